"""A search with bfloat16 products: the graph's edges are float32, and what rounding did to the search is told."""

import gc
import weakref

import numpy as np
import pytest
import torch
from tiny_models import CASES, build, keys

import circuits
from circuits.errors import CircuitsError
from circuits.kernels.attend import pull_values
from circuits.kernels.backend import Products
from circuits.prompt import prepare
from circuits.targets import TopTokens
from circuits.tracing import lay_out

NAMES = ("gpt2_clt_frozen", "llama_skip_top_attn_out", "llama_value")


@pytest.mark.parametrize("max_targets", [None, 20])
@pytest.mark.parametrize("name", NAMES)
def test_edges_are_float32_and_the_rounding_is_told(name: str, max_targets: int | None) -> None:
    """Kept nodes that both graphs have carry the same edges to float32's rounding and close their ledger; influences
    differ by the rounding, whose size the metadata gives."""
    model, ids = build(CASES[name]), CASES[name].token_ids
    options = {"left_out": 0.0, "node_threshold": 1.0, "edge_threshold": 1.0, "max_targets": max_targets}
    exact = circuits.trace(model, ids, settings=circuits.TraceSettings(**options))  # type: ignore[arg-type]
    rounded = circuits.trace(model, ids, settings=circuits.TraceSettings(**options, products="bfloat16"))  # type: ignore[arg-type]
    told = rounded.metadata["products"]
    assert told["products"] == "bfloat16"
    assert 1e-5 < told["error"] < 2e-2
    assert told["gap"] > 10 * rounded.metadata["ledger"]["max_relative_gap"]
    assert rounded.metadata["ledger"]["max_relative_gap"] < 1e-5
    assert "products" not in exact.metadata
    weights = {}
    for graph in (exact, rounded):
        names = keys(graph)
        pairs = zip(graph.edges.source.tolist(), graph.edges.target.tolist(), strict=True)
        weights[graph is rounded] = {
            (names[source], names[target]): float(weight)
            for (source, target), weight in zip(pairs, graph.edges.weight, strict=True)
        }
    both = weights[True].keys() & weights[False].keys()
    largest = max(map(abs, weights[False].values()))
    assert len(both) > 0.8 * len(weights[False])
    assert max(abs(weights[True][pair] - weights[False][pair]) for pair in both) < 1e-6 * largest
    if max_targets is None:
        assert len(names) // 2 < rounded.metadata["ledger"]["targets"] <= exact.metadata["ledger"]["targets"]
        assert float(np.abs(rounded.nodes.influence - exact.nodes.influence).max()) < 5e-2


def test_an_unpruned_graph_is_float32() -> None:
    """Its edges are the rows of the search, so rounded products are refused; and unknown ones by name."""
    with pytest.raises(CircuitsError, match="keeps the rows of the search"):
        circuits.TraceSettings(unpruned=True, products="bfloat16")
    with pytest.raises(CircuitsError, match="products is 'float8', expected one of float32, bfloat16"):
        circuits.TraceSettings(products="float8")


def _pull(products: Products) -> torch.Tensor:
    random = torch.Generator().manual_seed(3)
    g, w_o = torch.randn(5, 7, 32, generator=random), torch.randn(4, 8, 32, generator=random)
    pattern = torch.rand(4, 7, 7, generator=random).tril()
    return pull_values(pattern, g, w_o, 2, None, products)


def test_pulling_rounds_what_it_is_told_to() -> None:
    """bfloat16 has eight bits: the results differ by about 2^-9 of their size, neither by nothing nor by more."""
    exact, rounded = _pull("float32"), _pull("bfloat16")
    error = float((exact - rounded).abs().max() / exact.abs().max())
    assert 2**-13 < error < 2**-6


def test_a_sweep_is_gone_with_its_last_use() -> None:
    """A sweep holds recording, writers and rows; nothing in it refers back to it, so memory is free at once."""
    case = CASES["llama_value"]
    model = build(case)
    with torch.no_grad():
        sweep = lay_out(model, prepare(model.base, case.token_ids), [TopTokens()])
        sweep.run(0.0)
    kept = [weakref.ref(thing) for thing in (sweep, sweep.rows, sweep.table, sweep.linear.recording)]
    gc.disable()
    try:
        del sweep
        assert not any(reference() for reference in kept)
    finally:
        gc.enable()
