"""Columns as Python's own values, for the formats that write one row after the other."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from circuits.graph.graph import Graph
from circuits.graph.tables import Heads

# The tables of heads by the name that an edge's rows of them have in every format.
HEAD_TABLES = ("heads", "first_hops", "last_hops")
# Node columns that graphs of earlier versions lack: nan there.
LATER_COLUMNS = ("predicted", "measured")


def plain(values: npt.NDArray[Any]) -> list[Any]:
    """Python values of a column.

    A number in single precision keeps its own shortest digits, 0.1 and not 0.10000000149011612, from which single
    precision reads the same number back. A number that is not there (nan) becomes None.
    """
    if values.dtype == np.float32:
        numbers = [float(digits) for digits in values.astype(np.str_).tolist()]
    else:
        numbers = values.tolist()
    if values.dtype.kind != "f":
        return numbers
    return [None if number != number else number for number in numbers]


def loadings(graph: Graph, table: str = "heads") -> list[list[list[Any]]]:
    """The head loadings of each edge, or its hops.

    Args:
        graph: The graph.
        table: "heads", "first_hops" or "last_hops".

    Returns:
        For each of the m edges its rows of [layer, head, key position, query position, weight].
    """
    heads: Heads = getattr(graph, table)
    columns = [plain(getattr(heads, name)) for name in ("layer", "head", "key", "query", "weight")]
    rows = [list(row) for row in zip(*columns, strict=True)]
    first = np.searchsorted(heads.edge, np.arange(len(graph.edges) + 1)).tolist()
    return [rows[start:end] for start, end in pairwise(first)]
