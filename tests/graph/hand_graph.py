"""A graph small enough to work out by hand.

    token 0 --(+2)--> feature <--(-2)-- error
    token 1 --(+1)--> feature --(+3)--> logit      token 1 --(-1)--> logit

All in one column of names: 0 token, 1 token, 2 error, 3 feature, 4 logit with weight 0.5.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from circuits.graph import Edges, Graph, Heads, Nodes, with_influence

KINDS = ["embedding", "embedding", "attention_error", "attention_feature", "logit"]


def hand_nodes(kinds: list[str] = KINDS, layers: list[int] | None = None) -> Nodes:
    """Nodes of the given kinds; by default those of the drawing."""
    n = len(kinds)
    nothing = np.full(n, np.nan, np.float32)
    kind = np.array(kinds)
    return Nodes(
        kind=kind,
        dictionary=np.array(["attn.1" if name == "attention_feature" else "" for name in kinds]),
        layer=np.array([-1, -1, 0, 1, 2] if layers is None else layers),
        position=np.minimum(np.arange(n), 1),
        feature=np.where(np.char.endswith(kind, "_error"), -1, 10 + np.arange(n)),
        activation=np.where(kind == "attention_feature", np.float32(1.1), nothing),
        pre_activation=nothing,
        bias=nothing,
        influence=np.zeros(n),
        cumulative_influence=np.ones(n),
        target_weight=np.where(kind == "logit", 0.5, 0.0),
        probability=np.where(kind == "logit", np.float32(0.5), nothing),
        label=np.array([" a" if name in ("embedding", "logit") else "" for name in kinds]),
    )


def hand_edges() -> Edges:
    """The edges of the drawing."""
    return Edges(source=[0, 1, 2, 3, 1], target=[3, 3, 3, 4, 4], weight=np.float32([2, 1, -2, 3, -1]))


def hand_graph(**changes: Any) -> Graph:
    """The whole graph, with head loadings on the first edge."""
    parts: dict[str, Any] = {
        "prompt": "a a",
        "tokens": (" a", " a"),
        "token_ids": (10, 11),
        "n_layers": 2,
        "nodes": hand_nodes(),
        "edges": hand_edges(),
        "heads": Heads.from_rows([(0, 1, 1, 0, 1, 2.5), (0, 1, 3, 0, 1, -0.5)]),
        "patterns": {(1, 1): np.float32([[1, 0], [0.25, 0.75]]), (1, 3): np.float32([[1, 0], [0.1, 0.9]])},
        "metadata": {"model": "hand"},
    }
    return with_influence(Graph(**{**parts, **changes}))
