"""Is a part of a graph enough, and is it needed? The base model run with all nodes outside of it ablated to zero.

After *Sparse Feature Circuits* (Marks et al. 2024), "faithfulness" and "completeness", with zero ablation. Where
dictionaries rebuild an output, it is put together anew on the current stream:

    out[p] = biases + skip . x[p] + sum_{f kept} a_f[p] W_f + kept_error[p] (base[p] - rebuilt[p])

`a_f` are encoded anew from the current stream, `base` is what the base model makes of it there, and `rebuilt` is what
all active features give. A feature counts at a position where it is a node of the mask; one that was not active on the
recording is no node, so it is out. An MLP without a dictionary is one error node at each position. Attention without a
dictionary runs as it is, and so do patterns and norms. Tokens are always kept, and where the first position is special,
which has no feature and error nodes, so is all that is there. With every node kept the base model is left as it is.

A post-norm behind a rebuilt output has the denominator of the base model's current output: else the little that a mask
keeps would be scaled up to the size of the whole.

Letters of shapes: R rows (masks), S positions, D model width, n nodes, P positions of logits, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from circuits.capturing import capturing
from circuits.families import linear_parameters, part
from circuits.linearize import LinearizedModel, write_depth
from circuits.nodes import NodeTable
from circuits.recording import NormRecord, cast_up
from circuits.replaced import Encoded, captured, encode_batch, rebuild
from circuits.replacements.dictionary import Active, Dictionary
from circuits.replacements.movement import HeadLoading
from circuits.replacements.sites import Site
from circuits.sweep import Sweep


@dataclass(frozen=True)
class Faithfulness:
    """What a quantity is with every node (`whole`), none (`nothing`), those of a mask, and all but those.

    sufficiency
        `(kept - nothing) / (whole - nothing)`: 1 where the mask alone does it all.
    necessity
        `1 - (without - nothing) / (whole - nothing)`: 1 where nothing is left without the mask.

    Both are None where the nodes make no difference.
    """

    sufficiency: float | None
    necessity: float | None
    whole: float
    nothing: float
    kept: float
    without: float


def faithfulness(
    sweep: Sweep, kept: np.ndarray, measure: Callable[[Tensor], Tensor], positions: Sequence[int] | None = None
) -> Faithfulness:
    """Sufficiency and necessity of some nodes of a prompt.

    Parameters
    ----------
    sweep
        Of `circuits.tracing.lay_out`.
    kept
        (n,) mask over the nodes of `sweep.table`. It makes no difference for tokens.
    measure
        From logits (R, P, V), without a final soft cap, to the quantity (R,).
    positions
        The P positions; by default that of each output target of the sweep, in their order, or the last without any.
    """
    if positions is None:
        positions = [place for readers in sweep.targets.outputs for place in readers.positions] or [-1]
    chosen = np.asarray(kept, dtype=bool)
    masks = np.stack([np.ones_like(chosen), np.zeros_like(chosen), chosen, ~chosen])
    logits = logits_of_parts(sweep.linear, sweep.table, masks, positions)
    whole, nothing, alone, without = measure(logits).double().tolist()
    span = whole - nothing
    return Faithfulness(
        sufficiency=(alone - nothing) / span if span else None,
        necessity=1.0 - (without - nothing) / span if span else None,
        whole=whole,
        nothing=nothing,
        kept=alone,
        without=without,
    )


@torch.no_grad()
def logits_of_parts(
    linear: LinearizedModel, table: NodeTable, masks: np.ndarray, positions: Sequence[int] = (-1,)
) -> Tensor:
    """Logits (R, P, V), without a final soft cap, of runs that keep only the nodes of a mask each, (R, n)."""
    final = _PartialRun(linear, _Kept(linear, table, masks)).run()
    places, back = torch.unique(torch.tensor(positions) % final.shape[1], return_inverse=True)
    logits = linear.model.unembed(final[:, places.to(final.device)])
    return logits[:, back.to(final.device)]


class _Kept:
    """Masks (R, n) over the nodes of a table, as a run asks for them."""

    def __init__(self, linear: LinearizedModel, table: NodeTable, masks: np.ndarray) -> None:
        self.rows, self.n_positions = len(masks), linear.recording.n_positions
        self.device = linear.recording.token_ids.device
        self.is_special = bool((table.kind[: table.starts[1]] == "embedding").all())
        self.errors: dict[tuple[str, int], Tensor] = {}
        self.features: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}
        for kind, layer in set(zip(table.kind.tolist(), table.layer.tolist(), strict=True)):
            if kind.endswith("_error"):
                self.errors[kind, layer] = self._at_positions(
                    table, masks, (table.kind == kind) & (table.layer == layer)
                )
        of_feature = table.dictionary >= 0
        sides = zip(table.dictionary[of_feature].tolist(), (table.kind[of_feature] == "mtc_key").tolist(), strict=True)
        for index, is_key in set(sides):
            nodes = np.flatnonzero((table.dictionary == index) & ((table.kind == "mtc_key") == is_key))
            numbers = table.position[nodes] * linear.dictionaries[index].n_features + table.feature[nodes]
            order = np.argsort(numbers)
            self.features[index, is_key] = self._tensor(numbers[order]), self._tensor(masks[:, nodes[order]])

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)

    def _at_positions(self, table: NodeTable, masks: np.ndarray, chosen: np.ndarray) -> Tensor:
        """(R, S, 1) of 0 and 1; the special first position is kept."""
        found = np.zeros((self.rows, self.n_positions, 1), dtype=np.float32)
        found[:, table.position[chosen], 0] = masks[:, chosen]
        if self.is_special:
            found[:, 0] = 1.0
        return self._tensor(found)

    def take(self, active: Active, index: int, n_features: int, *, is_key: bool = False) -> Active:
        """Those entries of dictionary `index` that are kept, at positions r S + s of row r."""
        rows, places = active.positions // self.n_positions, active.positions % self.n_positions
        hit = torch.zeros(len(active), dtype=torch.bool, device=self.device)
        if (index, is_key) in self.features:
            numbers, kept = self.features[index, is_key]
            wanted = places * n_features + active.features
            at = torch.searchsorted(numbers, wanted).clamp(max=len(numbers) - 1)
            hit = (numbers[at] == wanted) & kept[rows, at]
        return active.take(hit | (places == 0) if self.is_special else hit)


@dataclass
class _PartialRun:
    """One forward pass of R rows; `captured` has what the base model makes of the current stream, site by site."""

    linear: LinearizedModel
    kept: _Kept
    captured: dict[str, Tensor] = field(default_factory=dict)
    encoded: dict[int, tuple[Encoded, Encoded]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.mask = torch.ones(self.kept.rows, self.kept.n_positions, dtype=torch.bool, device=self.kept.device)
        self.writers: dict[int | str, dict[tuple[Site, bool], list[int]]] = {}
        for index, dictionary in enumerate(self.linear.dictionaries):
            for site in self.linear.writes_of(dictionary):
                there = self.writers.setdefault(str(site) if site.name == "v" else write_depth(site), {})
                there.setdefault((site, self._is_raw(dictionary, site)), []).append(index)

    def run(self) -> Tensor:
        """`resid_final` (R, S, D)."""
        model = self.linear.model
        ids = self.linear.recording.token_ids.expand(self.kept.rows, -1)
        # Captured first: a hook that was registered earlier sees an output before it is changed.
        with cast_up(model), capturing(model, self._wanted(), self.captured), self._hooks():
            embedding = part(model.lm, model.family.embedding)(ids).float()
            output = part(model.lm, model.family.trunk)(inputs_embeds=embedding, use_cache=False)
        final: Tensor = output.last_hidden_state.to(model.device).float()
        return final

    def _is_raw(self, dictionary: Dictionary, site: Site) -> bool:
        """Whether a write goes through a post-norm of its layer."""
        family = self.linear.model.family
        if site.name == "z":
            return family.attention_post_norm is not None
        post = {"attn_out": family.attention_post_norm, "mlp_out": family.mlp_post_norm}.get(site.name)
        return dictionary.before_post_norm and post is not None

    def _wanted(self) -> list[str]:
        """What dictionaries read, as the stream has it; values are read where they are changed."""
        wanted = {str(captured(d, d.read.site)) for d in self.linear.dictionaries if d.read.site.name != "v"}
        wanted |= {f"pattern.{d.layer}" for d in self.linear.dictionaries if isinstance(d.moved_by, HeadLoading)}
        for there in self.writers.values():
            wanted |= {_before(site) for site, is_raw in there if is_raw}
        return sorted(wanted)

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        linear, family, handles = self.linear, self.linear.model.family, []
        for layer, block in enumerate(linear.model.blocks):
            changes: dict[str, Callable[[Tensor], Tensor]] = {}
            if layer in linear.replaced_blocks:
                changes[""] = partial(self._changed, 2 * layer + 2, ("block_error", layer))
            else:
                changes[family.mlp_out] = partial(self._changed, 2 * layer + 2, ("mlp_error", layer))
            if layer in linear.replaced_attention:
                changes[family.attention_out] = partial(self._changed, 2 * layer + 1, ("attention_error", layer))
            if layer in linear.replaced_values:
                changes[family.value] = partial(self._changed_values, layer)
            for path, change in changes.items():
                module = part(block, path) if path else block
                handles.append(module.register_forward_hook(_on_output(change, linear.model.device)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _changed_values(self, layer: int, output: Tensor) -> Tensor:
        columns = self.linear.model.value_columns().to(output.device)
        self.captured[f"v.{layer}"] = output[..., columns].float()
        output = output.clone()
        output[..., columns] = self._changed(f"v.{layer}", ("value_error", layer), output[..., columns])
        return output

    def _changed(self, place: int | str, error: tuple[str, int], base: Tensor) -> Tensor:
        """What takes the place of the base model's output at a depth, or of a layer's values."""
        base = base.reshape(self.kept.rows, self.kept.n_positions, -1)
        if place not in self.writers:
            return base * self.kept.errors[error]
        whole, part_kept = (self._together(place, base, only_kept=only) for only in (False, True))
        changed = part_kept + self.kept.errors[error] * (base - whole)
        if self.kept.is_special:
            changed[:, 0] = base[:, 0]
        return changed

    def _together(self, place: int | str, base: Tensor, *, only_kept: bool) -> Tensor:
        """What dictionaries write there, (R, S, D), constants included: all of it, or what the masks keep."""
        total, raw = torch.zeros_like(base), None
        for (site, is_raw), indices in self.writers[place].items():
            parts = [(self.linear.dictionaries[i], self._encoded(i)[only_kept]) for i in indices]
            written = rebuild(parts, site).view(*base.shape[:2], -1)
            if site.name == "z":
                path = self.linear.model.family.attention_output
                weight, bias = linear_parameters(part(self._block(site), path))
                written = nn.functional.linear(written.to(weight.device), weight, bias).to(written.device)
            if not is_raw:
                total = total + written
                continue
            raw = written if raw is None else raw + written
            before = site
        return total if raw is None else total + self._through_post_norm(before, raw)

    def _through_post_norm(self, site: Site, raw: Tensor) -> Tensor:
        """Through the post-norm of a site, with the denominator of what the base model has there."""
        family = self.linear.model.family
        path = family.mlp_post_norm if site.name == "mlp_out" else family.attention_post_norm
        assert path is not None
        norm = self._norm(part(self._block(site), path), self.captured[_before(site)])
        return _applied(norm, raw)

    def _block(self, site: Site) -> nn.Module:
        return self.linear.model.blocks[site.layer]

    def _norm(self, module: nn.Module, x: Tensor) -> NormRecord:
        """A norm with the denominators (R, S) that it has on x (R, S, D)."""
        model = self.linear.model
        gain, bias, _ = model.norm_parameters(module)
        return NormRecord(gain, bias, model.norm_scale(module, x), model.family.norm == "layer")

    def _encoded(self, index: int) -> tuple[Encoded, Encoded]:
        """A dictionary on the current stream: all of it, and what the masks keep."""
        if index not in self.encoded:
            dictionary = self.linear.dictionaries[index]
            pattern = self.captured.get(f"pattern.{dictionary.layer}")
            whole = encode_batch(dictionary, self._input(dictionary), self.mask, pattern)
            n = dictionary.n_features
            writing = whole.writing
            if isinstance(dictionary.moved_by, HeadLoading):
                assert pattern is not None
                sent = self.kept.take(whole.sending, index, n, is_key=True)
                writing = _moved(dictionary, sent, pattern)
            writing = self.kept.take(writing, index, n)
            self.encoded[index] = whole, replace(whole, writing=writing)
        return self.encoded[index]

    def _input(self, dictionary: Dictionary) -> Tensor:
        """What a dictionary reads, (R, S, d_read): the current stream through the norm of its site."""
        read, family = dictionary.read, self.linear.model.family
        x = self.captured[str(captured(dictionary, read.site))].reshape(*self.mask.shape, -1)
        if read.norm == "none":
            return x
        path = family.attention_norm if read.site.name == "resid_pre" else family.mlp_norm
        norm = self._norm(part(self._block(read.site), path), x)
        return _applied(norm, x) if read.norm == "full" else norm.apply(x, slice(None), gain=False)


def _moved(dictionary: Dictionary, sent: Active, pattern: Tensor) -> Active:
    """What arrives in each row, positions r S + s, by its own patterns (R, H, S, S)."""
    n_positions = pattern.shape[-1]
    arrived = []
    for row, own in enumerate(pattern):
        mine = sent.take(sent.positions // n_positions == row)
        came = dictionary.move(replace(mine, positions=mine.positions - row * n_positions), own)
        arrived.append(replace(came, positions=came.positions + row * n_positions))
    directions = [active.directions for active in arrived if active.directions is not None]
    return Active(
        torch.cat([active.positions for active in arrived]),
        torch.cat([active.features for active in arrived]),
        torch.cat([active.activations for active in arrived]),
        torch.cat([active.pre_activations for active in arrived]),
        torch.cat(directions) if directions else None,
    )


def _applied(norm: NormRecord, x: Tensor) -> Tensor:
    normed = norm.apply(x, slice(None))
    return normed if norm.bias is None else normed + norm.bias


def _before(site: Site) -> str:
    return f"{'mlp' if site.name == 'mlp_out' else 'attn'}_before.{site.layer}"


def _on_output(change: Callable[[Tensor], Tensor], home: torch.device) -> Callable[..., Any]:
    """A forward hook that changes a module's output, or the first of several, whatever its shape; changed at home."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        value: Tensor = output[0] if isinstance(output, tuple) else output
        changed = change(value.to(home)).reshape(value.shape).to(value)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook
