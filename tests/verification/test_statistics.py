"""Figures of agreement on data whose answers are known."""

import json
import time

import numpy as np
import pytest
from scipy import stats

from circuits.statistics import agreement, median_interval


def noisy(rng: np.random.Generator, n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Predictions, and measurements that are 0.7 of them plus noise of the same spread."""
    predicted = rng.normal(size=n)
    return predicted, 0.7 * predicted + rng.normal(size=n)


def test_perfect() -> None:
    """What is measured is half of what is predicted: correlation 1, slope 1/2, and nothing is uncertain about them."""
    predicted = np.array([-3.0, 0.5, 1.0, 2.0, 8.0])
    found = agreement(predicted, predicted / 2)
    assert found["tested"] == 5
    assert found["spearman"] == pytest.approx(1.0, abs=1e-12)
    assert found["spearman_interval"] == pytest.approx([1.0, 1.0], abs=1e-12)
    assert found["slope"] == pytest.approx(0.5, abs=1e-12)
    assert found["slope_interval"] == pytest.approx([0.5, 0.5], abs=1e-12)
    assert found["median_effect"] == 1.0
    low, high = found["median_effect_interval"]
    assert (low, high) == (0.25, 4.0)


def test_reversed() -> None:
    """The order turned round by a curve: correlation -1, slope by hand."""
    predicted = np.array([1.0, 2.0, 3.0, 4.0])
    measured = np.array([0.0, -1.0, -10.0, -20.0])
    found = agreement(predicted, measured)
    assert found["spearman"] == pytest.approx(-1.0, abs=1e-12)
    assert found["slope"] == pytest.approx(-(2 + 30 + 80) / 30, abs=1e-12)
    assert found["median_effect"] == 5.5


@pytest.mark.parametrize("n", [3, 4, 11, 50])
def test_ties_as_scipy(n: int) -> None:
    """Ties on both sides count at their mean rank, as scipy has it."""
    rng = np.random.default_rng(n)
    predicted = np.array([0.0, 1.0, *rng.integers(4, size=n - 2)])
    measured = np.array([1.0, 0.0, *rng.integers(4, size=n - 2)])
    assert agreement(predicted, measured)["spearman"] == pytest.approx(
        stats.spearmanr(predicted, measured).statistic, abs=1e-12
    )


def test_draws_are_samples() -> None:
    """Each figure's interval is that of scipy and numpy on the nodes that the draws really take, ties and all."""
    rng = np.random.default_rng(5)
    predicted, measured = (np.round(values, 1) for values in noisy(rng, 20))
    found = agreement(predicted, measured, seed=9, draws=200)
    taken = np.random.default_rng(9).integers(20, size=(200, 20))
    samples = [(predicted[row], measured[row]) for row in taken]
    expected = {
        "spearman": [stats.spearmanr(p, m).statistic for p, m in samples],
        "slope": [(p @ m) / (p @ p) for p, m in samples],
    }
    for name, values in expected.items():
        assert found[f"{name}_interval"] == pytest.approx(np.percentile(values, (2.5, 97.5)).tolist(), abs=1e-10)
    order = np.sort(np.abs(measured))
    medians = [np.median(order[row]) for row in taken]
    assert found["median_effect_interval"] == pytest.approx(np.percentile(medians, (2.5, 97.5)).tolist(), abs=1e-12)


def test_intervals_cover() -> None:
    """Of 200 noisy experiments about 95 % have the true slope, and the median of the population, inside."""
    rng = np.random.default_rng(0)
    slopes = medians = 0
    for seed in range(200):
        predicted, measured = noisy(rng)
        low, high = agreement(predicted, measured, seed=seed, draws=400)["slope_interval"]
        slopes += low <= 0.7 <= high
        interval = median_interval(rng.exponential(size=41), seed, 400)
        assert interval is not None
        medians += interval[0] <= np.log(2) <= interval[1]
    assert 180 <= slopes <= 197
    assert 180 <= medians <= 199


def test_same_seed() -> None:
    """The same seed gives the same figures, another one other intervals and the same rest; blocks of draws add up."""
    predicted, measured = noisy(np.random.default_rng(1))
    first, again, other = (agreement(predicted, measured, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first["spearman"] == other["spearman"]
    assert first["spearman_interval"] != other["spearman_interval"]
    many = agreement(*noisy(np.random.default_rng(1), 3000), draws=900)  # more than one block
    assert many["slope_interval"][0] < many["slope"] < many["slope_interval"][1]


@pytest.mark.parametrize(("predicted", "measured"), [([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]), ([1, 2, 3], [2, 2, 2])])
def test_constants(predicted: list[float], measured: list[float]) -> None:
    """A side that is constant has no rank correlation, and no interval of one; the slope is there."""
    found = agreement(predicted, measured)
    assert found["spearman"] is None
    assert found["spearman_interval"] is None
    assert found["slope"] == pytest.approx(np.dot(predicted, measured) / np.dot(predicted, predicted), abs=1e-12)
    assert found["median_effect"] == 2.0


def test_nothing_is_not_a_number() -> None:
    """Pairs that are not finite are left out; too few, or no predictions but 0, leave None, never NaN."""
    nan, infinite = float("nan"), float("inf")
    found = agreement([1.0, nan, 2.0, 3.0, 4.0, 5.0], [1.0, 5.0, 2.0, nan, infinite, 6.0])
    assert found["tested"] == 3
    assert found == agreement([1.0, 2.0, 5.0], [1.0, 2.0, 6.0])
    empty = agreement([], [])
    assert empty.pop("tested") == 0
    assert set(empty.values()) == {None}
    two = agreement([1.0, 2.0], [2.0, 4.0])
    assert two["slope"] == 2.0
    assert two["median_effect"] == 3.0
    assert [two["spearman"], two["slope_interval"], two["median_effect_interval"]] == [None, None, None]
    still = agreement([0.0, 0.0, 0.0], [1.0, 2.0, 3.0])
    assert still["slope"] is None
    assert still["slope_interval"] is None
    for figures in (found, empty, two, still):
        json.dumps(figures, allow_nan=False)


def test_fast() -> None:
    """2,000 draws of 50 nodes take well under 0.2 s (best of three, for others share the machine)."""
    predicted, measured = noisy(np.random.default_rng(2), 50)
    took = []
    for _ in range(3):
        start = time.perf_counter()
        agreement(predicted, measured)
        took.append(time.perf_counter() - start)
    assert min(took) < 0.2
