"""What the server does when it is asked: traces, interventions, saved graphs, annotations, labels, and turns."""

import json
import threading
from typing import Any

import numpy as np
import pytest
from asking import PROMPT, traced

import circuits
from circuits.graph import Graph


def test_a_prompt_becomes_a_saved_graph(make: Any, model: Any) -> None:
    """The same graph as `circuits.trace` gives; listed with what it says, opened, and given back as a file."""
    client = make()
    name = traced(client, targets=["Mary"], minus="John", node_threshold=0.6)
    assert name == "when-mary-and-john-went-to-the-store-john-gave-a-drink-to"
    saved = Graph.load(client.studio.shelf.path(name))
    from circuits.targets import token_id

    target = circuits.TokenDifference(token_id(model.base, "Mary"), token_id(model.base, "John"))
    alone = circuits.trace(model, PROMPT, [target], circuits.TraceSettings(node_threshold=0.6))
    assert saved.node_ids() == alone.node_ids()
    assert np.array_equal(saved.edges.weight, alone.edges.weight)
    assert saved.metadata["asked"]["minus"] == "John"
    (entry,) = client.get("/api/graphs").json()["graphs"]
    assert (entry["name"], entry["prompt"], entry["nodes"]) == (name, PROMPT, len(saved.nodes))
    assert entry["target"] == "Mary minus John"
    file = client.get(f"/api/graphs/{name}")
    assert file.headers["content-disposition"] == f'attachment; filename="{name}.json"'
    assert file.content == client.studio.shelf.path(name).read_bytes()
    assert client.get(f"/graphs/{name}").status_code == 200
    view = client.get(f"/view/{name}")
    assert "sandbox allow-scripts" in view.headers["content-security-policy"]
    assert '"dictionary": "attention-sae' in view.text  # feature pages of the embedded model are in it


def test_progress_is_told_as_it_goes(make: Any) -> None:
    """The stream of a job ends with its result, and every message in between is a report."""
    client = make()
    job = client.post("/api/traces", json={"prompt": PROMPT}).json()["job"]
    with client.stream("GET", f"/api/jobs/{job}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        reports = [json.loads(line.removeprefix("data: ")) for line in stream.iter_lines() if line.startswith("data")]
    assert reports[-1]["state"] == "done"
    assert reports[-1]["result"]["graph"]
    assert all(report["job"] == job and report["done"] <= max(report["total"], 0) for report in reports)


@pytest.mark.parametrize("how", ["ablate", "scale"])
def test_an_intervention_gives_logits_and_a_graph_of_the_changed_model(make: Any, model: Any, how: str) -> None:
    """The logits of `circuits.intervene`, beside those of before; the graph of `trace(changes=...)`; both are kept."""
    client = make()
    name = traced(client)
    node = "a1_1360_14"
    change = {"nodes": [node], "how": how, "value": 2.5}
    report = client.do(f"/api/graphs/{name}/interventions", {"changes": [change]})
    assert report["state"] == "done", report
    saved = Graph.load(client.studio.shelf.path(report["result"]["graph"]))
    wanted = circuits.Change(f"{node}@attention-sae.1", how, 2.5 if how == "scale" else 0.0)  # type: ignore[arg-type]
    outcome = circuits.intervene(model, PROMPT, [wanted])
    made = saved.metadata["intervention"]
    assert made["of"] == name
    assert made["tokens"] == [row.__dict__ for row in outcome.top_tokens(count=8)]
    assert abs(made["tokens"][0]["new_logit"] - made["tokens"][0]["logit"]) > 1
    alone = circuits.trace(model, PROMPT, changes=[wanted])
    assert saved.node_ids() == alone.node_ids()
    assert np.array_equal(saved.edges.weight, alone.edges.weight)
    assert (node in saved.node_ids()) == (how == "scale")
    page = client.get(f"/graphs/{report['result']['graph']}")
    assert page.status_code == 200
    entry = client.get("/api/graphs").json()["graphs"][0]
    assert entry["of"] == name
    assert entry["changes"] == saved.metadata["changes"]


def test_what_cannot_be_changed_is_refused(make: Any) -> None:
    """Outputs, nodes of another graph, a node twice, and a graph that is changed already, in words."""
    client = make()
    name = traced(client)
    graph = Graph.load(client.studio.shelf.path(name))
    output = graph.node_ids()[int(np.flatnonzero(graph.nodes.kind == "logit")[0])]
    for nodes, words in [([output], "is an output"), (["9_9_9"], "no node of this graph"),
                         (["a1_1360_14"] * 2, "changed twice")]:  # fmt: skip
        report = client.do(f"/api/graphs/{name}/interventions", {"changes": [{"nodes": nodes, "how": "ablate"}]})
        assert report["state"] == "failed"
        assert words in report["error"]
    change = {"changes": [{"nodes": ["a1_1360_14"], "how": "ablate"}]}
    changed = client.do(f"/api/graphs/{name}/interventions", change)["result"]["graph"]
    again = client.do(f"/api/graphs/{changed}/interventions", change)
    assert "1 of its nodes changed" in again["error"]


def test_annotations_names_and_deletion(make: Any) -> None:
    """Pins and supernodes come back with the graph and nothing else of it changes; renaming and deleting work."""
    client = make()
    name = traced(client)
    before = Graph.load(client.studio.shelf.path(name))
    pinned = before.node_ids()[:3]
    params = {"pinnedIds": pinned, "supernodes": [["<b>pair</b>", *pinned[:2]]], "evil": "x"}
    assert client.post(f"/api/graphs/{name}/annotations", json={"qParams": params}).json() == {"saved": 3}
    after = Graph.load(client.studio.shelf.path(name))
    assert after.metadata["qParams"]["supernodes"] == params["supernodes"]
    assert "evil" not in after.metadata["qParams"]
    assert after.node_ids() == before.node_ids()
    assert np.array_equal(after.edges.weight, before.edges.weight)
    new = client.post(f"/api/graphs/{name}/rename", json={"name": "../../My Graph!"}).json()["graph"]
    assert new == "my-graph"
    assert [entry["name"] for entry in client.get("/api/graphs").json()["graphs"]] == ["my-graph"]
    assert client.get(f"/view/{name}").status_code == 404
    assert client.post("/api/graphs/my-graph/delete", json={}).json() == {"deleted": "my-graph"}
    assert client.get("/api/graphs").json()["graphs"] == []


def test_labels_are_saved_and_shown(make: Any, tmp_path: Any) -> None:
    """A person's label goes into the user's own copy of the pages, onto page and viewer; an empty one takes it away."""
    client = make()
    address = "/api/features/attention-sae.1/1360"
    automatic = client.get(address).json()
    assert automatic["label_by"] != "person"
    labelled = client.post(f"{address}/label", json={"label": "names <to> come"}).json()
    assert (labelled["label"], labelled["label_by"]) == ("names <to> come", "person")
    assert client.get(address).json() == labelled
    assert (tmp_path / "data" / "circuits" / "features.sqlite").is_file()
    name = traced(client)
    assert "names \\u003cto> come" in client.get(f"/view/{name}").text
    assert client.post(f"{address}/label", json={"label": ""}).json() == automatic
    assert client.get("/features/attention-sae.1/1360").status_code == 200
    assert client.get("/features/attention-sae.1/999999999").status_code == 400
    assert client.get("/api/features/..%2F..%2Fx/1").status_code in (400, 404)
    assert client.get("/features").status_code == 200


def test_two_requests_take_turns(make: Any) -> None:
    """Both are answered, the second after the first; both graphs are those of a request alone."""
    client = make()
    jobs = [client.post("/api/traces", json={"prompt": PROMPT}).json()["job"] for _ in range(2)]
    names = []
    for job in jobs:
        report = client.wait(job)
        assert report["state"] == "done"
        names.append(report["result"]["graph"])
    assert names[1] == f"{names[0]}-2"
    first, second = (Graph.load(client.studio.shelf.path(name)) for name in names)
    assert np.array_equal(first.edges.weight, second.edges.weight)


def test_a_full_queue_refuses_and_a_waiting_job_can_be_stopped(make: Any) -> None:
    """One job runs, one waits, the next gets 429; a stopped job never runs; then there is room again."""
    client = make(waiting=1)
    go, begun = threading.Event(), threading.Event()

    def slow(job: Any) -> dict[str, Any]:
        begun.set()
        assert go.wait(30)
        return {}

    running = client.worker.submit(slow)
    assert begun.wait(30)
    waiting = client.post("/api/traces", json={"prompt": PROMPT}).json()["job"]
    assert client.get(f"/api/jobs/{waiting}").json()["ahead"] == 1
    refused = client.post("/api/traces", json={"prompt": PROMPT})
    assert (refused.status_code, "wait already" in refused.json()["error"]) == (429, True)
    assert client.post(f"/api/jobs/{waiting}/stop", json={}).json()["state"] == "failed"
    go.set()
    assert client.wait(running.id)["state"] == "done"
    assert client.get(f"/api/jobs/{waiting}").json()["error"] == "stopped"
    assert client.studio.shelf.names() == []
    traced(client)


def test_a_trace_that_takes_too_long_is_stopped(make: Any) -> None:
    """Between blocks, by the limit on its time or because somebody asked; nothing is saved, and the next one runs."""
    client = make(timeout=0.02, max_tokens=200)
    report = client.do("/api/traces", {"prompt": PROMPT * 8, "node_threshold": 1.0})
    assert report["state"] == "failed"
    assert "stopped after 0.02 s" in report["error"]
    client = make(max_tokens=200)
    job = client.post("/api/traces", json={"prompt": PROMPT * 8}).json()["job"]
    while client.get(f"/api/jobs/{job}").json()["state"] == "waiting":
        pass
    client.post(f"/api/jobs/{job}/stop", json={})
    assert client.wait(job)["error"] == "stopped"
    assert client.studio.shelf.names() == []
    traced(client)
