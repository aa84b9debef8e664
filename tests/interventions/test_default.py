"""Interventions on the embedded model, from Python and from the command line."""

import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import circuits
from circuits.cli import main
from circuits.generation import generate
from circuits.graph import Graph
from circuits.interventions import Bench, Change, PatternChange, intervene
from circuits.loading import Model

PROMPT = "When Mary and John went to the store, John gave a drink to"


@cache
def default(replacement: str = "attention-sae") -> tuple[Model, Graph]:
    model = circuits.load(replacement=replacement)
    return model, circuits.trace(model, PROMPT)


@pytest.mark.parametrize("replacement", ["attention-sae", "mtc", "weakly-causal"])
def test_without_the_strongest_attention_features_the_name_is_less_likely(replacement: str) -> None:
    """Attention features that write at the last position, taken away together, lower " Mary" and its logit."""
    model, graph = default(replacement)
    nodes, ids = graph.nodes, graph.node_ids()
    wanted = np.isin(nodes.kind, ["attention_feature", "mtc_query"]) & (nodes.position == len(graph.tokens) - 1)
    best = [i for i in np.argsort(-nodes.influence, kind="stable").tolist() if wanted[i]][:4]
    outcome = intervene(model, PROMPT, [Change(ids[i], "ablate") for i in best])
    first = outcome.top_tokens()[0]
    assert first.text == " Mary"
    assert first.new_logit < first.logit - 1.0
    assert first.new_probability < first.probability - 0.2


def test_a_head_that_may_not_look_at_the_name() -> None:
    """Every head of layer 1 and 2 kept from " Mary" at the last position: another name is more likely."""
    model, _ = default()
    heads = [
        PatternChange(layer, head, 14, 2, "set", 0.0) for layer in (1, 2) for head in range(model.base.shape.n_heads)
    ]
    first = intervene(model, PROMPT, heads).top_tokens()[0]
    assert first.text == " Mary"
    assert first.new_probability < 0.5 * first.probability


def test_generation_follows_a_steered_feature() -> None:
    """The name's feature, taken away, and text goes on otherwise; the baseline is the model's own greedy text."""
    model, graph = default()
    ids = [
        i for i, kind in zip(graph.node_ids(), graph.nodes.kind) if kind == "attention_feature" and i.endswith("_14")
    ]
    text = generate(model, PROMPT, [Change(i, "ablate") for i in ids], max_new_tokens=6)
    assert text.baseline.text.startswith(" Mary")
    assert not text.changed.text.startswith(" Mary")
    assert len(text.changed.probabilities) == len(text.changed.token_ids) <= 6


def test_a_long_batch_is_one_forward_pass_a_piece() -> None:
    """Up to sixty-four ablations are rows of a single forward pass."""
    model, graph = default()
    bench = Bench(model, PROMPT)
    ids = [i for i, kind in zip(graph.node_ids(), graph.nodes.is_feature) if kind][:64]
    calls = []
    handle = model.base.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    bench.run([[Change(i, "ablate")] for i in ids], batch_size=64)
    handle.remove()
    assert len(calls) == 1


# --- the command line ---------------------------------------------------------------------------------------------


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of `circuits ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["circuits", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_command_prints_and_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Tables of tokens and of what is watched, two texts, and the same numbers as JSON; all in 80 columns."""
    _, graph = default()
    saved, out = tmp_path / "graph.json", tmp_path / "found.json"
    graph.save(saved)
    node = next(i for i, kind in zip(graph.node_ids(), graph.nodes.kind) if kind == "attention_feature")
    options = ["--ablate", node, "--scale", "2_17_:=2", "--attention", "L2H1:14->3=0", "--renormalize"]
    options += ["--watch", node, "--generate", "3", "-o", out, "--layers", "3:4"]
    assert call(monkeypatch, "intervene", "--graph", saved, *options) == 0
    printed = capsys.readouterr().out
    assert '" Mary"' in printed
    assert "Watched features" in printed
    assert "alone:  Mary" in printed
    assert all(len(line) <= 80 for line in printed.splitlines() if not line.startswith("wrote"))
    data = json.loads(out.read_text())
    assert data["tokens"][0]["text"] == " Mary"
    assert data["features"][0]["new_activation"] == 0.0
    assert len(data["generated"]["changed"]["token_ids"]) == 3
    assert data["changes"][2] == {"layer": 2, "head": 1, "query": 14, "key": 3, "how": "set", "value": 0.0,
                                  "renormalize": True}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "nothing is changed"),
        (["--ablate", "x1_2_3"], "no feature of 'x'"),
        (["--ablate", "k1_2_3"], "no dictionary of layer 1 has nodes of kind mtc_key"),
        (["--set", "2_17_3"], "is not NODE=VALUE"),
        (["--set", "2_17_3=nan"], "is not NODE=VALUE"),
        (["--attention", "H5:3->1=0"], "names no attention"),
        (["--attention", "L2H1:3->1=x"], "is no number"),
        (["--attention", "L2H1:3->9=1"], "comes after it"),
        (["--ablate", "2_17_3", "--layers", "3"], "is not FROM:TO"),
        (["--ablate", "2_17_3", "--layers", "3:9"], "0 <= FROM < TO <= 4"),
        (["--ablate", "2_17_3", "--generate", "4", "--mode", "frozen"], "--generate recomputes everything"),
        (["--ablate", "2_17_3", "--generate", "4000"], "has a context of"),
        (["--ablate", "2_17_3", "--token-ids", "1,2"], "give the prompt once"),
        (["--ablate", "2_17_3", "--mode", "frozen", "--freeze-attention"], "belong to real mode"),
    ],
)
def test_what_the_command_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    """Exit code 2, the reason in words, no traceback."""
    assert call(monkeypatch, "intervene", PROMPT, *options) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert words in message
    assert "Traceback" not in message
