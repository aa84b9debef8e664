"""Two graphs small enough to work out by hand, a plain one and one with every kind of node.

    token 0 --(+2)--> feature <--(-2)-- error
    token 1 --(+1)--> feature --(+3)--> logit      token 1 --(-1)--> logit

All in one column of names: 0 token, 1 token, 2 error, 3 feature, 4 logit with weight 0.5.

The other one, of three layers (values; a multitoken transcoder for the whole block; own patterns and an MLP):

    E_10_0 -(+1)-> v0_5_0     E_11_1, v0_5_0, v0_error_0 -(+2, +2, -1)-> k1_7_1     E_10_0 -(+1)-> k1_7_0
    k1_7_0, k1_7_1 -(+1, +3)-> q1_7_1      E_10_0, q1_7_1 -(-2, +2)-> a2_8_1
    q1_7_1, r1_error_1, a2_8_1, a2_error_1 -(+1, +1, +1, -1)-> 2_9_1      2_9_1, 2_error_1 -(+3, +1)-> 3_22_1
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from circuits.graph import (
    IDENTITY_HEAD,
    OWN_HEAD,
    REST,
    STAYS,
    Edges,
    Graph,
    Heads,
    Nodes,
    Pairs,
    Scores,
    with_influence,
)

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
        predicted=nothing,
        measured=nothing,
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


MIXED_KINDS = [
    *("embedding", "embedding", "value_feature", "value_error", "mtc_key", "mtc_key", "mtc_query", "block_error"),
    *("attention_feature", "attention_error", "mlp_feature", "mlp_error", "logit"),
]


def explained_hand_graph() -> Graph:
    """The mixed graph with everything that says why: hops, explained scores with their pairs, and tested nodes.

    Score 0 is of head L1H0 from token 1 to token 0, score 1 of the identity's neighbour L1H0 from token 1 to itself,
    score 2 of the own pattern of a2_8_1 from token 1 to token 0. Edge 9 (q1_7_1 to 2_9_1) has hops, though it does
    not leave its position.
    """
    graph = mixed_hand_graph()
    tested = np.array([name in ("k1_7_1", "a2_8_1") for name in graph.node_ids()])
    number = np.float32(np.arange(len(graph.nodes)))
    nodes = replace(
        graph.nodes,
        predicted=np.where(tested, -0.1 * number, np.nan).astype(np.float32),
        measured=np.where(tested, -0.2 * number, np.nan).astype(np.float32),
    )
    scores = Scores(
        layer=[1, 1, 2],
        head=[0, 0, OWN_HEAD],
        query=[1, 1, 1],
        key=[0, 1, 0],
        owner=np.array(["", "", "a2_8_1"]),
        score=np.float32([4.5, 2.5, 1.0]),
        attention=np.float32([0.75, 0.25, 0.1]),
        relative=np.float32([0.3, -0.8, np.nan]),
        lead=np.float32([1.2, -1.6, np.nan]),
        gap=np.float32([1e-6, 2e-6, 0]),
    )
    rows = [
        *((2, "score", "E_11_1", "bias", 0, 1.0), (0, "score", "E_11_1", "v0_5_0", 0, 3.0)),
        *((0, "score", "E_11_1", "E_10_0", 0, 2.0), (0, "score", "bias", "v0_5_0", 0, -0.5)),
        *((0, "lead", "E_11_1", "v0_5_0", 0, 0.75), (0, "lead", "E_11_1", "E_11_1", 1, -0.25)),
        *((0, "query", "E_11_1", "", 0, 5.0), (0, "key", "", "v0_5_0", 0, 2.5), (0, "key", "", "E_10_0", 0, 2.0)),
        *((0, "qk_feature", "qk.1/37", "qk.1/37", 0, 4.25), (1, "score", "E_11_1", "E_11_1", 1, 0.1)),
        (1, "query", "E_11_1", "", 1, 0.1),
    ]
    pairs = Pairs(*(np.array(values) for values in zip(*rows, strict=True)))
    return replace(
        graph,
        nodes=nodes,
        first_hops=Heads.from_rows([(9, 1, 0, 0, 1, 0.75), (9, -1, REST, 1, 1, 0.25), (13, -1, STAYS, 1, 1, 3.0)]),
        last_hops=Heads.from_rows([(13, -1, STAYS, 1, 1, 3.0), (9, 2, 3, 0, 1, 1.25), (9, -1, REST, 1, 1, -0.25)]),
        patterns={**graph.patterns, (2, 3): np.float32([[1, 0], [0.5, 0.5]])},
        scores=scores,
        pairs=replace(pairs, score=pairs.score.astype(np.int32), weight=pairs.weight.astype(np.float32)),
    )


def mixed_hand_graph() -> Graph:
    """The graph with every kind of node, and with identity and own heads."""
    nodes = hand_nodes(MIXED_KINDS, [-1, -1, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3])
    is_feature = nodes.is_feature
    nodes = replace(
        nodes,
        dictionary=np.array(["", "", "value.0", "", *["mtc.1"] * 3, "", "lorsa.2", "", "clt.2", "", ""]),
        position=np.array([0, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]),
        feature=np.array([10, 11, 5, -1, 7, 7, 7, -1, 8, -1, 9, -1, 22]),
        activation=np.where(is_feature, np.float32(1.5), np.float32(np.nan)),
    )
    heads = [
        *((1, 0, 1, 0, 1, 2.0), (3, 0, 0, 0, 1, -1.0)),
        *((5, 1, 0, 0, 1, 1.5), (5, 1, 1, 0, 1, -0.5), (6, 1, IDENTITY_HEAD, 1, 1, 2.0), (6, 1, 0, 1, 1, 1.0)),
        *((7, 2, OWN_HEAD, 0, 1, -2.0), (8, 2, OWN_HEAD, 1, 1, 2.0)),
    ]
    return hand_graph(
        n_layers=3,
        nodes=nodes,
        edges=Edges(
            source=[0, 2, 1, 3, 0, 4, 5, 0, 6, 6, 7, 8, 9, 10, 11],
            target=[2, 5, 5, 5, 4, 6, 6, 8, 8, 10, 10, 10, 10, 12, 12],
            weight=np.float32([1, 2, 2, -1, 1, 1, 3, -2, 2, 1, 1, 1, -1, 3, 1]),
        ),
        heads=Heads.from_rows(heads),
        patterns={name: np.float32([[1, 0], [0.5, 0.5]]) for name in ((0, 0), (0, 1), (1, 0), (1, 1))},
    )
