"""One forward pass with everything kept that the linearized model needs.

Shapes: L layers, S positions, D model width, H query heads, E head width.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from circuits.capturing import capturing
from circuits.families import part
from circuits.model import BaseModel
from circuits.offload import room
from circuits.replacements.sites import ReadSite, Site


@dataclass(frozen=True)
class NormRecord:
    """A norm with its denominator frozen: `scale` (S,) is one over the recorded denominator."""

    gain: Tensor
    bias: Tensor | None
    scale: Tensor
    centred: bool

    def to(self, device: torch.device) -> "NormRecord":
        """The same on a device."""
        bias = None if self.bias is None else self.bias.to(device)
        return NormRecord(self.gain.to(device), bias, self.scale.to(device), self.centred)

    def apply(self, x: Tensor, positions: Tensor | slice, *, gain: bool = True) -> Tensor:
        """The linear part on vectors (n, ..., D) that stand at `positions`: no norm bias."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        scale = self.scale[positions].unsqueeze(-1)
        return x * (scale * self.gain if gain else scale)

    def pull(self, g: Tensor, positions: Tensor | slice, *, gain: bool = True) -> Tensor:
        """The transpose of `apply`: covectors after the norm become covectors before it."""
        scale = self.scale[positions].unsqueeze(-1)
        g = g * (scale * self.gain if gain else scale)
        return g - g.mean(-1, keepdim=True) if self.centred else g


@dataclass(frozen=True)
class Recording:
    """All of one forward pass, in float32: streams (L, S, D), patterns (L, H, S, S) as [query, key], norms.

    `queries` (L, S, H, E) and `keys` (L, S, K, E) are what the score is the product of: after their norms and rotary
    position, the score's scale in the queries, before a soft cap. `attn_out` and `mlp_out` are what is added to the
    stream; where a post-norm stands before that, `attention_post_norms` and `mlp_post_norms` have it, and `attn_before`
    (L, S, D) is the attention output that it reads.

    Of a run in which something was added, streams and outputs have it in them. Readers of an attention output read it
    before: `attn_read` (L, S, D), None where nothing was added. `values_added` (S, K x E) is by layer.
    """

    token_ids: Tensor
    embedding: Tensor
    resid_pre: Tensor
    attn_out: Tensor
    resid_mid: Tensor
    mlp_out: Tensor
    z: Tensor
    patterns: Tensor
    queries: Tensor
    keys: Tensor
    attention_norms: tuple[NormRecord, ...]
    mlp_norms: tuple[NormRecord, ...]
    final_norm: NormRecord
    resid_final: Tensor
    attention_post_norms: tuple[NormRecord, ...] = ()
    mlp_post_norms: tuple[NormRecord, ...] = ()
    attn_before: Tensor | None = None
    attn_read: Tensor | None = None
    values_added: dict[int, Tensor] = field(default_factory=dict)

    @property
    def n_positions(self) -> int:
        return len(self.token_ids)

    def norm_at(self, site: str, layer: int) -> NormRecord:
        """The norm that reads a stream site."""
        return (self.attention_norms if site == "resid_pre" else self.mlp_norms)[layer]

    def post_norm(self, layer: int, *, mlp: bool = False) -> NormRecord | None:
        """The norm between a sublayer and the stream, in families that have one."""
        norms = self.mlp_post_norms if mlp else self.attention_post_norms
        return norms[layer] if norms else None

    def resid_post(self, layer: int) -> Tensor:
        """The stream (S, D) above a layer."""
        return self.resid_pre[layer] + self.attn_out[layer] + self.mlp_out[layer]

    def read(self, read: ReadSite) -> Tensor:
        """What a dictionary reads, (S, d_read)."""
        name = "attn_read" if read.site.name == "attn_out" and self.attn_read is not None else read.site.name
        value: Tensor = getattr(self, name)[read.site.layer]
        if read.norm == "none":
            return value
        norm = self.norm_at(read.site.name, read.site.layer)
        normed = norm.apply(value, slice(None), gain=read.norm == "full")
        return normed + norm.bias if read.norm == "full" and norm.bias is not None else normed

    def logits(self, model: BaseModel, position: int) -> Tensor:
        """Logits (V,) at one position, without a final soft cap."""
        return model.unembed(self.resid_final[position])


@dataclass(frozen=True)
class Added:
    """What is added while a prompt is recorded.

    sites
        (S, width) by site: `resid_pre.0`, `z.L`, `attn_out.L`, `mlp_out.L`, and `resid_post.L`.
    raw
        Likewise at `attn_out.L` and `mlp_out.L` before the post-norm that a family may have there.
    values
        (S, K x E) by layer; what that makes of the head outputs is in `sites` already.
    """

    sites: Mapping[Site, Tensor] = field(default_factory=dict)
    raw: Mapping[Site, Tensor] = field(default_factory=dict)
    values: Mapping[int, Tensor] = field(default_factory=dict)


@torch.no_grad()
def record(model: BaseModel, token_ids: Tensor, added: Added | None = None) -> Recording:
    """Run the model once on token ids (S,) and keep streams, patterns and norm denominators in float32.

    Blocks stored in half precision are cast up one at a time, so the recording is a float32 computation
    whatever the weights are stored in. With `added` it is one of a changed model (`circuits.held`).
    """
    added = added or Added()
    family, blocks, home = model.family, model.blocks, model.device
    kept: dict[str, list[Tensor]] = defaultdict(list)
    handles = []

    def before(module: nn.Module, name: str) -> None:
        handles.append(
            module.register_forward_pre_hook(
                lambda _, args, kwargs: kept[name].append(_first(args, kwargs)[0].to(home, copy=True)), with_kwargs=True
            )
        )

    def after(module: nn.Module, name: str) -> None:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            kept[name].append((output[0] if output.ndim == 3 else output).to(home, copy=True))

        handles.append(module.register_forward_hook(keep))

    for block in blocks:
        before(block, "resid_pre")
        before(part(block, family.attention_output), "z")
        before(part(block, family.mlp_norm), "resid_mid")
        after(part(block, family.attention_out), "attn_out")
        after(part(block, family.mlp_out), "mlp_out")
        for path in filter(None, (family.attention_post_norm, family.mlp_post_norm)):
            before(part(block, path), path)
    before(part(model.lm, family.final_norm), "final")
    handles += _add(model, added)  # after those that keep: what is kept is before it
    inside = _Layers(len(blocks), home)
    embedding_module = part(model.lm, family.embedding)
    wanted = [f"{name}.{layer}" for name in ("q", "k", "pattern") for layer in range(len(blocks))]
    try:
        with cast_up(model), capturing(model, wanted, inside):
            embedding = embedding_module(token_ids[None]).float()
            if (start := added.sites.get(Site("resid_pre", 0))) is not None:
                embedding = embedding + start
            output = part(model.lm, family.trunk)(inputs_embeds=embedding, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    shape = model.shape
    stacked = {name: torch.stack(kept.pop(name)) for name in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "z")}
    for name, site, heads in (("queries", "q", shape.n_heads), ("keys", "k", shape.n_kv_heads)):
        flat = inside.all[site]
        stacked[name] = flat.view(*flat.shape[:-1], heads, -1)

    def norms(path: str | None, inputs: Iterable[Tensor]) -> tuple[NormRecord, ...]:
        if path is None:
            return ()
        return tuple(_norm(model, part(block, path), x) for block, x in zip(blocks, inputs, strict=True))

    before_post = kept[family.attention_post_norm or ""]
    read = _count_in(stacked, before_post, added)
    return Recording(
        token_ids=token_ids,
        embedding=embedding[0],
        patterns=inside.all["pattern"],
        attention_norms=norms(family.attention_norm, stacked["resid_pre"]),
        mlp_norms=norms(family.mlp_norm, stacked["resid_mid"]),
        attention_post_norms=norms(family.attention_post_norm, before_post),
        attn_before=torch.stack(before_post) if before_post else None,
        mlp_post_norms=norms(family.mlp_post_norm, kept[family.mlp_post_norm or ""]),
        final_norm=_norm(model, part(model.lm, family.final_norm), kept["final"][0]),
        resid_final=output.last_hidden_state[0].to(home, torch.float32),
        attn_read=read,
        values_added=dict(added.values),
        **stacked,
    )


def _count_in(stacked: dict[str, Tensor], before_post: list[Tensor], added: Added) -> Tensor | None:
    """Put what was added into the outputs that were kept before it; gives the attention outputs as readers read them.

    What stands before a post-norm was kept with what was added there, and is for readers: that comes out.
    """
    if not (added.sites or added.raw):
        return None
    for layer, x in enumerate(before_post):
        if (raw := added.raw.get(Site("attn_out", layer))) is not None:
            before_post[layer] = x - raw
    read, stacked["attn_out"] = stacked["attn_out"], stacked["attn_out"].clone()
    for place, what in added.sites.items():
        if place.name in ("attn_out", "mlp_out", "resid_post"):
            stacked["attn_out" if place.name == "attn_out" else "mlp_out"][place.layer] += what
    return read


def _add(model: BaseModel, added: Added) -> list[Any]:
    """Hooks that add at the sites."""
    family, handles = model.family, []
    places = {"attn_out": family.attention_out, "mlp_out": family.mlp_out, "resid_post": ""}
    raw_places = {"attn_out": family.attention, "mlp_out": family.mlp}
    found = [(site, what, places) for site, what in added.sites.items()]
    found += [(site, what, raw_places) for site, what in added.raw.items()]
    for site, what, paths in found:
        block = model.blocks[site.layer]
        if site.name == "z":
            handles.append(part(block, family.attention_output).register_forward_pre_hook(_plus_input(what)))
        elif site.name in paths:
            path = paths[site.name]
            handles.append((part(block, path) if path else block).register_forward_hook(_plus_output(what)))
    return handles


def _plus_input(what: Tensor) -> Callable[..., Any]:
    return lambda _, args: (args[0] + what.view_as(args[0]).to(args[0]), *args[1:])


def _plus_output(what: Tensor) -> Callable[..., Any]:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + what.view_as(output[0]).to(output[0]), *output[1:])
        return output + what.view_as(output).to(output)

    return hook


class _Layers(dict[str, Tensor]):
    """Takes what `capturing` finds in attention, and puts all layers of a site into one tensor as they come.

    Patterns of a long prompt are many times the rest of the recording: no layer of them is held twice.
    """

    def __init__(self, n_layers: int, home: torch.device) -> None:
        super().__init__()
        self.n_layers, self.home = n_layers, home
        self.all: dict[str, Tensor] = {}

    def __setitem__(self, site: str, value: Tensor) -> None:
        name, _, layer = site.partition(".")
        if layer.isdigit():  # "q.0:none" is "q.0" under another name
            if name not in self.all:
                self.all[name] = room((self.n_layers, *value.shape[1:]), self.home)
            self.all[name][int(layer)] = value[0]


@contextmanager
def cast_up(model: BaseModel) -> Iterator[None]:
    """Within the context every block and the final norm compute in float32, cast up only while they run."""
    handles = []
    for module in [*model.blocks, part(model.lm, model.family.final_norm)]:
        stored = next(module.parameters()).dtype
        if stored != torch.float32:
            handles.append(module.register_forward_pre_hook(lambda m, _: m.float() and None))
            handles.append(module.register_forward_hook(lambda m, _, __, dtype=stored: m.to(dtype) and None))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    value: Tensor = args[0] if args else kwargs["hidden_states"]
    return value


def _norm(model: BaseModel, module: nn.Module, x: Tensor) -> NormRecord:
    gain, bias, _ = model.norm_parameters(module)
    return NormRecord(gain, bias, model.norm_scale(module, x), model.family.norm == "layer")
