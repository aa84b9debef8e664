"""`graph.graphml`, for Gephi, Cytoscape, yEd and others.

GraphML knows only plain attributes, so the loadings and the strongest hops of an edge are one line of text each, and
patterns and explained scores are left out.
There is no reader: `graph.json` holds everything.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from circuits.graph.formats.rows import HEAD_TABLES, loadings, plain
from circuits.graph.formats.text import heads_text, visible
from circuits.graph.formats.whole_file import write_whole
from circuits.graph.graph import Graph

_HOPS = 8


def write(graph: Graph, path: Path) -> None:
    """Write the graph as GraphML.

    Raises:
        GraphError: The file cannot be written.
    """
    write_whole(path, to_graphml(graph).encode("utf-8"))


def to_graphml(graph: Graph) -> str:
    """The text of the file; an attribute that is not there (nan) is left out."""
    import networkx

    digraph: networkx.DiGraph[str] = networkx.DiGraph(
        prompt=visible(graph.prompt),
        tokens=visible(json.dumps(graph.tokens, ensure_ascii=False)),
        n_layers=graph.n_layers,
        metadata=visible(json.dumps(graph.metadata, sort_keys=True)),
    )
    names = graph.node_ids()
    columns = {name: plain(values) for name, values in graph.nodes.columns().items()}
    for index, name in enumerate(names):
        digraph.add_node(
            name, **{key: _scalar(values[index]) for key, values in columns.items() if values[index] is not None}
        )
    ends = zip(graph.edges.source.tolist(), graph.edges.target.tolist(), plain(graph.edges.weight), strict=True)
    tables = {table: loadings(graph, table) for table in HEAD_TABLES}
    for index, (source, target, weight) in enumerate(ends):
        told = {
            table: heads_text(rows[index], None if table == "heads" else _HOPS)
            for table, rows in tables.items()
            if rows[index]
        }
        digraph.add_edge(names[source], names[target], weight=weight, **told)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + "\n".join(networkx.generate_graphml(digraph)) + "\n"


def _scalar(value: Any) -> Any:
    return visible(value) if isinstance(value, str) else value
