"""What cross-layer formats are tested with: outputs of all layers by the interface of `Dictionary`, and tiny models."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from circuits.replacements import Replacement


def outcome(replacement: Replacement, xs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Activations (T, F) of every dictionary and outputs (T, D) of every layer written, from what each reads."""
    activations: list[Tensor] = []
    outputs: dict[int, Tensor] = {}
    for dictionary, x in zip(replacement.dictionaries, xs, strict=True):
        active = dictionary.encode(x)
        dense = torch.zeros(len(x), dictionary.n_features)
        dense[active.positions, active.features] = active.activations
        activations.append(dense)
        for site in dictionary.writes:
            y = dense @ dictionary.decoder_rows(torch.arange(dictionary.n_features), site)
            if (bias := dictionary.output_bias(site)) is not None:
                y = y + bias
            if dictionary.skip is not None and site == dictionary.writes[0]:
                y = y + x @ dictionary.skip.T
            outputs[site.layer] = outputs.get(site.layer, torch.zeros(())) + y
    return activations, [outputs[layer] for layer in sorted(outputs)]


def tiny_model(folder: Path, family: str, n_layers: int, width: int) -> Path:
    """A random GPT-2 or Llama, saved; biases and gains are random too."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": width, "num_hidden_layers": n_layers, "num_attention_heads": 3}
    if family == "gpt2":
        lm: torch.nn.Module = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=16, bos_token_id=0, eos_token_id=0))
    else:
        lm = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=3, intermediate_size=24, pad_token_id=0))
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    lm.save_pretrained(folder)
    return folder
