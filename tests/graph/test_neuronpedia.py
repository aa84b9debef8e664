"""Graphs of other tools in Neuronpedia's schema: files that circuit-tracer 0.5.0 wrote, and what it computed them from.

`tests/data/neuronpedia/README.md` says how they were made.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from circuits.graph import Graph, GraphError, edge_scores, with_influence

DATA = Path(__file__).parents[1] / "data" / "neuronpedia"
PRUNED = {"pruned": (0.8, 0.98), "tight": (0.5, 0.9)}


def content(name: str) -> dict[str, Any]:
    """A file as it stands."""
    found: dict[str, Any] = json.loads((DATA / f"{name}.json").read_text())
    return found


def load_changed(tmp_path: Path, changed: dict[str, Any]) -> Graph:
    """A changed file, loaded."""
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(changed))
    return Graph.load(path)


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    """What circuit-tracer wrote the files from."""
    with np.load(DATA / "expected.npz") as archive:
        return dict(archive)


def rows_of(graph: Graph, expected: dict[str, np.ndarray]) -> np.ndarray:
    """(n,) the row of circuit-tracer's matrix that each node is."""
    features = expected["active_features"][expected["selected_features"]].tolist()
    tokens, logits = expected["input_tokens"].tolist(), expected["logit_token_ids"].tolist()
    n_layers, last = int(expected["n_layers"]), len(tokens) - 1
    keys: list[tuple[str, int, int, int]] = [("mlp_feature", *feature) for feature in features]
    keys += [("mlp_error", layer, position, -1) for layer in range(n_layers) for position in range(len(tokens))]
    keys += [("embedding", -1, position, token) for position, token in enumerate(tokens)]
    keys += [("logit", n_layers, last, token) for token in logits]
    number = {key: row for row, key in enumerate(keys)}
    columns = (graph.nodes.kind, graph.nodes.layer, graph.nodes.position, graph.nodes.feature)
    return np.array([number[key] for key in zip(*(column.tolist() for column in columns), strict=True)])


@pytest.mark.parametrize("name", ["full", *PRUNED])
def test_links_are_the_adjacency(name: str, expected: dict[str, np.ndarray]) -> None:
    """Every edge is the entry of circuit-tracer's matrix, to the bit, also where a feature and an error share an id."""
    graph = Graph.load(DATA / f"{name}.json")
    rows = rows_of(graph, expected)
    found = expected["adjacency"][rows[graph.edges.target], rows[graph.edges.source]]
    np.testing.assert_array_equal(graph.edges.weight, found)
    assert len(graph.edges) == sum(link["weight"] != 0 for link in content(name)["links"])
    assert graph.tokens == tuple(content(name)["metadata"]["prompt_tokens"])
    assert graph.token_ids == tuple(expected["input_tokens"].tolist())
    assert graph.n_layers == int(expected["n_layers"])
    assert "ambiguous_links" not in graph.metadata
    ids = [node["node_id"] for node in content(name)["nodes"]]
    assert (len(ids) - len(set(ids))) == {"full": 5, "pruned": 1, "tight": 0}[name]
    logits = graph.nodes.kind == "logit"
    np.testing.assert_allclose(graph.nodes.probability[logits], expected["logit_probabilities"], rtol=1e-6)
    assert set(graph.nodes.label[logits]) == {
        f"t{token}" if token else "<bos>" for token in expected["logit_token_ids"].tolist()
    }


def test_influence_is_circuit_tracers() -> None:
    """From the links of the full graph: the cumulated shares that the file has, and every node's own."""
    graph = Graph.load(DATA / "full.json")
    again = with_influence(graph)
    np.testing.assert_allclose(again.nodes.cumulative_influence, graph.nodes.cumulative_influence, atol=1e-6)
    total = again.metadata["influence_total"]
    np.testing.assert_allclose(again.nodes.influence / total, graph.nodes.influence, atol=3e-6)
    assert graph.metadata["influence_total"] == 1.0


@pytest.mark.parametrize("name", PRUNED)
def test_pruning_gives_circuit_tracers_graph(name: str) -> None:
    """The full graph pruned with its thresholds has the nodes and links that circuit-tracer kept."""
    ours, theirs = Graph.load(DATA / "full.json").prune(*PRUNED[name]), Graph.load(DATA / f"{name}.json")

    def links(graph: Graph) -> dict[tuple[str, str], float]:
        ids, edges = graph.node_ids(), graph.edges
        return {(ids[s], ids[t]): w for s, t, w in zip(edges.source, edges.target, edges.weight.tolist())}

    assert ours.node_ids() == theirs.node_ids()
    assert links(ours) == links(theirs)
    np.testing.assert_array_equal(ours.nodes.cumulative_influence, theirs.nodes.cumulative_influence)


def test_a_pruned_graph_is_pruned_tighter() -> None:
    """Its nodes are judged by the full graph's shares; an edge threshold or a node threshold may not be looser."""
    graph = Graph.load(DATA / "pruned.json")
    full = Graph.load(DATA / "full.json")
    always = (graph.nodes.kind == "embedding") | graph.nodes.is_target
    for share in (0.7, 0.6, 0.5):
        strong = set(full.select(full.nodes.cumulative_influence - full.nodes.influence < share - 1e-9).node_ids())
        kept = set(graph.prune(share, 1.0).node_ids())
        assert kept - set(graph.select(always).node_ids()) <= strong
    assert len(graph.prune(0.5, 0.98).nodes) < len(graph.nodes)
    with pytest.raises(GraphError, match="looser"):
        graph.prune(0.9, 0.98)


def test_edge_scores_are_circuit_tracers() -> None:
    """On the pruned graph's own links, `compute_edge_influence` of circuit_tracer/graph.py written out densely."""
    graph = Graph.load(DATA / "pruned.json")
    n, edges = len(graph.nodes), graph.edges
    matrix = np.zeros((n, n))
    matrix[edges.target, edges.source] = np.abs(edges.weight.astype(np.float64))
    matrix /= np.maximum(matrix.sum(1, keepdims=True), 1e-10)
    weights = graph.nodes.target_weight
    influence, step = weights.copy(), weights @ matrix
    while step.any():
        influence, step = influence + step, step @ matrix
    wanted = (matrix * influence[:, None])[edges.target, edges.source]
    np.testing.assert_allclose(edge_scores(graph.nodes, edges), wanted, rtol=1e-9)


@pytest.mark.parametrize("suffix", ["json", "npz"])
def test_saved_as_ours_and_read_back(tmp_path: Path, suffix: str) -> None:
    """Nothing is lost on the way through our own formats; the pictures can be drawn."""
    changed = content("pruned")
    changed["qParams"]["supernodes"] = [["a name", "1_2_3"]]
    graph = load_changed(tmp_path, changed)
    graph.save(tmp_path / f"ours.{suffix}")
    again = Graph.load(tmp_path / f"ours.{suffix}")
    for name, column in graph.nodes.columns().items():
        np.testing.assert_array_equal(getattr(again.nodes, name), column)
    for name, column in graph.edges.columns().items():
        np.testing.assert_array_equal(getattr(again.edges, name), column)
    assert again.metadata == graph.metadata
    assert again.metadata["qParams"]["supernodes"] == [["a name", "1_2_3"]]
    if suffix == "json":
        written = json.loads((tmp_path / "ours.json").read_text())
        assert written["qParams"] == changed["qParams"]
        assert written["metadata"]["scan"] == "tiny-gpt2"
        for picture in ("svg", "dot", "graphml"):
            graph.save(tmp_path / f"ours.{picture}")


def test_without_influences_they_come_from_the_links(tmp_path: Path) -> None:
    """Files of other tools may lack them, and name features by Cantor's pairing alone."""
    changed = content("full")
    for node in changed["nodes"]:
        del node["influence"]
    graph = load_changed(tmp_path, changed)
    theirs = Graph.load(DATA / "full.json")
    np.testing.assert_allclose(graph.nodes.cumulative_influence, theirs.nodes.cumulative_influence, atol=1e-6)
    changed = content("tight")
    numbered = {node["node_id"]: f"n{index}" for index, node in enumerate(changed["nodes"])}
    for node in changed["nodes"]:
        node["node_id"] = numbered[node["node_id"]]
    for link in changed["links"]:
        link["source"], link["target"] = numbered[link["source"]], numbered[link["target"]]
    by_pairing, by_id = load_changed(tmp_path, changed), Graph.load(DATA / "tight.json")
    features = by_id.nodes.is_feature
    np.testing.assert_array_equal(by_pairing.nodes.feature[features], by_id.nodes.feature[features])
    assert set(by_pairing.token_ids) == {-1}


def test_a_link_that_may_be_either_is_told(tmp_path: Path) -> None:
    """A link alone in its target's input, whose id a feature and an error share, goes to the error and is listed."""
    changed = content("full")
    shared = "0_2_4"
    reading = {link["target"].split("_")[0]: link for link in changed["links"] if link["source"] == shared}
    assert set(reading) == {"1", "2", "4"}
    changed["links"] = [reading["1"], reading["4"]]
    graph = load_changed(tmp_path, changed)
    assert graph.metadata["ambiguous_links"] == [[shared, reading["4"]["target"], reading["4"]["weight"]]]
    # The error of layer 2 is above a feature of layer 1, so that link can only be the feature's.
    assert graph.nodes.kind[graph.edges.source].tolist() == ["mlp_feature", "mlp_error"]
    # Between a token and a feature, in no order, it may be either again, whatever stands around it.
    changed = content("full")
    mixed = [link for link in changed["links"] if link["target"] == reading["4"]["target"] and link["weight"]]
    changed["links"] = mixed[::-1]
    graph = load_changed(tmp_path, changed)
    assert {name for name, _, _ in graph.metadata["ambiguous_links"]} == {"0_1_1", "0_1_2", "0_1_3", "0_1_4", shared}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: found["nodes"][0].update(feature_type="bias"), "'bias'; known are"),
        (lambda found: found["links"][0].update(source="9_9_9"), "'9_9_9', which is no node"),
        (lambda found: found["links"][0].update(target="E_0_0"), "stands for 0 nodes that can read"),
        (lambda found: found["nodes"][0].pop("ctx_idx"), "lacks the key 'ctx_idx'"),
        (lambda found: found["nodes"][0].update(layer="x"), "does not allow"),
        (lambda found: found["metadata"].pop("prompt_tokens"), "Neuronpedia's schema"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, change: Any, words: str) -> None:
    """With the file's name, and what is wrong."""
    changed = content("pruned")
    change(changed)
    with pytest.raises(GraphError, match=words) as raised:
        load_changed(tmp_path, changed)
    assert "changed.json" in str(raised.value)


def test_labels_of_features_are_kept(tmp_path: Path) -> None:
    """A viewer's label of a feature is the node's, and is written again."""
    changed = content("pruned")
    node = next(node for node in changed["nodes"] if node["feature_type"] == "cross layer transcoder")
    node["clerp"] = "capitals"
    graph = load_changed(tmp_path, changed)
    assert graph.nodes.label[graph.nodes.is_feature].tolist().count("capitals") == 1
    replace(graph, metadata={}).save(tmp_path / "ours.json")
    written = json.loads((tmp_path / "ours.json").read_text())
    assert [one["clerp"] for one in written["nodes"]].count("capitals") == 1
