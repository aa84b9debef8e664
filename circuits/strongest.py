"""The strongest few of very many events a feature, and numbers that look drawn but hang on the place alone.

What is kept does not depend on how the events came in batches: a text that is stopped and gone on with gives the same.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Events:
    """Activations, (n,) each: of which feature, how strong for the one who keeps them, how much, and where."""

    features: Ints
    keys: Floats
    values: Floats
    documents: Ints
    positions: Ints

    def take(self, index: npt.NDArray[Any]) -> "Events":
        """Some of them, by mask or by index."""
        return Events(
            self.features[index],
            self.keys[index],
            self.values[index],
            self.documents[index],
            self.positions[index],
        )


class Strongest:
    """The `k` events with the largest keys of each of F features.

    Attributes
    ----------
    keys : (F, k) from the largest; minus infinity where there were fewer events
    values : (F, k) the activations
    documents, positions : (F, k) where they were
    """

    def __init__(self, n_features: int, k: int) -> None:
        self.keys: Floats = np.full((n_features, k), -np.inf)
        self.values: Floats = np.zeros((n_features, k))
        self.documents: Ints = np.zeros((n_features, k), np.int64)
        self.positions: Ints = np.zeros((n_features, k), np.int64)

    def strong(self, events: Events) -> Events:
        """Those that are not too weak; most of a long text are, and need no more work."""
        return events.take(events.keys > self.keys[events.features, -1])

    def add(self, events: Events) -> None:
        """Take events; of equal keys the earlier event stays."""
        k = self.keys.shape[1]
        order = np.lexsort((-events.keys, events.features))
        named, starts, counts = np.unique(events.features[order], return_index=True, return_counts=True)
        rank = np.arange(len(order)) - np.repeat(starts, counts)
        kept = order[rank < k]
        row, place = np.repeat(np.arange(len(named)), np.minimum(counts, k)), k + rank[rank < k]
        both: dict[str, npt.NDArray[Any]] = {}
        for name, held in self.arrays().items():
            wide = np.full((len(named), 2 * k), -np.inf if name == "keys" else 0, held.dtype)
            wide[:, :k] = held[named]
            wide[row, place] = getattr(events, name)[kept]
            both[name] = wide
        best = np.argsort(-both["keys"], axis=1, kind="stable")[:, :k]
        for name, wide in both.items():
            getattr(self, name)[named] = np.take_along_axis(wide, best, axis=1)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """All that is kept, by name: what `restore` takes."""
        return {name: getattr(self, name) for name in ("keys", "values", "documents", "positions")}

    def restore(self, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """Go on where another stood."""
        for name in self.arrays():
            setattr(self, name, arrays[name].copy())


def draws(documents: Ints, positions: Ints, features: Ints | int = 0) -> Floats:
    """Numbers in [0, 1), (n,), one for each place in a text (and feature): always the same for the same place.

    Mixed as in SplitMix64 (Steele, Lea & Flood 2014, *Fast splittable pseudorandom number generators*).
    """
    with np.errstate(over="ignore"):
        x = documents.astype(np.uint64) * np.uint64(1 << 20) + positions.astype(np.uint64)
        x = x * _GOLDEN + np.asarray(features).astype(np.uint64) * np.uint64(0xD1B54A32D192ED03) + _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def coarse(values: Floats) -> Floats:
    """Values to twelve bits: those that differ by rounding alone, as the same words in two texts do, become equal."""
    mantissa, exponent = np.frexp(values)
    rounded: Floats = np.ldexp(np.round(mantissa * (1 << 12)), exponent - 12)
    return rounded


class Histograms:
    """Histograms of the activations of F features whose range is not known before.

    A feature has `BINS` bins on each side of zero, 2^e wide, value a in bin floor(a / 2^e). A value that does not fit
    doubles the width, two bins becoming one, so the result is that of the last width from the start.
    """

    BINS = 32
    UNSET = -(1 << 20)

    def __init__(self, n_features: int) -> None:
        self.counts: npt.NDArray[np.int32] = np.zeros((n_features, 2 * self.BINS), np.int32)
        self.exponents: Ints = np.full(n_features, self.UNSET, np.int64)

    def add(self, features: Ints, values: Floats) -> None:
        """Count activations (n,), none of them zero."""
        if not len(features):
            return
        largest = np.zeros(len(self.counts))
        np.maximum.at(largest, features, np.abs(values))
        # The smallest e with |a| < BINS 2^e: frexp gives |a| = m 2^x with m in [1/2, 1).
        fitting = np.frexp(largest)[1].astype(np.int64) - int(np.log2(self.BINS))
        new = (self.exponents == self.UNSET) & (largest > 0)
        self.exponents[new] = fitting[new]
        while (narrow := np.flatnonzero((largest > 0) & (fitting > self.exponents))).size:
            wide = self.counts[narrow].reshape(len(narrow), self.BINS, 2).sum(2)
            half = self.BINS // 2
            self.counts[narrow] = 0
            self.counts[narrow, half : half + self.BINS] = wide
            self.exponents[narrow] += 1
        place = np.floor(np.ldexp(values, -self.exponents[features])).astype(np.int64) + self.BINS
        np.add.at(self.counts, (features, place), 1)

    def of(self, feature: int) -> tuple[float, float, list[int]]:
        """Lower edge of the first bin that is used, width of a bin, and counts; a bin beside zero is always there."""
        used = np.flatnonzero(self.counts[feature])
        if not used.size:
            return 0.0, 1.0, []
        first, last = min(int(used[0]), self.BINS), max(int(used[-1]), self.BINS - 1)
        width = float(np.ldexp(1.0, int(self.exponents[feature])))
        return (first - self.BINS) * width, width, self.counts[feature, first : last + 1].tolist()
