"""The graph as a `networkx.DiGraph`, and back.

A node is named by its id and has every column of `Nodes` as an attribute. An edge has `weight`, `heads`, a list of
(layer, head, key position, query position, weight), `first_hops` and `last_hops` alike, and `index`, its place among
the edges. The graph's own attributes hold the rest: explained scores as `qk`, as in `graph.json`, and as `head_names`
the names of the heads that the base model does not have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from circuits.graph.errors import GraphError
from circuits.graph.formats.qk import from_lists, to_lists
from circuits.graph.formats.rows import HEAD_TABLES, LATER_COLUMNS, loadings, plain
from circuits.graph.graph import Graph
from circuits.graph.tables import NODE_COLUMNS, SPECIAL_HEADS, Edges, Heads, Nodes

if TYPE_CHECKING:
    import networkx

GRAPH_ATTRIBUTES = ("prompt", "tokens", "token_ids", "n_layers", "patterns", "metadata")


def to_networkx(graph: Graph) -> networkx.DiGraph[str]:
    """The graph for networkx, with Python's own numbers as attributes.

    Example:
        >>> digraph = to_networkx(graph)  # doctest: +SKIP
        >>> digraph.edges["E_17_1", "a0_5_3"]["heads"]  # doctest: +SKIP
        [(0, 2, 1, 3, 0.75)]
    """
    import networkx

    names = graph.node_ids()
    digraph: networkx.DiGraph[str] = networkx.DiGraph(
        **{name: getattr(graph, name) for name in GRAPH_ATTRIBUTES},
        qk=to_lists(graph),
        head_names=dict(SPECIAL_HEADS),
    )
    columns = {name: values.tolist() for name, values in graph.nodes.columns().items()}
    for index, name in enumerate(names):
        digraph.add_node(name, **{key: values[index] for key, values in columns.items()})
    tables = {table: loadings(graph, table) for table in HEAD_TABLES}
    ends = zip(graph.edges.source.tolist(), graph.edges.target.tolist(), plain(graph.edges.weight), strict=True)
    for index, (source, target, weight) in enumerate(ends):
        rows = {table: [tuple(row) for row in found[index]] for table, found in tables.items()}
        digraph.add_edge(names[source], names[target], weight=weight, **rows, index=index)
    return digraph


def from_networkx(digraph: networkx.DiGraph[str]) -> Graph:
    """The inverse of `to_networkx`.

    Nodes keep their order; edges keep theirs by `index`, and edges that were added without one come last. An edge
    without `heads` has no loadings, one without `first_hops` or `last_hops` no hops, a graph without `qk` no explained
    scores.

    Raises:
        GraphError: An attribute of the graph, a node or an edge is missing or of the wrong type.
    """
    for name in GRAPH_ATTRIBUTES:
        if name not in digraph.graph:
            raise GraphError(f"The networkx graph lacks the attribute {name!r}; expected one made by to_networkx().")
    try:
        return _graph(digraph)
    except GraphError:
        raise
    except KeyError as error:
        raise GraphError(f"An entry of the attribute 'qk' of the networkx graph lacks {error}.") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise GraphError(f"The networkx graph has an attribute of the wrong type: {error}.") from error


def _graph(digraph: networkx.DiGraph[str]) -> Graph:
    names = list(digraph.nodes)
    number = {name: index for index, name in enumerate(names)}
    nodes = {name: _attributes(digraph, name) for name in NODE_COLUMNS}
    links = sorted(digraph.edges(data=True), key=lambda link: link[2].get("index", digraph.number_of_edges()))
    for source, target, attributes in links:
        if "weight" not in attributes:
            raise GraphError(f"Edge {source} -> {target} of the networkx graph lacks the attribute 'weight'.")
    tables: dict[str, Any] = {
        table: Heads.from_rows([(edge, *row) for edge, link in enumerate(links) for row in link[2].get(table, ())])
        for table in HEAD_TABLES
    }
    scores, pairs = from_lists(digraph.graph.get("qk", []))
    return Graph(
        **{name: digraph.graph[name] for name in GRAPH_ATTRIBUTES},
        nodes=Nodes(**{name: np.array(values, dtype=NODE_COLUMNS[name]) for name, values in nodes.items()}),
        edges=Edges(
            source=np.array([number[link[0]] for link in links], dtype=np.int32),
            target=np.array([number[link[1]] for link in links], dtype=np.int32),
            weight=np.array([link[2]["weight"] for link in links], dtype=np.float32),
        ),
        **tables,
        scores=scores,
        pairs=pairs,
    )


def _attributes(digraph: networkx.DiGraph[str], name: str) -> list[Any]:
    values = []
    for node, attributes in digraph.nodes(data=True):
        if name not in attributes and name not in LATER_COLUMNS:
            raise GraphError(f"Node {node} of the networkx graph lacks the attribute {name!r}; every node needs it.")
        values.append(attributes.get(name, np.nan))
    return values
