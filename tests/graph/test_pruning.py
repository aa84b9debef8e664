"""Pruning of graphs whose answer can be written down, and pruning in two steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hand_graph import hand_graph, hand_nodes, mixed_hand_graph
from synthetic import Size, synthetic_graph

from circuits.graph import (
    IDENTITY_HEAD,
    OWN_HEAD,
    Edges,
    Graph,
    GraphError,
    Heads,
    edge_scores,
    head_name,
    keep_nodes,
    prune_edges,
    threshold,
)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 5.0), (0.5, 5.0), (0.51, 3.0), (0.8, 3.0), (0.81, 1.0), (1.0, 1.0), (2.0, 1.0)]
)
def test_threshold(share: float, expected: float) -> None:
    """Of 5, 3, 1, 1 the strongest hold 0.5, 0.8, 0.9 and all."""
    assert threshold(np.array([1.0, 5.0, 1.0, 3.0]), share) == expected


def test_threshold_of_nothing_keeps_everything() -> None:
    """Without scores, or with zeros only, the cut is zero."""
    assert threshold(np.zeros(0), 0.8) == 0.0
    assert threshold(np.zeros(3), 0.8) == 0.0


def test_equal_scores_stay_together() -> None:
    """Two nodes at the cut both stay, and so does what always stays."""
    keep = keep_nodes(np.array([1.0, 5.0, 1.0, 3.0, 0.0]), 0.85, np.array([False, False, False, False, True]))
    assert keep.tolist() == [True] * 5


def test_edge_scores_of_the_hand_written_graph() -> None:
    """Share of the target's input times the target's influence (feature) or weight (logit)."""
    graph = hand_graph()
    np.testing.assert_allclose(edge_scores(graph.nodes, graph.edges), [0.15, 0.075, 0.15, 0.375, 0.125], atol=1e-7)


def test_pruning_the_hand_written_graph() -> None:
    """Influences 0.15, 0.2, 0.15, 0.375, 0 add up to 0.875: at 0.6 the feature and token 1 hold it.

    The error goes; tokens and logit always stay. Left: the feature reads 2/3 from token 0 and 1/3 from token 1, the
    logit 3/4 from the feature, 1/4 from token 1: scores 0.25, 0.125, 0.375, 0.125, of which 0.7 takes the first two.
    """
    pruned = hand_graph().prune(0.6, 0.7)
    assert pruned.node_ids() == ["E_10_0", "E_11_1", "a1_13_1", "2_14_1"]
    assert list(zip(pruned.edges.source, pruned.edges.target, strict=True)) == [(0, 2), (2, 3)]
    assert pruned.edges.weight.tolist() == [2.0, 3.0]
    assert pruned.heads.edge.tolist() == [0, 0]
    assert sorted(pruned.patterns) == [(1, 1), (1, 3)]
    assert pruned.nodes.influence.tolist() == pytest.approx([0.15, 0.2, 0.375, 0.0], abs=1e-7)
    assert pruned.metadata["settings"] == {"node_threshold": 0.6, "edge_threshold": 0.7}


def test_pruning_with_every_kind() -> None:
    """At 0.67 the strongest are 2_9_1, q1_7_1, 2_error_1, E_10_0, k1_7_1: the identity stays, its layer's H1 goes."""
    pruned = mixed_hand_graph().prune(0.67, 1.0)
    assert pruned.node_ids() == ["E_10_0", "E_11_1", "k1_7_1", "q1_7_1", "2_9_1", "2_error_1", "3_22_1"]
    assert list(zip(pruned.heads.head.tolist(), pruned.heads.weight.tolist(), strict=True)) == [(-1, 2.0), (0, 1.0)]
    assert list(pruned.patterns) == [(1, 0)]


def test_a_query_side_goes_with_its_key_sides() -> None:
    """At 0.39 only q1_7_1 and 2_9_1 are strong enough; nothing that is left feeds them, so they go too."""
    pruned = mixed_hand_graph().prune(0.39, 1.0)
    assert pruned.node_ids() == ["E_10_0", "E_11_1", "3_22_1"]


def test_dead_ends_go_until_none_is_left() -> None:
    """A chain of features loses its top edge, and so feature after feature goes; the error with them."""
    kinds = ["embedding", "mlp_error", "mlp_feature", "mlp_feature", "logit"]
    nodes = hand_nodes(kinds, [-1, 0, 1, 2, 3])
    edges = Edges(source=[0, 1, 2, 3, 0], target=[2, 2, 3, 4, 4], weight=np.float32([1, 1, 1, 0.001, 1]))
    pruned = prune_edges(hand_graph(nodes=nodes, edges=edges, n_layers=3, heads=hand_graph().heads.take([])), 0.9)
    assert pruned.nodes.kind.tolist() == ["embedding", "logit"]
    assert pruned.edges.weight.tolist() == [1.0]
    assert pruned.patterns == {}


def test_a_feature_as_target_stays() -> None:
    """A target without outgoing edges is no dead end."""
    nodes = replace(hand_nodes(), target_weight=np.array([0, 0, 0, 1.0, 0]))
    pruned = hand_graph(nodes=nodes, edges=Edges([0, 1], [3, 3], np.float32([2, 1]))).prune(0.5, 0.9)
    assert "a1_13_1" in pruned.node_ids()


@pytest.mark.parametrize("mixed", [False, True])
def test_at_most_so_many_features(mixed: bool) -> None:
    """The strongest stay."""
    graph = synthetic_graph(Size(12, n_features=50, mixed=mixed))
    few = graph.prune(0.9, 0.98, max_feature_nodes=7)
    assert np.count_nonzero(few.nodes.is_feature) <= 7
    strongest = np.sort(graph.nodes.influence[graph.nodes.is_feature])[::-1][6]
    assert few.nodes.influence[few.nodes.is_feature].min() >= strongest


def _names(graph: Graph) -> set[str]:
    return set(graph.node_ids())


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_pruning_again_judges_nodes_by_the_full_graph(seed: int, mixed: bool) -> None:
    """Tighter pruning of a pruned graph gives the nodes that pruning at once gives, but for dead ends."""
    graph = synthetic_graph(Size(20, n_features=120, mixed=mixed), seed)
    at_once, again = graph.prune(0.5, 1.0), graph.prune(0.8, 1.0).prune(0.5, 1.0)
    assert _names(at_once) == _names(again)


def test_pruning_with_the_same_thresholds_is_nothing() -> None:
    """The graph itself comes back."""
    pruned = hand_graph().prune()
    assert pruned.prune() is pruned


@pytest.mark.parametrize(("node", "edge"), [(0.9, 0.7), (0.6, 0.8)])
def test_looser_pruning_is_an_error(node: float, edge: float) -> None:
    """What was cut off does not come back, and the message says what to do."""
    with pytest.raises(GraphError, match="--unpruned"):
        hand_graph().prune(0.6, 0.7).prune(node, edge)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [((1.5, 0.9), "node_threshold"), ((0.5, -1.0), "edge_threshold"), ((0.5, 0.9, -1), "max_feature_nodes")],
)
def test_impossible_thresholds(arguments: tuple[float, ...], said: str) -> None:
    """Thresholds are shares."""
    with pytest.raises(GraphError, match=said):
        hand_graph().prune(*arguments)  # type: ignore[arg-type]


def test_select_numbers_again_and_drops_patterns() -> None:
    """Edges with an end outside go, loadings follow their edge, unused patterns go."""
    graph = hand_graph()
    part = graph.select(np.array([False, True, False, True, True]))
    assert part.edges.source.tolist() == [0, 1, 0]
    assert part.edges.target.tolist() == [1, 2, 2]
    assert len(part.heads) == 0
    assert part.patterns == {}
    with pytest.raises(GraphError, match="masks have shapes"):
        graph.select(np.ones(3, bool))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_layers": 1}, "Nodes.layer has 1 for a node of kind attention_feature in a model of 1 layers"),
        ({"tokens": ("a",)}, "1 tokens and 2 token_ids"),
        ({"edges": Edges([0, 0], [3, 3], np.float32([1, 2]))}, "more than once"),
        ({"edges": Edges([0], [5], np.float32([1]))}, r"Edges.target has 5; expected 0 to 4"),
        ({"patterns": {(0, 1): np.zeros((3, 2))}}, r"patterns\(0, 1\) has shape \(3, 2\)"),
        ({"patterns": {(1, -1): np.eye(2, dtype=np.float32)}}, "head -1 of layer 1"),
    ],
)
def test_parts_must_fit_together(changes: dict[str, object], said: str) -> None:
    """A graph of parts that do not fit is an error that says which."""
    with pytest.raises(GraphError, match=said):
        hand_graph(**changes)


def test_heads_have_names() -> None:
    """The identity and the own pattern have words, and lower numbers mean nothing."""
    assert [head_name(head) for head in (3, IDENTITY_HEAD, OWN_HEAD)] == ["H3", "id", "own"]
    assert [head_name(head, layer=2) for head in (3, IDENTITY_HEAD, OWN_HEAD)] == ["L2H3", "L2 id", "L2 own"]
    with pytest.raises(GraphError, match=r"Heads\.head has -5"):
        Heads.from_rows([(0, 0, -5, 0, 0, 1.0)])


def test_loadings_are_sorted_by_edge() -> None:
    """Whatever order they are given in."""
    graph = hand_graph()
    assert hand_graph(heads=graph.heads.take(np.array([1, 0]))).heads.head.tolist() == [3, 1]
    mixed = graph.heads.from_rows([(4, 0, 1, 0, 1, 1.0), (0, 0, 3, 0, 1, 2.0)])
    assert hand_graph(heads=mixed).heads.edge.tolist() == [0, 4]
