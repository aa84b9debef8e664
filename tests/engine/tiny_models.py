"""Random models of three layers and eleven words with random replacements in memory: what the engine is tried on.

Every parameter is drawn at random, gains and biases too, so that nothing is right by being zero or one.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tiny_replacements import Maker, Sizes
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from circuits.graph import Graph
from circuits.kernels.encode import ActivationKind
from circuits.linearize import check_replacements
from circuits.loading import Model
from circuits.model import BaseModel
from circuits.replacements import Dictionary, Replacement
from circuits.replacements.sites import Norm

FamilyName = Literal[
    "gpt2", "llama", "qwen3", "gemma2", "neox", "neox_sequential",
    "llama3", "mistral", "qwen2", "gemma", "gemma3", "olmo2", "phi3", "gpt_oss",
]  # fmt: skip
N_LAYERS, D_MODEL, N_HEADS, VOCABULARY, BOS = 3, 16, 4, 11, 0
PROMPT = (BOS, 3, 7, 1, 3, 10)


@dataclass(frozen=True)
class Case:
    """One model with its replacements.

    mlp
        `clt`, `transcoder`, `skip` (a transcoder with a skip connection) or `type1` (of the weakly causal set), in
        `mlp_layers`; a CLT is in all layers.
    attention
        Layer -> the site that its SAE reads and writes, `attn_out` or `z`; layers without a replacement stay frozen.
    moved
        Further dictionaries by name and layer, as `tiny_replacements.MOVED_KINDS` has them.
    together
        Whether all are one replacement: those of two may not write to the same site.
    special
        Whether the prompt's first token is special.
    before_post_norm
        Whether the dictionaries were trained on the sublayers' own outputs, before a post-norm.
    """

    family: FamilyName
    mlp: Literal["clt", "transcoder", "skip", "type1"] = "clt"
    mlp_layers: tuple[int, ...] = (0, 1, 2)
    attention: dict[int, str] = field(default_factory=dict)
    moved: tuple[str, ...] = ()
    together: bool = False
    activation: ActivationKind = "relu"
    norm: Norm = "full"
    special: bool = True
    before_post_norm: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def token_ids(self) -> tuple[int, ...]:
        return PROMPT if self.special else PROMPT[1:]

    def layers_of(self, *kinds: str) -> set[int]:
        """Layers that have a dictionary of these kinds of `moved`."""
        found = (name.split(".") for name in self.moved)
        return {int(layer) for kind, layer in found if kind.startswith(kinds)}

    @property
    def cut_layers(self) -> set[int]:
        """Layers whose whole block is replaced."""
        return self.layers_of("residual")

    @property
    def value_layers(self) -> set[int]:
        """Layers whose values are replaced."""
        return self.layers_of("value")

    @property
    def frozen_layers(self) -> set[int]:
        """Layers whose attention passes everything on."""
        written = set(self.attention) | self.layers_of("type2", "mtc", "lorsa", "own", "value", "residual")
        spread = self.layers_of("mctc") | {layer + 1 for layer in self.mlp_layers if self.mlp == "type1"}
        return {layer for layer in range(N_LAYERS) if layer not in written and layer < min(spread, default=N_LAYERS)}


ATTN_OUT = {0: "attn_out", 1: "attn_out", 2: "attn_out"}
Z = {0: "z", 1: "z", 2: "z"}
STAYING = {
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


ALL = (0, 1, 2)


def everywhere(kind: str) -> tuple[str, ...]:
    """A kind of `moved` in all layers."""
    return tuple(f"{kind}.{layer}" for layer in ALL)


MOVING = {
    "gpt2_weakly_causal": Case("gpt2", mlp="type1", moved=everywhere("type2"), together=True, seed=30),
    "llama_weakly_causal_mlp": Case(
        "llama", mlp="type1", moved=everywhere("type2-mlp"), together=True, special=False, seed=31
    ),
    "llama_type1_alone": Case("llama", mlp="type1", mlp_layers=(0, 1), activation="jump_relu", seed=32),
    "gpt2_mtc": Case("gpt2", moved=everywhere("mtc"), seed=33),
    "llama_mtc_top4": Case("llama", moved=everywhere("mtc-top4"), activation="jump_relu", special=False, seed=34),
    "llama_mtc_top4_special": Case("llama", moved=("mtc-top4.0", "mtc-top4.2"), seed=35),
    "gpt2_mtc_single_skip": Case("gpt2", mlp="skip", moved=("mtc-single.0", "mtc.2"), special=False, seed=36),
    "gpt2_mctc": Case("gpt2", mlp_layers=(), moved=everywhere("mctc-mlp"), special=False, seed=37),
    "llama_mctc_clt": Case("llama", moved=everywhere("mctc"), seed=38),
    "llama_mctc_upper": Case("llama", mlp="transcoder", moved=("mctc.1", "type2.2"), activation="topk", seed=39),
    "gpt2_residual_middle": Case("gpt2", attention={0: "attn_out", 2: "z"}, moved=("residual.1",), seed=40),
    "llama_residual_all": Case("llama", mlp_layers=(), moved=everywhere("residual"), special=False, seed=41),
    "llama_residual_weakly_causal": Case(
        "llama", mlp="type1", moved=(*everywhere("type2-mlp"), "residual-rank2.1"), together=True, seed=42
    ),
    "gpt2_residual_mctc": Case(
        "gpt2", moved=("mctc-mlp.0", "residual.1", "mctc.2"), together=True, special=False, seed=43
    ),
    "llama_residual_over_frozen": Case("llama", mlp="skip", moved=("residual.2",), special=False, seed=44),
    "gpt2_mtc_ranks": Case("gpt2", moved=("mtc-rank2.0", "mtc-rank3-top4.1", "mtc.2", "mtc-second.2"), seed=45),
    "llama_mtc_ranks": Case("llama", moved=("mtc-rank3-top4.0", "mtc-rank2.2"), special=False, seed=46),
    "gpt2_value": Case("gpt2", moved=everywhere("value"), seed=47),
    "llama_value": Case("llama", moved=everywhere("value"), activation="topk", special=False, seed=48),
    "llama_value_over_frozen": Case("llama", mlp="skip", moved=("value.1",), attention={2: "z"}, seed=49),
    "llama_lorsa": Case("llama", moved=everywhere("lorsa-rotary"), seed=50),
    "llama_lorsa_published": Case("llama", moved=everywhere("lorsa-published"), seed=80),
    "gpt2_lorsa_published": Case("gpt2", mlp_layers=(), moved=("lorsa-published.1", "own.2"), special=False, seed=81),
    "gpt2_own": Case("gpt2", moved=("lorsa.0", "own.1", "own-rank2.2"), special=False, seed=51),
    "gpt2_own_over_frozen": Case("gpt2", mlp="transcoder", moved=("own-rank2.1", "lorsa.2"), seed=52),
    "gpt2_mixed": Case("gpt2", moved=("value.0", "mtc.1"), attention={2: "attn_out"}, special=False, seed=53),
    "llama_mixed": Case("llama", mlp="skip", moved=("value.0", "mtc-rank2.1", "type2.2"), seed=54),
    "llama_mixed_frozen": Case("llama", mlp="transcoder", moved=("lorsa.0", "mtc.2"), special=False, seed=55),
}  # fmt: skip
FAMILIES = {
    "qwen3_clt_attn_out": Case("qwen3", attention=ATTN_OUT, seed=60),
    "qwen3_frozen": Case("qwen3", mlp="transcoder", special=False, seed=61),
    "neox_parallel_frozen": Case("neox", seed=62),
    "neox_parallel_skip_z": Case("neox", mlp="skip", attention={0: "z", 2: "z"}, special=False, seed=63),
    "neox_parallel_skip_all_z": Case("neox", mlp="skip", mlp_layers=(0, 2), attention=Z, norm="scale", seed=64),
    "neox_parallel_attn_out": Case("neox", mlp="transcoder", attention=ATTN_OUT, activation="topk", seed=65),
    "neox_sequential": Case("neox_sequential", mlp="skip", attention={2: "attn_out"}, special=False, seed=66),
    "gemma2_frozen": Case("gemma2", seed=67),
    "gemma2_clt_attn_out": Case("gemma2", attention=ATTN_OUT, activation="jump_relu", special=False, seed=68),
    "gemma2_z_skip": Case("gemma2", mlp="skip", attention={0: "z", 2: "z"}, seed=69),
    "gemma2_before_post_norm": Case("gemma2", attention={0: "z", 1: "attn_out"}, before_post_norm=True, seed=70),
}
MOVING_FAMILIES = {
    "qwen3_mtc": Case("qwen3", moved=("mtc.0", "mtc-rank2.2"), special=False, seed=71),
    "neox_parallel_mtc": Case("neox", moved=everywhere("mtc"), seed=72),
    "neox_parallel_value": Case("neox", mlp="skip", moved=("value.0", "value.2"), special=False, seed=73),
    "neox_parallel_residual": Case("neox", mlp="skip", moved=("residual.0", "lorsa-rotary.2"), seed=74),
    "neox_parallel_weakly_causal": Case(
        "neox", mlp="type1", moved=everywhere("type2-mlp"), together=True, special=False, seed=75
    ),
    "gemma2_mtc": Case("gemma2", mlp="transcoder", moved=("mtc.0", "mtc-top4.1"), special=False, seed=76),
    "gemma2_value": Case("gemma2", mlp="skip", moved=("value.0", "value.2"), before_post_norm=True, seed=77),
    "gemma2_residual_before": Case(
        "gemma2", moved=("mctc-mlp.0", "residual.1", "mctc.2"), together=True, before_post_norm=True, seed=78
    ),
    "gemma2_weakly_causal_before": Case(
        "gemma2", mlp="type1", moved=everywhere("type2"), together=True, before_post_norm=True, special=False, seed=79
    ),
}  # fmt: skip
MOVING |= MOVING_FAMILIES
CASES = STAYING | FAMILIES | MOVING


def build(case: Case) -> Model:
    """The model of a case with its replacements, in memory."""
    generator = torch.Generator().manual_seed(case.seed)
    lm = random_lm(case.family, generator).to(case.dtype)
    base = BaseModel(lm, None, f"tiny-{case.family}")
    maker = Maker(sizes_of(lm), generator, case.activation, case.norm)
    replacements = []
    if case.mlp_layers:
        replacements.append(in_memory("mlp", [maker.mlp(layer, case.mlp) for layer in case.mlp_layers]))
    if case.attention:
        saes = [maker.attention(layer, site) for layer, site in case.attention.items()]
        replacements.append(in_memory("attention", saes))
    if case.moved:
        replacements.append(in_memory("moved", [maker.of(name) for name in case.moved]))
    if case.before_post_norm:
        for r in replacements:
            r.dictionaries = tuple(replace(d, before_post_norm=True) for d in r.dictionaries)
    if case.together:
        replacements = [in_memory("all", [d for replacement in replacements for d in replacement.dictionaries])]
    check_replacements(base, replacements)
    return Model(base, tuple(replacements))


def sizes_of(lm: Any) -> Sizes:
    """The widths of a tiny model's sites."""
    config = lm.config
    n_kv = getattr(config, "num_key_value_heads", N_HEADS)
    return Sizes(N_LAYERS, D_MODEL, N_HEADS, n_kv, getattr(config, "head_dim", None) or D_MODEL // N_HEADS)


def random_lm(family: str, generator: torch.Generator) -> nn.Module:
    """A Hugging Face model, eager attention; grouped queries and heads wider than width / heads where there can be."""
    common = {
        "vocab_size": VOCABULARY, "num_hidden_layers": N_LAYERS, "num_attention_heads": N_HEADS,
        "hidden_size": D_MODEL, "max_position_embeddings": 16, "bos_token_id": BOS, "eos_token_id": BOS,
        "attn_implementation": "eager",
    }  # fmt: skip
    grouped = {"intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 6, "attention_bias": True}
    lm: nn.Module
    if family == "gpt2":
        lm = GPT2LMHeadModel(GPT2Config(**common))
    elif family == "llama":
        lm = LlamaForCausalLM(LlamaConfig(**common, **grouped))
    elif family == "qwen3":
        lm = Qwen3ForCausalLM(Qwen3Config(**common, **grouped))
    elif family == "gemma2":
        caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
        lm = Gemma2ForCausalLM(
            Gemma2Config(**common, **grouped, **caps, sliding_window=3, query_pre_attn_scalar=5, pad_token_id=BOS)
        )
    elif family == "llama3":
        stretched = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                     "high_freq_factor": 4.0, "original_max_position_embeddings": 8}  # fmt: skip
        lm = LlamaForCausalLM(LlamaConfig(**common, **grouped, rope_parameters=stretched, tie_word_embeddings=True))
    elif family == "mistral":
        lm = MistralForCausalLM(MistralConfig(**common, **grouped, sliding_window=3))
    elif family == "qwen2":
        kinds = ["full_attention", "sliding_attention", "full_attention"]
        lm = Qwen2ForCausalLM(
            Qwen2Config(**common, **grouped, use_sliding_window=True, sliding_window=3, layer_types=kinds)
        )
    elif family == "gemma":
        lm = GemmaForCausalLM(GemmaConfig(**common, **grouped, pad_token_id=BOS))
    elif family == "gemma3":
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        turns = {"full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
                 "sliding_attention": {"rope_type": "default", "rope_theta": 10.0}}  # fmt: skip
        lm = Gemma3ForCausalLM(
            Gemma3TextConfig(**common, **grouped, sliding_window=3, layer_types=kinds, rope_parameters=turns,
                             query_pre_attn_scalar=5, pad_token_id=BOS)
        )  # fmt: skip
    elif family == "olmo2":
        lm = Olmo2ForCausalLM(Olmo2Config(**common, **grouped, pad_token_id=BOS))
    elif family == "phi3":
        lm = Phi3ForCausalLM(Phi3Config(**common, intermediate_size=24, num_key_value_heads=2,
                                        sliding_window=3, pad_token_id=BOS))  # fmt: skip
    elif family == "gpt_oss":
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        lm = GptOssForCausalLM(
            GptOssConfig(**common, **grouped, sliding_window=3, layer_types=kinds, num_local_experts=3,
                         num_experts_per_tok=2, pad_token_id=BOS,
                         rope_parameters={"rope_type": "default", "rope_theta": 1000.0})
        )  # fmt: skip
    else:
        rotary = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
        parallel = family == "neox"
        lm = GPTNeoXForCausalLM(
            GPTNeoXConfig(**common, intermediate_size=24, rope_parameters=rotary, use_parallel_residual=parallel)
        )
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            is_gain = parameter.ndim == 1 and not name.endswith(("bias", "sinks"))
            spread = 0.5 if parameter.ndim == 1 or "embed" in name or "wte" in name or "wpe" in name else 0.35
            one = 0.0 if family.startswith("gemma") else 1.0  # Gemma keeps its gains less one
            parameter.copy_(one + 0.3 * drawn if is_gain else spread * drawn)
    return lm


def in_memory(name: str, dictionaries: list[Dictionary]) -> Replacement:
    """A replacement that lies in no directory."""
    return Replacement(name, Path("memory") / name, "memory", tuple(dictionaries))


Key = tuple[str, int, int, int]


def keys(graph: Graph) -> list[Key]:
    """(kind, layer, position, feature) of every node: its identity in these cases."""
    nodes = graph.nodes
    columns = (nodes.kind, nodes.layer, nodes.position, nodes.feature)
    return list(zip(*(column.tolist() for column in columns), strict=True))
