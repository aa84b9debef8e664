"""Which features are active together: correlations of their activations over a sample of a text's tokens.

    r(i, j) = (sum_t a_i a_j - n m_i m_j) / (n s_i s_j)        m: mean, s: standard deviation over the n tokens

Sums go over the pairs of features that are active at the same token, never over all features times all tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from circuits.strongest import Ints

BLOCK = 1 << 24  # products of two features' activations in memory at once
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sampled:
    """The active entries of a dictionary at the n tokens of a sample, sorted by token: (k,) each."""

    n_features: int
    tokens: Ints
    features: Ints
    values: Floats


def correlated(
    dictionaries: Sequence[Sampled], n_tokens: int, near: int, partners: Sequence[Sequence[int]]
) -> Iterator[tuple[int, Ints, Ints, Floats]]:
    """The features that each feature correlates with most, positive ones alone.

    Parameters
    ----------
    partners
        For each dictionary, the numbers of those that its features are compared with.

    Yields
    ------
    dictionary, features (n,), and (n, near) partners counted through `partners` one after the other, and correlations.
    """
    spreads = [_spread(one, n_tokens) for one in dictionaries]
    for number, one in enumerate(dictionaries):
        widths = [dictionaries[other].n_features for other in partners[number]]
        step = max(1, BLOCK // max(1, sum(widths)))
        for first in range(0, one.n_features, step):
            features = np.arange(first, min(first + step, one.n_features))
            table = np.concatenate(
                [
                    _correlations(one, dictionaries[other], features, spreads[number], spreads[other], n_tokens)
                    for other in partners[number]
                ],
                axis=1,
            )
            at = sum(widths[: list(partners[number]).index(number)])
            table[np.arange(len(features)), at + features] = 0.0
            best = torch.from_numpy(table).topk(min(near, table.shape[1]), dim=1)
            yield number, features, best.indices.numpy(), best.values.numpy()


def _spread(one: Sampled, n_tokens: int) -> tuple[Floats, Floats]:
    """Mean and standard deviation of every feature, (F,)."""
    mean = np.bincount(one.features, one.values, one.n_features) / max(n_tokens, 1)
    square = np.bincount(one.features, one.values**2, one.n_features) / max(n_tokens, 1)
    return mean, np.sqrt(np.maximum(square - mean**2, 0.0))


def _correlations(
    one: Sampled,
    other: Sampled,
    features: Ints,
    spread: tuple[Floats, Floats],
    other_spread: tuple[Floats, Floats],
    n_tokens: int,
) -> Floats:
    """(n, F') correlations of some features with all of another dictionary."""
    sums = np.zeros(len(features) * other.n_features)
    mine = np.flatnonzero((one.features >= features[0]) & (one.features <= features[-1]))
    starts = np.searchsorted(other.tokens, one.tokens[mine])
    counts = np.searchsorted(other.tokens, one.tokens[mine], side="right") - starts
    ends = np.cumsum(counts)
    for begin, end in _pieces(ends):
        some, count = mine[begin:end], counts[begin:end]
        partner = np.repeat(starts[begin:end] - (np.cumsum(count) - count), count) + np.arange(int(count.sum()))
        pair = np.repeat(one.features[some] - features[0], count) * other.n_features + other.features[partner]
        sums += np.bincount(pair, np.repeat(one.values[some], count) * other.values[partner], len(sums))
    mean, deviation = spread[0][features], spread[1][features]
    covariance = sums.reshape(len(features), -1) / max(n_tokens, 1) - mean[:, None] * other_spread[0]
    scale = deviation[:, None] * other_spread[1]
    return np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)


def _pieces(ends: Ints) -> Iterator[tuple[int, int]]:
    """Stretches of entries that have about `BLOCK` pairs together."""
    begin = 0
    while begin < len(ends):
        before = int(ends[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, before + BLOCK)))
        yield begin, end
        begin = end
