"""Influence and scores against numbers worked out by hand, and against the dense formula."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hand_graph import hand_edges, hand_nodes, mixed_hand_graph

from circuits.graph import (
    ERROR_KINDS,
    FEATURE_KINDS,
    ID_PREFIXES,
    KINDS,
    Edges,
    GraphError,
    Nodes,
    completeness_score,
    cumulative_influence,
    depth,
    graph_influence,
    node_influence,
    replacement_score,
)


def test_depth_follows_the_model() -> None:
    """Embeddings, attention, MLP, attention, MLP, logit of a model with two layers; then every kind there is."""
    kinds = ["embedding", "attention_error", "mlp_feature", "attention_feature", "mlp_error", "logit"]
    nodes = hand_nodes(kinds, [-1, 0, 0, 1, 1, 2])
    assert depth(nodes).tolist() == [0, 3, 4, 7, 8, 9]
    assert depth(mixed_hand_graph().nodes).tolist() == [0, 0, 1, 1, 6, 6, 7, 8, 11, 11, 12, 12, 13]


def test_kinds_are_listed_from_below() -> None:
    """In the order of `KINDS` nodes of one layer never go down, and a kind is a feature, an error, or neither."""
    nodes = hand_nodes(list(KINDS), [-1, *[0] * (len(KINDS) - 2), 2])
    assert np.all(np.diff(depth(nodes)) >= 0)
    assert sorted((*FEATURE_KINDS, *ERROR_KINDS, "embedding", "logit")) == sorted(KINDS)
    assert set(ID_PREFIXES) == set(KINDS)
    assert (nodes.is_error == np.char.endswith(nodes.kind, "_error")).all()
    assert not (nodes.is_error & nodes.is_feature).any()


def test_influence_of_a_hand_written_graph() -> None:
    """Two tokens, a feature, an error, a logit; see hand_graph for the drawing.

    The logit (weight 0.5) takes 3/4 from the feature, 1/4 from the second token; the feature takes 2/5 from the
    first token, 1/5 from the second, 2/5 from the error.
    """
    influence = graph_influence(hand_nodes(), hand_edges())
    np.testing.assert_allclose(influence, [0.15, 0.2, 0.15, 0.375, 0.0], atol=1e-7)


def test_scores_of_the_hand_written_graph() -> None:
    """Tokens end with 0.35 of 0.5; the feature, weight 0.375 of 1.375, has 2/5 of its input from the error."""
    nodes, edges = hand_nodes(), hand_edges()
    assert replacement_score(nodes, edges) == pytest.approx(0.7, abs=1e-7)
    assert completeness_score(nodes, edges) == pytest.approx(1 - 0.4 * 0.375 / 1.375, abs=1e-7)


def test_influence_and_scores_with_every_kind() -> None:
    """Errors of values, of attention, of an MLP and of a block hold 0.3336 of the 0.5 that the logit starts with.

    Two features read errors: 2_9_1 (influence 0.375) with a half of its input, k1_7_1 (0.1055) with a fifth; the logit
    (weight 0.5) with a fourth.
    """
    graph = mixed_hand_graph()
    tokens = [0.12421875, 0.0421875]
    others = [0.0421875, 0.02109375, 0.03515625, 0.10546875, 0.140625, *[0.09375] * 3, 0.375, 0.125, 0.0]
    expected = np.array([*tokens, *others])
    np.testing.assert_allclose(graph.nodes.influence, expected, atol=1e-9)
    assert replacement_score(graph.nodes, graph.edges) == pytest.approx(sum(tokens) / 0.5, abs=1e-9)
    unexplained = 0.5 * 0.375 + 0.2 * 0.10546875 + 0.25 * 0.5
    complete = 1 - unexplained / (expected.sum() + 0.5)
    assert completeness_score(graph.nodes, graph.edges) == pytest.approx(complete, abs=1e-9)


def test_scores_without_influence_are_zero() -> None:
    """No target weight, no score."""
    nodes = replace(hand_nodes(), target_weight=np.zeros(5))
    assert replacement_score(nodes, hand_edges()) == 0.0
    assert completeness_score(nodes, hand_edges()) == 0.0


def test_a_target_below_another_target() -> None:
    """A target's own start flows on, but only what comes from above is its influence."""
    nodes = replace(hand_nodes(), target_weight=np.array([0, 0, 0, 1.0, 0.5]))
    influence = graph_influence(nodes, hand_edges())
    np.testing.assert_allclose(influence, [0.4 * 1.375, 0.125 + 0.2 * 1.375, 0.4 * 1.375, 0.375, 0.0], atol=1e-7)


@pytest.mark.parametrize("seed", range(8))
def test_influence_equals_the_dense_inverse(seed: int) -> None:
    """Start (I - A)^-1 - start, A the share matrix, on random graphs; each node may have an order of its own."""
    rng = np.random.default_rng(seed)
    n = 63
    weights = np.tril(rng.normal(size=(n, n)), -1) * (rng.random((n, n)) < 0.2)
    target, source = np.nonzero(weights)
    start = rng.random(n) * (rng.random(n) < 0.1)
    rows = np.abs(weights).sum(1, keepdims=True)
    share = np.divide(np.abs(weights), rows, out=np.zeros_like(weights), where=rows > 0)
    expected = start @ np.linalg.inv(np.eye(n) - share) - start
    shuffled = rng.permutation(len(source))
    found = node_influence(
        n, source[shuffled], target[shuffled], weights[target, source][shuffled], start, np.arange(n)
    )
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_an_edge_downward_is_an_error() -> None:
    """An edge from a logit to a token names both."""
    edges = Edges(source=[4], target=[0], weight=[1.0])
    with pytest.raises(GraphError, match=r"node 4 .* node 0"):
        graph_influence(hand_nodes(), edges)


def test_no_edges_no_influence() -> None:
    """An empty graph has zeros, and everything is the weakest."""
    influence = graph_influence(hand_nodes(), Edges.empty())
    assert influence.tolist() == [0.0] * 5
    assert cumulative_influence(influence).tolist() == [1.0] * 5


def test_cumulative_influence_counts_from_the_strongest() -> None:
    """1, 2 and 5 of 8."""
    assert cumulative_influence(np.array([1.0, 5.0, 2.0])).tolist() == [1.0, 0.625, 0.875]


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("kind", ["feature"] * 5, "expected only embedding"),
        ("layer", [0.5] * 5, "has type float64; expected int32"),
        ("label", [1] * 5, "expected str"),
        ("influence", [0.0] * 4, "different lengths"),
        ("bias", [[0.0]] * 5, "one dimension"),
    ],
)
def test_bad_columns_are_named(column: str, values: Any, said: str) -> None:
    """A column of the wrong type or shape is an error that names it."""
    with pytest.raises(GraphError, match=said):
        Nodes(**{**hand_nodes().columns(), column: values})


def test_weights_must_be_finite() -> None:
    """NaN weights do not get into a graph."""
    with pytest.raises(GraphError, match="not finite"):
        Edges(source=[0], target=[1], weight=[np.nan])


def test_columns_cannot_be_changed() -> None:
    """A graph is frozen, its arrays too."""
    with pytest.raises(ValueError, match="read-only"):
        hand_nodes().layer[0] = 3
