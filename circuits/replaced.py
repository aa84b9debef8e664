"""The base model run with the outputs that dictionaries write taken from the dictionaries.

Dictionaries read the replaced model's own stream, and attention patterns are computed anew. The first position of a
document, whose features and errors are no nodes, keeps its outputs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from circuits.capturing import capturing
from circuits.errors import CircuitsError
from circuits.families import part
from circuits.kernels.decode import gather_decode
from circuits.linearize import write_depth
from circuits.model import BaseModel
from circuits.replacements.dictionary import Active, Dictionary
from circuits.replacements.movement import HeadLoading
from circuits.replacements.sites import ReadSite, Site


@dataclass(frozen=True)
class Encoded:
    """One dictionary on a batch of C documents of S positions; position c S + s stands for position s of document c.

    `sending` has the entries that passed the gate, `writing` what is decoded: the same unless features have moved.
    `inputs` (C x S, d_read) is what was read.
    """

    sending: Active
    writing: Active
    inputs: Tensor


def encode_batch(dictionary: Dictionary, x: Tensor, mask: Tensor, pattern: Tensor | None) -> Encoded:
    """Run a dictionary on documents.

    Parameters
    ----------
    x
        (C, S, d_read), padded on the right.
    mask
        (C, S), true at real tokens.
    pattern
        (C, H, S, S) of the base layer, for features that its heads move.
    """
    n_contexts, n_positions, width = x.shape
    inputs = x.reshape(-1, width).float()
    if dictionary.moved_by is None:
        active = dictionary.encode(inputs)
        active = active.take(mask.flatten()[active.positions])
        return Encoded(active, active, inputs)
    sending, writing = [], []
    for c in range(n_contexts):
        length = int(mask[c].sum())
        active = dictionary.encode(x[c, :length].float())
        sending.append(_shifted(active, c * n_positions))
        if isinstance(dictionary.moved_by, HeadLoading):
            assert pattern is not None
            active = dictionary.move(active, pattern[c, :, :length, :length].float())
        writing.append(_shifted(active, c * n_positions))
    return Encoded(join_actives(sending), join_actives(writing), inputs)


def rebuild(parts: Sequence[tuple[Dictionary, Encoded]], site: Site) -> Tensor:
    """What dictionaries write to one site, (C x S, D), biases and skip connections included."""
    total: Tensor | None = None
    for dictionary, encoded in parts:
        active, x = encoded.writing, encoded.inputs
        if active.directions is None:
            features, place = torch.unique(active.features, return_inverse=True)
            rows = dictionary.decoder_rows(features, site)
        else:
            rows, place = dictionary.decoder_rows(active.features, site, active.directions), None
        y = gather_decode(active.positions, place, active.activations, rows, len(x))
        bias = dictionary.output_bias(site)
        y = y if bias is None else y + bias
        if dictionary.skip is not None and site == dictionary.writes[0]:
            y = y + (x.to(dictionary.skip) @ dictionary.skip.T).to(y)
        total = y if total is None else total + y
    assert total is not None
    return total


def needed(dictionaries: Sequence[Dictionary]) -> list[ReadSite | Site | str]:
    """What has to be captured for dictionaries to run: their read sites, and patterns of heads that move features."""
    patterns = {f"pattern.{d.layer}" for d in dictionaries if isinstance(d.moved_by, HeadLoading)}
    return [*dict.fromkeys(captured(d, d.read) for d in dictionaries), *sorted(patterns)]


def captured(dictionary: Dictionary, place: ReadSite | Site) -> ReadSite | Site | str:
    """What has to be captured for a place of a dictionary: an output before a post-norm if it was trained there."""
    site = place.site if isinstance(place, ReadSite) else place
    if dictionary.before_post_norm and site.name in ("attn_out", "mlp_out"):
        return f"{site.name.removesuffix('_out')}_before.{site.layer}"
    return place


def _shifted(active: Active, by: int) -> Active:
    return replace(active, positions=active.positions + by)


def join_actives(actives: Sequence[Active]) -> Active:
    """The entries of several, one after the other."""
    def column(name: str) -> Tensor:
        return torch.cat([getattr(active, name) for active in actives])

    directions = None if actives[0].directions is None else column("directions")
    names = ("positions", "features", "activations", "pre_activations")
    positions, features, activations, pre_activations = (column(name) for name in names)
    return Active(positions, features, activations, pre_activations, directions)


@dataclass
class ReplacedRun:
    """Changes the outputs that dictionaries write, sublayer by sublayer, as a forward pass reaches them.

    zero
        Zero-ablate instead: sublayer outputs and values become zero, a block replaced whole passes its input on.
    """

    model: BaseModel
    dictionaries: Sequence[Dictionary]
    mask: Tensor
    zero: bool = False
    kept: dict[str, Tensor] = field(default_factory=dict)
    encoded: dict[str, Encoded] = field(default_factory=dict)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Within the context a forward pass on the masked documents is the replaced model's."""
        handles: list[Any] = []
        sites = {site for d in self.dictionaries for site in d.writes}
        blocks = {site.layer for site in sites if site.name == "resid_post"}
        self.dictionaries = [
            d for d in self.dictionaries if d.layer not in blocks or d.read.site.name in ("resid_pre",)
        ]
        family = self.model.family
        with capturing(self.model, needed(self.dictionaries), self.kept):
            for layer, block in enumerate(self.model.blocks):
                if layer in blocks:
                    handles.append(block.register_forward_hook(self._output_hook(Site("resid_post", layer))))
                    continue
                attention, mlp = Site("attn_out", layer), Site("mlp_out", layer)
                if Site("z", layer) in sites:
                    module = part(block, family.attention_output)
                    handles.append(module.register_forward_pre_hook(self._input_hook(Site("z", layer))))
                elif Site("v", layer) in sites:
                    handles.append(part(block, family.value).register_forward_hook(self._value_hook(layer)))
                elif attention in sites:
                    path = family.attention if self._before_post_norm(attention) else family.attention_out
                    handles.append(part(block, path).register_forward_hook(self._output_hook(attention)))
                if mlp in sites:
                    path = family.mlp if self._before_post_norm(mlp) else family.mlp_out
                    handles.append(part(block, path).register_forward_hook(self._output_hook(mlp)))
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def _before_post_norm(self, site: Site) -> bool:
        """Whether an output is replaced before the post-norm that the family may have."""
        before = {d.before_post_norm for d in self.dictionaries if site in d.writes}
        family = self.model.family
        if len(before) > 1 and (family.attention_post_norm if site.name == "attn_out" else family.mlp_post_norm):
            names = ", ".join(d.name for d in self.dictionaries if site in d.writes)
            raise CircuitsError(
                f"{names} all write {site}, some before its post-norm and some behind it; such a mixture can be "
                "traced, but not run"
            )
        return True in before

    def _changed(self, site: Site, value: Tensor, passed: Tensor | None = None) -> Tensor:
        """What takes the place of `value` (C, S, D) at a site; the first position stays."""
        there, value = value.device, value.to(self.model.device)
        if self.zero:
            changed = torch.zeros_like(value) if passed is None else passed.to(value.device, copy=True)
        else:
            writers = [d for d in self.dictionaries if any(_same_output(site, write) for write in d.writes)]
            for dictionary in writers:
                if dictionary.name not in self.encoded:
                    self.encoded[dictionary.name] = self._encode(dictionary, value)
            parts = [(d, self.encoded[d.name]) for d in writers]
            own = next(write for d in writers for write in d.writes if _same_output(site, write))
            changed = rebuild(parts, own).view_as(value).to(value.dtype)
        changed[:, 0] = value[:, 0]
        return changed.to(there)

    def _encode(self, dictionary: Dictionary, value: Tensor) -> Encoded:
        """A dictionary's features; one that reads the very output that is being changed reads `value`."""
        read = dictionary.read.site
        x = value if read.name in ("attn_out", "z", "v") else self.kept[str(dictionary.read)]
        return encode_batch(dictionary, x, self.mask, self.kept.get(f"pattern.{dictionary.layer}"))

    def _output_hook(self, site: Site) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any, output: Any) -> Any:
            value = output[0] if isinstance(output, tuple) else output
            passed = args[0] if site.name == "resid_post" and args else None
            changed = self._changed(site, value, passed)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    def _input_hook(self, site: Site) -> Callable[..., Any]:
        return lambda _, args: (self._changed(site, args[0]), *args[1:])

    def _value_hook(self, layer: int) -> Callable[..., Any]:
        columns = self.model.value_columns()

        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[..., columns] = self._changed(Site("v", layer), output[..., columns])
            return output

        return hook


def _same_output(site: Site, write: Site) -> bool:
    apart = ("v", "resid_post")
    return write == site or (
        site.name not in apart and write.name not in apart and write_depth(write) == write_depth(site)
    )
