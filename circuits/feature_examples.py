"""The second pass: the activations around the places that were chosen, and how features move there.

A window of a feature that stays shows the place at two thirds of its width. One of a multitoken transcoder's feature
holds the place that it is read at and, where both have room, the one that it moves to most. There and with patterns of
a feature's own:

    moves[key, query] = P_f[query, key] a_f[key]        and over the keys they add up to the query's activation

(for patterns of a feature's own, to its pre-activation less the encoder's bias; `a_f[key]` is then what the encoder
reads at the key, which has no gate). Attention leaks a little of everything to everywhere, so the query side is told
where it has at least `TOLD` of the window's strongest activation, and a move where it has `SMALL` of it; all other keys
of a told query, those before the window among them, count together as key -1. All numbers are rounded to the third
significant digit of the largest beside them.

Letters of shapes: S positions of a document, W of a window, H heads, r rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from circuits.feature_gathering import Chosen, group_name
from circuits.feature_inputs import Documents
from circuits.feature_records import rounded, sparse
from circuits.replacements.dictionary import Dictionary
from circuits.replacements.movement import HeadLoading, OwnAttention
from circuits.strongest import Ints

TOLD, SMALL = 0.2, 0.05
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Window:
    """Positions of a document that an example shows."""

    start: int
    length: int

    @property
    def span(self) -> slice:
        return slice(self.start, self.start + self.length)


def examples(
    dictionary: Dictionary, chosen: Chosen, ran: Documents, numbers: Sequence[int], context: int
) -> Iterator[tuple[int, int, list[Any]]]:
    """Examples in the documents that were run, which have these ascending numbers: (feature, number, example)."""
    place = np.searchsorted(numbers, chosen.documents)
    place[place == len(numbers)] = 0
    here = np.flatnonzero(np.asarray(numbers)[place] == chosen.documents)
    if not len(here):
        return
    acting = _Acting(dictionary, ran)
    for i in here.tolist():
        feature, row = int(chosen.features[i]), int(place[i])
        window, shown = acting.example(feature, row, int(chosen.positions[i]), context)
        head = [group_name(int(chosen.groups[i])), int(chosen.documents[i]), window.start, window.length]
        yield feature, int(chosen.numbers[i]), head + shown


class _Acting:
    """The activations of one dictionary on documents, by feature and document."""

    def __init__(self, dictionary: Dictionary, ran: Documents) -> None:
        self.dictionary, self.ran = dictionary, ran
        active = ran.encode(dictionary)
        if dictionary.moved_by is None:
            active = active.take(ran.counted.flatten()[active.positions])
        self.width = int(ran.mask.shape[1])
        places = active.positions.cpu().numpy()
        keys = active.features.cpu().numpy() * ran.mask.numel() + places
        order = np.argsort(keys)
        self.keys, self.places = keys[order], places[order] % self.width
        self.values: Floats = active.activations.double().cpu().numpy()[order]
        directions = None if active.directions is None else active.directions.double().cpu().numpy()[order]
        self.directions: Floats | None = directions
        self.patterns = lru_cache(maxsize=1)(self._patterns)

    def example(self, feature: int, row: int, position: int, context: int) -> tuple[Window, list[Any]]:
        """The window around a place, and what is shown of it."""
        length = len(self.ran.documents[row])
        values, directions = self._values(feature, row, length)
        moved_by = self.dictionary.moved_by
        if moved_by is None:
            window = _window(position - 2 * context // 3, context, length)
            return window, [_told(values[window.span])]
        if isinstance(moved_by, HeadLoading):
            pattern, sent = self._carried(feature, row, moved_by), values
            query = position + int(np.abs(pattern[position:, position]).argmax())
            span = query - position + 1 if query - position < context - 1 else context // 2
            window = _window(position - max(1, (context - span) // 3), context, length)
            vectors = values[:, None] * (np.ones((length, 1)) if directions is None else directions)
        else:
            pattern, vectors = self._own(feature, row, moved_by)
            window = _window(position - 2 * context // 3, context, length)
            along = vectors[:, 0] if directions is None else vectors @ directions[position]
            sent = along
        moved = pattern[window.span] @ vectors  # [W, r]
        gated = isinstance(moved_by, OwnAttention)
        queries = values[window.span] if gated else moved[:, 0] if directions is None else np.linalg.norm(moved, axis=1)
        towards = directions[window.span] if gated and directions is not None else moved
        strong = np.abs(queries) >= TOLD * np.abs(queries).max(initial=0.0)
        queries = np.where(strong, queries, 0.0)
        return window, [_told(sent[window.span]), _told(queries), _moves(pattern, vectors, queries, towards, window)]

    def _values(self, feature: int, row: int, length: int) -> tuple[Floats, Floats | None]:
        """Activations (S,) of a feature on a document, and its directions (S, r)."""
        first = feature * self.ran.mask.numel() + row * self.width
        found = slice(*np.searchsorted(self.keys, (first, first + self.width)).tolist())
        values = np.zeros(length)
        values[self.places[found]] = self.values[found]
        if self.directions is None:
            return values, None
        directions = np.zeros((length, self.dictionary.rank))
        directions[self.places[found]] = self.directions[found]
        return values, directions

    def _patterns(self, row: int) -> Floats:
        """The patterns that carry features of a document, (H or G, S, S)."""
        length, moved_by = len(self.ran.documents[row]), self.dictionary.moved_by
        if isinstance(moved_by, OwnAttention):
            x = self.ran.inputs(self.dictionary)[row, :length]
            return moved_by.patterns(x.to(moved_by.W_q)).double().cpu().numpy()
        kept = self.ran.kept[f"pattern.{self.dictionary.layer}"][row, :, :length, :length]
        return kept.double().cpu().numpy()

    def _carried(self, feature: int, row: int, moved_by: HeadLoading) -> Floats:
        """`P_f` (S, S) of a multitoken transcoder's feature."""
        *heads, identity = moved_by.weights[feature].double().tolist()
        patterns = self.patterns(row)
        mixed: Floats = np.tensordot(np.array(heads), patterns, 1)
        mixed[np.diag_indices(len(mixed))] += identity
        return mixed

    def _own(self, feature: int, row: int, moved_by: OwnAttention) -> tuple[Floats, Floats]:
        """A feature's own pattern (S, S), and what its encoder reads at every key, (S, r)."""
        x = self.ran.inputs(self.dictionary)[row, : len(self.ran.documents[row])]
        first = feature * self.dictionary.rank
        rows = self.dictionary.encoder.rows(torch.arange(first, first + self.dictionary.rank))
        read = (x.to(rows) @ rows.T).double().cpu().numpy()
        return self.patterns(row)[int(moved_by.group[feature])], read


def _window(start: int, context: int, length: int) -> Window:
    """A window of `context` positions, fewer in a short document, from `start` on or where it fits."""
    width = min(context, length)
    return Window(max(0, min(start, length - width)), width)


def _told(values: Floats) -> list[float]:
    """Rounded values as [offset, value, ...]."""
    return sparse(rounded(values.tolist(), float(np.abs(values).max(initial=0.0))))


def _moves(pattern: Floats, vectors: Floats, queries: Floats, towards: Floats, window: Window) -> list[Any]:
    """[key, query, weight, ...] of the queries that are told; key -1 is all that are not told."""
    strongest = float(np.abs(queries).max(initial=0.0))
    sizes = np.linalg.norm(towards, axis=1)
    flat: list[Any] = []
    for query in np.flatnonzero(queries).tolist():
        at = window.start + query
        # A feature of rank one keeps its sign; of one with more rows, what goes along the query's direction counts.
        along = vectors[:, 0] if vectors.shape[1] == 1 else vectors @ (towards[query] / max(sizes[query], 1e-300))
        parts = pattern[at] * along
        inside = parts[window.start : at + 1]
        told = np.where(np.abs(inside) >= SMALL * strongest, inside, 0.0)
        weights = [float(parts.sum() - told.sum()), *told.tolist()]
        for key, weight in enumerate(rounded(weights, strongest), -1):
            if weight:
                flat += [key, query, weight]
    return flat


def documents_of(chosen: Sequence[Chosen]) -> Ints:
    """The documents that examples are in, ascending."""
    return np.unique(np.concatenate([one.documents for one in chosen] or [np.zeros(0, np.int64)]))
