"""The command line, run as a user runs it: what it prints, what it writes, and how it refuses bad input."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from circuits.cli import main
from circuits.graph import Graph

CASE = next((Path(__file__).parents[1] / "data" / "golden").iterdir())
MODEL, TRANSCODERS = str(CASE / "model"), str(CASE / "transcoders")
PROMPT = "When Mary and John went to the store, John gave a drink to"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs `circuits ARGS`; returns (exit code, output, error output)."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["circuits", *map(str, args)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def copied(tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the small model and its transcoders, to be damaged."""
    for source, name in ((MODEL, "model"), (TRANSCODERS, "transcoders")):
        shutil.copytree(source, tmp_path / name)
    return tmp_path / "model", tmp_path / "transcoders"


def refused(result: tuple[int, str, str], *words: str) -> bool:
    """Exit code 2, no traceback, and a message with these words."""
    code, _, message = result
    assert code == 2, message
    assert "Traceback" not in message
    joined = " ".join(message.split())
    for word in words:
        assert word in joined, f"{word!r} is not in: {joined}"
    return True


def test_trace_on_the_default_predicts_the_name_and_writes_every_format(run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, message = run("trace", PROMPT, "-o", out, "--format", "json,npz,svg,html,dot,graphml")
    assert code == 0, message
    assert 'output " Mary"' in printed
    assert sorted(path.name for path in out.iterdir()) == [
        f"graph.{suffix}" for suffix in ("dot", "graphml", "html", "json", "npz", "svg")
    ]
    data = json.loads((out / "graph.json").read_text())
    carried = [link for link in data["links"] if link.get("heads")]
    assert len(carried) > 10
    for link in carried:
        assert sum(row[4] for row in link["heads"]) == pytest.approx(link["weight"], rel=1e-4, abs=1e-6)
    assert data["metadata"]["ledger"]["max_relative_gap"] <= 1e-4
    logits = sorted((node for node in data["nodes"] if node["is_target_logit"]), key=lambda n: -n["token_prob"])
    assert "(p=" in logits[0]["clerp"]


def test_same_trace_twice_gives_the_same_bytes(run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run("trace", PROMPT, "-o", tmp_path / name, "--format", "json,npz,svg,html", "--quiet")[0] == 0
    for suffix in ("json", "npz", "svg", "html"):
        assert (tmp_path / "a" / f"graph.{suffix}").read_bytes() == (tmp_path / "b" / f"graph.{suffix}").read_bytes()


def test_show_and_render_work_without_the_model(run, tmp_path: Path) -> None:
    assert run("trace", PROMPT, "-o", tmp_path, "--format", "npz", "--quiet")[0] == 0
    code, printed, _ = run("show", tmp_path / "graph.npz")
    assert code == 0
    assert "ledger gap" in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert run("render", tmp_path / "graph.npz", "-o", tmp_path / "small.svg", "--node-threshold", 0.5)[0] == 0
    assert (tmp_path / "small.svg").read_text().startswith(("<svg", "<?xml"))
    assert run("render", tmp_path / "graph.npz", "--format", "html")[0] == 0
    assert (tmp_path / "graph.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    refused(run("render", tmp_path / "graph.npz", "-o", tmp_path / "x.svg", "--format", "html"), "do not agree")


def test_trace_writes_a_page_beside_json_and_svg(run, tmp_path: Path) -> None:
    assert run("trace", PROMPT, "-o", tmp_path / "out", "--quiet")[0] == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["graph.html", "graph.json", "graph.svg"]


def test_targets_from_the_command_line(run, tmp_path: Path) -> None:
    def nodes(*options: object) -> tuple[Graph, np.ndarray]:
        code, _, message = run("trace", PROMPT, "-o", tmp_path, "--format", "npz", "--quiet", *options)
        assert code == 0, message
        graph = Graph.load(tmp_path / "graph.npz")
        return graph, np.flatnonzero(graph.nodes.is_target)

    graph, targets = nodes("--target", " Mary", "--minus", " John")
    assert graph.nodes.label[targets].tolist() == [" Mary minus  John"]
    graph, targets = nodes("--target", " Mary", "--target", " John")
    assert sorted(graph.nodes.label[targets].tolist()) == [" John", " Mary"]
    features = np.flatnonzero(graph.nodes.kind == "attention_feature")
    chosen = features[np.argmax(graph.nodes.influence[features])]
    name = graph.node_ids()[chosen]
    graph, targets = nodes("--target", name)
    assert [graph.node_ids()[i] for i in targets] == [name]
    graph, targets = nodes("--position", 3, "--position", -1)
    assert set(graph.nodes.position[targets].tolist()) == {3, len(graph.tokens) - 1}
    graph, _ = nodes("--max-feature-nodes", 12)
    assert 0 < int(graph.nodes.is_feature.sum()) <= 12


def test_info_describes_model_and_replacement(run) -> None:
    code, printed, _ = run("info")
    assert code == 0
    assert "clt.0" in printed
    assert "attention-sae.0" in printed
    code, printed, _ = run("info", TRANSCODERS)
    assert code == 0
    assert "circuit-tracer" in printed


def test_prompts_that_cannot_be_traced(run, tmp_path: Path) -> None:
    assert refused(run("trace", ""), "empty")
    assert refused(run("trace"), "give the prompt once")
    assert refused(run("trace", "--token-ids", "0,99999"), "99999", "vocabulary")
    assert refused(run("trace", "--token-ids", "0,x"), "integers")
    assert refused(run("trace", "a " * 2000), "context", "shorten")
    assert refused(run("trace", "--prompt-file", tmp_path / "none.txt"), "none.txt")
    assert refused(run("trace", PROMPT, "--target", "Marybelle the great"), "not one token")
    assert refused(run("trace", PROMPT, "--target", "a0_999999_3"), "not active")
    assert refused(run("trace", PROMPT, "--chat"), "chat template")
    assert refused(run("trace", PROMPT, "--node-threshold", 2), "node_threshold")
    assert refused(run("trace", PROMPT, "--format", "pdf"), "pdf")


def test_output_that_cannot_be_written(run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert refused(run("trace", PROMPT, "-o", tmp_path / "file" / "out"), "file")
    (tmp_path / "out" / "graph.json").mkdir(parents=True)
    assert refused(run("trace", PROMPT, "-o", tmp_path / "out", "--format", "json"), "graph.json")
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "graph.json"]


def test_unknown_family(run, copied: tuple[Path, Path]) -> None:
    config = json.loads((copied[0] / "config.json").read_text())
    config["model_type"] = "bert"
    config["architectures"] = ["BertLMHeadModel"]
    (copied[0] / "config.json").write_text(json.dumps(config))
    result = run("trace", "--token-ids", "0,2,3", "--model", copied[0])
    assert refused(result, "unknown model family 'bert'", "gpt2", "llama")
    assert refused(run("trace", "--token-ids", "0,2", "--model", copied[0] / "nothing"), "nothing")


def test_damaged_model_weights(run, copied: tuple[Path, Path]) -> None:
    path = copied[0] / "model.safetensors"
    whole = load_file(path)
    name = next(name for name in whole if "mlp" in name and whole[name].ndim == 2)
    save_file({**whole, name: torch.full_like(whole[name], torch.nan)}, path, metadata={"format": "pt"})
    assert refused(run("trace", "--token-ids", "0,2,3", "--model", copied[0]), name, "NaN")
    save_file({key: value for key, value in whole.items() if key != name}, path, metadata={"format": "pt"})
    assert refused(run("trace", "--token-ids", "0,2,3", "--model", copied[0]), "missing", name)
    shape = tuple(whole[name].shape)
    save_file({**whole, name: whole[name][:-1].contiguous()}, path, metadata={"format": "pt"})
    assert refused(run("trace", "--token-ids", "0,2,3", "--model", copied[0]), name, f"asks for {shape}")
    save_file(whole, path, metadata={"format": "pt"})
    path.write_bytes(path.read_bytes()[:-100])
    assert refused(run("trace", "--token-ids", "0,2,3", "--model", copied[0]), str(copied[0]))


def test_damaged_replacements(run, copied: tuple[Path, Path]) -> None:
    model, transcoders = copied
    path = next(path for path in sorted(transcoders.glob("*.safetensors")) if "W_dec" not in path.name)
    whole = load_file(path)
    name = next(key for key in whole if "W_enc" in key)

    def trace() -> tuple[int, str, str]:
        return run("trace", "--token-ids", "0,2,3", "--model", model, "--replacement", transcoders)

    assert trace()[0] == 0
    save_file({key: value for key, value in whole.items() if key != name}, path)
    assert refused(trace(), path.name, name)
    bias = next(key for key in whole if "b_enc" in key)
    save_file({**whole, bias: whole[bias][:-1].contiguous()}, path)
    assert refused(trace(), path.name, bias, "should have shape (96) but has (95)")
    save_file({**whole, name: torch.full_like(whole[name], torch.nan)}, path)
    assert refused(trace(), path.name, name)
    save_file(whole, path)
    path.write_bytes(path.read_bytes()[:-100])
    assert refused(trace(), path.name)
    assert refused(run("trace", PROMPT, "--replacement", TRANSCODERS), "another model")
    assert refused(run("trace", PROMPT, "--replacement", model), "manifest.json")


def test_out_of_memory_is_a_message(run, monkeypatch: pytest.MonkeyPatch) -> None:
    from circuits import tracing

    def exhausted(*args: object, **kwargs: object) -> None:
        raise MemoryError

    monkeypatch.setattr(tracing, "record", exhausted)
    assert refused(run("trace", PROMPT), "out of memory", "shorter prompt")


def test_explain_tells_a_node_and_an_edge(run, tmp_path: Path) -> None:
    """`trace --explain` writes pairs, also as Neuronpedia has them; `explain` tells them in words, tables and JSON."""
    out, told = tmp_path / "out", tmp_path / "told.json"
    assert run("trace", PROMPT, "-o", out, "--format", "json", "--explain", "--quiet")[0] == 0
    content = json.loads((out / "graph.json").read_text())
    assert content["metadata"]["qk"]["max_relative_gap"] < 1e-4
    assert content["metadata"]["qk"]["scores"] == len(content["qk"]) > 50
    traced = next(node for node in content["nodes"] if node["node_id"] == "a1_1360_14")
    assert len(traced["qk_tracing_results"]["pair_wise_contributors"]) == 10
    code, printed, message = run("explain", out / "graph.json", "a1_1360_14", "-o", told)
    assert code == 0, message
    words = " ".join(printed.split())
    assert 'L1H0 looks from 14 " to" at 2 " Mary"' in words
    assert "the token before" in words
    assert "Chain from token to output" in words
    look = json.loads(told.read_text())["looks"][0]
    assert (look["head"], look["query"], look["key"]) == ("L1H0", 14, 2)
    edge = next(link for link in content["links"] if link["target"] == "a1_1360_14")["source"] + "->a1_1360_14"
    assert run("explain", out / "graph.json", edge)[0] == 0
    assert run("explain", out / "graph.json")[0] == 0
    assert refused(run("explain", out / "graph.json", "a1_1360_9"), "no node of this graph", "a1_")
    assert refused(run("explain", tmp_path / "none.json"), "none.json")
    assert refused(run("explain", out / "graph.json", "--model", MODEL), "--replacement")


def test_verify_writes_into_the_graph(run, tmp_path: Path) -> None:
    """`trace --verify` and `verify` print figures with intervals and keep them, with each node's test."""
    out = tmp_path / "out"
    code, printed, message = run("trace", PROMPT, "-o", out, "--format", "json,svg", "--verify", 8)
    assert code == 0, message
    assert "rank correlation" in printed
    assert "ablat" in (out / "graph.svg").read_text()
    graph = Graph.load(out / "graph.json")
    assert graph.metadata["verification"]["nodes"]["tested"] == 8
    assert int(np.isfinite(graph.nodes.measured).sum()) == 8
    code, printed, message = run("verify", out / "graph.json", "--nodes", 12, "-o", tmp_path / "again.json")
    assert code == 0, message
    assert "sufficiency" in printed
    assert Graph.load(tmp_path / "again.json").metadata["verification"]["nodes"]["tested"] == 12
    content = json.loads((out / "graph.json").read_text())
    content["metadata"]["model"]["hash"] = "0" * 64
    (tmp_path / "other.json").write_text(json.dumps(content))
    assert refused(run("verify", tmp_path / "other.json"), "trace again")


def test_frozen_attention_shows_the_heads_of_the_last_hop(run, tmp_path: Path) -> None:
    """A CLT alone: edges between tokens still name heads, and the file has both splits."""
    out = tmp_path / "out"
    code, printed, message = run("trace", PROMPT, "--replacement", "clt", "-o", out, "--format", "json")
    assert code == 0, message
    assert "heads are those of an edge's last hop" in " ".join(printed.split())
    graph = Graph.load(out / "graph.json")
    for hops in (graph.first_hops, graph.last_hops):
        sums = np.bincount(hops.edge, weights=hops.weight.astype(np.float64), minlength=len(graph.edges))
        split = np.isin(np.arange(len(graph.edges)), hops.edge)
        assert split.sum() > 100
        np.testing.assert_allclose(sums[split], graph.edges.weight[split], rtol=1e-4, atol=1e-4)
