"""The parts of the SVG: rows and columns, edges, nodes, names, title and legend, each as lines of XML."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np

from circuits.graph.formats.rows import plain
from circuits.graph.formats.svg_edges import Curve, Labels
from circuits.graph.formats.svg_layout import SLANT, Layout
from circuits.graph.formats.svg_style import escaped, shortened, shown, text_width
from circuits.graph.formats.text import heads_text, hops_text, strongest_head
from circuits.graph.graph import Graph

_NAMED_EDGES = 14
_NAMED_NODES = 60
_ROOMY = 20.0


def text(x: float, y: float, content: str, classes: str = "", extra: str = "") -> str:
    """A text element; the content is escaped here."""
    look = f' class="{classes}"' if classes else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{look}{extra}>{escaped(content)}</text>'


def frame(layout: Layout, width: float) -> list[str]:
    """Bands and names of the layers, and a faint line where each token's stream runs."""
    parts = []
    for row in layout.rows:
        middle = row.top + row.height / 2 + 3.0
        if row.sort == "mlp" and row.layer % 2 == 0:
            height = max(r.top + r.height for r in layout.rows if r.layer == row.layer) - row.top
            parts.append(f'<rect class="band" x="0" y="{row.top:.1f}" width="{width:.1f}" height="{height:.1f}"/>')
        if row.height > 12.0:
            parts.append(text(62, middle, row.name, "small quiet end"))
        if row.sort == "mlp":
            parts.append(text(8, row.top + row.height + 3.5, f"L{row.layer}"))
    if layout.rows:
        top, bottom = layout.rows[0], layout.rows[-1]
        ends = f'y1="{top.top + top.height:.1f}" y2="{bottom.top + bottom.height / 2:.1f}"'
        for column in layout.columns:
            x = f"{column.centre:.1f}"
            parts.append(f'<line class="stream" x1="{x}" x2="{x}" {ends}/>')
    return parts


def edges(graph: Graph, drawn: list[Curve]) -> list[str]:
    """All drawn edges, each with its numbers as a tooltip."""
    names = graph.node_ids()
    strongest = max((curve.score for curve in drawn), default=1.0) or 1.0
    parts = []
    for curve in drawn:
        source, target = names[graph.edges.source[curve.edge]], names[graph.edges.target[curve.edge]]
        classes = "edge " + ("positive" if curve.weight >= 0 else "negative")
        classes += " frozen" if curve.crosses and not curve.heads else ""
        opacity = 0.16 + 0.74 * (curve.score / strongest) ** 0.5
        width = 0.4 + 3.0 * curve.share**0.8
        parts.append(
            f'<path class="{classes}" d="{curve.path}" stroke-width="{width:.2f}" stroke-opacity="{opacity:.2f}">'
            f"<title>{escaped(_edge_tooltip(curve, source, target))}</title></path>"
        )
    return parts


def _edge_tooltip(curve: Curve, source: str, target: str) -> str:
    told = f"{source} → {target} · weight {curve.weight:+.4g} · {curve.share:.1%} of the target's input"
    told += f" · heads {heads_text(curve.heads, 8)}" if curve.heads else ""
    hops = hops_text(curve.first_hops, curve.last_hops, 5)
    return f"{told} · {hops}" if hops else told


def nodes(graph: Graph, layout: Layout) -> list[str]:
    """All nodes, each with its numbers as a tooltip."""
    names = graph.node_ids()
    columns = {name: plain(values) for name, values in graph.nodes.columns().items()}
    parts = []
    for index, name in enumerate(names):
        node = {key: values[index] for key, values in columns.items()}
        x, y, r = float(layout.x[index]), float(layout.y[index]), float(layout.radius[index])
        title = f"<title>{escaped(_node_tooltip(node, name, graph.tokens))}</title>"
        parts.append(shape(node["kind"], x, y, r, title))
    return parts


def shape(kind: str, x: float, y: float, r: float, title: str = "") -> str:
    """The sign of one kind of node.

    A circle for MLP, a diamond for attention, a hexagon for values, a square for tokens, logits and whole blocks; of a
    multitoken transcoder a triangle that points up for the key side and down for the query side.
    """
    classes = f'class="node {kind}"'
    if kind.startswith(("mtc", "value")):
        side = 1.25 * r if kind == "mtc_query" else -1.25 * r
        return f'<path {classes} d="{_outline(kind, x, y, side, 1.15 * r)}">{title}</path>'
    if kind.startswith("mlp"):
        return f'<circle {classes} cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}">{title}</circle>'
    if kind.startswith("attention"):
        r *= 1.2
        corners = f"M{x:.1f} {y - r:.1f}l{r:.1f} {r:.1f} {-r:.1f} {r:.1f} {-r:.1f} {-r:.1f}z"
        return f'<path {classes} d="{corners}">{title}</path>'
    corner = f'x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r:.1f}" height="{2 * r:.1f}"'
    round_by = 0.3 if kind == "block_error" else 1.5
    return f'<rect {classes} {corner} rx="{round_by}">{title}</rect>'


def _outline(kind: str, x: float, y: float, side: float, r: float) -> str:
    """A triangle whose tip lies `side` below its middle, or a hexagon of outer radius r."""
    if kind.startswith("mtc"):
        return f"M{x:.1f} {y + side:.1f}L{x + abs(side):.1f} {y - 0.75 * side:.1f}H{x - abs(side):.1f}z"
    half, wide = 0.5 * r, 0.87 * r
    corners = f"l{wide:.1f} {half:.1f} 0 {r:.1f} {-wide:.1f} {half:.1f} {-wide:.1f} {-half:.1f} 0 {-r:.1f}z"
    return f"M{x:.1f} {y - r:.1f}{corners}"


def _node_tooltip(node: dict[str, Any], name: str, tokens: tuple[str, ...]) -> str:
    where = f"layer {node['layer']}, " if node["kind"] not in ("embedding", "logit") else ""
    told = [
        f"{node['kind'].replace('_', ' ')} {name}",
        f"{where}position {node['position']} {_quote(tokens[node['position']])}",
    ]
    if node["label"]:
        told.append(_quote(node["label"]))
    if node["dictionary"]:
        told.append(f"{node['dictionary']} feature {node['feature']}")
    for key in ("probability", "activation", "pre_activation", "bias"):
        if node[key] is not None:
            told.append(f"{key.replace('_', '-')} {node[key]:.4g}")
    told.append(f"influence {node['influence']:.4g} (cumulative {node['cumulative_influence']:.3f})")
    tested = [f"{key} {node[key]:+.3g}" for key in ("predicted", "measured") if node[key] is not None]
    if tested:
        told.append(f"change of the target without it: {', '.join(tested)}")
    return " · ".join(told)


def _quote(token: str) -> str:
    return json.dumps(token, ensure_ascii=False)


def token_labels(graph: Graph, layout: Layout) -> list[str]:
    """The prompt's tokens below their columns, with their positions; without columns below their nodes."""
    parts: list[str] = []
    if not layout.rows:
        for index in np.flatnonzero(graph.nodes.kind == "embedding").tolist():
            label = shortened(shown(graph.tokens[graph.nodes.position[index]]), 48.0)
            parts.append(text(float(layout.x[index]), float(layout.y[index]) + 15.0, label, "halo middle"))
        return parts
    bottom = layout.rows[-1].top + layout.rows[-1].height
    for column in layout.columns:
        x = column.centre
        parts.append(text(x, bottom - 1.0, str(column.position), "tiny quiet middle"))
        if layout.slanted:
            turned = f' transform="rotate({-SLANT:.0f} {x + 3:.1f} {bottom + 10:.1f})"'
            parts.append(text(x + 3, bottom + 10, column.label, "end", turned))
        else:
            parts.append(text(x, bottom + 13, column.label, "middle"))
    return parts


def logit_labels(graph: Graph, layout: Layout) -> list[str]:
    """The predicted tokens above their nodes, slanted, with their probabilities."""
    parts = []
    for index, caption in logit_captions(graph):
        x, y = float(layout.x[index]) + 2.0, float(layout.y[index]) - 9.0
        parts.append(text(x, y, caption, "halo", f' transform="rotate({-SLANT:.0f} {x:.1f} {y:.1f})"'))
    return parts


def logit_captions(graph: Graph) -> list[tuple[int, str]]:
    """For each logit its index and its token with the probability."""
    captions = []
    for index, kind in enumerate(graph.nodes.kind.tolist()):
        if kind == "logit":
            probability = float(graph.nodes.probability[index])
            number = "" if probability != probability else f" {probability:.2f}"
            captions.append((index, shortened(shown(str(graph.nodes.label[index])), 84.0) + number))
    return captions


def head_names(drawn: list[Curve], labels: Labels) -> list[str]:
    """The strongest head on the strongest edges through attention, wherever on the edge there is room."""
    parts = []
    for curve in reversed(drawn):
        if not (curve.heads and curve.crosses):
            continue
        name = strongest_head(curve.heads)
        for t in (0.5, 0.56, 0.44, 0.62, 0.38, 0.68, 0.74, 0.32, 0.8, 0.26):
            x, y = curve.at(t)
            if labels.place(x, y, text_width(name, 8.5) + 3.0, 10.0):
                sign = "positive" if curve.weight >= 0 else "negative"
                parts.append(text(x, y + 3.0, name, f"small middle {sign}"))
                break
        if len(parts) == _NAMED_EDGES:
            break
    return parts


def feature_names(graph: Graph, layout: Layout, labels: Labels) -> list[str]:
    """The labels, else the indices, of the features with most influence, where there is room beside them.

    In a crowded picture only features that are alone in their cell are named.
    """
    parts = []
    column = graph.nodes
    features = [index for index, is_feature in enumerate(column.is_feature.tolist()) if is_feature]
    if layout.slot < _ROOMY:
        places = list(zip(column.kind.tolist(), column.layer.tolist(), column.position.tolist(), strict=True))
        together = Counter(places)
        features = [index for index in features if together[places[index]] == 1]
    features.sort(key=lambda index: (-column.influence[index], index))
    for index in features[:_NAMED_NODES]:
        name = shortened(
            shown(str(column.label[index])) if column.label[index] else str(column.feature[index]), 90.0, 7.5
        )
        x, y, r = float(layout.x[index]), float(layout.y[index]), float(layout.radius[index])
        half = text_width(name, 7.5) / 2 + 1.0
        for dx, dy in ((0.0, r + 6.5), (r + half + 1.5, 0.0), (-r - half - 1.5, 0.0), (0.0, -r - 6.5)):
            if labels.place(x + dx, y + dy, 2 * half, 8.0):
                parts.append(text(x + dx, y + dy + 2.7, name, "tiny quiet halo middle"))
                break
    return parts
