"""How well what was measured agrees with what was predicted: rank correlation, slope, size, and how sure they are.

Intervals are 95 % percentile bootstrap intervals over the tested nodes. A draw is how often it takes each node: ranks,
sums and medians of a draw are those of the nodes with these multiplicities, so no draw is ever sorted.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
FEWEST = 3
LEVELS = (2.5, 97.5)
_CELLS = 1 << 20  # entries of a block of draws


def agreement(predicted: ArrayLike, measured: ArrayLike, *, seed: int = 0, draws: int = 2000) -> dict[str, Any]:
    """Figures of n predictions and what was measured, ready for JSON.

    Parameters
    ----------
    predicted, measured
        (n,) each. Pairs that are not finite are left out.
    seed, draws
        Of the bootstrap.

    Returns
    -------
    dict
        tested : pairs that count.
        spearman : rank correlation, ties at their mean rank; None where either side is constant.
        slope : of measured on predicted through the origin, `sum p m / sum p^2`; None where all predictions are 0.
        median_effect : median of |measured|.
        `<figure>_interval` : [low, high], 95 %.
        With fewer than 3 pairs there are no intervals and no rank correlation, None.
    """
    p, m = np.asarray(predicted, dtype=np.float64).ravel(), np.asarray(measured, dtype=np.float64).ravel()
    finite = np.isfinite(p) & np.isfinite(m)
    p, m = p[finite], m[finite]
    enough = len(p) >= FEWEST
    drawn = [(_spearman(p, m, counts), _slope(p, m, counts)) for counts in _draws(len(p), seed, draws if enough else 0)]
    spearman, slope = (np.concatenate([pair[i] for pair in drawn]) if drawn else np.zeros(0) for i in (0, 1))
    once = np.ones((1, len(p)))
    size = np.abs(m)
    return {
        "tested": len(p),
        "spearman": _number(_spearman(p, m, once)[0]) if enough else None,
        "spearman_interval": _interval(spearman),
        "slope": _number(_slope(p, m, once)[0]),
        "slope_interval": _interval(slope),
        "median_effect": float(np.median(size)) if len(size) else None,
        "median_effect_interval": median_interval(size, seed, draws),
    }


def median_interval(values: ArrayLike, seed: int = 0, draws: int = 2000) -> list[float] | None:
    """[low, high], 95 %, of the median of values (n,), not finite ones left out; None with fewer than 3."""
    given = np.asarray(values, dtype=np.float64).ravel()
    ordered = np.sort(given[np.isfinite(given)])
    n = len(ordered)
    if n < FEWEST:
        return None
    medians = []
    for counts in _draws(n, seed, draws):
        until = counts.cumsum(1)
        low, high = ((until > place).argmax(1) for place in ((n - 1) // 2, n // 2))
        medians.append((ordered[low] + ordered[high]) / 2)
    return _interval(np.concatenate(medians)) if medians else None


def _draws(n: int, seed: int, draws: int) -> Iterator[Floats]:
    """How often each draw takes each of n nodes, (some draws, n), block by block."""
    rng = np.random.default_rng(seed)
    size = max(1, _CELLS // max(n, 1))
    for start in range(0, draws, size):
        rows = min(size, draws - start)
        taken = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(taken.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def _ranks(x: Floats, counts: Floats) -> Floats:
    """Mean rank of each of x (n,) in samples that take them `counts` (B, n) times: (B, n)."""
    order = np.argsort(x, kind="stable")
    ordered = x[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    group = np.empty(len(x), dtype=np.int64)
    group[order] = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(x))))
    alike = np.add.reduceat(counts[:, order], starts, axis=1)
    return (alike.cumsum(1) - (alike - 1) / 2)[:, group]


def _spearman(x: Floats, y: Floats, counts: Floats) -> Floats:
    """(B,) Pearson's correlation of the ranks; NaN where a sample is constant."""
    if x.size == 0:
        return np.full(len(counts), np.nan)
    a, b = _ranks(x, counts), _ranks(y, counts)
    # Ranks add up to the same whatever the ties: their mean is (n + 1) / 2.
    middle = (counts.sum(1, keepdims=True) + 1) / 2
    a, b = a - middle, b - middle
    weighted = counts * a
    spread = np.sqrt((weighted * a).sum(1) * (counts * b * b).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = (weighted * b).sum(1) / np.where(spread > 0, spread, np.nan)
    return found.clip(-1.0, 1.0)


def _slope(p: Floats, m: Floats, counts: Floats) -> Floats:
    """(B,); NaN where every prediction of a sample is 0."""
    squares = counts @ (p * p)
    return (counts @ (p * m)) / np.where(squares > 0, squares, np.nan)


def _interval(values: Floats) -> list[float] | None:
    """The middle 95 % of what the draws gave; draws without a value are left out."""
    finite = values[np.isfinite(values)]
    return [float(value) for value in np.percentile(finite, LEVELS)] if len(finite) else None


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
