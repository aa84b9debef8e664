"""Round trips, determinism, the schema, hostile tokens, broken files, and writing whole or not at all."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hand_graph import explained_hand_graph, hand_graph, hand_nodes, mixed_hand_graph
from synthetic import Size, synthetic_graph

from circuits.graph import Edges, Graph, GraphError, Heads
from circuits.graph.formats.json_file import cantor_pairing, dumps

SUFFIXES = (".json", ".npz", ".dot", ".graphml", ".svg")
HOSTILE = ("<script>alert(1)</script>", '"quoted"', "line\nbreak", "nul\x00", "🙂", "\\", "]]>", "\ud800", "&amp;", "")


def assert_same(found: Graph, expected: Graph) -> None:
    """Every array bit for bit, and everything else equal."""
    for table in ("nodes", "edges", "heads", "first_hops", "last_hops", "scores", "pairs"):
        for name, values in getattr(expected, table).columns().items():
            other = getattr(getattr(found, table), name)
            assert other.dtype.kind == values.dtype.kind
            np.testing.assert_array_equal(other, values, err_msg=f"{table}.{name}")
    for name in ("prompt", "tokens", "token_ids", "n_layers", "metadata"):
        assert getattr(found, name) == getattr(expected, name)
    assert list(found.patterns) == list(expected.patterns)
    for head, pattern in expected.patterns.items():
        np.testing.assert_array_equal(found.patterns[head], pattern)


def hostile_graph() -> Graph:
    """A graph whose tokens are everything that a format might trip over."""
    graph = synthetic_graph(Size(len(HOSTILE), n_features=30)).prune()
    label = [
        HOSTILE[p] if kind in ("embedding", "logit") else ""
        for kind, p in zip(graph.nodes.kind.tolist(), graph.nodes.position.tolist(), strict=True)
    ]
    columns = {**graph.nodes.columns(), "label": np.array(label)}
    names = ("n_layers", "edges", "heads", "patterns", "metadata")
    rest = {name: getattr(graph, name) for name in names}
    return Graph(
        prompt="".join(HOSTILE), tokens=HOSTILE, token_ids=tuple(range(10)), nodes=type(graph.nodes)(**columns), **rest
    )


GRAPHS = {
    "hand": hand_graph,
    "mixed hand": mixed_hand_graph,
    "explained": explained_hand_graph,
    "mixed full": lambda: synthetic_graph(Size(9, n_features=40, mixed=True)),
    "mixed pruned": lambda: synthetic_graph(Size(14, n_features=70, mixed=True)).prune(0.95),
    "full": lambda: synthetic_graph(Size(7, n_features=20)),
    "pruned": lambda: synthetic_graph(Size(20, n_features=90)).prune(),
    "hostile": hostile_graph,
    "no edges": lambda: hand_graph().select(np.ones(5, bool), np.zeros(5, bool)),
}


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_a_saved_graph_loads_again(name: str, suffix: str, tmp_path: Path) -> None:
    """Exactly."""
    graph = GRAPHS[name]()
    graph.save(tmp_path / f"graph{suffix}")
    assert_same(Graph.load(tmp_path / f"graph{suffix}"), graph)


@pytest.mark.parametrize("name", GRAPHS)
def test_networkx_and_back(name: str) -> None:
    """Exactly, and with Python's own numbers as attributes."""
    graph = GRAPHS[name]()
    digraph = graph.to_networkx()
    assert digraph.number_of_nodes() == len(graph.nodes)
    assert_same(Graph.from_networkx(digraph), graph)


def test_networkx_attributes() -> None:
    """What a user finds on nodes and edges."""
    digraph = hand_graph().to_networkx()
    assert digraph.nodes["a1_13_1"]["kind"] == "attention_feature"
    assert digraph.edges["E_10_0", "a1_13_1"]["heads"] == [(1, 1, 0, 1, 2.5), (1, 3, 0, 1, -0.5)]
    digraph.remove_edge("E_11_1", "a1_13_1")
    assert len(Graph.from_networkx(digraph).edges) == 4
    del digraph.nodes["2_14_1"]["layer"]
    with pytest.raises(GraphError, match=r"2_14_1.*'layer'"):
        Graph.from_networkx(digraph)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_graph_gives_the_same_bytes(suffix: str, mixed: bool, tmp_path: Path) -> None:
    """Also when it was saved and loaded in between."""
    graph = synthetic_graph(Size(9, n_features=40, mixed=mixed)).prune()
    graph.save(tmp_path / f"a{suffix}")
    graph.save(tmp_path / "b.json")
    Graph.load(tmp_path / "b.json").save(tmp_path / f"c{suffix}")
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"c{suffix}").read_bytes()


NUMBER = (int, float)
NULL = type(None)
SCHEMA: dict[str, dict[str, Any]] = {
    "metadata": {"slug": str, "scan": str, "prompt_tokens": list, "prompt": str, "schema_version": int,
                 "feature_details": dict, "node_threshold": NUMBER, "info": dict, "generation_settings": dict,
                 "pruning_settings": dict},
    "qParams": {"pinnedIds": list, "supernodes": list, "linkType": str, "clickedId": str, "sg_pos": str},
    "nodes": {"node_id": str, "feature": (int, NULL), "layer": str, "ctx_idx": int, "feature_type": str,
              "jsNodeId": str, "clerp": str, "influence": (*NUMBER, NULL), "activation": (*NUMBER, NULL),
              "token_prob": NUMBER, "is_target_logit": bool, "run_idx": int, "reverse_ctx_idx": int},
    "links": {"source": str, "target": str, "weight": NUMBER},
}  # fmt: skip


@pytest.mark.parametrize("name", ["pruned", "hostile", "mixed pruned"])
def test_json_is_what_viewers_read(name: str, tmp_path: Path) -> None:
    """All keys with their types, unique ids, links between nodes, logits with their probability."""
    graph = GRAPHS[name]()
    graph.save(tmp_path / "graph.json")
    content = json.loads((tmp_path / "graph.json").read_text())
    for part, keys in SCHEMA.items():
        items = content[part] if isinstance(content[part], list) else [content[part]]
        for item in items:
            for key, kind in keys.items():
                assert isinstance(item[key], kind), (part, key, item[key])
    names = [node["node_id"] for node in content["nodes"]]
    assert len(set(names)) == len(names)
    assert {link[end] for link in content["links"] for end in ("source", "target")} <= set(names)
    for node in content["nodes"]:
        if node["feature_type"] == "logit":
            assert float(node["clerp"].split("(p=")[1].split(")")[0]) == pytest.approx(node["token_prob"], abs=6e-4)
        if node["kind"] == "attention_feature":
            assert node["feature_type"] == "lorsa"
            assert node["feature"] == cantor_pairing(node["model_layer"], node["feature_index"])
    crossing = [link for link in content["links"] if "heads" in link]
    assert crossing
    for link in crossing:
        assert sum(row[4] for row in link["heads"]) == pytest.approx(link["weight"], abs=1e-5)
    assert set(content["patterns"]) == {
        f"{row[0]}.{row[1]}" for link in crossing for row in link["heads"] if row[1] >= 0
    }
    assert sum(node["is_target_logit"] for node in content["nodes"]) == 1


def test_names_are_unique_when_two_dictionaries_share_a_site() -> None:
    """The second of two equal names gets a number."""
    kinds = ["embedding", "mlp_feature", "mlp_feature", "logit"]
    nodes = replace(hand_nodes(kinds, [-1, 0, 0, 2]), feature=np.array([1, 5, 5, 3]))
    graph = hand_graph(nodes=nodes, edges=Edges.empty(), heads=Heads.empty())
    assert graph.node_ids() == ["E_1_0", "0_5_1", "0_5_1_2", "2_3_1"]


def test_every_kind_has_its_name_and_its_type() -> None:
    """Ids that tell the kinds apart, types that the viewers' schema has, and two sides that are one feature there."""
    content = json.loads(dumps(mixed_hand_graph()))
    found = {node["node_id"]: node["feature_type"] for node in content["nodes"]}
    assert found == {
        "E_10_0": "embedding",
        "E_11_1": "embedding",
        "v0_5_0": "lorsa",
        "v0_error_0": "lorsa error",
        "k1_7_0": "lorsa",
        "k1_7_1": "lorsa",
        "q1_7_1": "lorsa",
        "r1_error_1": "mlp reconstruction error",
        "a2_8_1": "lorsa",
        "a2_error_1": "lorsa error",
        "2_9_1": "cross layer transcoder",
        "2_error_1": "mlp reconstruction error",
        "3_22_1": "logit",
    }
    numbers = {node["node_id"]: node["feature"] for node in content["nodes"]}
    assert numbers["k1_7_0"] == numbers["q1_7_1"] == cantor_pairing(1, 7)


def test_special_heads_in_every_format(tmp_path: Path) -> None:
    """The integer where numbers are kept, with what it means beside it; the name where there is text."""
    import networkx

    graph = mixed_hand_graph()
    content = json.loads(dumps(graph))
    assert content["graph"]["head_names"] == {"-1": "id", "-2": "own", "-3": "stays", "-4": "rest"}
    links = {(link["source"], link["target"]): link.get("heads") for link in content["links"]}
    assert links["k1_7_1", "q1_7_1"] == [[1, -1, 1, 1, 2.0], [1, 0, 1, 1, 1.0]]
    digraph = graph.to_networkx()
    assert digraph.graph["head_names"] == {-1: "id", -2: "own", -3: "stays", -4: "rest"}
    assert digraph.edges["q1_7_1", "a2_8_1"]["heads"] == [(2, -2, 1, 1, 2.0)]
    for suffix in SUFFIXES:
        graph.save(tmp_path / f"graph{suffix}")
    with np.load(tmp_path / "graph.npz") as arrays:
        assert arrays["head"].tolist() == [1, 0, 0, 1, -1, 0, -2, -2]
        assert not [name for name in arrays if name.startswith("pattern") and "-" in name]
    edges = networkx.read_graphml(tmp_path / "graph.graphml").edges
    assert edges["k1_7_1", "q1_7_1"]["heads"] == "L1 id 1→1 +2, L1H0 1→1 +1"
    dot = (tmp_path / "graph.dot").read_text()
    assert 'label="L1 id"' in dot
    assert 'label="L2 own"' in dot
    assert "H-" not in dot + (tmp_path / "graph.svg").read_text()


def test_metadata_comes_back_as_it_was(tmp_path: Path) -> None:
    """Keys that the schema also has are the user's own on loading."""
    metadata = {"slug": "My Slug", "scan": "m", "info": {"description": "d"}, "other": [1, {"a": None}]}
    graph = hand_graph(metadata=metadata)
    graph.save(tmp_path / "graph.json")
    content = json.loads((tmp_path / "graph.json").read_text())
    assert content["metadata"]["slug"] == "my-slug"
    assert content["metadata"]["info"] == {"description": "d"}
    assert Graph.load(tmp_path / "graph.json").metadata == graph.metadata


def test_npz_has_the_promised_arrays(tmp_path: Path) -> None:
    """Readable by numpy alone, without pickles."""
    hand_graph().save(tmp_path / "graph.npz")
    with np.load(tmp_path / "graph.npz", allow_pickle=False) as arrays:
        assert arrays["kind"].tolist()[3] == "attention_feature"
        assert arrays["weight"].tolist() == [2, 1, -2, 3, -1]
        assert arrays["head_edge"].tolist() == [0, 0]
        assert arrays["head"].tolist() == [1, 3]
        assert arrays["head_weight"].tolist() == [2.5, -0.5]
        assert arrays["pattern_1_1"].tolist() == [[1, 0], [0.25, 0.75]]


def test_graphml_loads_in_networkx(tmp_path: Path) -> None:
    """With hostile tokens too."""
    import networkx

    graph = hostile_graph()
    graph.save(tmp_path / "graph.graphml")
    digraph = networkx.read_graphml(tmp_path / "graph.graphml")
    assert set(digraph.nodes) == set(graph.node_ids())
    assert digraph.number_of_edges() == len(graph.edges)
    hand_graph().save(tmp_path / "hand.graphml")
    edge = networkx.read_graphml(tmp_path / "hand.graphml").edges["E_10_0", "a1_13_1"]
    assert edge["heads"] == "L1H1 0→1 +2.5, L1H3 0→1 -0.5"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the pyparsing that pydot calls
def test_dot_is_read_back_by_pydot(tmp_path: Path) -> None:
    """With hostile tokens too; every edge is there."""
    import pydot

    graph = hostile_graph()
    graph.save(tmp_path / "graph.dot")
    (dot,) = pydot.graph_from_dot_file(str(tmp_path / "graph.dot"), encoding="utf-8")
    assert len(dot.get_edges()) == len(graph.edges)
    assert len([s for s in dot.get_subgraphs() if "cluster" in s.get_name()]) == len(graph.tokens)


@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_every_truncation_is_an_error(suffix: str, tmp_path: Path) -> None:
    """A file cut off anywhere is reported with its name and never half loaded."""
    path = tmp_path / f"graph{suffix}"
    hand_graph().save(path)
    whole = path.read_bytes()
    for end in range(0, len(whole) - 2, max(1, len(whole) // 60)):
        path.write_bytes(whole[:end])
        with pytest.raises(GraphError, match=f"graph{suffix}"):
            Graph.load(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("graph"), "key 'graph' is missing"),
        (lambda c: c.update(nodes={}), "key 'nodes' is missing or no list"),
        (lambda c: c["graph"].update(format=99), "format 99"),
        (lambda c: c["nodes"][0].pop("kind"), "lacks the key 'kind'"),
        (lambda c: c["nodes"][0].update(bias="x"), "wrong type under 'bias'"),
        (lambda c: c["links"][0].update(source="nobody"), "'nobody'"),
        (lambda c: c["links"][0].update(heads=[[1, 2]]), "wrong type"),
        (lambda c: c["links"][0].update(weight=None), "not finite|wrong type"),
        (lambda c: c["patterns"].update({"zero": []}), "wrong type"),
        (lambda c: c["graph"].update(tokens=3), "wrong type"),
    ],
)
def test_broken_json_says_where(change: Any, said: str, tmp_path: Path) -> None:
    """A key that is missing or wrong is named."""
    path = tmp_path / "graph.json"
    hand_graph().save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(GraphError, match=said):
        Graph.load(path)


def test_broken_npz_says_where(tmp_path: Path) -> None:
    """Missing arrays are named, pickles are refused."""
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    with pytest.raises(GraphError, match="no array 'graph'"):
        Graph.load(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", graph=np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(GraphError, match=r"b\.npz"):
        Graph.load(tmp_path / "b.npz")


def test_unknown_suffixes_and_missing_files(tmp_path: Path) -> None:
    """The message lists what there is."""
    with pytest.raises(GraphError, match=r"\.pt; use one of \.dot, \.graphml, \.html, \.json"):
        hand_graph().save(tmp_path / "graph.pt")
    with pytest.raises(GraphError, match=r"cannot be read as \.svg"):
        Graph.load(tmp_path / "graph.svg")
    with pytest.raises(GraphError, match="No such file"):
        Graph.load(tmp_path / "graph.json")
    with pytest.raises(GraphError, match="folder exists and is writable"):
        hand_graph().save(tmp_path / "nowhere" / "graph.json")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing half-written, nothing left behind."""
    path = tmp_path / "graph.json"
    path.write_text("old")
    with pytest.raises(GraphError, match="metadata cannot be written as JSON"):
        hand_graph(metadata={"x": object()}).save(path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(GraphError, match="No space left"):
        hand_graph().save(path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["graph.json"]


def test_graphml_is_parsed_by_the_standard_library(tmp_path: Path) -> None:
    """Well-formed whatever the tokens are, with every node."""
    hostile_graph().save(tmp_path / "graph.graphml")
    root = ElementTree.parse(tmp_path / "graph.graphml").getroot()
    assert len(root.findall(".//{*}node")) == len(hostile_graph().nodes)


def test_annotations_that_a_viewer_saved_are_read(tmp_path: Path) -> None:
    """`qParams` changed by a viewer become the graph's own; untouched ones add nothing to it."""
    path = tmp_path / "graph.json"
    hand_graph().save(path)
    assert "qParams" not in Graph.load(path).metadata
    content = json.loads(path.read_text())
    content["qParams"] |= {"pinnedIds": ["E_10_0"], "supernodes": [["start", "E_10_0"]]}
    path.write_text(json.dumps(content))
    back = Graph.load(path)
    assert back.metadata["qParams"] == content["qParams"]
    back.save(path)
    assert Graph.load(path).metadata["qParams"] == content["qParams"]
    assert json.loads(path.read_text())["qParams"] == content["qParams"]
    partly = hand_graph(metadata={"qParams": {"pinnedIds": ["E_10_0"]}})
    partly.save(path)
    assert Graph.load(path).metadata["qParams"] == {"pinnedIds": ["E_10_0"]}
