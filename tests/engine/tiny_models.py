"""Random models of three layers and eleven words with random replacements in memory: what the engine is tried on.

Every parameter is drawn at random, gains and biases too, so that nothing is right by being zero or one.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from circuits.graph import Graph
from circuits.kernels.encode import Activation, ActivationKind
from circuits.linearize import check_replacements
from circuits.loading import Model
from circuits.model import BaseModel
from circuits.replacements import Decoder, Dictionary, ReadSite, Replacement, Site
from circuits.replacements.sites import Norm
from circuits.replacements.weights import HeldTensor

N_LAYERS, D_MODEL, N_HEADS, VOCABULARY, BOS = 3, 16, 4, 11, 0
PROMPT = (BOS, 3, 7, 1, 3, 10)


@dataclass(frozen=True)
class Case:
    """One model with its replacements.

    mlp
        `clt`, `transcoder` or `skip` (a transcoder with a skip connection), in `mlp_layers`; a CLT is in all layers.
    attention
        Layer -> the site that its SAE reads and writes, `attn_out` or `z`; the other layers stay frozen.
    special
        Whether the prompt's first token is special.
    """

    family: Literal["gpt2", "llama"]
    mlp: Literal["clt", "transcoder", "skip"] = "clt"
    mlp_layers: tuple[int, ...] = (0, 1, 2)
    attention: dict[int, str] = field(default_factory=dict)
    activation: ActivationKind = "relu"
    norm: Norm = "full"
    special: bool = True
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def token_ids(self) -> tuple[int, ...]:
        return PROMPT if self.special else PROMPT[1:]


ATTN_OUT = {0: "attn_out", 1: "attn_out", 2: "attn_out"}
Z = {0: "z", 1: "z", 2: "z"}
CASES = {
    "gpt2_clt_attn_out": Case("gpt2", attention=ATTN_OUT),
    "gpt2_clt_z_not_special": Case("gpt2", attention=Z, special=False, activation="jump_relu", seed=1),
    "gpt2_clt_frozen": Case("gpt2", norm="scale", activation="topk", seed=2),
    "gpt2_skip_top_z": Case("gpt2", mlp="skip", mlp_layers=(0, 2), attention={2: "z"}, special=False, seed=3),
    "gpt2_transcoder_mixed": Case("gpt2", mlp="transcoder", attention={0: "z", 2: "attn_out"}, norm="none", seed=4),
    "llama_clt_z": Case("llama", attention=Z, seed=5),
    "llama_clt_attn_out_not_special": Case("llama", attention=ATTN_OUT, special=False, activation="topk", seed=6),
    "llama_clt_middle_frozen": Case("llama", attention={0: "attn_out", 2: "z"}, activation="batch_topk", seed=7),
    "llama_skip_top_attn_out": Case("llama", mlp="skip", mlp_layers=(1, 2), attention={2: "attn_out"}, seed=8),
    "llama_skip_scale_z": Case("llama", mlp="skip", attention={1: "z", 2: "z"}, norm="scale", special=False, seed=9),
    "llama_no_mlp": Case("llama", mlp_layers=(), mlp="transcoder", attention={1: "attn_out", 2: "attn_out"}, seed=10),
}


def build(case: Case) -> Model:
    """The model of a case with its replacements, in memory."""
    generator = torch.Generator().manual_seed(case.seed)
    lm = random_lm(case.family, generator).to(case.dtype)
    base = BaseModel(lm, None, f"tiny-{case.family}")
    maker = Maker(case, generator, d_z=base.shape.n_heads * base.shape.d_head)
    replacements = []
    if case.mlp_layers:
        replacements.append(in_memory("mlp", [maker.mlp(layer) for layer in case.mlp_layers]))
    if case.attention:
        saes = [maker.attention(layer, site) for layer, site in case.attention.items()]
        replacements.append(in_memory("attention", saes))
    check_replacements(base, replacements)
    return Model(base, tuple(replacements))


def random_lm(family: str, generator: torch.Generator) -> nn.Module:
    """A Hugging Face model, eager attention; Llama with grouped queries and heads wider than width / heads."""
    lm: nn.Module
    if family == "gpt2":
        config: Any = GPT2Config(
            vocab_size=VOCABULARY, n_positions=16, n_embd=D_MODEL, n_layer=N_LAYERS, n_head=N_HEADS,
            bos_token_id=BOS, eos_token_id=BOS, attn_implementation="eager",
        )  # fmt: skip
        lm = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            vocab_size=VOCABULARY, max_position_embeddings=16, hidden_size=D_MODEL, intermediate_size=24,
            num_hidden_layers=N_LAYERS, num_attention_heads=N_HEADS, num_key_value_heads=2, head_dim=6,
            attention_bias=True, bos_token_id=BOS, eos_token_id=BOS, attn_implementation="eager",
        )  # fmt: skip
        lm = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            is_gain = parameter.ndim == 1 and not name.endswith("bias")
            spread = 0.5 if parameter.ndim == 1 or "embed" in name or "wte" in name or "wpe" in name else 0.35
            parameter.copy_(1 + 0.3 * drawn if is_gain else spread * drawn)
    return lm


@dataclass(frozen=True)
class Maker:
    """Draws dictionaries for a case."""

    case: Case
    generator: torch.Generator
    d_z: int
    n_features: int = 12

    def mlp(self, layer: int) -> Dictionary:
        """A CLT layer or a transcoder."""
        last = N_LAYERS if self.case.mlp == "clt" else layer + 1
        writes = tuple(Site("mlp_out", later) for later in range(layer, last))
        skip = self._draw(D_MODEL, D_MODEL, scale=0.3) if self.case.mlp == "skip" else None
        kind = "clt" if self.case.mlp == "clt" else "transcoder"
        return self._dictionary(f"{kind}.{layer}", ReadSite(Site("resid_mid", layer), self.case.norm), writes, skip)

    def attention(self, layer: int, site: str) -> Dictionary:
        """An attention output SAE."""
        place = Site(site, layer)
        return self._dictionary(f"attention-sae.{layer}", ReadSite(place, "none"), (place,), None)

    def _dictionary(self, name: str, read: ReadSite, writes: tuple[Site, ...], skip: Tensor | None) -> Dictionary:
        width = self.d_z if read.site.name == "z" else D_MODEL
        n = self.n_features
        kind = self.case.activation
        threshold = 0.2 + 0.2 * torch.rand(n, generator=self.generator) if kind in ("jump_relu", "batch_topk") else None
        return Dictionary(
            name=name,
            kind=name.split(".")[0],
            read=read,
            writes=writes,
            activation=Activation(kind, k=5 if "topk" in kind else None),
            W_enc=self._draw(n, width, scale=width**-0.5),
            b_enc=self._draw(n, scale=0.3),
            decoders={site: Decoder(HeldTensor(f"{name}>{site}", self._draw(n, width, scale=0.4))) for site in writes},
            output_biases={site: self._draw(width, scale=0.3) for site in writes},
            threshold=threshold,
            skip=skip,
        )

    def _draw(self, *shape: int, scale: float) -> Tensor:
        return scale * torch.randn(*shape, generator=self.generator)


def in_memory(name: str, dictionaries: list[Dictionary]) -> Replacement:
    """A replacement that lies in no directory."""
    return Replacement(name, Path("memory") / name, "memory", tuple(dictionaries))


Key = tuple[str, int, int, int]


def keys(graph: Graph) -> list[Key]:
    """(kind, layer, position, feature) of every node: its identity in these cases."""
    nodes = graph.nodes
    columns = (nodes.kind, nodes.layer, nodes.position, nodes.feature)
    return list(zip(*(column.tolist() for column in columns), strict=True))
