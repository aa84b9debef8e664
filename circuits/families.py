"""Where each model family keeps its parts. A new family is one more `Family`, never a branch elsewhere.

Paths are attribute paths: of the causal LM for the whole-model parts, of one block for the parts of a block.
"""

from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal, cast

from torch import Tensor, nn

from circuits.errors import CircuitsError


@dataclass(frozen=True)
class Family:
    """The parts of one architecture.

    `value` may be a fused projection: `value_part = (i, n)` takes the i-th of n equal parts of its outputs.
    """

    model_type: str
    trunk: str
    embedding: str
    blocks: str
    final_norm: str
    attention_norm: str
    attention: str
    value: str
    attention_output: str
    mlp_norm: str
    mlp: str
    norm: Literal["layer", "rms"]
    position_embedding: str | None = None
    value_part: tuple[int, int] = (0, 1)
    unembedding: str = "lm_head"


GPT2 = Family(
    model_type="gpt2",
    trunk="transformer",
    embedding="transformer.wte",
    position_embedding="transformer.wpe",
    blocks="transformer.h",
    final_norm="transformer.ln_f",
    attention_norm="ln_1",
    attention="attn",
    value="attn.c_attn",
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
    blocks="model.layers",
    final_norm="model.norm",
    attention_norm="input_layernorm",
    attention="self_attn",
    value="self_attn.v_proj",
    attention_output="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    mlp="mlp",
    norm="rms",
)

FAMILIES = {family.model_type: family for family in (GPT2, LLAMA)}


def family_of(model_type: str, name: str) -> Family:
    """The description of a model type, or an error that lists the known ones."""
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise CircuitsError(f"{name}: unknown model family {model_type!r}; known families: {known}")
    return FAMILIES[model_type]


def part(root: nn.Module, path: str) -> nn.Module:
    """The submodule at an attribute path."""
    return cast(nn.Module, attrgetter(path)(root))


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
