"""What says why in a graph: hops, explained scores with their pairs, and what ablations predicted and did."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hand_graph import explained_hand_graph, hand_graph
from synthetic import Size, synthetic_graph
from test_formats import assert_same

from circuits.graph import OWN_HEAD, REST, STAYS, Graph, GraphError, Heads, Pairs, Scores, head_name
from circuits.graph.formats.json_file import dumps
from circuits.graph.formats.svg_file import to_svg

VERIFICATION: dict[str, Any] = {
    "mode": "real",
    "nodes": {
        "tested": 24,
        "spearman": 0.712,
        "spearman_interval": [0.5, 0.84],
        "slope": 0.9,
        "slope_interval": [0.7, 1.1],
        "median_effect": 0.31,
        "median_effect_interval": [0.2, 0.4],
    },
    "random": {"tested": 24, "spearman": 0.1, "median_effect": 0.02, "median_effect_interval": [0.01, 0.03]},
    "patterns": {"tested": 12, "spearman": 0.66, "spearman_interval": [0.4, 0.8]},
    "sufficiency": 0.8,
    "necessity": 0.35,
}


def links(content: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """The links of a JSON file by their ends."""
    return {(link["source"], link["target"]): link for link in content["links"]}


def test_json_tells_hops_and_scores() -> None:
    """Rows on the links that have hops, one object for each score, and null where there is no number."""
    content = json.loads(dumps(explained_hand_graph()))
    link = links(content)["q1_7_1", "2_9_1"]
    assert link["first_hops"] == [[1, 0, 0, 1, 0.75], [-1, REST, 1, 1, 0.25]]
    assert link["last_hops"] == [[2, 3, 0, 1, 1.25], [-1, REST, 1, 1, -0.25]]
    assert links(content)["2_9_1", "3_22_1"]["first_hops"] == [[-1, STAYS, 1, 1, 3.0]]
    assert sum("first_hops" in link for link in content["links"]) == 2
    first, second, own = content["qk"]
    assert first == {
        "layer": 1, "head": 0, "query": 1, "key": 0, "owner": "", "score": 4.5, "attention": 0.75, "relative": 0.3,
        "lead": 1.2, "gap": 1e-6,
        "pairs": [["E_11_1", "v0_5_0", 3.0], ["E_11_1", "E_10_0", 2.0], ["bias", "v0_5_0", -0.5]],
        "lead_pairs": [["E_11_1", "v0_5_0", 0, 0.75], ["E_11_1", "E_11_1", 1, -0.25]],
        "query_side": [["E_11_1", 5.0]],
        "key_side": [["v0_5_0", 2.5], ["E_10_0", 2.0]],
        "qk_features": [["qk.1/37", 4.25]],
    }  # fmt: skip
    assert second["pairs"] == [["E_11_1", "E_11_1", 0.1]]
    assert (own["head"], own["owner"], own["relative"]) == (OWN_HEAD, "a2_8_1", None)
    nodes = {node["node_id"]: node for node in content["nodes"]}
    assert (nodes["k1_7_1"]["predicted"], nodes["k1_7_1"]["measured"]) == (-0.5, -1.0)
    assert nodes["q1_7_1"]["predicted"] is None


def test_nodes_tell_what_neuronpedia_reads() -> None:
    """The pairs of the scores that the incoming loadings name, each by its loading's share.

    q1_7_1 gets 1.5 by L1H0 from key 0, score 0, and 1 by L1H0 from key 1, score 1: shares 3/5 and 2/5, for L1H1 and the
    identity are not explained. a2_8_1 gets -2 by its own pattern, score 2, which is all: share -1.
    """
    nodes = {node["node_id"]: node for node in json.loads(dumps(explained_hand_graph()))["nodes"]}
    assert nodes["q1_7_1"]["qk_tracing_results"] == {
        "pair_wise_contributors": [
            ["E_11_1", "v0_5_0", 1.8],
            ["E_11_1", "E_10_0", 1.2],
            ["bias", "v0_5_0", -0.3],
            ["E_11_1", "E_11_1", 0.04],
        ],
        "top_q_marginal_contributors": [["E_11_1", 3.04]],
        "top_k_marginal_contributors": [["v0_5_0", 1.5], ["E_10_0", 1.2]],
    }
    assert nodes["a2_8_1"]["qk_tracing_results"] == {
        "pair_wise_contributors": [["E_11_1", "bias", -1.0]],
        "top_q_marginal_contributors": [],
        "top_k_marginal_contributors": [],
    }
    assert {name for name, node in nodes.items() if "qk_tracing_results" in node} == {"q1_7_1", "a2_8_1"}


def test_a_score_of_an_own_pattern_is_its_owners() -> None:
    """Another feature's own pattern at the same place is not explained by it."""
    graph = explained_hand_graph()
    named = graph.explained_by("heads")
    assert {edge: scores for edge, scores in zip(graph.heads.edge.tolist(), named, strict=True) if scores} == {
        5: [0], 6: [1], 7: [2],
    }  # fmt: skip
    assert graph.explained_by("first_hops") == [[0], [], []]
    other = replace(graph.scores, owner=np.array(["", "", "a2_9_1"]))
    assert [2] not in replace(graph, scores=other).explained_by("heads")


def test_ten_strongest_on_a_node() -> None:
    """By absolute value, ties by name."""
    graph = explained_hand_graph()
    n = 15
    pairs = Pairs(
        score=np.full(n, 2, np.int32),
        form=np.full(n, "score"),
        query_node=np.array([f"0_{i}_1" for i in range(n)]),
        key_node=np.full(n, "bias"),
        key=np.zeros(n, np.int32),
        weight=np.float32([(-1) ** i * i for i in range(n)]),
    )
    nodes = {node["node_id"]: node for node in json.loads(dumps(replace(graph, pairs=pairs)))["nodes"]}
    found = nodes["a2_8_1"]["qk_tracing_results"]["pair_wise_contributors"]
    assert found == [[f"0_{i}_1", "bias", -((-1) ** i) * i] for i in range(14, 4, -1)]
    assert (
        "qk_tracing_results" not in nodes["q1_7_1"]
        or not nodes["q1_7_1"]["qk_tracing_results"]["pair_wise_contributors"]
    )


@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_files_of_earlier_versions_load(suffix: str, tmp_path: Path) -> None:
    """Without the new keys: columns of nan, tables without rows."""
    graph, path = hand_graph(), tmp_path / f"graph{suffix}"
    graph.save(path)
    if suffix == ".json":
        content = json.loads(path.read_text())
        del content["qk"]
        for node in content["nodes"]:
            del node["predicted"], node["measured"]
        path.write_text(json.dumps(content))
    else:
        with np.load(path) as arrays:
            new = ("predicted", "measured", "first_hop", "last_hop", "score_", "pair_")
            np.savez(path, **{name: values for name, values in arrays.items() if not name.startswith(new)})
    assert_same(Graph.load(path), graph)
    digraph = graph.to_networkx()
    del digraph.graph["qk"]
    for _, attributes in digraph.nodes(data=True):
        del attributes["predicted"]
    for _, _, attributes in digraph.edges(data=True):
        del attributes["first_hops"]
    assert_same(Graph.from_networkx(digraph), graph)


def test_a_broken_score_is_named(tmp_path: Path) -> None:
    """A missing column, a wrong type, a row too short: each an error that says so."""
    for change, message in (
        (lambda score: score.pop("layer"), "lacks the key 'layer'"),
        (lambda score: score.update(owner=3), "Scores.owner has values of the wrong type"),
        (lambda score: score["pairs"].append(["E_11_1", 1.0]), "wrong type"),
        (lambda score: score["key_side"].append([1, 1.0]), "Pairs.key_node has values of the wrong type"),
    ):
        content = json.loads(dumps(explained_hand_graph()))
        change(content["qk"][0])
        (tmp_path / "graph.json").write_text(json.dumps(content))
        with pytest.raises(GraphError, match=message):
            Graph.load(tmp_path / "graph.json")


def test_what_does_not_fit_is_refused() -> None:
    """Hops among the loadings, pairs of no score, keys and names that a form does not have."""
    graph = explained_hand_graph()
    stays = Heads.from_rows([(0, -1, STAYS, 0, 0, 1.0)])
    with pytest.raises(GraphError, match="first_hops or last_hops"):
        replace(graph, heads=stays)
    with pytest.raises(GraphError, match=r"first_hops\.edge has 99"):
        replace(graph, first_hops=replace(stays, edge=np.array([99])))
    for column, value, message in (
        ("score", 3, "beyond the scores; expected 0 to 2"),
        ("form", "sum", r"Pairs\.form has \['sum'\]"),
        ("key", 1, "only the form 'lead' has other keys"),
        ("key", 7, "the prompt's tokens"),
        ("weight", np.inf, "not finite"),
    ):
        values = getattr(graph.pairs, column).copy()
        values[0] = value
        with pytest.raises(GraphError, match=message):
            replace(graph, pairs=replace(graph.pairs, **{column: values}))
    for form, message in (("query", "other side"), ("key", "other side"), ("qk_feature", "same name on both sides")):
        with pytest.raises(GraphError, match=message):
            replace(graph, pairs=replace(graph.pairs.take(np.array([0])), form=np.array([form])))


def test_pairs_are_brought_into_order() -> None:
    """By score and form; rows of one form keep their order."""
    pairs = explained_hand_graph().pairs
    assert pairs.score.tolist() == [0] * 9 + [1, 1, 2]
    assert pairs.form.tolist()[:9] == [*["score"] * 3, *["lead"] * 2, "query", "key", "key", "qk_feature"]
    assert pairs.key_node.tolist()[:3] == ["v0_5_0", "E_10_0", "v0_5_0"]


def test_selecting_keeps_what_is_still_named() -> None:
    """Without edge 5 (k1_7_0 to q1_7_1) score 0 is still named by a hop; without edge 9 too it goes with its pairs."""
    graph = explained_hand_graph()
    every = np.ones(len(graph.nodes), bool)
    edges = np.ones(len(graph.edges), bool)
    edges[5] = False
    part = graph.select(every, edges)
    assert part.scores.key.tolist() == [0, 1, 0]
    assert part.first_hops.edge.tolist() == [8, 8, 12]
    assert part.last_hops.weight.tolist() == [1.25, -0.25, 3.0]
    assert (2, 3) in part.patterns
    edges[9] = False
    part = graph.select(every, edges)
    assert part.scores.owner.tolist() == ["", "a2_8_1"]
    assert part.pairs.score.tolist() == [0, 0, 1]
    assert part.pairs.key_node.tolist() == ["E_11_1", "", "bias"]
    assert part.first_hops.edge.tolist() == [11]
    assert (2, 3) not in part.patterns
    part = graph.select(every, np.zeros(len(graph.edges), bool))
    assert not len(part.scores) + len(part.pairs) + len(part.first_hops) + len(part.last_hops)


def test_pruning_keeps_hops_with_their_edges() -> None:
    """Every hop that is left belongs to the edge that it was made for."""
    graph = synthetic_graph(Size(12, n_features=60))
    m = np.arange(len(graph.edges), dtype=np.int32)
    zero = np.zeros(len(m), np.int32)
    hops = Heads(edge=m, layer=zero, head=zero, key=zero, query=zero, weight=graph.edges.weight)
    pruned = replace(graph, first_hops=hops, last_hops=hops).prune(0.6)
    assert 0 < len(pruned.edges) < len(graph.edges)
    for table in (pruned.first_hops, pruned.last_hops):
        np.testing.assert_array_equal(table.edge, np.arange(len(pruned.edges)))
        np.testing.assert_array_equal(table.weight, pruned.edges.weight)


def test_hops_in_words(tmp_path: Path) -> None:
    """In GraphML as attributes, in DOT and SVG as tooltips; what is no head is named without a layer."""
    import networkx

    graph = explained_hand_graph()
    assert (head_name(STAYS, layer=-1), head_name(REST, layer=-1), head_name(STAYS)) == ("stays", "rest", "stays")
    for suffix in (".graphml", ".dot", ".svg"):
        graph.save(tmp_path / f"graph{suffix}")
    edge = networkx.read_graphml(tmp_path / "graph.graphml").edges["q1_7_1", "2_9_1"]
    assert edge["first_hops"] == "L1H0 0→1 +0.75, rest 1→1 +0.25"
    assert edge["last_hops"] == "L2H3 0→1 +1.25, rest 1→1 -0.25"
    told = "first hops L1H0 0→1 +0.75, rest 1→1 +0.25 · last hops L2H3 0→1 +1.25, rest 1→1 -0.25"
    assert told in (tmp_path / "graph.dot").read_text()
    assert told in (tmp_path / "graph.svg").read_text()


def test_svg_carries_its_evidence() -> None:
    """One line, or as many as it needs, with the figures that are there; none without; tested nodes say both."""
    graph = explained_hand_graph()
    assert "change of the target without it: predicted -0.5, measured -1" in to_svg(graph)
    assert "Spearman" not in to_svg(graph)
    metadata = {**graph.metadata, "verification": VERIFICATION, "qk": {"max_relative_gap": 3.1e-6, "scores": 1400}}
    svg = to_svg(replace(graph, metadata=metadata))
    for words in (
        "24 nodes ablated (real)",
        "Spearman 0.71 [0.50, 0.84]",
        "slope 0.90 [0.70, 1.10]",
        "median effect 0.31 [0.20, 0.40], of random nodes 0.02 [0.01, 0.03]",
        "12 patterns of heads changed: Spearman 0.66 [0.40, 0.80]",
        "sufficiency 0.80",
        "necessity 0.35",
        "1,400 scores explained, QK gap 3.1e-06",
    ):
        assert words in svg
    partly = {"verification": {"nodes": {"tested": 3, "spearman": None}}, "qk": {}}
    assert "3 nodes ablated (real)" in to_svg(replace(graph, metadata={**graph.metadata, **partly}))


def test_empty_tables_have_their_types() -> None:
    """So that two empty tables are alike wherever they come from."""
    assert Scores.empty().owner.dtype.kind == "U"
    assert Pairs.empty().weight.dtype == np.float32
