"""What is kept of many events, however they come: against sorting all of them, and counting all of them."""

from itertools import pairwise

import numpy as np
import pytest

from circuits.strongest import Events, Histograms, Strongest, coarse, draws


def drawn(n: int, n_features: int, seed: int) -> Events:
    """Random events, many of equal keys."""
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 50, n).astype(float)
    return Events(rng.integers(0, n_features, n), keys, rng.normal(size=n), np.arange(n), rng.integers(0, 9, n))


@pytest.mark.parametrize("batch", [1, 7, 400])
def test_the_strongest_of_any_batches(batch: int) -> None:
    """The first of equal keys, and fewer than k where there are fewer."""
    events, kept = drawn(400, 13, 0), Strongest(14, 5)
    for begin in range(0, 400, batch):
        some = events.take(np.arange(begin, min(begin + batch, 400)))
        kept.add(kept.strong(some))
    for feature in range(14):
        mine = np.flatnonzero(events.features == feature)
        best = mine[np.argsort(-events.keys[mine], kind="stable")][:5]
        there = np.isfinite(kept.keys[feature])
        assert kept.documents[feature][there].tolist() == events.documents[best].tolist()
        assert kept.values[feature][there].tolist() == events.values[best].tolist()
        assert kept.positions[feature][there].tolist() == events.positions[best].tolist()
        assert there.sum() == len(best)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e5])
def test_histograms_are_those_of_the_last_width(scale: float) -> None:
    """In any order of batches; negative values too; the largest value lies in the upper half of its side."""
    rng = np.random.default_rng(1)
    values = scale * rng.normal(size=500) ** 3
    counted = []
    for order in (np.argsort(np.abs(values)), np.argsort(-np.abs(values)), np.arange(500)):
        histograms = Histograms(2)
        for part in np.array_split(order, 9):
            histograms.add(np.ones(len(part), np.int64), values[part])
        counted.append(histograms.of(1))
        assert histograms.of(0) == (0.0, 1.0, [])
    assert counted[0] == counted[1] == counted[2]
    edge, width, counts = counted[0]
    edges = edge + width * np.arange(len(counts) + 1)
    expected = [int(((values >= low) & (values < high)).sum()) for low, high in pairwise(edges)]
    assert counts == expected
    assert sum(counts) == 500
    assert 16 * width <= np.abs(values).max() < 32 * width


def test_a_power_of_two_has_room() -> None:
    """The largest value at an edge of its bin."""
    for value in (1.0, -1.0, 32.0, -32.0):
        histograms = Histograms(1)
        histograms.add(np.zeros(1, np.int64), np.array([value]))
        edge, width, counts = histograms.of(0)
        assert sum(counts) == 1
        place = counts.index(1)
        assert edge + place * width <= value < edge + (place + 1) * width


def test_draws_are_fair_and_always_the_same() -> None:
    """Even over places and features, another for each, and the numbers that they have always been."""
    documents, positions = np.divmod(np.arange(100_000), 128)
    found = draws(documents, positions)
    assert len(np.unique(found)) == 100_000
    assert np.abs(np.histogram(found, 20, (0, 1))[0] - 5000).max() < 300
    assert abs(np.corrcoef(found, draws(documents, positions, 1))[0, 1]) < 0.02
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.02


def test_coarse_values_forget_rounding() -> None:
    """Values apart by float32's rounding become one, others stay apart."""
    values = np.array([0.1, -3.7, 1e5, 0.0])
    assert (coarse(values * (1 + 1e-8)) == coarse(values)).all()
    assert (np.abs(coarse(values) - values) <= np.abs(values) / 4096).all()
    assert (coarse(values[:3] * 1.001) != coarse(values[:3])).all()
