"""How much each node matters to the targets, over all paths of the graph.

An edge's share is its absolute weight over the sum of absolute weights into its target. Influence flows down the
shares: a node passes what it has to its sources, each according to its share,

    influence(i) = sum over targets t of (influence(t) + start(t)) * |w_ti| / sum over j of |w_tj|

where `start` is the weight of a target node, such as a logit's probability. This is the node influence of the
Circuit Tracing methods paper (Ameisen et al., 2025, "Graph pruning"), which sums the powers of the share matrix.
As a graph has no cycle, one pass from the top gives the sum exactly: when a level of targets is reached, all
that flows into it has arrived.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from circuits.graph.errors import GraphError
from circuits.graph.graph import Graph
from circuits.graph.tables import Edges, Float32, Float64, Int32, Int64, Nodes

# The steps within a layer above its values, from below; logits stand on the first step of the layer after the last.
_STEPS = (
    ("mtc_key",),
    ("attention_feature", "mtc_query", "attention_error"),
    ("mlp_feature", "mlp_error", "block_error"),
)


def depth(nodes: Nodes) -> Int64:
    """Where each node stands on the way up through the model.

    Embeddings 0; of layer l values at 4l + 1, key sides of a multitoken transcoder at 4l + 2, query sides and attention
    at 4l + 3, MLP and block errors at 4l + 4; logits at 4L + 1 with L the number of layers. Every edge goes from a
    lower to a strictly higher depth.

    Returns:
        (n,) depths.
    """
    offset = np.ones(len(nodes), np.int64)
    for number, kinds in enumerate(_STEPS, start=2):
        offset[np.isin(nodes.kind, kinds)] = number
    at = 4 * nodes.layer.astype(np.int64) + offset
    at[nodes.kind == "embedding"] = 0
    return at


def shares(n_nodes: int, target: Int32, weight: Float32) -> Float64:
    """Each edge's part of its target's input: |w| over the sum of |w| into the target, 0 where that sum is 0.

    Returns:
        (m,) shares.
    """
    size = np.abs(weight.astype(np.float64))
    total = np.bincount(target, weights=size, minlength=n_nodes)[target]
    return np.divide(size, total, out=np.zeros_like(size), where=total > 0)


def node_influence(
    n_nodes: int, source: Int32, target: Int32, weight: Float32, start: Float64, order: Int64
) -> Float64:
    """The influence of every node on the targets.

    Args:
        n_nodes: Number of nodes, n.
        source: (m,) source of each edge.
        target: (m,) target of each edge.
        weight: (m,) weight of each edge.
        start: (n,) influence that each target starts with, 0 for nodes that are no targets.
        order: (n,) an integer that grows along every edge, such as `depth`.

    Returns:
        (n,) influences. What a target starts with is not part of its own influence.

    Raises:
        GraphError: An edge does not go from a lower to a higher order.
    """
    upward = order[source] < order[target]
    if not upward.all():
        edge = int(np.argmin(upward))
        raise GraphError(
            f"Edge {edge} goes from node {source[edge]} (order {order[source[edge]]}) to node {target[edge]} "
            f"(order {order[target[edge]]}); expected a target above its source. Check the nodes' kinds and layers."
        )
    share = shares(n_nodes, target, weight)
    by_level = np.argsort(-order[target], kind="stable")
    source, target, share = source[by_level], target[by_level], share[by_level]
    ends = np.flatnonzero(np.diff(order[target])) + 1
    influence = np.zeros(n_nodes)
    for first, last in zip([0, *ends.tolist()], [*ends.tolist(), len(target)], strict=True):
        level = slice(first, last)
        np.add.at(influence, source[level], (influence[target[level]] + start[target[level]]) * share[level])
    return influence


def graph_influence(nodes: Nodes, edges: Edges) -> Float64:
    """The influence of every node over the edges given, from the nodes' target weights.

    Returns:
        (n,) influences.
    """
    return node_influence(len(nodes), edges.source, edges.target, edges.weight, nodes.target_weight, depth(nodes))


def cumulative_influence(influence: Float64) -> Float64:
    """For each node the share of the summed influence that it and all stronger ones hold.

    Nodes of equal influence count in their own order.

    Returns:
        (n,) shares, 1 for the weakest node; all 1 where there is no influence at all.
    """
    strongest_first = np.argsort(-influence, kind="stable")
    cumulated = np.ones(len(influence))
    total = influence.sum()
    if total > 0:
        cumulated[strongest_first] = np.cumsum(influence[strongest_first]) / total
    return cumulated


def with_influence(graph: Graph) -> Graph:
    """The same graph with influences computed from its own edges, which must be those of the full graph.

    Sets `influence`, `cumulative_influence` and `metadata["influence_total"]`.
    """
    influence = graph_influence(graph.nodes, graph.edges)
    nodes = replace(graph.nodes, influence=influence, cumulative_influence=cumulative_influence(influence))
    return replace(graph, nodes=nodes, metadata={**graph.metadata, "influence_total": float(influence.sum())})
