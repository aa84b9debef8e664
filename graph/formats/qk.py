"""Explained scores as nested lists, for the formats that have such, and as Neuronpedia's schema has them on nodes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from circuits.graph.errors import GraphError
from circuits.graph.explained import PAIR_COLUMNS, PAIR_FORMS, SCORE_COLUMNS, Pairs, Scores
from circuits.graph.formats.rows import plain
from circuits.graph.graph import Graph

# Of each form: its key in the file, and the columns of `Pairs` that its rows have beside the weight.
FORM_ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "score": ("pairs", ("query_node", "key_node")),
    "lead": ("lead_pairs", ("query_node", "key_node", "key")),
    "query": ("query_side", ("query_node",)),
    "key": ("key_side", ("key_node",)),
    "qk_feature": ("qk_features", ("query_node",)),
}
# Kinds of nodes that viewers draw as features of attention.
ATTENTION_KINDS = ("attention_feature", "mtc_query", "mtc_key", "value_feature")
_STRONGEST = 10


def to_lists(graph: Graph) -> list[dict[str, Any]]:
    """One dictionary for each explained score: its columns, and the rows of its pairs by form.

    Example:
        >>> to_lists(graph)[0]  # doctest: +SKIP
        {"layer": 1, "head": 2, "query": 7, "key": 3, ..., "pairs": [["E_17_7", "0_5_3", 2.5]], "lead_pairs": ...}
    """
    scores = {name: plain(values) for name, values in graph.scores.columns().items()}
    pairs = {name: plain(values) for name, values in graph.pairs.columns().items()}
    ends = np.searchsorted(graph.pairs.score, np.arange(len(graph.scores) + 1)).tolist()
    found = []
    for index, (start, end) in enumerate(pairwise(ends)):
        told: dict[str, Any] = {name: values[index] for name, values in scores.items()}
        told |= {key: [] for key, _ in FORM_ROWS.values()}
        for row in range(start, end):
            key, columns = FORM_ROWS[pairs["form"][row]]
            told[key].append([*(pairs[name][row] for name in columns), pairs["weight"][row]])
        found.append(told)
    return found


def from_lists(lists: Sequence[dict[str, Any]]) -> tuple[Scores, Pairs]:
    """The inverse of `to_lists`.

    Raises:
        GraphError: A value has the wrong type.
        KeyError: A score lacks one of its columns.
        TypeError: A score is no dictionary, or a row no list.
        ValueError: A row has too many or too few values.
    """
    scores = {
        name: _typed(f"Scores.{name}", [told[name] for told in lists], dtype) for name, dtype in SCORE_COLUMNS.items()
    }
    rows: list[dict[str, Any]] = []
    for number, told in enumerate(lists):
        for form in PAIR_FORMS:
            key, columns = FORM_ROWS[form]
            for values in told.get(key, ()):
                row = {"query_node": "", "key_node": "", "key": told["key"], "score": number, "form": form}
                row |= dict(zip((*columns, "weight"), values, strict=True))
                if form == "qk_feature":
                    row["key_node"] = row["query_node"]
                rows.append(row)
    pairs = {name: _typed(f"Pairs.{name}", [row[name] for row in rows], dtype) for name, dtype in PAIR_COLUMNS.items()}
    return Scores(**scores), Pairs(**pairs)


def _typed(name: str, values: list[Any], dtype: type[np.generic]) -> np.ndarray[Any, Any]:
    """A column of a type; None becomes nan where there are numbers."""
    if issubclass(dtype, np.floating):
        values = [np.nan if value is None else value for value in values]
    if any(isinstance(value, str) != (dtype is np.str_) for value in values):
        raise GraphError(f"{name} has values of the wrong type; expected {dtype.__name__}.")
    return np.array(values, dtype=dtype)


def tracing_results(graph: Graph) -> dict[int, dict[str, list[list[Any]]]]:
    """What made the heads look where they did for each attention node, as Neuronpedia's `qk_tracing_results`.

    The pairs and both sides' sums of the scores that a node's incoming loadings name, each score weighted by its
    loading's share of the node's explained loadings, signed; the ten strongest of each.

    Returns:
        By index of the node, for nodes of `ATTENTION_KINDS` that have any.
    """
    if not len(graph.scores):
        return {}
    explained = graph.explained_by("heads")
    named: defaultdict[int, list[tuple[int, float]]] = defaultdict(list)
    columns = zip(graph.edges.target[graph.heads.edge].tolist(), graph.heads.weight.tolist(), explained, strict=True)
    for node, weight, scores in columns:
        named[node] += [(score, weight) for score in scores]
    ends = np.searchsorted(graph.pairs.score, np.arange(len(graph.scores) + 1)).tolist()
    found = {}
    for node, loadings in named.items():
        total = sum(abs(weight) for _, weight in loadings)
        if str(graph.nodes.kind[node]) in ATTENTION_KINDS and total > 0:
            sums: dict[str, defaultdict[tuple[str, ...], float]] = {
                form: defaultdict(float) for form in ("score", "query", "key")
            }
            for score, weight in loadings:
                for row in range(ends[score], ends[score + 1]):
                    _add_pair(graph.pairs, row, weight / total, sums)
            found[node] = {
                "pair_wise_contributors": _strongest(sums["score"]),
                "top_q_marginal_contributors": _strongest(sums["query"]),
                "top_k_marginal_contributors": _strongest(sums["key"]),
            }
    return found


def _add_pair(pairs: Pairs, row: int, share: float, sums: dict[str, defaultdict[tuple[str, ...], float]]) -> None:
    form = str(pairs.form[row])
    if form in sums:
        ends = (str(pairs.query_node[row]), str(pairs.key_node[row]))
        sums[form][tuple(end for end in ends if end)] += share * float(pairs.weight[row])


def _strongest(sums: dict[tuple[str, ...], float]) -> list[list[Any]]:
    order = sorted(sums, key=lambda names: (-abs(sums[names]), names))[:_STRONGEST]
    return [[*names, float(f"{sums[names]:.6g}")] for names in order]
