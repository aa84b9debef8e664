"""Edges of the SVG: which are drawn, along which curve, and where there is room for a name.

An edge through attention rises in its source's column and crosses to its target's column just below the layer
whose heads carried it, lower the farther it goes, so that edges of one layer fan out. What leaves a value is carried
by the heads of its own layer: it crosses at once and rises in its target's column. An edge within one column bends a
little, so that it does not run through other nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from circuits.graph.formats.rows import HEAD_TABLES, loadings, plain
from circuits.graph.formats.svg_layout import Layout
from circuits.graph.graph import Graph
from circuits.graph.influence import shares
from circuits.graph.pruning import edge_scores

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """One edge as it is drawn: its place among the edges, its four Bézier points, and what its look says.

    `crosses` says that it goes between columns, or from the key side to the query side of a feature.
    """

    edge: int
    points: tuple[Point, Point, Point, Point]
    weight: float
    share: float
    score: float
    heads: list[list[Any]]
    crosses: bool
    first_hops: list[list[Any]]
    last_hops: list[list[Any]]

    def at(self, t: float) -> Point:
        """The point on the curve at t from 0, its source, to 1, its target."""
        factors = ((1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3)
        x = sum(factor * point[0] for factor, point in zip(factors, self.points, strict=True))
        y = sum(factor * point[1] for factor, point in zip(factors, self.points, strict=True))
        return x, y

    @property
    def path(self) -> str:
        """The curve in the language of SVG paths."""
        (a, b), *others = self.points
        return f"M{a:.1f} {b:.1f}C" + " ".join(f"{x:.1f} {y:.1f}" for x, y in others)


def curves(graph: Graph, layout: Layout, limit: int) -> list[Curve]:
    """The edges to draw, weakest first so that the strongest lie on top.

    Args:
        graph: The graph to draw.
        layout: Where its nodes stand.
        limit: Draw at most so many, those with the highest scores (see `circuits.graph.pruning`).
    """
    edges, nodes = graph.edges, graph.nodes
    scores = edge_scores(nodes, edges)
    part = shares(len(nodes), edges.target, edges.weight)
    weights = plain(edges.weight)
    heads, first, last = (loadings(graph, table) for table in HEAD_TABLES)
    strongest = np.argsort(-scores, kind="stable")[:limit]
    drawn = []
    for edge in strongest[::-1].tolist():
        source, target = int(edges.source[edge]), int(edges.target[edge])
        crosses = bool(nodes.position[source] != nodes.position[target] or nodes.kind[source] == "mtc_key")
        points = _points(graph, layout, edge)
        numbers = weights[edge], float(part[edge]), float(scores[edge])
        drawn.append(Curve(edge, points, *numbers, heads[edge], crosses, first[edge], last[edge]))
    return drawn


def _points(graph: Graph, layout: Layout, edge: int) -> tuple[Point, Point, Point, Point]:
    source, target = int(graph.edges.source[edge]), int(graph.edges.target[edge])
    position = graph.nodes.position[target]
    x1, y1 = float(layout.x[source]), float(layout.y[source] - layout.radius[source])
    x2, y2 = float(layout.x[target]), float(layout.y[target] + layout.radius[target])
    rise = y1 - y2
    middle = layout.columns[int(position)].centre if layout.columns else x1
    if graph.nodes.position[source] != position:
        far = min(1.0, abs(x2 - x1) / layout.width)
        if graph.nodes.kind[source] in ("value_feature", "value_error"):
            above_source = min((0.3 + 0.5 * far) * rise, 40.0 + 30.0 * far)
            return (x1, y1), (x1, y1 - above_source), (x2, y1 - above_source - 0.15 * rise), (x2, y2)
        below_target = min((0.3 + 0.5 * far) * rise, 60.0 + 40.0 * far)
        return (x1, y1), (x1, y1 - (0.85 - 0.45 * far) * rise), (x2, y2 + below_target), (x2, y2)
    beside = (x1 + x2) / 2 - middle
    outward = 1 if beside > 1.0 or (abs(beside) <= 1.0 and edge % 2) else -1
    bend = outward * min(0.12 * rise, 1.2 * layout.slot) if rise > 60.0 else 0.0
    if graph.nodes.kind[source] == "mtc_key":
        bend = outward * min(0.5 * rise, 0.6 * layout.slot)
    return (x1, y1), (x1 + bend, y1 - 0.4 * rise), (x2 + bend, y2 + 0.4 * rise), (x2, y2)


@dataclass
class Labels:
    """Rectangles that are taken, so that no label covers another or a node."""

    taken: list[tuple[float, float, float, float]] = field(default_factory=list)

    def place(self, x: float, y: float, width: float, height: float) -> bool:
        """Take the rectangle around a middle if all of it is free.

        Returns:
            Whether it was free.
        """
        left, upper, right, lower = x - width / 2, y - height / 2, x + width / 2, y + height / 2
        for other in self.taken:
            if left < other[2] and right > other[0] and upper < other[3] and lower > other[1]:
                return False
        self.taken.append((left, upper, right, lower))
        return True


def around_nodes(layout: Layout) -> Labels:
    """The rectangles of all nodes as taken."""
    labels = Labels()
    for x, y, radius in zip(layout.x.tolist(), layout.y.tolist(), layout.radius.tolist(), strict=True):
        labels.taken.append((x - radius - 1, y - radius - 1, x + radius + 1, y + radius + 1))
    return labels
