"""Keep the part of a graph that carries the influence.

The rule is that of the Circuit Tracing methods paper (Ameisen et al., 2025) as circuit-tracer applies it:

1. Nodes: the strongest that together hold `node_threshold` of the summed influence of the full graph. Embeddings
   and targets always stay.
2. Edges among them: shares and influences are taken again on what is left; an edge scores its share times the
   influence and target weight of its target; the strongest that together hold `edge_threshold` of the scores stay.
3. Features and errors that nothing kept reads from, and features that read from nothing kept, go with their edges,
   until nothing changes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from circuits.graph.errors import GraphError
from circuits.graph.graph import Graph
from circuits.graph.influence import graph_influence, shares
from circuits.graph.tables import Booleans, Edges, Float64, Nodes

_ROUNDING = 1e-12


def threshold(scores: Float64, share: float) -> float:
    """The smallest score that is kept when the strongest scores shall hold `share` of their sum.

    Example:
        >>> threshold(np.array([5.0, 1.0, 3.0, 1.0]), 0.7)
        3.0

    Args:
        scores: (n,) scores, none negative.
        share: The part of the sum to reach, 0 to 1.

    Returns:
        The score of the first item, from the strongest down, at which the share is reached; 0 without scores.
    """
    if not len(scores) or not scores.sum() > 0:
        return 0.0
    descending = np.sort(scores)[::-1]
    reached = int(np.searchsorted(np.cumsum(descending) / descending.sum(), share))
    return float(descending[min(reached, len(scores) - 1)])


def keep_nodes(influence: Float64, share: float, always: Booleans) -> Booleans:
    """The nodes that together hold a share of the summed influence.

    Args:
        influence: (n,) influences in the full graph.
        share: The part of the sum to hold, 0 to 1.
        always: (n,) nodes that stay whatever their influence.

    Returns:
        (n,) mask.
    """
    return (influence >= threshold(influence, share)) | always


def edge_scores(nodes: Nodes, edges: Edges) -> Float64:
    """Each edge's share of its target's input, times the target's influence and target weight.

    Returns:
        (m,) scores, of the graph as it is given.
    """
    passed_on = graph_influence(nodes, edges) + nodes.target_weight
    return shares(len(nodes), edges.target, edges.weight) * passed_on[edges.target]


def prune_edges(graph: Graph, edge_threshold: float) -> Graph:
    """Steps 2 and 3 of the rule, on a graph that has only the nodes to keep.

    Args:
        graph: A graph with all edges among its nodes.
        edge_threshold: The part of the summed edge scores to hold, 0 to 1.

    Raises:
        GraphError: The threshold is not between 0 and 1.
    """
    _check_share("edge_threshold", edge_threshold)
    scores = edge_scores(graph.nodes, graph.edges)
    return graph.select(*_without_dead_ends(graph, scores >= threshold(scores, edge_threshold)))


def prune(
    graph: Graph, node_threshold: float = 0.8, edge_threshold: float = 0.98, max_feature_nodes: int | None = None
) -> Graph:
    """The part of a graph that carries the influence.

    Nodes are judged by the stored influence of the full graph, so a graph that was pruned before can be pruned
    tighter, and its nodes are those that pruning at once would have judged. The thresholds are written to
    `metadata["settings"]`.

    Args:
        graph: A full graph, or one pruned before with looser thresholds.
        node_threshold: The part of the summed influence that the kept nodes hold, 0 to 1.
        edge_threshold: The part of the summed edge scores that the kept edges hold, 0 to 1.
        max_feature_nodes: Keep at most so many features, the strongest first; no limit by default.

    Returns:
        The pruned graph; the graph itself if it was pruned with the same thresholds.

    Raises:
        GraphError: A threshold is not between 0 and 1, or looser than one that was used before.
    """
    _check_share("node_threshold", node_threshold)
    _check_share("edge_threshold", edge_threshold)
    if max_feature_nodes is not None and max_feature_nodes < 0:
        raise GraphError(f"max_feature_nodes is {max_feature_nodes}; expected a number of nodes, 0 or more.")
    before = _thresholds(graph)
    if before:
        _check_tighter(before, {"node_threshold": node_threshold, "edge_threshold": edge_threshold})
    limit = len(graph.nodes) if max_feature_nodes is None else max_feature_nodes
    same = before.get("node_threshold") == node_threshold and before.get("edge_threshold") == edge_threshold
    if same and np.count_nonzero(graph.nodes.is_feature) <= limit:
        return graph
    nodes = graph.nodes
    total = float(graph.metadata.get("influence_total", nodes.influence.sum()))
    if not before:
        graph = replace(graph, metadata={**graph.metadata, "influence_total": total})
    always = (nodes.kind == "embedding") | nodes.is_target
    if before and total > 0:
        stronger = nodes.cumulative_influence - nodes.influence / total
        keep = (stronger < node_threshold - _ROUNDING) | always
    else:
        keep = keep_nodes(nodes.influence, node_threshold, always)
    keep &= ~_weakest_features(nodes, keep, limit)
    pruned = prune_edges(graph.select(keep), edge_threshold)
    settings = {"node_threshold": node_threshold, "edge_threshold": edge_threshold}
    if max_feature_nodes is not None:
        settings["max_feature_nodes"] = max_feature_nodes
    return replace(
        pruned, metadata={**pruned.metadata, "settings": {**pruned.metadata.get("settings", {}), **settings}}
    )


def _weakest_features(nodes: Nodes, keep: Booleans, limit: int) -> Booleans:
    """(n,) the kept features beyond the limit; targets do not count as features."""
    features = np.flatnonzero(keep & nodes.is_feature & ~nodes.is_target)
    strongest_first = features[np.argsort(-nodes.influence[features], kind="stable")]
    weakest = np.zeros(len(nodes), np.bool_)
    weakest[strongest_first[limit:]] = True
    return weakest


def _without_dead_ends(graph: Graph, edge_mask: Booleans) -> tuple[Booleans, Booleans]:
    """Drop features and errors that nothing reads, and features that read nothing, until none is left."""
    nodes, edges = graph.nodes, graph.edges
    must_be_read = (nodes.is_feature | nodes.is_error) & ~nodes.is_target
    must_read = nodes.is_feature & ~nodes.is_target
    node_mask = np.ones(len(nodes), np.bool_)
    while True:
        source, target = edges.source[edge_mask], edges.target[edge_mask]
        is_read = np.bincount(source, minlength=len(nodes)) > 0
        reads = np.bincount(target, minlength=len(nodes)) > 0
        dead = node_mask & ((must_be_read & ~is_read) | (must_read & ~reads))
        if not dead.any():
            return node_mask, edge_mask
        node_mask = node_mask & ~dead
        edge_mask = edge_mask & node_mask[edges.source] & node_mask[edges.target]


def _thresholds(graph: Graph) -> dict[str, float]:
    """The thresholds that the graph was pruned with; empty for a full graph."""
    settings: dict[str, Any] = graph.metadata.get("settings", {})
    names = ("node_threshold", "edge_threshold")
    return {name: float(settings[name]) for name in names if settings.get(name) is not None}


def _check_share(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise GraphError(f"{name} is {value}; expected a number from 0 to 1.")


def _check_tighter(before: dict[str, float], wanted: dict[str, float]) -> None:
    for name, value in wanted.items():
        if value > before.get(name, 1.0):
            raise GraphError(
                f"{name} {value} is looser than the {before[name]} that this graph was pruned with; what was cut "
                "off is not in it. Trace the prompt again with looser thresholds, or with --unpruned."
            )
