"""Neuronpedia: uploading and labelling against a server on this machine that plays its API and checks what it is sent.

What it refuses is what apps/webapp/app/api/graph/{signed-put,save-to-db}/route.ts of hijohnnylin/neuronpedia refuse.
"""

import json
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from circuits.cli import main
from circuits.errors import CircuitsError
from circuits.graph import Graph
from circuits.labels import label
from circuits.neuronpedia import Server, source_of, upload
from circuits.neuronpedia_labels import NeuronpediaLabels

GRAPH = Path(__file__).parents[1] / "data" / "neuronpedia" / "pruned.json"
KEY = "sk-np-secret-0123456789"
REQUIRED = {"node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp"}  # graph-schema.json


@dataclass
class Played:
    """What the server was asked, and what it does otherwise than well."""

    asked: list[tuple[str, str, dict[str, str], Any]] = field(default_factory=list)
    stored: dict[str, Any] = field(default_factory=dict)
    refuse: tuple[int, dict[str, Any]] | None = None
    redirect: str | None = None
    address: str = ""

    def paths(self) -> list[str]:
        """The calls that were made."""
        return [f"{method} {path.split('?')[0]}" for method, path, _, _ in self.asked]


def answer(played: Played, path: str, key: str | None, content: Any) -> tuple[int, Any]:
    """The API."""
    if path == "/api/features":
        rows = [one for one in content if one["index"] % 2 == 0]
        texts = [
            {"typeName": "oai_token-act-pair", "description": "not this one"},
            {"typeName": "np_max-act-logits", "description": " words\n of {} "},
        ]
        return 200, [
            {
                "modelId": one["modelId"],
                "layer": one["layer"],
                "index": str(one["index"]),
                "explanations": [{**text, "description": text["description"].format(one["index"])} for text in texts],
            }
            for one in reversed(rows)
        ] + [{"layer": rows[0]["layer"], "index": str(rows[0]["index"] + 1), "explanations": []}] if rows else []
    if key != KEY:
        return 401, {"error": "API key is required"}
    if path == "/api/graph/signed-put":
        if not content["filename"].endswith(".json") or content["contentLength"] < 1024:
            return 500, {"error": "Failed to generate signed URL"}
        played.stored["length"] = content["contentLength"]
        return 200, {
            "url": f"{played.address}/bucket/{content['filename']}?X-Amz-Signature=hidden",
            "putRequestId": "p1",
        }
    if path == "/api/graph/save-to-db" and content == {"putRequestId": "p1"}:
        graph = played.stored["graph"]
        if any(not set(node) >= REQUIRED for node in graph["nodes"]):
            return 400, {"error": "Invalid graph format.", "details": ["/nodes/0: must have required property"]}
        if any(re.search("[^a-zA-Z0-9_-]", graph["metadata"][name]) for name in ("scan", "slug")):
            return 400, {"error": "Invalid scan or slug."}
        if graph["metadata"]["scan"] not in ("gpt2-small", "gemma-2-2b"):
            return 400, {"error": "ERR_MODEL_DOES_NOT_EXIST"}
        return 200, {"url": f"https://www.neuronpedia.org/{graph['metadata']['scan']}/graph?slug=x"}
    return 404, {"error": "not found"}


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Played]:
    """A server, with `NEURONPEDIA_URL` set to it and the cache of labels in an empty folder."""
    played = Played()

    class Handler(BaseHTTPRequestHandler):
        """Speaks JSON."""

        def do_POST(self) -> None:
            """A question, or a file that is stored."""
            body = self.rfile.read(int(self.headers["Content-Length"]))
            content = json.loads(body)
            headers = {name.lower(): value for name, value in self.headers.items()}
            played.asked.append((self.command, self.path, headers, content))
            code, said = 200, {}
            if self.command == "PUT":
                assert len(body) == played.stored["length"]
                played.stored["graph"] = content
            elif played.refuse is not None:
                code, said = played.refuse
            else:
                code, said = answer(played, self.path, self.headers.get("x-api-key"), content)
            text = json.dumps(said).encode()
            self.send_response(302 if played.redirect else code)
            if played.redirect:
                self.send_header("Location", played.redirect)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_PUT = do_POST

        def log_message(self, *args: object) -> None:
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    played.address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("NEURONPEDIA_URL", played.address)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("NEURONPEDIA_API_KEY", raising=False)
    yield played
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs `circuits ARGS`; returns (exit code, all that it says in one line)."""

    def call(*args: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["circuits", *map(str, args)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        said = " ".join((captured.out + captured.err).split())
        assert "Traceback" not in said
        assert KEY not in said
        return code, said

    return call


def test_a_graph_is_uploaded(played: Played, run, monkeypatch: pytest.MonkeyPatch) -> None:
    """In three calls; the key goes to Neuronpedia and not to the bucket, and what is stored can be opened again."""
    monkeypatch.setenv("NEURONPEDIA_API_KEY", KEY)
    code, said = run(
        "upload", GRAPH, "--model-id", "gpt2-small", "--source-set", "transcoders-16k", "--slug", "My-Graph"
    )
    assert code == 0, said
    assert "https://www.neuronpedia.org/gpt2-small/graph?slug=x" in said
    assert played.paths() == ["POST /api/graph/signed-put", "PUT /bucket/my-graph.json", "POST /api/graph/save-to-db"]
    keys = [headers.get("x-api-key") for _, _, headers, _ in played.asked]
    assert keys == [KEY, None, KEY]
    stored = played.stored["graph"]
    assert stored["metadata"]["feature_details"]["neuronpedia_source_set"] == "transcoders-16k"
    assert (stored["metadata"]["scan"], stored["metadata"]["slug"]) == ("gpt2-small", "my-graph")
    assert len(stored["nodes"]) == len(Graph.load(GRAPH).nodes)
    assert stored["metadata"]["schema_version"] == 1


def test_our_own_graph_is_uploaded(played: Played, tmp_path: Path, run) -> None:
    """A traced graph meets the schema as well; the model's name is made one that Neuronpedia has."""
    assert run("trace", "When Mary and John went", "-o", tmp_path, "--format", "npz", "--quiet")[0] == 0
    code, said = run("upload", tmp_path / "graph.npz", "--key", KEY, "--model-id", "gemma-2-2b")
    assert code == 0, said
    assert played.stored["graph"]["metadata"]["slug"] == "when-mary-and-john-went"
    code, said = run("upload", tmp_path / "graph.npz", "--key", KEY)
    assert code == 2
    assert "--model-id" in said


def test_refusals_say_what_to_do(played: Played, run, tmp_path: Path) -> None:
    """Exit code 2, no traceback, no key."""
    code, said = run("upload", GRAPH)
    assert (code, "NEURONPEDIA_API_KEY" in said) == (2, True)
    code, said = run("upload", GRAPH, "--key", "wrong")
    assert code == 2
    assert "the key was refused" in said
    code, said = run("upload", GRAPH, "--key", KEY, "--slug", "a b")
    assert (code, "--slug" in said) == (2, True)
    code, said = run("upload", GRAPH, "--key", KEY, "--model-id", "../x")
    assert (code, "--model-id" in said) == (2, True)
    played.refuse = 429, {"error": f"Too many put requests today ({KEY})"}
    code, said = run("upload", GRAPH, "--key", KEY)
    assert (code, "Too many put requests today (***)" in said) == (2, True)
    assert run("upload", tmp_path / "none.json", "--key", KEY)[0] == 2


def test_a_key_is_taken_nowhere_else(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    """No redirect is followed, and nothing is sent without https."""
    played.redirect = f"{played.address}/elsewhere"
    with pytest.raises(CircuitsError, match="leads elsewhere"):
        upload(Graph.load(GRAPH), Server(key=KEY), model="gpt2-small")
    assert played.paths() == ["POST /api/graph/signed-put"]
    with pytest.raises(CircuitsError, match="https only"):
        upload(Graph.load(GRAPH), Server("http://neuronpedia.example", KEY), model="gpt2-small")
    assert KEY not in repr(Server(key=KEY))


def test_features_get_labels(played: Played, run, tmp_path: Path) -> None:
    """The preferred explanation of each feature, matched by index; the second time they come from the disk."""
    output = tmp_path / "labelled.json"
    arguments = ("label", GRAPH, "--model-id", "gemma-2-2b", "--source-set", "some-16k", "-o", output)
    code, said = run(*arguments)
    assert code == 0, said
    graph = Graph.load(output)
    features = graph.nodes.feature[graph.nodes.is_feature].tolist()
    labels = graph.nodes.label[graph.nodes.is_feature].tolist()
    assert labels == [f"words of {feature}" if feature % 2 == 0 else "" for feature in features]
    assert "words of 10" in said
    assert f"{sum(feature % 2 == 0 for feature in features)} of {len(features)} features" in said
    asked = [one for _, _, _, content in played.asked for one in content]
    assert {one["modelId"] for one in asked} == {"gemma-2-2b"}
    assert {one["layer"] for one in asked} == {"0-some-16k", "1-some-16k", "2-some-16k"}
    assert all("x-api-key" not in headers for _, _, headers, _ in played.asked)
    before = len(played.asked)
    assert run("label", output)[0] == 0  # the source set stands in the graph now, the model does not
    played.asked.clear()
    assert run(*arguments)[0] == 0
    again = [one["index"] for _, _, _, content in played.asked for one in content]
    assert len(played.asked) <= before
    assert all(index % 2 for index in again)  # only what had no label


def test_labels_without_a_network(played: Played, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those on disk are used and that is said; with none on disk it is an error that says so."""
    output = tmp_path / "labelled.json"
    arguments = ("label", GRAPH, "--model-id", "gemma-2-2b", "--source-set", "some-16k", "-o", output)
    cache = tmp_path / "cache" / "circuits" / "neuronpedia" / "127.0.0.1" / "gemma-2-2b"
    monkeypatch.setenv("NEURONPEDIA_URL", "http://127.0.0.1:9")
    code, said = run(*arguments)
    assert code == 2
    assert "cannot be reached" in said
    assert not output.exists()
    cache.mkdir(parents=True)
    (cache / "0-some-16k.json").write_text(json.dumps({"10": "[ten]"}))
    (cache / "1-some-16k.json").write_text("damaged")
    code, said = run(*arguments)
    assert code == 0, said
    assert "labels on disk only" in said
    graph = Graph.load(output)
    assert [text for text in graph.nodes.label[graph.nodes.is_feature].tolist() if text] == ["[ten]"]


def test_where_the_names_come_from(tmp_path: Path) -> None:
    """What is given, then the graph's own details, then public dictionaries, then the model's name."""
    content = json.loads(GRAPH.read_text())

    def names(scan: str, **metadata: Any) -> tuple[str, str | None]:
        changed = {**content, "metadata": {**content["metadata"], "scan": scan, **metadata}}
        (tmp_path / "graph.json").write_text(json.dumps(changed))
        return source_of(Graph.load(tmp_path / "graph.json"))

    assert names("mntss/clt-gemma-2-2b-2.5M@main") == ("gemma-2-2b", "clt-hp")
    assert names("gemma") == ("gemma-2-2b", "gemmascope-transcoder-16k")
    assert names("gpt2") == ("gpt2-small", None)
    assert names("google/Gemma-2-2b") == ("gemma-2-2b", None)
    assert names("qwen3-4b", feature_details={"neuronpedia_source_set": "mine"}) == ("qwen3-4b", "mine")
    assert names("x", replacements=[{"name": "mwhanna/qwen3-4b-transcoders"}]) == ("qwen3-4b", "transcoder-hp")
    with pytest.raises(CircuitsError, match="--source-set"):
        names("qwen3-4b", feature_details={"neuronpedia_source_set": "../../x"})
    with pytest.raises(CircuitsError, match="--source-set"):
        label(Graph.load(GRAPH), NeuronpediaLabels(Server("http://127.0.0.1:9")))


def test_graphs_of_other_tools_are_shown_and_drawn(run, tmp_path: Path) -> None:
    """`show` and `render` take circuit-tracer's file, and prune it; with what circuit-tracer kept at 0.5 and 0.9."""
    full = GRAPH.with_name("full.json")
    code, said = run("show", full)
    assert code == 0, said
    assert 'output "t31"' in said
    assert "nan" not in said
    output = tmp_path / "tight.json"
    assert run("render", full, "-o", output, "--node-threshold", 0.5, "--edge-threshold", 0.9)[0] == 0
    theirs = json.loads(GRAPH.with_name("tight.json").read_text())
    ours = json.loads(output.read_text())
    for key in ("feature_type", "ctx_idx", "influence", "activation", "feature"):
        found = [[node[key] for node in graph["nodes"] if node["feature_type"] != "logit"] for graph in (ours, theirs)]
        if key == "activation":
            found = [[value and pytest.approx(value, rel=1e-6) for value in found[0]], found[1]]
        if key == "feature":  # of features; of embeddings theirs is the position
            found = [[v for v, node in zip(values, theirs["nodes"]) if node["layer"] in "012"] for values in found]
            found = [[-1 if value is None else value for value in values] for values in found]
        assert found[0] == found[1], key
    assert run("render", full, "-o", tmp_path / "graph.svg", "--node-threshold", 0.8)[0] == 0
    assert (tmp_path / "graph.svg").stat().st_size > 1000
