"""Why heads looked where they did, for the edges of a graph: which scores to explain, and their strongest pairs.

On an edge heads are weighted by their loadings: the heads with the largest ones are explained, until they carry
`COVERED` of the edge's absolute loading, at most `MOST` of them. Where attention is only frozen, the strongest first
and last hop of an edge are explained.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuits.assemble import table_numbers
from circuits.graph import (
    ID_PREFIXES,
    IDENTITY_HEAD,
    NAMED_CONSTANTS,
    OWN_HEAD,
    PAIR_FORMS,
    STAYS,
    Graph,
    Heads,
    Pairs,
    Scores,
)
from circuits.nodes import NodeTable
from circuits.qk_attribution import Explained, HeadStep, QKAttribution, Strongest
from circuits.replacements.formats.qk_format import QKReplacement
from circuits.replacements.qk_score import QKDictionary
from circuits.sweep import Progress, Sweep

COVERED, MOST = 0.8, 3
TOP = 10
# A part that is not told, and how it is written.
NOTHING, NO_NAME = -1 - len(NAMED_CONSTANTS), ""


def with_scores(
    graph: Graph,
    sweep: Sweep,
    qk: QKReplacement | None = None,
    *,
    edges: np.ndarray | None = None,
    top: int = TOP,
    progress: Progress | None = None,
) -> Graph:
    """The graph with the scores of the heads that carry its edges explained, and the worst ledger gap as metadata.

    Parameters
    ----------
    qk
        A trained QK diagonalization: scores are given in its features too.
    edges
        Only these edges; by default all.
    top
        How many pairs, and parts of each side, are kept of a score.
    """
    steps = edge_steps(graph, sweep, edges)
    table = _Collected(sweep.table, top)
    done = 0
    for explained in QKAttribution.of(sweep).explain(steps):
        table.add(explained, [] if qk is None else qk.of_layer(explained.steps[0].layer), sweep)
        done += len(explained.steps)
        if progress is not None:
            progress(done, len(steps))
    scores, pairs = table.tables()
    about: dict[str, Any] = {"scores": len(scores), "max_relative_gap": float(scores.gap.max(initial=0.0))}
    if sweep.linear.model.attention_soft_cap is not None:
        about["soft_cap"] = "not linear: the secant through the recorded score stands for it"
    return replace(graph, scores=scores, pairs=pairs, metadata={**graph.metadata, "qk": about})


def edge_steps(graph: Graph, sweep: Sweep, edges: np.ndarray | None = None) -> list[HeadStep]:
    """The heads to explain for a graph's edges, each once."""
    chosen = np.ones(len(graph.edges), dtype=bool)
    if edges is not None:
        chosen = np.zeros(len(graph.edges), dtype=bool)
        chosen[edges] = True
    found = []
    for heads, most in ((graph.heads, MOST), (graph.first_hops, 1), (graph.last_hops, 1)):
        rows = strongest_heads(heads if edges is None else heads.take(chosen[heads.edge]), most)
        owners = np.full(len(rows), -1)
        if (own := rows.head == OWN_HEAD).any():
            owners[own] = table_numbers(graph, sweep)[graph.edges.target[rows.edge[own]]]
        found.append(np.stack([rows.layer, rows.head, rows.query, rows.key, owners]).astype(np.int64))
    columns = np.concatenate(found, axis=1)
    if not columns.shape[1]:
        return []
    lowest = columns.min(axis=1, keepdims=True)
    shape = tuple(np.ptp(columns, axis=1) + 1)
    codes = np.sort(np.ravel_multi_index(tuple(columns - lowest), shape))
    steps = np.stack(np.unravel_index(codes[np.diff(codes, prepend=-1) > 0], shape)) + lowest
    return [HeadStep(*step) for step in steps.T.tolist()]


def strongest_heads(heads: Heads, most: int = MOST) -> Heads:
    """Of each edge the heads with the largest loadings: until they carry `COVERED` of it, at most `most`."""
    of_head = (heads.head != IDENTITY_HEAD) & (heads.head != STAYS) & (heads.layer >= 0)
    rows = np.flatnonzero(of_head)
    if (heads.edge[1:] < heads.edge[:-1]).any():
        rows = rows[np.argsort(heads.edge[rows], kind="stable")]
    if not len(rows):
        return heads.take(rows)
    edge, size = heads.edge[rows], np.abs(heads.weight[rows]).astype(np.float64)
    begins = np.flatnonzero(np.diff(edge, prepend=edge[0] - 1))
    counts = np.diff(begins, append=len(edge))
    left = COVERED * np.add.reduceat(size, begins)
    kept = []
    for _ in range(min(most, int(counts.max()))):
        largest = np.maximum.reduceat(size, begins)
        at = np.flatnonzero(size == np.repeat(np.where((left > 0) & (largest >= 0), largest, np.nan), counts))
        at = at[np.diff(edge[at], prepend=-1) != 0]
        kept.append(rows[at])
        left -= largest
        size[at] = -1.0
    return heads.take(np.sort(np.concatenate(kept)))


def part_names(table: NodeTable, sources: np.ndarray) -> np.ndarray:
    """Names of parts, of whatever shape: node ids, and those of constants; nothing for `NOTHING`."""
    there = np.zeros(len(table) - NOTHING, dtype=bool)
    there[sources - NOTHING] = True
    different = np.flatnonzero(there) + NOTHING
    nodes = different[different >= 0]
    columns = (table.kind, table.layer, table.feature, table.position)
    names = [
        NO_NAME if constant == NOTHING else NAMED_CONSTANTS[-1 - constant] for constant in different[different < 0]
    ]
    for kind, layer, feature, position in zip(*(column[nodes].tolist() for column in columns), strict=True):
        site = ID_PREFIXES[kind] + ("" if kind == "embedding" else str(layer))
        names.append(f"{site}_{'error' if feature < 0 else feature}_{position}")
    told: np.ndarray = np.array(names, dtype=np.str_)[there.cumsum()[sources - NOTHING] - 1]
    return told


class _Collected:
    """Gathers the columns of `Scores` and `Pairs`."""

    def __init__(self, table: NodeTable, top: int) -> None:
        self.table, self.top = table, top
        self.scores: list[tuple[np.ndarray, ...]] = []
        self.pairs: list[tuple[np.ndarray, ...]] = []
        self.count = 0
        # Forms from len(PAIR_FORMS) on are features of these dictionaries.
        self.dictionaries: list[str] = []

    def add(self, explained: Explained, qk: Sequence[QKDictionary], sweep: Sweep) -> None:
        """One block's scores, their strongest pairs and sides, and their parts in trained QK features."""
        steps = np.array([(s.layer, s.head, s.query, s.key, s.owner) for s in explained.steps]).T
        owner = part_names(self.table, np.where(steps[4] < 0, NOTHING, steps[4]))
        figures = (explained.scores, explained.attention, explained.relative, explained.lead, explained.gaps)
        self.scores.append((*steps[:4], owner, *(figure.cpu().numpy() for figure in figures)))
        pairs, leads = explained.strongest_pairs(self.top)
        queries, keys = explained.strongest_sides(self.top)
        for form, found in (("score", pairs), ("lead", leads), ("query", queries), ("key", keys)):
            self._add(form, found)
        for dictionary in qk:
            self._add_features(dictionary, explained, sweep)
        self.count += len(explained.steps)

    def _add(self, form: str, found: Strongest) -> None:
        weight = found.weight.cpu().numpy()
        row, at = np.nonzero(weight)
        sides = [side.cpu().numpy()[row, at] for side in (found.query, found.key)]
        place = found.place.cpu().numpy()[row, at]
        self.pairs.append((row + self.count, np.full(len(row), PAIR_FORMS.index(form)), *sides, place, weight[row, at]))

    def _add_features(self, dictionary: QKDictionary, explained: Explained, sweep: Sweep) -> None:
        """Scores in the features of a QK diagonalization, as parts of their leads."""
        of, block, recording = dictionary.of, explained.block, sweep.linear.recording
        mine = [i for i, step in enumerate(explained.steps) if step.head in of.heads]
        if not mine:
            return
        end = block.position + 1
        sites = (recording.queries[of.layer, :end].flatten(1), recording.keys[of.layer, :end].flatten(1))
        u, v = dictionary.features(*sites)
        loading = dictionary.head_weights[:, [of.heads.index(explained.steps[i].head) for i in mine]].T
        met = torch.einsum("fr,sfr->sf", u[-1], v)
        lead = (explained.lead_shares[mine].float() @ met) * loading
        weight, feature = (column.cpu().numpy() for column in _top(lead, self.top))
        row, at = np.nonzero(weight)
        number = np.array(mine)[row]
        features, places = feature[row, at], explained.key.cpu().numpy()[number]
        form = np.full(len(row), len(PAIR_FORMS) + len(self.dictionaries))
        self.dictionaries.append(dictionary.name)
        self.pairs.append((number + self.count, form, features, features, places, weight[row, at]))

    def tables(self) -> tuple[Scores, Pairs]:
        """What was gathered, pairs in the order of their scores."""
        if not self.scores:
            return Scores.empty(), Pairs.empty()
        scores = [np.concatenate(column) for column in zip(*self.scores, strict=True)]
        pairs = [np.concatenate(column) for column in zip(*self.pairs, strict=True)]
        order = np.lexsort((np.minimum(pairs[1], len(PAIR_FORMS) - 1), pairs[0]))
        number, form, query, key, place, weight = (column[order] for column in pairs)
        queries, keys = self._names(form, query, "key"), self._names(form, key, "query")
        forms = np.array([*PAIR_FORMS, *(["qk_feature"] * len(self.dictionaries))])[form]
        return Scores(*scores), Pairs(number, forms, queries, keys, place, weight)

    def _names(self, form: np.ndarray, parts: np.ndarray, other: str) -> np.ndarray:
        """Names of one side; nothing where only the other side is told."""
        of_qk = form >= len(PAIR_FORMS)
        names = part_names(self.table, np.where(of_qk | (form == PAIR_FORMS.index(other)), NOTHING, parts))
        if not of_qk.any():
            return names
        owners = np.array(self.dictionaries, dtype=object)[form[of_qk] - len(PAIR_FORMS)]
        told = names.astype(object)
        told[of_qk] = owners + "/" + parts[of_qk].astype(np.str_).astype(object)
        return told.astype(np.str_)


def _top(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest of each row by size, and where they are."""
    at = values.abs().topk(min(count, values.shape[1]), dim=1).indices
    return values.gather(1, at), at
