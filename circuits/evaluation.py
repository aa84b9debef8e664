"""How good a replacement is: normalized MSE, L0, dead features, and the cross-entropy that it keeps.

The replaced model runs with every MLP and attention output that a dictionary writes taken from the dictionaries,
which read the replaced model's own stream; attention patterns are computed anew. The first position, whose features
and errors are no nodes, keeps its outputs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from circuits.capturing import capturing
from circuits.families import part
from circuits.kernels.decode import gather_decode
from circuits.linearize import write_depth
from circuits.model import BaseModel
from circuits.replacements.dictionary import Active, Dictionary, Replacement
from circuits.replacements.sites import ReadSite, Site
from circuits.text import Document, groups, pad


@dataclass
class Fit:
    """Sums over tokens for one dictionary's own output; `figures` gives the usual numbers."""

    squared: float = 0.0
    total: Tensor | None = None
    square: float = 0.0
    active: int = 0
    tokens: int = 0
    fired: Tensor | None = None

    def add(self, target: Tensor, rebuilt: Tensor, active: Active, n_features: int) -> None:
        self.squared += float((target - rebuilt).double().pow(2).sum())
        self.square += float(target.double().pow(2).sum())
        self.total = target.double().sum(0) + (0 if self.total is None else self.total)
        self.active += len(active)
        self.tokens += len(target)
        if self.fired is None:
            self.fired = torch.zeros(n_features, dtype=torch.bool, device=target.device)
        self.fired[active.features] = True

    def figures(self) -> dict[str, float]:
        """Normalized MSE, mean L0 a token, and the share of features that never fired."""
        assert self.total is not None
        assert self.fired is not None
        spread = self.square - float(self.total.pow(2).sum()) / self.tokens
        return {
            "normalized_mse": self.squared / spread,
            "l0": self.active / self.tokens,
            "dead_share": 1.0 - float(self.fired.float().mean()),
        }


@dataclass(frozen=True)
class CrossEntropy:
    """Mean loss a token of the base model, with replacements, and with the same outputs set to zero, in nats."""

    base: float
    replaced: float
    ablated: float

    @property
    def kept(self) -> float:
        """The share of the gap to zero-ablation that the replacements close."""
        return (self.ablated - self.replaced) / (self.ablated - self.base)


@torch.no_grad()
def dictionary_figures(
    model: BaseModel, replacements: Sequence[Replacement], documents: Sequence[Document]
) -> dict[str, dict[str, float]]:
    """Figures of every dictionary on the base model's activations, first positions left out.

    A CLT's normalized MSE of layer l is that of `mlp_out.l` rebuilt by all layers up to l.
    """
    dictionaries = [d for r in replacements for d in r.dictionaries]
    sites: list[ReadSite | Site] = [*{d.read for d in dictionaries}, *{w for d in dictionaries for w in d.writes}]
    fits = {d.name: Fit() for d in dictionaries}
    for group in groups(sorted(documents, key=len)):
        ids, mask = pad(group, model.device)
        mask[:, 0] = False
        kept: dict[str, Tensor] = {}
        with capturing(model, sites, kept):
            part(model.lm, model.family.trunk)(input_ids=ids, use_cache=False)
        held = {name: values[mask] for name, values in kept.items()}
        actives = {d.name: d.encode(held[str(d.read)]) for d in dictionaries}
        for d in dictionaries:
            own = d.writes[0]
            rebuilt = rebuild([(o, actives[o.name], held[str(o.read)]) for o in dictionaries if own in o.writes], own)
            fits[d.name].add(held[str(own)], rebuilt, actives[d.name], d.n_features)
    return {name: fit.figures() for name, fit in fits.items()}


def rebuild(parts: Sequence[tuple[Dictionary, Active, Tensor]], site: Any) -> Tensor:
    """What dictionaries with these active features and inputs (n, d_read) write to one site, biases included."""
    total: Tensor | None = None
    for dictionary, active, x in parts:
        features, place = torch.unique(active.features, return_inverse=True)
        y = gather_decode(active.positions, place, active.activations, dictionary.decoder_rows(features, site), len(x))
        bias = dictionary.output_bias(site)
        y = y if bias is None else y + bias
        if dictionary.skip is not None and site == dictionary.writes[0]:
            y = y + x @ dictionary.skip.T
        total = y if total is None else total + y
    assert total is not None
    return total


@torch.no_grad()
def cross_entropy(model: BaseModel, replacements: Sequence[Replacement], documents: Sequence[Document]) -> CrossEntropy:
    """Loss of the base model, the replaced model and the zero-ablated model on documents."""
    dictionaries = [d for r in replacements for d in r.dictionaries]
    sums, count = [0.0, 0.0, 0.0], 0
    for group in groups(sorted(documents, key=len)):
        ids, mask = pad(group, model.device)
        wanted = mask[:, 1:]
        count += int(wanted.sum())
        for i, change in enumerate((None, _Replaced(dictionaries), _Zero())):
            with _changed(model, dictionaries, change):
                logits = model.lm(input_ids=ids, use_cache=False).logits[:, :-1].float()
            losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            sums[i] += float(losses.view_as(wanted)[wanted].sum())
    return CrossEntropy(*(total / count for total in sums))


class _Zero:
    """Every replaced output set to zero."""

    def __call__(self, depth: int, output: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return torch.zeros_like(output)


@dataclass
class _Replaced:
    """Every replaced output rebuilt from features of the run itself."""

    dictionaries: Sequence[Dictionary]
    encoded: dict[str, tuple[Active, Tensor]] = field(default_factory=dict)

    def __call__(self, depth: int, output: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        parts, found = [], None
        for dictionary in self.dictionaries:
            for site in dictionary.writes:
                if write_depth(site) != depth:
                    continue
                if dictionary.layer == (depth - 1) // 2:
                    x = inputs.get(str(dictionary.read), output)
                    x = x.flatten(0, -2).float()
                    self.encoded[dictionary.name] = dictionary.encode(x), x
                parts.append((dictionary, *self.encoded[dictionary.name]))
                found = site
        return rebuild(parts, found).view(*output.shape[:-1], -1).to(output.dtype)


@contextmanager
def _changed(
    model: BaseModel,
    dictionaries: Sequence[Dictionary],
    change: Callable[[int, Tensor, dict[str, Tensor]], Tensor] | None,
) -> Iterator[None]:
    """Within the context the outputs that dictionaries write go through `change`, first positions excepted."""
    handles = []
    inputs: dict[str, Tensor] = {}
    depths = {write_depth(site) for d in dictionaries for site in d.writes} if change else set()
    through_z = {2 * d.layer + 1 for d in dictionaries if d.read.site.name == "z"}

    def hook_output(module: nn.Module, depth: int) -> None:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            assert change is not None
            value = output[0] if isinstance(output, tuple) else output
            changed = change(depth, value, inputs).clone()
            changed[..., 0, :] = value[..., 0, :]
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handles.append(module.register_forward_hook(hook))

    def hook_z(module: nn.Module, depth: int) -> None:
        def hook(_: nn.Module, args: Any) -> Any:
            assert change is not None
            changed = change(depth, args[0], inputs).clone()
            changed[..., 0, :] = args[0][..., 0, :]
            return (changed, *args[1:])

        handles.append(module.register_forward_pre_hook(hook))

    for layer, block in enumerate(model.blocks):
        if 2 * layer + 1 in through_z & depths:
            hook_z(part(block, model.family.attention_output), 2 * layer + 1)
        elif 2 * layer + 1 in depths:
            hook_output(part(block, model.family.attention), 2 * layer + 1)
        if 2 * layer + 2 in depths:
            hook_output(part(block, model.family.mlp), 2 * layer + 2)
    reads = [d.read for d in dictionaries if d.read.site.name == "resid_mid"] if change else []
    try:
        with capturing(model, reads, inputs):
            yield
    finally:
        for handle in handles:
            handle.remove()
