"""How good a replacement is: normalized MSE, L0, dead features, and the cross-entropy that it keeps."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from circuits.capturing import capturing, joined
from circuits.families import part
from circuits.model import BaseModel
from circuits.replaced import Encoded, ReplacedRun, captured, encode_batch, needed, rebuild
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
        """Count tokens (n, D), what they were rebuilt as, and the entries that were active at them."""
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

    The normalized MSE is that of the dictionary's own output, its first write site, as rebuilt by all dictionaries that
    write there; for a dictionary that reads several layers at once, that of all of them together. L0 counts, where
    features move, those that pass the gate: at the source for features that the base layer's heads move.
    """
    dictionaries = [d for r in replacements for d in r.dictionaries]
    sites: list[ReadSite | Site | str] = [
        *needed(dictionaries),
        *{captured(d, w) for d in dictionaries for w in _own(d)},
    ]
    fits = {d.name: Fit() for d in dictionaries}
    for group in groups(sorted(documents, key=len)):
        ids, mask = pad(group, model.device)
        scored = mask.clone()
        scored[:, 0] = False
        kept: dict[str, Tensor] = {}
        with capturing(model, sites, kept):
            part(model.lm, model.family.trunk)(input_ids=ids, use_cache=False)
        encoded = {
            d.name: encode_batch(d, joined(kept, captured(d, d.read)), mask, kept.get(f"pattern.{d.layer}"))
            for d in dictionaries
        }
        for d in dictionaries:
            pairs = [_own_output(d, dictionaries, encoded, site, kept, scored) for site in _own(d)]
            sending = encoded[d.name].sending
            counted = sending.take(scored.flatten()[sending.positions])
            fits[d.name].add(
                torch.cat([target for target, _ in pairs], dim=1),
                torch.cat([rebuilt for _, rebuilt in pairs], dim=1),
                counted,
                d.n_features,
            )
    return {name: fit.figures() for name, fit in fits.items()}


def _own(dictionary: Dictionary) -> tuple[Site, ...]:
    """The write sites that a dictionary is measured by."""
    return dictionary.writes if dictionary.read.also else dictionary.writes[:1]


def _own_output(
    of: Dictionary,
    dictionaries: Sequence[Dictionary],
    encoded: dict[str, Encoded],
    site: Site,
    kept: dict[str, Tensor],
    scored: Tensor,
) -> tuple[Tensor, Tensor]:
    """What stood at a dictionary's site and what all that write there rebuilt it as, (n, D) each."""
    place = captured(of, site)
    writers = [(d, encoded[d.name]) for d in dictionaries if site in d.writes and captured(d, site) == place]
    return kept[str(place)][scored], rebuild(writers, site)[scored.flatten()]


@torch.no_grad()
def cross_entropy(model: BaseModel, replacements: Sequence[Replacement], documents: Sequence[Document]) -> CrossEntropy:
    """Loss of the base model, the replaced model and the zero-ablated model on documents."""
    dictionaries = [d for r in replacements for d in r.dictionaries]
    sums, count = [0.0, 0.0, 0.0], 0
    for group in groups(sorted(documents, key=len)):
        ids, mask = pad(group, model.device)
        wanted = mask[:, 1:]
        count += int(wanted.sum())
        runs = (None, ReplacedRun(model, dictionaries, mask), ReplacedRun(model, dictionaries, mask, zero=True))
        for i, run in enumerate(runs):
            with nullcontext() if run is None else run.hooks():
                logits = model.lm(input_ids=ids, use_cache=False).logits[:, :-1].float()
            losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            sums[i] += float(losses.view_as(wanted)[wanted].sum())
    return CrossEntropy(*(total / count for total in sums))
