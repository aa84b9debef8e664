"""`graph.dot`, for Graphviz and everything that reads its language; made with pydot.

A cluster for each token holds its nodes, nodes of one layer stand in one rank, the edge colour is the sign and the
width the share of the target's input. Attention edges are labelled with their strongest head.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from circuits.graph.formats.rows import HEAD_TABLES, loadings, plain
from circuits.graph.formats.text import heads_text, hops_text, strongest_head, visible
from circuits.graph.formats.whole_file import write_whole
from circuits.graph.graph import Graph
from circuits.graph.influence import depth, shares

if TYPE_CHECKING:
    import pydot

_SHAPES = {
    "embedding": "box",
    "value_feature": "hexagon",
    "mtc_key": "triangle",
    "attention_feature": "diamond",
    "mtc_query": "invtriangle",
    "mlp_feature": "circle",
    "logit": "box",
}
_POSITIVE, _NEGATIVE = "#0072B2", "#D55E00"


def write(graph: Graph, path: Path) -> None:
    """Write the graph in the DOT language.

    Raises:
        GraphError: The file cannot be written.
    """
    write_whole(path, to_pydot(graph).to_string().encode("utf-8"))


def to_pydot(graph: Graph) -> pydot.Dot:
    """The graph for pydot; node names are those of `Graph.node_ids`."""
    import pydot

    dot = pydot.Dot(
        "circuits", graph_type="digraph", rankdir="BT", newrank="true", label=quoted(graph.prompt), fontname="Helvetica"
    )
    dot.set_node_defaults(fontname="Helvetica", fontsize="9", height="0.25", width="0.25", margin="0.04")
    dot.set_edge_defaults(arrowsize="0.4", fontname="Helvetica", fontsize="8")
    names = graph.node_ids()
    for position, token in enumerate(graph.tokens):
        cluster = pydot.Subgraph(f"cluster_token_{position}", label=quoted(token), color='"#bbbbbb"')
        for index in np.flatnonzero(graph.nodes.position == position).tolist():
            cluster.add_node(_node(graph, index, names[index]))
        dot.add_subgraph(cluster)
    levels = depth(graph.nodes)
    for level in np.unique(levels).tolist():
        rank = pydot.Subgraph(f"rank_{level}", rank="same")
        for index in np.flatnonzero(levels == level).tolist():
            rank.add_node(pydot.Node(quoted(names[index])))
        dot.add_subgraph(rank)
    for edge in _edges(graph, names):
        dot.add_edge(edge)
    return dot


def quoted(text: str) -> str:
    """Any text as a quoted string of the DOT language."""
    return '"' + visible(text).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _node(graph: Graph, index: int, name: str) -> pydot.Node:
    import pydot

    nodes = graph.nodes
    kind = str(nodes.kind[index])
    label = str(nodes.label[index]) if kind in ("embedding", "logit") else str(nodes.feature[index])
    if kind == "logit":
        label += f" ({nodes.probability[index]:.2f})"
    return pydot.Node(
        quoted(name),
        label=quoted("" if kind.endswith("_error") else label),
        shape=_SHAPES.get(kind, "point"),
        color='"#999999"' if kind.endswith("_error") else '"#333333"',
        tooltip=quoted(f"{name} {kind} influence {nodes.influence[index]:.3g}"),
    )


def _edges(graph: Graph, names: list[str]) -> list[pydot.Edge]:
    import pydot

    edges = graph.edges
    share = shares(len(graph.nodes), edges.target, edges.weight).tolist()
    heads_of, first, last = (loadings(graph, table) for table in HEAD_TABLES)
    columns = zip(edges.source.tolist(), edges.target.tolist(), plain(edges.weight), share, strict=True)
    drawn = []
    for index, (source, target, weight, part) in enumerate(columns):
        heads = heads_of[index]
        carried = f"{heads_text(heads)} {hops_text(first[index], last[index], 5)}".strip()
        named: dict[str, Any] = {"label": quoted(strongest_head(heads))} if heads else {}
        edge = pydot.Edge(
            quoted(names[source]),
            quoted(names[target]),
            color=quoted(_POSITIVE if weight >= 0 else _NEGATIVE),
            penwidth=f"{0.3 + 3.0 * part:.2f}",
            tooltip=quoted(f"{weight:+.4g} {carried}".strip()),
            **named,
        )
        drawn.append(edge)
    return drawn
