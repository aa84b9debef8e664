"""Two numbers that say how much of a prompt a graph explains; both taken on the full, unpruned graph.

They are those of the Circuit Tracing methods paper (Ameisen et al., 2025, "Evaluating our graphs") as
circuit-tracer computes them.
"""

from __future__ import annotations

import numpy as np

from circuits.graph.influence import graph_influence, shares
from circuits.graph.tables import Edges, Nodes


def replacement_score(nodes: Nodes, edges: Edges) -> float:
    """The part of the influence that starts at tokens, and not at error nodes.

    Follow the shares down from the targets: every path ends at a token or at an error node. The score is the
    fraction that ends at a token, 1 for a perfect replacement.

    Returns:
        A number from 0 to 1; 0 where nothing flows into tokens or errors.
    """
    influence = graph_influence(nodes, edges)
    tokens = float(influence[nodes.kind == "embedding"].sum())
    errors = float(influence[nodes.is_error].sum())
    return tokens / (tokens + errors) if tokens + errors > 0 else 0.0


def completeness_score(nodes: Nodes, edges: Edges) -> float:
    """The part of the nodes' inputs that comes from features and tokens, weighted by influence.

    For every node the share of its input that does not come from error nodes (1 for nodes without input),
    averaged with weight influence + target weight.

    Returns:
        A number from 0 to 1; 0 where no node has influence.
    """
    weight = graph_influence(nodes, edges) + nodes.target_weight
    from_error = nodes.is_error[edges.source]
    share = shares(len(nodes), edges.target, edges.weight)
    unexplained = np.bincount(edges.target[from_error], weights=share[from_error], minlength=len(nodes))
    total = float(weight.sum())
    return float(((1.0 - unexplained) * weight).sum()) / total if total > 0 else 0.0
