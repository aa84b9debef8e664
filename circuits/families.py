"""Where each model family keeps its parts. A new family is one more `Family`, never a branch elsewhere.

Paths are attribute paths: of the causal LM for the whole-model parts, of one block for the parts of a block.
"""

from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from circuits.errors import CircuitsError


@dataclass(frozen=True)
class Family:
    """The parts of one architecture.

    `query`, `key` and `value` may be one fused projection. With the layout "parts", `query_part = (i, n)` takes the
    i-th of n equal parts of its outputs; with "heads" the same within each head; with "sizes" queries, keys and values
    follow each other, each of its own size.

    `gain_offset` is added to the weight of every norm to give its gain. `attention_post_norm` and `mlp_post_norm` stand
    between a sublayer and the stream. `sinks` is a parameter of attention: the score, one a head, of a key that is
    always there and has no value, so that patterns do not sum to one. With `norms_before` false no norm stands before a
    sublayer: `attention_norm` and `mlp_norm` are then the names that `Passing` modules get there. With
    `head_norm_over_all` the norms of queries and keys go over all heads at once. `parallel` names the
    setting of the configuration that says whether attention and MLP of a block read the same stream.
    """

    model_type: str
    trunk: str
    embedding: str
    blocks: str
    final_norm: str
    attention_norm: str
    attention: str
    query: str
    key: str
    value: str
    attention_output: str
    mlp_norm: str
    mlp: str
    norm: Literal["layer", "rms"]
    position_embedding: str | None = None
    rotary: str | None = None
    query_part: tuple[int, int] = (0, 1)
    key_part: tuple[int, int] = (0, 1)
    value_part: tuple[int, int] = (0, 1)
    fused: Literal["parts", "heads", "sizes"] = "parts"
    query_norm: str | None = None
    key_norm: str | None = None
    attention_post_norm: str | None = None
    mlp_post_norm: str | None = None
    gain_offset: float = 0.0
    parallel: str | None = None
    sinks: str | None = None
    norms_before: bool = True
    head_norm_over_all: bool = False
    unembedding: str = "lm_head"

    @property
    def attention_out(self) -> str:
        """The module of a block whose output attention adds to the stream."""
        return self.attention_post_norm or self.attention

    @property
    def mlp_out(self) -> str:
        """The module of a block whose output the MLP adds to the stream."""
        return self.mlp_post_norm or self.mlp


GPT2 = Family(
    model_type="gpt2",
    trunk="transformer",
    embedding="transformer.wte",
    position_embedding="transformer.wpe",
    blocks="transformer.h",
    final_norm="transformer.ln_f",
    attention_norm="ln_1",
    attention="attn",
    query="attn.c_attn",
    key="attn.c_attn",
    value="attn.c_attn",
    query_part=(0, 3),
    key_part=(1, 3),
    value_part=(2, 3),
    attention_output="attn.c_proj",
    mlp_norm="ln_2",
    mlp="mlp",
    norm="layer",
)

LLAMA = Family(
    model_type="llama",
    trunk="model",
    embedding="model.embed_tokens",
    rotary="model.rotary_emb",
    blocks="model.layers",
    final_norm="model.norm",
    attention_norm="input_layernorm",
    attention="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    attention_output="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    mlp="mlp",
    norm="rms",
)

MISTRAL = replace(LLAMA, model_type="mistral")

QWEN2 = replace(LLAMA, model_type="qwen2")

QWEN3 = replace(LLAMA, model_type="qwen3", query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")

GEMMA2 = replace(
    LLAMA,
    model_type="gemma2",
    mlp_norm="pre_feedforward_layernorm",
    attention_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    gain_offset=1.0,
)

GEMMA = replace(LLAMA, model_type="gemma", gain_offset=1.0)

GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
)

PHI3 = replace(
    LLAMA,
    model_type="phi3",
    query="self_attn.qkv_proj",
    key="self_attn.qkv_proj",
    value="self_attn.qkv_proj",
    query_part=(0, 3),
    key_part=(1, 3),
    value_part=(2, 3),
    fused="sizes",
)

OLMO2 = replace(
    LLAMA,
    model_type="olmo2",
    attention_norm="attention_input",
    mlp_norm="mlp_input",
    norms_before=False,
    attention_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    head_norm_over_all=True,
)

GPT_OSS = replace(LLAMA, model_type="gpt_oss", sinks="self_attn.sinks")

GPT_NEOX = Family(
    model_type="gpt_neox",
    trunk="gpt_neox",
    embedding="gpt_neox.embed_in",
    rotary="gpt_neox.rotary_emb",
    blocks="gpt_neox.layers",
    final_norm="gpt_neox.final_layer_norm",
    attention_norm="input_layernorm",
    attention="attention",
    query="attention.query_key_value",
    key="attention.query_key_value",
    value="attention.query_key_value",
    query_part=(0, 3),
    key_part=(1, 3),
    value_part=(2, 3),
    fused="heads",
    attention_output="attention.dense",
    mlp_norm="post_attention_layernorm",
    mlp="mlp",
    norm="layer",
    parallel="use_parallel_residual",
)

FAMILIES = {
    family.model_type: family
    for family in (GPT2, GPT_NEOX, LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, OLMO2, PHI3, GPT_OSS)
}


# Models with vision, whose text model alone is read: what transformers calls it.
TEXT_MODELS = {"gemma3": "gemma3_text"}


def family_of(model_type: str, name: str) -> Family:
    """The description of a model type, or an error that lists the known ones."""
    model_type = TEXT_MODELS.get(model_type, model_type)
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise CircuitsError(f"{name}: unknown model family {model_type!r}; known families: {known}")
    return FAMILIES[model_type]


def part(root: nn.Module, path: str) -> nn.Module:
    """The submodule at an attribute path."""
    return cast(nn.Module, attrgetter(path)(root))


class Passing(nn.Module):
    """Gives on what it gets. It stands before a sublayer in families without a norm there, as one of gain one whose
    denominator is one, so that every family has a place where a sublayer reads."""

    eps = 0.0

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones_like(like), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        """A forward pre-hook of the sublayer that calls this module on what the sublayer reads."""
        if args:
            return (self(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self(kwargs["hidden_states"])}


def place_passing(family: Family, block: nn.Module) -> None:
    """Give a block without norms before its sublayers the modules that stand for them, once."""
    for name, sublayer in ((family.attention_norm, family.attention), (family.mlp_norm, family.mlp)):
        if not hasattr(block, name):
            passing = Passing(cast(Tensor, part(block, family.mlp_out).weight))
            block.add_module(name, passing)
            part(block, sublayer).register_forward_pre_hook(passing.before, with_kwargs=True)


def linear_parameters(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias (out,) of a linear layer, GPT-2's transposed `Conv1D` included."""
    weight = cast(Tensor, module.weight)
    if type(module).__name__ == "Conv1D":
        weight = weight.T
    return weight, cast("Tensor | None", getattr(module, "bias", None))


def norm_epsilon(module: nn.Module) -> float:
    """The constant under the root of a norm's denominator, whatever the class calls it."""
    found: Any = getattr(module, "variance_epsilon", None)
    return float(found if found is not None else cast(Any, module).eps)
