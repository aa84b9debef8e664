"""The first pass over a text: counts, histograms, the strongest places of every feature, and a fair sample of others.

Memory grows with features and examples, not with the text. What has been gathered is arrays (`state`), so a build may
stop after any batch.
"""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from circuits.errors import CircuitsError
from circuits.feature_inputs import Documents, reads_heads
from circuits.replacements.dictionary import Dictionary
from circuits.strongest import Events, Histograms, Ints, Strongest, coarse, draws

QUANTILES = 5
DRAWN = 4  # places a quantile that are kept, of which some may turn out to be shown already


@dataclass(frozen=True)
class Settings:
    """What a build looks at and what it keeps.

    tokens
        So many tokens of the text, or all of it if it has fewer.
    window
        Longest document that the model is run on.
    context
        Tokens of an example.
    top, per_quantile
        Examples with the largest activations, one a document, and examples of each fifth of all activations.
    outputs, near
        Length of the lists of tokens and of features.
    sample
        Tokens, about so many, that co-activation and the head loading of attention features are taken from.
    batch_tokens
        Tokens that are run together.
    """

    tokens: int = 1_000_000
    window: int = 128
    context: int = 24
    top: int = 10
    per_quantile: int = 2
    outputs: int = 10
    near: int = 6
    sample: int = 50_000
    batch_tokens: int = 4096

    def check(self, longest: int) -> None:
        """Refuse what cannot be; `longest` is the model's context."""
        if not 2 <= self.window <= longest:
            raise CircuitsError(f"window is {self.window}, expected 2 to the model's context of {longest}")
        if not 0 <= self.per_quantile <= DRAWN:
            raise CircuitsError(f"per_quantile is {self.per_quantile}, expected 0 to {DRAWN}")
        for name in ("tokens", "context", "top", "outputs", "near", "sample", "batch_tokens"):
            if getattr(self, name) < 1:
                raise CircuitsError(f"{name} is {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True)
class Entries:
    """Active entries that count, (n,) each: in which document, at which position, which feature, and how much."""

    documents: Ints
    positions: Ints
    features: Ints
    values: npt.NDArray[np.float64]


class Gathered:
    """What is gathered of one dictionary."""

    def __init__(self, dictionary: Dictionary, settings: Settings, n_heads: int) -> None:
        n = dictionary.n_features
        self.dictionary, self.settings = dictionary, settings
        self.active: Ints = np.zeros(n, np.int64)
        self.histograms = Histograms(n)
        self.top = Strongest(n, settings.top)
        self.sample = Strongest(n, QUANTILES * DRAWN)
        self.heads: npt.NDArray[np.float64] = np.zeros((n, n_heads if reads_heads(dictionary) else 0))

    def add(self, ran: Documents, first: int) -> Entries:
        """Count a batch of documents, numbered from `first` on; returns the entries at tokens of the sample."""
        active = ran.encode(self.dictionary)
        active = active.take(ran.counted.flatten()[active.positions])
        places, features = active.positions.cpu().numpy(), active.features.cpu().numpy()
        values = active.activations.double().cpu().numpy()
        document, positions = np.divmod(places, ran.mask.shape[1])
        documents = document + first
        self.active += np.bincount(features, minlength=len(self.active))
        self.histograms.add(features, values)
        self._add_top(Events(features, coarse(np.abs(values)), values, documents, positions))
        events = Events(features, draws(documents, positions, features), values, documents, positions)
        self.sample.add(self.sample.strong(events))
        sampled = in_sample(documents, positions, self.settings)
        if self.heads.shape[1] and sampled.any():
            some = active.take(torch.from_numpy(np.flatnonzero(sampled)).to(active.positions.device))
            np.add.at(self.heads, features[sampled], ran.head_parts(self.dictionary, some).double().cpu().numpy())
        return Entries(documents[sampled], positions[sampled], features[sampled], values[sampled])

    def _add_top(self, events: Events) -> None:
        """The strongest place of each document."""
        events = self.top.strong(events)
        order = np.lexsort((events.positions, -events.keys, events.documents, events.features))
        pair = np.stack([events.features[order], events.documents[order]])
        first = np.ones(len(order), dtype=bool)
        first[1:] = (pair[:, 1:] != pair[:, :-1]).any(0)
        self.top.add(events.take(np.sort(order[first])))

    def state(self) -> bytes:
        """All that is gathered."""
        file = io.BytesIO()
        arrays: dict[str, Any] = self._arrays()
        np.savez(file, **arrays)
        return file.getvalue()

    def restore(self, state: bytes) -> None:
        """Go on where another stood."""
        with np.load(io.BytesIO(state), allow_pickle=False) as arrays:
            self.active, self.heads = arrays["active"], arrays["heads"]
            self.histograms.counts, self.histograms.exponents = arrays["counts"], arrays["exponents"]
            for name, kept in (("top", self.top), ("sample", self.sample)):
                kept.restore({column: arrays[f"{name}_{column}"] for column in kept.arrays()})

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        found: dict[str, npt.NDArray[Any]] = {
            "active": self.active,
            "heads": self.heads,
            "counts": self.histograms.counts,
            "exponents": self.histograms.exponents,
        }
        for name, kept in (("top", self.top), ("sample", self.sample)):
            found |= {f"{name}_{column}": values for column, values in kept.arrays().items()}
        return found


@dataclass(frozen=True)
class Chosen:
    """The places that become examples, (n,) each: feature, which of its examples, group, document and position."""

    features: Ints
    numbers: Ints
    groups: Ints
    documents: Ints
    positions: Ints


def in_sample(documents: Ints, positions: Ints, settings: Settings) -> npt.NDArray[np.bool_]:
    """(n,) which tokens are in the sample for co-activation."""
    drawn: npt.NDArray[np.bool_] = draws(documents, positions) < settings.sample / settings.tokens
    return drawn


def sampled_tokens(ran: Documents, first: int, settings: Settings) -> int:
    """How many tokens of a batch are in the sample, whether a feature is active there or not."""
    documents, positions = np.nonzero(ran.counted.cpu().numpy())
    return int(in_sample(documents + first, positions, settings).sum())


def group_name(group: int) -> str:
    """`top`, or `quantile 3 of 5`, the first being the weakest fifth of all activations."""
    return "top" if group == 0 else f"quantile {group} of {QUANTILES}"


def choose(gathered: Gathered) -> Chosen:
    """Examples of every feature: the top ones, then those of the quantiles, from the strongest; none shown twice."""
    settings, rows = gathered.settings, []
    for feature in np.flatnonzero(gathered.active).tolist():
        top = _events(gathered.top, feature)
        shown = {(document, position) for _, _, document, position in top}
        found = [(0, document, position) for _, _, document, position in top]
        sample = sorted(_events(gathered.sample, feature), key=lambda event: (_coarse(event[1]), *event[2:]))
        groups: dict[int, list[tuple[float, int, int]]] = {}
        for rank, (key, _, document, position) in enumerate(sample):
            group = rank * QUANTILES // len(sample) + 1
            groups.setdefault(group, []).append((-key, document, position))
        for group in sorted(groups, reverse=True):
            fresh = [place for place in sorted(groups[group]) if place[1:] not in shown]
            found += [(group, document, position) for _, document, position in fresh[: settings.per_quantile]]
        rows += [(feature, number, *example) for number, example in enumerate(found)]
    columns = np.array(rows, dtype=np.int64).reshape(-1, 5).T
    return Chosen(*columns)


def _coarse(value: float) -> float:
    return float(coarse(np.array([value]))[0])


def _events(kept: Strongest, feature: int) -> list[tuple[float, float, int, int]]:
    """(key, value, document, position) of a feature's events, from the largest key."""
    there = np.isfinite(kept.keys[feature])
    columns = (kept.keys, kept.values, kept.documents, kept.positions)
    return list(zip(*(column[feature][there].tolist() for column in columns), strict=True))
