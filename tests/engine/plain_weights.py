"""The weights of a Hugging Face model under one name for each part, in float64, for the plain reference."""

from typing import Any

import torch
from torch import Tensor, nn


class Weights:
    """A Hugging Face GPT-2 or Llama in float64, one name for each part."""

    def __init__(self, lm: nn.Module) -> None:
        config: Any = lm.config
        self.is_gpt2 = config.model_type == "gpt2"
        self.w = {name: tensor.detach().double() for name, tensor in lm.state_dict().items()}
        self.n_layers, self.n_heads = config.num_hidden_layers, config.num_attention_heads
        self.n_kv = self.n_heads if self.is_gpt2 else config.num_key_value_heads
        self.width = config.hidden_size // self.n_heads if self.is_gpt2 else config.head_dim
        self.epsilon = config.layer_norm_epsilon if self.is_gpt2 else config.rms_norm_eps
        self.theta = None if self.is_gpt2 else config.rope_parameters["rope_theta"]
        self.embedding = self.w["transformer.wte.weight" if self.is_gpt2 else "model.embed_tokens.weight"]
        self.unembedding = self.w["lm_head.weight"]

    def norm_weights(self, which: str, layer: int) -> tuple[Tensor, Tensor | float]:
        if self.is_gpt2:
            name = {"attention": f"h.{layer}.ln_1", "mlp": f"h.{layer}.ln_2", "final": "ln_f"}[which]
            return self.w[f"transformer.{name}.weight"], self.w[f"transformer.{name}.bias"]
        inside = f"layers.{layer}."
        names = {"attention": inside + "input_layernorm", "mlp": inside + "post_attention_layernorm", "final": "norm"}
        return self.w[f"model.{names[which]}.weight"], 0.0

    def projection(self, layer: int, letter: str) -> tuple[Tensor, Tensor]:
        """Weight (out, in) and bias of the q, k, v or o projection."""
        if self.is_gpt2 and letter == "o":
            prefix = f"transformer.h.{layer}.attn.c_proj"
            return self.w[f"{prefix}.weight"].T, self.w[f"{prefix}.bias"]
        if self.is_gpt2:
            fused, bias = (self.w[f"transformer.h.{layer}.attn.c_attn.{part}"] for part in ("weight", "bias"))
            d = fused.shape[0]
            columns = slice("qkv".index(letter) * d, ("qkv".index(letter) + 1) * d)
            return fused.T[columns], bias[columns]
        prefix = f"model.layers.{layer}.self_attn.{letter}_proj"
        weight = self.w[f"{prefix}.weight"]
        return weight, self.w.get(f"{prefix}.bias", torch.zeros(len(weight)).double())

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        if self.is_gpt2:
            up, up_bias, down, down_bias = (
                self.w[f"transformer.h.{layer}.mlp.{name}"]
                for name in ("c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias")
            )
            return nn.functional.gelu(x @ up + up_bias, approximate="tanh") @ down + down_bias
        gate, up, down = (
            self.w[f"model.layers.{layer}.mlp.{name}.weight"] for name in ("gate_proj", "up_proj", "down_proj")
        )
        return (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
