"""A bounded number of rows, best first: against circuit-tracer's search written out on the dense matrix."""

import numpy as np
import pytest
import torch
from tiny_models import CASES, build

import circuits
from circuits import best_first
from circuits.best_first import BestFirst
from circuits.errors import CircuitsError
from circuits.prompt import prepare
from circuits.sweep import Sweep
from circuits.targets import TopTokens
from circuits.tracing import lay_out

NAMES = ("gpt2_clt_frozen", "llama_skip_top_attn_out", "llama_clt_z", "gpt2_mtc", "gpt2_residual_middle", "llama_value")
BATCH = 7


def laid_out(name: str) -> tuple[Sweep, np.ndarray]:
    """A case's sweep, and its dense matrix [target, source] over nodes and outputs."""
    case, model = CASES[name], build(CASES[name])
    sweep = lay_out(model, prepare(model.base, case.token_ids), [TopTokens()])
    total = len(sweep.targets.start)
    matrix = np.zeros((total, total))
    with torch.no_grad():
        for block in sweep.rows_of(np.ones(total, dtype=bool)):
            matrix[np.ix_(block.targets.nodes.numpy(), block.sources.numpy())] = block.weights.numpy()
    return sweep, matrix


def influence_of(matrix: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Sum of the powers of the share matrix, from the targets' weights."""
    shares = np.abs(matrix)
    shares /= np.maximum(shares.sum(1, keepdims=True), 1e-30)
    found, flow = np.zeros(len(start)), start
    while flow.any():
        flow = flow @ shares
        found = found + flow
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_search_is_circuit_tracers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same features in the same batches; influences, scores and what is left out, from the reduced matrix."""
    monkeypatch.setattr(best_first, "BATCH", BATCH)
    monkeypatch.setattr(best_first, "GROWTH", 10**6)
    sweep, matrix = laid_out(name)
    start, table = sweep.targets.start, sweep.table
    n = len(table)
    features = np.flatnonzero(table.dictionary >= 0)
    budget = min(3 * BATCH + 2, len(features) - 3)
    assert budget > 2 * BATCH
    expanded = np.zeros(len(start), dtype=bool)
    expanded[n:] = True
    while (done := int(expanded[:n].sum())) < budget:
        influence = influence_of(matrix * expanded[:, None], start)
        waiting = features[~expanded[features]]
        expanded[waiting[np.argsort(-influence[waiting], kind="stable")[: min(BATCH, budget - done)]]] = True
    reduced = matrix * expanded[:, None]
    of_all = influence_of(reduced, start)
    dropped = features[~expanded[features]]
    reduced[:, dropped] = 0.0
    expected = influence_of(reduced, start)
    with torch.no_grad():
        search = BestFirst(sweep)
        swept = search.run(budget)
    assert np.array_equal(swept.expanded, expanded)
    np.testing.assert_allclose(swept.influence, expected, rtol=1e-4, atol=1e-6)
    assert swept.left_out == pytest.approx(of_all[dropped].sum(), rel=1e-4)
    assert swept.max_relative_gap < 2e-5
    tokens = expected[:n][table.kind == "embedding"].sum()
    errors = expected[:n][np.char.endswith(table.kind.astype(str), "_error")].sum()
    assert swept.replacement_score == pytest.approx(tokens / (tokens + errors), rel=1e-4)
    for block in search.rows_of(expanded):
        rows = np.ix_(block.targets.nodes.numpy(), block.sources.numpy())
        np.testing.assert_allclose(block.weights.numpy(), matrix[rows], atol=1e-5 * np.abs(matrix).max())
        others = np.setdiff1d(np.arange(n), block.sources.numpy())
        assert not matrix[np.ix_(block.targets.nodes.numpy(), others)].any()


def test_all_rows_are_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for every feature the graph is the one that the top-down sweep prunes."""
    monkeypatch.setattr(best_first, "BATCH", BATCH)
    case, model = CASES["gpt2_clt_frozen"], build(CASES["gpt2_clt_frozen"])
    settings = [circuits.TraceSettings(max_targets=10**6), circuits.TraceSettings(left_out=0.0)]
    found, expected = (circuits.trace(model, case.token_ids, settings=one) for one in settings)
    assert found.node_ids() == expected.node_ids()
    np.testing.assert_allclose(found.edges.weight, expected.edges.weight, rtol=1e-4, atol=1e-5)
    assert found.metadata["settings"]["max_targets"] == 10**6
    assert found.metadata["settings"]["search"] == "best first"
    assert found.metadata["left_out_influence"] == 0.0


def test_a_small_budget() -> None:
    """Features without a row are not in the graph, and a budget below one is refused."""
    case, model = CASES["gpt2_clt_frozen"], build(CASES["gpt2_clt_frozen"])
    graph = circuits.trace(model, case.token_ids, settings=circuits.TraceSettings(max_targets=5, hops=False))
    assert 0 < graph.nodes.is_feature.sum() <= 5
    assert graph.metadata["left_out_influence"] > 0
    assert not len(graph.first_hops)
    with pytest.raises(CircuitsError, match="max_targets is 0"):
        circuits.TraceSettings(max_targets=0)


def test_a_budget_whose_rows_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is spent from the top down, no row is kept, and the graph says so and how much is left out."""
    case, model = CASES["gpt2_clt_frozen"], build(CASES["gpt2_clt_frozen"])
    monkeypatch.setattr(best_first, "ROWS_SHARE", 0.0)
    settings = circuits.TraceSettings(max_targets=9, hops=False)
    graph = circuits.trace(model, case.token_ids, settings=settings)
    assert graph.metadata["settings"]["search"] == "top down"
    assert 0 < graph.nodes.is_feature.sum() <= 9
    assert 3 < graph.metadata["ledger"]["targets"] - (graph.nodes.kind == "logit").sum() <= 9
    assert graph.metadata["left_out_influence"] > 0
    assert graph.metadata["ledger"]["max_relative_gap"] < 2e-5
