"""The attribution graph as data: nodes, edges, influence, scores, pruning, and its file formats.

Knows no model and no torch, so a saved graph can be read, pruned and drawn anywhere.
"""

from circuits.graph.errors import GraphError
from circuits.graph.explained import NAMED_CONSTANTS, PAIR_FORMS, Pairs, Scores
from circuits.graph.graph import Graph
from circuits.graph.influence import cumulative_influence, depth, graph_influence, node_influence, with_influence
from circuits.graph.pruning import edge_scores, keep_nodes, prune, prune_edges, threshold
from circuits.graph.scores import completeness_score, replacement_score
from circuits.graph.tables import (
    ERROR_KINDS,
    FEATURE_KINDS,
    ID_PREFIXES,
    IDENTITY_HEAD,
    KINDS,
    OWN_HEAD,
    REST,
    STAYS,
    Edges,
    Heads,
    Nodes,
    head_name,
)

__all__ = [
    "ERROR_KINDS",
    "FEATURE_KINDS",
    "IDENTITY_HEAD",
    "ID_PREFIXES",
    "KINDS",
    "NAMED_CONSTANTS",
    "OWN_HEAD",
    "PAIR_FORMS",
    "REST",
    "STAYS",
    "Edges",
    "Graph",
    "GraphError",
    "Heads",
    "Nodes",
    "Pairs",
    "Scores",
    "completeness_score",
    "cumulative_influence",
    "depth",
    "edge_scores",
    "graph_influence",
    "head_name",
    "keep_nodes",
    "node_influence",
    "prune",
    "prune_edges",
    "replacement_score",
    "threshold",
    "with_influence",
]
