"""Where everything stands in the SVG: a column for each token, a row for each sort of node in each layer.

From below: embeddings, then for every layer key sides, where it has any, above them attention and then MLP, then
logits. All nodes of one row and position share a cell and are packed into lines; columns and rows are as large as
their fullest cell asks.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from circuits.graph.formats.svg_style import shortened, shown, text_width
from circuits.graph.graph import Graph
from circuits.graph.tables import KINDS, Float64

LEFT = 74.0
RIGHT = 26.0
LABEL_WIDTH = 92.0
SLANT = 45.0
LOGIT_SLOT = 21.0
_SORTS = {
    "embedding": "embedding",
    "value_feature": "key",
    "value_error": "key",
    "mtc_key": "key",
    "attention_feature": "attention",
    "mtc_query": "attention",
    "attention_error": "attention",
    "mlp_feature": "mlp",
    "mlp_error": "mlp",
    "block_error": "mlp",
    "logit": "logit",
}
_LEAST_LANE = 16.0
_NAMES = {"embedding": "tokens", "key": "key side", "attention": "attention", "mlp": "MLP", "logit": "output"}


@dataclass(frozen=True)
class Row:
    """One row of cells: its sort (a key of `_NAMES`), layer, upper edge, height, and its name in the picture."""

    sort: str
    layer: int
    top: float
    height: float
    name: str


@dataclass(frozen=True)
class Column:
    """One token's column: its position, left edge, width, and the token as it is written below it."""

    position: int
    left: float
    width: float
    label: str

    @property
    def centre(self) -> float:
        """The middle of the column."""
        return self.left + self.width / 2


@dataclass(frozen=True, eq=False)
class Layout:
    """The geometry of a picture, in pixels, y growing downward.

    Attributes:
        x: (n,) middle of each node.
        y: (n,) middle of each node.
        radius: (n,) half the height of each node.
        rows: Rows from the top down; empty when Graphviz placed the nodes.
        columns: Columns from the left; empty when Graphviz placed the nodes.
        width: Width of the part with nodes, row names included.
        height: Lower end of the part with nodes and token labels.
        slanted: Whether token labels are slanted, for want of room.
        slot: Room that a node has across.
    """

    x: Float64
    y: Float64
    radius: Float64
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    width: float
    height: float
    slanted: bool
    slot: float


@dataclass(frozen=True)
class _Room:
    """How much room to give, by the number of tokens: least column and row, and a node's slot across and down."""

    column: float
    row: float
    slot: float
    line: float


def _room(n_tokens: int) -> _Room:
    if n_tokens <= 8:
        return _Room(column=92.0, row=44.0, slot=38.0, line=24.0)
    if n_tokens <= 24:
        return _Room(column=44.0, row=34.0, slot=24.0, line=20.0)
    return _Room(column=20.0, row=26.0, slot=15.0, line=15.0)


def node_radius(graph: Graph) -> Float64:
    """(n,) half the height of each node: by influence for features, small for errors."""
    nodes = graph.nodes
    feature = nodes.is_feature
    largest = float(nodes.influence[feature].max()) if feature.any() else 0.0
    size = np.sqrt(np.clip(nodes.influence / largest, 0.0, 1.0)) if largest > 0 else np.zeros(len(nodes))
    radius: Float64 = np.where(feature, 3.2 + 3.0 * size, np.where(nodes.is_error, 2.3, 4.2))
    return radius


def columns_layout(graph: Graph, top: float) -> Layout:
    """Place all nodes in columns and rows.

    Args:
        graph: The graph to draw.
        top: Where the picture begins, under its title.
    """
    room = _room(len(graph.tokens))
    cells = _cells(graph)
    labels = [shortened(shown(token), LABEL_WIDTH) for token in graph.tokens]
    per_line = _per_line(cells, len(graph.tokens))
    columns, slanted = _columns(labels, per_line, room)
    rows = _rows(graph, cells, per_line, top, room)
    x, y = np.zeros(len(graph.nodes)), np.zeros(len(graph.nodes))
    for (sort, layer, position), members in cells.items():
        row = next(row for row in rows if (row.sort, row.layer) == (sort, layer))
        lines = [members[i : i + per_line[position]] for i in range(0, len(members), per_line[position])]
        for number, line in enumerate(lines):
            slot = max(room.slot, LOGIT_SLOT) if sort == "logit" else room.slot
            for place, index in enumerate(line):
                x[index] = columns[position].centre + (place - (len(line) - 1) / 2) * slot
                y[index] = row.top + row.height / 2 + (number - (len(lines) - 1) / 2) * room.line
    labels_height = 26.0
    if slanted:
        labels_height = 20.0 + max(text_width(label) for label in labels) * math.sin(math.radians(SLANT)) + 8.0
    return Layout(
        x=x,
        y=y,
        radius=node_radius(graph),
        rows=rows,
        columns=columns,
        width=columns[-1].left + columns[-1].width + RIGHT if columns else LEFT,
        height=rows[-1].top + rows[-1].height + labels_height,
        slanted=slanted,
        slot=room.slot,
    )


def _cells(graph: Graph) -> dict[tuple[str, int, int], list[int]]:
    """The nodes of each (sort, layer, position): features first, then errors, each by kind and feature index."""
    nodes = graph.nodes
    cells: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    sorts = [_SORTS[kind] for kind in nodes.kind.tolist()]
    places = list(zip(sorts, nodes.layer.tolist(), nodes.position.tolist(), strict=True))
    kinds = np.array([KINDS.index(kind) for kind in nodes.kind.tolist()])
    order = np.lexsort((np.arange(len(nodes)), nodes.feature, kinds, nodes.is_error)).tolist()
    for index in order:
        cells[places[index]].append(index)
    logits = [key for key in cells if key[0] == "logit"]
    for key in logits:
        cells[key].sort(key=lambda index: -nodes.target_weight[index])
    return cells


def _crossing(graph: Graph) -> list[int]:
    """For each layer how many edges its heads carry across columns: into attention nodes, and out of values."""
    nodes, edges = graph.nodes, graph.edges
    crosses = nodes.position[edges.source] != nodes.position[edges.target]
    out_of = crosses & np.isin(nodes.kind[edges.source], ("value_feature", "value_error"))
    into = crosses & ~out_of & np.isin(nodes.kind[edges.target], ("attention_feature", "mtc_query"))
    layers = np.concatenate([nodes.layer[edges.source[out_of]], nodes.layer[edges.target[into]]])
    counts: list[int] = np.bincount(layers, minlength=graph.n_layers).tolist()
    return counts


def _per_line(cells: dict[tuple[str, int, int], list[int]], n_tokens: int) -> list[int]:
    """For each column how many nodes stand in one line of a cell; logits always stand in one line."""
    per_line = [1] * n_tokens
    for (sort, _, position), members in cells.items():
        wanted = len(members) if sort == "logit" else math.ceil(math.sqrt(3.0 * len(members)))
        wanted = min(len(members), wanted)
        per_line[position] = max(per_line[position], wanted)
    return per_line


def _columns(labels: list[str], per_line: list[int], room: _Room) -> tuple[tuple[Column, ...], bool]:
    columns, left = [], LEFT
    for position, label in enumerate(labels):
        width = max(room.column, per_line[position] * room.slot + 0.5 * room.slot)
        columns.append(Column(position, left, width, label))
        left += width
    slanted = any(text_width(column.label) > column.width - 6.0 for column in columns)
    return tuple(columns), slanted


def _rows(
    graph: Graph, cells: dict[tuple[str, int, int], list[int]], per_line: list[int], top: float, room: _Room
) -> tuple[Row, ...]:
    """Rows from the top down, with a lane for crossing edges below attention; a row without nodes is thin.

    A layer without key sides has no row for them.
    """
    keyed = {layer for sort, layer, _ in cells if sort == "key"}
    sorts = [("logit", graph.n_layers)]
    for layer in reversed(range(graph.n_layers)):
        sorts += [("mlp", layer), ("attention", layer), *([("key", layer)] if layer in keyed else [])]
    blocks = _only_blocks(graph)
    lines: dict[tuple[str, int], int] = defaultdict(int)
    crossing = _crossing(graph)
    for (sort, layer, position), members in cells.items():
        needed = math.ceil(len(members) / per_line[position])
        lines[sort, layer] = max(lines[sort, layer], needed)
    rows = []
    for sort, layer in [*sorts, ("embedding", -1)]:
        height = 12.0
        if lines[sort, layer] or sort == "embedding":
            height = max(room.row, lines[sort, layer] * room.line + 14.0)
        rows.append(Row(sort, layer, top, height, "block" if sort == "mlp" and layer in blocks else _NAMES[sort]))
        top += height
        if sort == "attention":
            top += max(_LEAST_LANE if layer in keyed else 0.0, min(110.0, 5.0 * math.sqrt(crossing[layer])))
    return tuple(rows)


def _only_blocks(graph: Graph) -> set[int]:
    """The layers that a multitoken transcoder stands for as a whole, so that the row of the MLP is the block's."""
    nodes = graph.nodes
    mlp = np.isin(nodes.kind, ("mlp_feature", "mlp_error"))
    return set(nodes.layer[nodes.kind == "block_error"].tolist()) - set(nodes.layer[mlp].tolist())
