"""What a graph predicts of ablations: against the sum over all paths written out, and what `verify` makes of it."""

import dataclasses
from pathlib import Path

import hand_built
import numpy as np
import pytest
from tiny_models import CASES, build

import circuits
from circuits import TokenTarget, TraceSettings
from circuits.assemble import table_numbers
from circuits.effects import total_effects
from circuits.graph import Graph
from circuits.loading import load, model_of
from circuits.prompt import prepare
from circuits.tracing import lay_out
from circuits.verification import verify

UNPRUNED = TraceSettings(left_out=0.0, unpruned=True)
PROMPT = "When Mary and John went to the store, John gave a drink to"
TARGETS = [TokenTarget(3), TokenTarget(5)]


def all_paths(graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the logits, and T (logits, nodes): every path from a node to a logit, one product each, summed."""
    nodes, edges = graph.nodes, graph.edges
    passed = np.zeros((len(nodes), len(nodes)))
    passed[edges.target, edges.source] = edges.weight.astype(np.float64) / np.where(
        nodes.kind[edges.target] == "logit", 1.0, nodes.pre_activation[edges.target].astype(np.float64)
    )
    logits = np.flatnonzero(nodes.kind == "logit")
    total, path = np.zeros((len(logits), len(nodes))), np.eye(len(nodes))[logits]
    while np.abs(path).max() > 0:
        path = path @ passed
        total += path
    return logits, total


@pytest.mark.parametrize("name", CASES)
def test_effects_are_the_sum_over_all_paths(name: str) -> None:
    """The sweep's effects equal the matrix's, whatever is replaced."""
    model, ids = build(CASES[name]), CASES[name].token_ids
    graph = circuits.trace(model, ids, TARGETS, UNPRUNED)
    sweep = lay_out(model, prepare(model.base, ids), TARGETS)
    number = table_numbers(graph, sweep)
    logits, expected = all_paths(graph)
    order = number[logits] - len(sweep.table)
    others = np.flatnonzero(graph.nodes.kind != "logit")
    found = total_effects(sweep)[order][:, number[others]]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected[:, others], rtol=1e-3, atol=1e-4 * scale)
    assert scale > 0.01


class TestVerify:
    """`verify` on the hand-built induction model and on the embedded default."""

    def test_frozen_direct_effects(self) -> None:
        """Frozen, a node that writes to the logit alone changes it by minus its edge, as predicted."""
        model = hand_built.induction()
        graph = circuits.trace(model, (0, 1, 2, 3, 1), [TokenTarget(2), TokenTarget(3)], UNPRUNED)
        tested = verify(model, graph, mode="frozen")
        names = tested.node_ids()
        for name in ("a1_0_4", "a1_error_4"):
            at = names.index(name)
            assert tested.nodes.predicted[at] == pytest.approx(tested.nodes.measured[at], rel=1e-4, abs=1e-5)
        figures = tested.metadata["verification"]
        assert figures["mode"] == "frozen"
        assert figures["patterns"]["tested"] > 0
        assert figures["patterns"]["spearman"] == pytest.approx(1.0)
        assert figures["patterns"]["slope"] == pytest.approx(1.0, rel=1e-4)
        assert figures["random"]["tested"] == 0

    @pytest.mark.parametrize("replacement", ["attention-sae", "clt", "mtc", "weakly-causal"])
    def test_frozen_is_exact(self, replacement: str) -> None:
        """On the default: what the linearized model predicts of direct effects is what frozen ablations do."""
        model = load(None, replacement)
        graph = verify(model, circuits.trace(model, PROMPT), nodes=60, mode="frozen")
        assert graph.metadata["verification"]["nodes"]["slope"] == pytest.approx(1.0, rel=1e-4)
        assert graph.metadata["verification"]["patterns"]["slope"] == pytest.approx(1.0, rel=1e-4)
        tested = np.isfinite(graph.nodes.measured)
        gaps = np.abs(graph.nodes.predicted - graph.nodes.measured)[tested]
        assert gaps.max() < 1e-4 * np.abs(graph.nodes.measured[tested]).max()

    @pytest.mark.parametrize("replacement", ["attention-sae", "clt"])
    def test_default(self, replacement: str) -> None:
        """The strongest nodes of the README's prompt do more than random ones, and what they do is predicted."""
        model = load(None, replacement)
        graph = verify(model, circuits.trace(model, PROMPT), nodes=24)
        figures = graph.metadata["verification"]
        assert figures["nodes"]["tested"] == 24
        assert np.isfinite(graph.nodes.measured).sum() == 24
        assert figures["nodes"]["median_effect_interval"][0] > figures["random"]["median_effect_interval"][1]
        assert figures["nodes"]["spearman"] > 0.3
        assert figures["nodes"]["slope"] > 0.3
        assert 0.0 < figures["sufficiency"] < 1.5
        again = verify(model, graph, nodes=24)
        assert again.metadata["verification"] == figures

    def test_refusals(self) -> None:
        """Another model's graph, and a graph without token targets, are refused with what to do."""
        model = hand_built.induction()
        graph = circuits.trace(model, (0, 1, 2, 3, 1), [TokenTarget(2)], UNPRUNED)
        with pytest.raises(circuits.CircuitsError, match="give the model of the graph"):
            verify(hand_built.previous_token(), graph)
        difference = circuits.trace(model, (0, 1, 2, 3, 1), [circuits.TokenDifference(2, 3)], UNPRUNED)
        with pytest.raises(circuits.CircuitsError, match="trace with tokens as targets"):
            verify(model, difference)

    def test_the_graph_s_model_is_found(self, tmp_path: Path) -> None:
        """A saved graph of the embedded model names what it was traced with; of another model it asks for it."""
        graph = circuits.trace(load(None, "mtc"), PROMPT)
        graph.save(tmp_path / "graph.json")
        found = model_of(Graph.load(tmp_path / "graph.json"))
        assert [replacement.name for replacement in found.replacements] == ["clt", "mtc"]
        other = dataclasses.replace(graph, metadata=graph.metadata | {"model": {"name": "gpt2", "hash": "0"}})
        with pytest.raises(circuits.CircuitsError, match="--model"):
            model_of(other)
