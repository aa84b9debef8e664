"""The base model: a Hugging Face causal LM of a known family, its tokenizer, and its weights as plain tensors."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from circuits.families import (
    Family,
    Passing,
    family_of,
    linear_parameters,
    norm_epsilon,
    part,
    place_passing,
)
from circuits.placing import device_of
from circuits.score_weights import Rotary, ScoreWeights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: layers, model width, query heads, key-value heads, head width, vocabulary, context."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    vocabulary: int
    context: int


@dataclass(frozen=True)
class AttentionWeights:
    """One layer's value and output weights, float32: `w_v` (K, E, D), `b_v` (K, E), `w_o` (H, E, D), `b_o` (D,).

    `norm` is gain (D,) of the norm that the values are read through and whether it is centred, `post` that of a norm
    behind the output, where a family has one.
    """

    w_v: Tensor
    b_v: Tensor | None
    w_o: Tensor
    b_o: Tensor | None
    norm: tuple[Tensor, bool]
    post: tuple[Tensor, bool] | None = None

    def to(self, device: torch.device) -> "AttentionWeights":
        """The same on a device."""
        if self.w_o.device == device:
            return self
        (gain, centred), post = self.norm, self.post
        return AttentionWeights(
            w_v=self.w_v.to(device),
            b_v=None if self.b_v is None else self.b_v.to(device),
            w_o=self.w_o.to(device),
            b_o=None if self.b_o is None else self.b_o.to(device),
            norm=(gain.to(device), centred),
            post=None if post is None else (post[0].to(device), post[1]),
        )

    @cached_property
    def folded(self) -> tuple[Tensor, Tensor]:
        """`w_o` behind the norm after it, `w_v` behind the one before it; their scales, one a position, left out."""
        w_o, w_v, (gain, centred) = self.w_o, self.w_v, self.norm
        w_v = w_v * gain
        if centred:
            w_v = w_v - w_v.mean(-1, keepdim=True)
        if self.post is not None:
            gain, centred = self.post
            w_o = (w_o - w_o.mean(-1, keepdim=True) if centred else w_o) * gain
        return w_o, w_v


class BaseModel:
    """A causal LM whose forward pass can be recorded and linearized.

    Attributes
    ----------
    lm : the Hugging Face module, eager attention, evaluation mode
    tokenizer : its tokenizer, or None when the folder has none
    files : the weight files that it came from; empty for a model made in memory
    family, shape, name : what their types say
    device : home, where tokens are embedded, and where all tensors are that it gives, but for those of `lm` itself and
        `attention_weights`
    layer_devices : where each layer lies; see `circuits.placing`
    """

    def __init__(self, lm: nn.Module, tokenizer: Any, name: str, files: Sequence[Path] = ()) -> None:
        self.lm = lm.eval().requires_grad_(False)
        self.files = tuple(files)
        self.tokenizer = tokenizer
        self.name = name
        config: Any = lm.config
        self.family: Family = family_of(config.model_type, name)
        d_model, n_heads = int(config.hidden_size), int(config.num_attention_heads)
        self.shape = Shape(
            n_layers=int(config.num_hidden_layers),
            d_model=d_model,
            n_heads=n_heads,
            n_kv_heads=int(getattr(config, "num_key_value_heads", None) or n_heads),
            d_head=int(getattr(config, "head_dim", None) or d_model // n_heads),
            vocabulary=int(config.vocab_size),
            context=int(config.max_position_embeddings),
        )
        self.device = cast(Tensor, part(lm, self.family.embedding).weight).device
        self.layer_devices = tuple(device_of(block, layer) for layer, block in enumerate(self.blocks))
        if not self.family.norms_before:
            for block in self.blocks:
                place_passing(self.family, block)
        self._rotary: dict[str | None, Rotary] = {}
        self._attention_weights: dict[int, AttentionWeights] = {}

    @property
    def devices(self) -> frozenset[torch.device]:
        """Every device that something of the model's is kept on, home included."""
        return frozenset({self.device, *self.layer_devices})

    @property
    def blocks(self) -> list[nn.Module]:
        return list(cast(nn.ModuleList, part(self.lm, self.family.blocks)))

    @cached_property
    def embedding(self) -> Tensor:
        """Token embedding (V, D), in the dtype that it is stored in."""
        return cast(Tensor, part(self.lm, self.family.embedding).weight)

    @cached_property
    def unembedding(self) -> Tensor:
        """Unembedding (V, D), in the dtype that it is stored in."""
        return linear_parameters(part(self.lm, self.family.unembedding))[0]

    @cached_property
    def unembedding_mean(self) -> Tensor:
        """Mean of the unembedding rows over the vocabulary, (D,) float32: it is taken off every logit's reader."""
        return self.unembedding.float().mean(0).to(self.device)

    def unembedding_rows(self, token_ids: Tensor | Sequence[int]) -> Tensor:
        """The unembedding of some tokens, (n, D) float32."""
        ids = torch.as_tensor(token_ids, device=self.unembedding.device)
        return self.unembedding[ids].to(self.device, torch.float32)

    def unembed(self, final: Tensor) -> Tensor:
        """Logits (..., V) of what is behind the final norm, (..., D); without a final soft cap."""
        return (final.to(self.unembedding.device) @ self.unembedding.float().T).to(self.device)

    def position_embedding(self, n: int) -> Tensor | None:
        """Learned position embeddings of the first n positions, (n, D) float32, where the family has them."""
        if self.family.position_embedding is None:
            return None
        return cast(Tensor, part(self.lm, self.family.position_embedding).weight)[:n].to(self.device, torch.float32)

    @property
    def rotary_theta(self) -> float | None:
        """Base of the rotary position embedding; None for a model without one."""
        config: Any = self.lm.config
        rotary = getattr(config, "rope_parameters", None)
        if rotary is None:
            return None
        found = rotary.get("rope_theta") or rotary["full_attention"]["rope_theta"]  # one a layer type in Gemma 3
        return float(found)

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP of a block read the same stream."""
        return self.family.parallel is not None and bool(getattr(self.lm.config, self.family.parallel))

    @property
    def final_soft_cap(self) -> float | None:
        """The logits are `cap tanh(logit / cap)`; None without a cap."""
        cap = getattr(self.lm.config, "final_logit_softcapping", None)
        return None if cap is None else float(cap)

    @property
    def attention_soft_cap(self) -> float | None:
        """Attention scores are `cap tanh(score / cap)`; None without a cap."""
        cap = getattr(self.lm.config, "attn_logit_softcapping", None)
        return None if cap is None else float(cap)

    def attention_weights(self, layer: int) -> AttentionWeights:
        """Value and output weights of one layer, split by head, where the layer lies; kept if stored in float32."""
        if layer in self._attention_weights:
            return self._attention_weights[layer]
        shape, family, block = self.shape, self.family, self.blocks[layer]
        w_v, b_v = self._projection(layer, family.value, family.value_part, shape.n_kv_heads)
        stored, b_o = linear_parameters(part(block, family.attention_output))

        def gain(path: str) -> tuple[Tensor, bool]:
            return self.norm_parameters(part(block, path))[0].to(w_v.device), family.norm == "layer"

        weights = AttentionWeights(
            w_v=w_v,
            b_v=b_v,
            w_o=stored.T.float().reshape(shape.n_heads, shape.d_head, shape.d_model),
            b_o=None if b_o is None else b_o.float(),
            norm=gain(family.attention_norm),
            post=None if family.attention_post_norm is None else gain(family.attention_post_norm),
        )
        if stored.dtype == torch.float32:
            self._attention_weights[layer] = weights
        return weights

    def score_weights(self, layer: int) -> ScoreWeights:
        """Query and key weights of one layer, split by head, and what stands between them and the score."""
        shape, family = self.shape, self.family
        attention: Any = part(self.blocks[layer], family.attention)
        w_q, b_q = self._projection(layer, family.query, family.query_part, shape.n_heads)
        w_k, b_k = self._projection(layer, family.key, family.key_part, shape.n_kv_heads)
        return ScoreWeights(
            w_q=w_q.to(self.device),
            b_q=None if b_q is None else b_q.to(self.device),
            w_k=w_k.to(self.device),
            b_k=None if b_k is None else b_k.to(self.device),
            query_norm=self._head_norm(layer, family.query_norm, shape.n_heads),
            key_norm=self._head_norm(layer, family.key_norm, shape.n_kv_heads),
            scale=float(attention.scaling),
            soft_cap=self.attention_soft_cap,
            window=self.window(layer),
            rotary=self.rotary(layer),
        )

    def window(self, layer: int) -> int | None:
        """How many keys a query of the layer sees, itself included; None for all before it."""
        config: Any = self.lm.config
        kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
        slides = kinds is None or kinds[layer] == "sliding_attention"
        return int(window) if slides and window is not None else None

    def rotary(self, layer: int) -> Rotary | None:
        """The model's own rotary tables for a layer, over its context."""
        if self.family.rotary is None:
            return None
        kinds = getattr(self.lm.config, "layer_types", None)
        by_kind = "layer_type" in signature(part(self.lm, self.family.rotary).forward).parameters
        kind = kinds[layer] if kinds is not None and by_kind else None
        if kind not in self._rotary:
            positions = torch.arange(self.shape.context, device=self.device)
            module: Any = part(self.lm, self.family.rotary)
            options = {} if kind is None else {"layer_type": kind}
            cos, sin = module(torch.zeros(1, device=self.device), positions[None], **options)
            columns = self._rotary_width(kind) // cos.shape[-1]  # 2 where a table has one column for a pair
            tables = (table[0].to(self.device, torch.float32).repeat(1, columns) for table in (cos, sin))
            self._rotary[kind] = Rotary(*tables)
        return self._rotary[kind]

    def _rotary_width(self, kind: str | None) -> int:
        """How many of a head's dimensions turn."""
        settings: Any = getattr(self.lm.config, "rope_parameters", None) or {}
        settings = settings.get(kind, settings)
        return int(self.shape.d_head * (settings.get("partial_rotary_factor") or 1.0))

    def value_columns(self) -> Tensor:
        """(K x E,) which outputs of the module `family.value` are values."""
        shape = self.shape
        index, parts = self.family.value_part
        if self.family.fused == "sizes":
            keys = (shape.n_heads + shape.n_kv_heads) * shape.d_head
            return torch.arange(keys, keys + shape.n_kv_heads * shape.d_head)
        rows = torch.arange(parts * shape.n_kv_heads * shape.d_head)
        if self.family.fused == "heads":
            return rows.view(shape.n_kv_heads, parts, shape.d_head)[:, index].flatten()
        return rows.view(parts, -1)[index]

    def _projection(self, layer: int, path: str, chosen: tuple[int, int], n_heads: int) -> tuple[Tensor, Tensor | None]:
        """Weight (n_heads, E, D) and bias (n_heads, E) of queries, keys or values, in float32."""
        weight, bias = linear_parameters(part(self.blocks[layer], path))
        index, parts = chosen
        width = self.shape.d_head
        sizes = [self.shape.n_heads * width, self.shape.n_kv_heads * width, self.shape.n_kv_heads * width]

        def split(values: Tensor) -> Tensor:
            if self.family.fused == "sizes":
                return torch.split(values.float(), sizes)[index].reshape(n_heads, width, *values.shape[1:])
            if self.family.fused == "heads":
                return values.float().reshape(n_heads, parts, width, *values.shape[1:])[:, index]
            return values.float().chunk(parts)[index].reshape(n_heads, width, *values.shape[1:])

        return split(weight), None if bias is None else split(bias)

    def _head_norm(self, layer: int, path: str | None, n_heads: int) -> tuple[Tensor, float] | None:
        if path is None:
            return None
        gain, _, epsilon = self.norm_parameters(part(self.blocks[layer], path))
        return (gain.view(n_heads, -1) if self.family.head_norm_over_all else gain), epsilon

    def norm_scale(self, module: nn.Module, x: Tensor) -> Tensor:
        """One over the denominators (...) that a norm has on x (..., D)."""
        if isinstance(module, Passing):
            return torch.ones_like(x[..., 0])
        if self.family.norm == "layer":
            x = x - x.mean(-1, keepdim=True)
        return (x.pow(2).mean(-1) + norm_epsilon(module)).rsqrt()

    def norm_parameters(self, module: nn.Module) -> tuple[Tensor, Tensor | None, float]:
        """Gain (D,), bias (D,) or None, and epsilon of a norm, in float32."""
        bias = cast("Tensor | None", getattr(module, "bias", None))
        gain = cast(Tensor, module.weight).to(self.device, torch.float32) + self.family.gain_offset
        return gain, None if bias is None else bias.to(self.device, torch.float32), norm_epsilon(module)

    @cached_property
    def identity(self) -> str:
        """SHA-256 over the weight files, whatever precision they are held in; without files, over the parameters."""
        digest = hashlib.sha256()
        for path in self.files:
            digest.update(path.name.encode())
            with path.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        if not self.files:
            for name, tensor in sorted(self.lm.state_dict().items()):
                digest.update(f"{name}{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().float().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
