"""`circuits.trace` against the plain reference: every edge, influence, score, kind of target, and every short cut."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_reference import Pass, Reference
from plain_reference import Target as PlainTarget
from tiny_models import CASES, D_MODEL, N_LAYERS, Case, Key, build, keys

import circuits
import circuits.rows
from circuits import Direction, FeatureTarget, TokenDifference, TokenTarget
from circuits.graph import Graph, completeness_score, graph_influence, replacement_score
from circuits.loading import Model
from circuits.targets import Target

UNPRUNED = circuits.TraceSettings(left_out=0.0, unpruned=True)
MIXED = ("gpt2_clt_attn_out", "llama_clt_middle_frozen", "gpt2_skip_top_z")
MIXED_MOVING = ("llama_mixed", "gpt2_residual_mctc", "gpt2_own_over_frozen")
MIXED_FAMILIES = ("neox_parallel_skip_z", "gemma2_value")


@cache
def model_of(name: str) -> Model:
    """The model of a case, built once."""
    return build(CASES[name])


@cache
def full_graph(name: str) -> Graph:
    """Every node and edge of a case for its automatic targets."""
    return circuits.trace(model_of(name), CASES[name].token_ids, settings=UNPRUNED)


@cache
def reference_of(name: str) -> Reference:
    """The plain reference of a case."""
    case, model = CASES[name], model_of(name)
    return Reference(model.base.lm, model.replacements, case.token_ids, special=case.special)


def matrix(graph: Graph, targets: list[Key], sources: list[Key]) -> np.ndarray:
    """The graph's edges between two lists of nodes, (targets, sources)."""
    row, column = {key: i for i, key in enumerate(targets)}, {key: i for i, key in enumerate(sources)}
    names = keys(graph)
    weights = np.zeros((len(targets), len(sources)))
    for source, target, weight in zip(graph.edges.source, graph.edges.target, graph.edges.weight, strict=True):
        weights[row[names[target]], column[names[source]]] = weight
    return weights


@pytest.mark.parametrize("name", CASES)
def test_every_edge(name: str) -> None:
    """Nodes are the same, activations, logits and the full adjacency matrix agree to 1e-4 of the largest edge."""
    graph, reference = full_graph(name), reference_of(name)
    logits = [key for key in keys(graph) if key[0] == "logit"]
    for _, _, position, token in logits:
        reference.add_token_target(token, position)
    sources = list(reference.sources)
    targets = [key for key in sources if key in reference.targets] + logits
    assert set(keys(graph)) == set(sources) | set(targets)
    assert len(targets) >= 20 or not CASES[name].mlp_layers
    expected = reference.adjacency(targets, sources).numpy()
    found = matrix(graph, targets, sources)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    place = {key: i for i, key in enumerate(keys(graph))}
    at = [place[key] for key in targets]
    pre = np.array([reference.targets[key].pre_activation for key in targets])
    np.testing.assert_allclose(graph.nodes.pre_activation[at], pre, rtol=1e-4, atol=1e-4)
    bias = pre - expected.sum(1)
    np.testing.assert_allclose(graph.nodes.bias[at], bias, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", MIXED + MIXED_MOVING + MIXED_FAMILIES)
def test_reference_has_the_model_s_logits(name: str) -> None:
    """The reference's own forward pass is the Hugging Face model's."""
    ids = torch.tensor([CASES[name].token_ids])
    with torch.no_grad():
        logits = model_of(name).base.lm(ids).logits[0]
    torch.testing.assert_close(reference_of(name).logits.float(), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_sweep_finds_the_influence_of_the_whole_graph(name: str) -> None:
    """Influence and scores of the sweep are those that `circuits.graph` computes from every edge."""
    graph = full_graph(name)
    influence = graph_influence(graph.nodes, graph.edges)
    assert influence.max() > 0.05
    np.testing.assert_allclose(graph.nodes.influence, influence, rtol=1e-4, atol=1e-6)
    scores = graph.metadata["scores"]
    assert scores["replacement"] == pytest.approx(replacement_score(graph.nodes, graph.edges), abs=1e-5)
    assert scores["completeness"] == pytest.approx(completeness_score(graph.nodes, graph.edges), abs=1e-5)
    assert graph.metadata["left_out_influence"] == 0.0


@pytest.mark.parametrize("left_out", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("name", MIXED + MIXED_MOVING)
def test_left_out_bounds_what_influences_are_short_by(name: str, left_out: float) -> None:
    """Influences are lower bounds, each short by at most the mass that is reported, which is at most what was asked."""
    settings = circuits.TraceSettings(left_out=left_out, node_threshold=1.0, edge_threshold=1.0)
    graph = circuits.trace(model_of(name), CASES[name].token_ids, settings=settings)
    mass = graph.metadata["left_out_influence"]
    assert 0.0 < mass <= left_out
    exact = dict(zip(keys(full_graph(name)), full_graph(name).nodes.influence, strict=True))
    short = np.array([exact[key] for key in keys(graph)]) - graph.nodes.influence
    assert short.min() > -1e-6
    assert short.max() <= mass + 1e-6
    assert graph.metadata["ledger"]["targets"] < full_graph(name).metadata["ledger"]["targets"]


@pytest.mark.parametrize("thresholds", [(0.8, 0.98), (0.5, 0.9), (0.95, 0.6)])
@pytest.mark.parametrize("name", CASES)
def test_pruned_trace_is_the_pruned_graph(name: str, thresholds: tuple[float, float]) -> None:
    """Keeping only the rows that pruning needs gives what pruning the whole graph gives, head loadings included."""
    settings = circuits.TraceSettings(left_out=0.0, node_threshold=thresholds[0], edge_threshold=thresholds[1])
    traced = circuits.trace(model_of(name), CASES[name].token_ids, settings=settings)
    pruned = full_graph(name).prune(*thresholds)
    assert traced.node_ids() == pruned.node_ids()
    assert len(traced.nodes) < len(full_graph(name).nodes)
    for column in ("source", "target"):
        np.testing.assert_array_equal(getattr(traced.edges, column), getattr(pruned.edges, column))
    np.testing.assert_allclose(traced.edges.weight, pruned.edges.weight, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(traced.nodes.influence, pruned.nodes.influence, rtol=1e-5, atol=1e-7)
    loadings = []
    for heads in (traced.heads, pruned.heads):
        places = zip(heads.edge.tolist(), heads.layer.tolist(), heads.head.tolist(), heads.key.tolist())
        loadings.append(dict(zip(places, heads.weight.tolist())))
    strong = [{key: w for key, w in found.items() if abs(w) > 1e-5} for found in loadings]
    assert set(strong[0]) <= set(loadings[1])
    assert set(strong[1]) <= set(loadings[0])
    for key, weight in strong[0].items():
        assert weight == pytest.approx(loadings[1][key], rel=1e-3, abs=1e-5)
    hops = {at for rows in (traced.first_hops, traced.last_hops) for at in zip(rows.layer.tolist(), rows.head.tolist())}
    assert set(traced.patterns) == set(pruned.patterns) | {(layer, head) for layer, head in hops if head >= 0}


@pytest.mark.parametrize("limit", [1, 4])
def test_limit_on_feature_nodes(limit: int) -> None:
    """At most so many features, and they are among the strongest that pruning kept."""
    name = MIXED[0]
    settings = circuits.TraceSettings(left_out=0.0, max_feature_nodes=limit)
    traced = circuits.trace(model_of(name), CASES[name].token_ids, settings=settings)
    pruned = full_graph(name).prune(0.8, 0.98, limit)
    assert traced.node_ids() == pruned.node_ids()
    assert 1 <= int(traced.nodes.is_feature.sum()) <= limit


def explain(name: str, targets: list[Target]) -> tuple[Graph, dict[Key, float]]:
    """An unpruned trace of some targets and the incoming edges of its only output node, by source."""
    graph = circuits.trace(model_of(name), CASES[name].token_ids, targets, UNPRUNED)
    (number,) = np.flatnonzero(graph.nodes.kind == "logit")
    into, names = graph.edges.target == number, keys(graph)
    sources = [names[i] for i in graph.edges.source[into]]
    return graph, dict(zip(sources, graph.edges.weight[into].tolist(), strict=True))


def covector_edges(name: str, read: Callable[[Pass], torch.Tensor], sources: list[Key]) -> dict[Key, float]:
    """The reference's edges into any function of a pass."""
    reference = reference_of(name)
    reference.targets["probe", 0, 0, 0] = PlainTarget(read, float("nan"))
    row = reference.adjacency([("probe", 0, 0, 0)], sources)[0]
    return dict(zip(sources, row.tolist(), strict=True))


def assert_same_edges(found: dict[Key, float], expected: dict[Key, float]) -> None:
    """Both agree on every source, to 1e-4 of the largest."""
    largest = max(abs(w) for w in expected.values())
    assert largest > 0
    assert set(found) <= set(expected)
    for key, weight in expected.items():
        assert found.get(key, 0.0) == pytest.approx(weight, abs=1e-4 * largest)


@pytest.mark.parametrize("name", MIXED + MIXED_MOVING + MIXED_FAMILIES)
def test_token_at_a_position_and_difference_of_tokens(name: str) -> None:
    """A named token at an inner position; a difference of two tokens is the difference of their rows."""
    reference = reference_of(name)
    sources = list(reference.sources)
    unembedding = reference.weights.unembedding
    graph, found = explain(name, [TokenTarget(4, position=3)])
    reader = unembedding[4] - unembedding.mean(0)
    assert_same_edges(found, covector_edges(name, lambda out: out.final[3] @ reader, sources))
    probability = reference.logits[3].softmax(-1)[4]
    assert graph.nodes.probability[graph.nodes.kind == "logit"] == pytest.approx(float(probability), rel=1e-4)
    graph, found = explain(name, [TokenDifference(4, 9)])
    reader = unembedding[4] - unembedding[9]
    assert_same_edges(found, covector_edges(name, lambda out: out.final[-1] @ reader, sources))
    assert graph.nodes.target_weight.sum() == 1.0


@pytest.mark.parametrize("site", ["resid_final", "resid_pre.2", "resid_mid.0", "resid_mid.2", "resid_post.1"])
@pytest.mark.parametrize("name", MIXED + MIXED_MOVING + MIXED_FAMILIES)
def test_direction_at_a_site(name: str, site: str) -> None:
    """Any direction at any stream site sees exactly what is written below it, with a closed ledger."""
    vector = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(3))
    position = 2
    graph, found = explain(name, [Direction(vector, position, site)])
    at, layer = site.split(".")[0], int(site.rpartition(".")[2]) if "." in site else 0
    reference = reference_of(name)

    def read(out: Pass) -> torch.Tensor:
        stream = _stream_at(out, at, layer)
        return stream[position] @ vector.double()

    assert_same_edges(found, covector_edges(name, read, list(reference.sources)))
    assert graph.metadata["ledger"]["max_relative_gap"] < 1e-4


def _stream_at(out: Pass, at: str, layer: int) -> torch.Tensor:
    """A stream site of a pass."""
    if at == "resid_final":
        return out.final
    return out.mid[layer] if at == "resid_mid" else out.pre[layer + (at == "resid_post")]


def test_several_positions_and_sites_at_once() -> None:
    """Targets asked for together are each what they are alone, and influence adds up over them."""
    name = MIXED[1]
    vector = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(4))
    targets: list[Target] = [TokenTarget(4, 3), TokenTarget(5), Direction(vector, 2, "resid_post.0")]
    ids = CASES[name].token_ids
    together = circuits.trace(model_of(name), ids, targets, UNPRUNED)
    outputs = keys(together)[-3:]
    assert {(position, feature) for _, _, position, feature in outputs} == {(3, 4), (5, 5), (2, -1)}
    alone = [circuits.trace(model_of(name), ids, [target], UNPRUNED) for target in targets]
    n = len(together.nodes) - 3
    np.testing.assert_allclose(
        together.nodes.influence[:n], sum(graph.nodes.influence[:n] for graph in alone), rtol=1e-4, atol=1e-7
    )
    for graph in alone:
        row = keys(together).index(keys(graph)[-1])
        mine, theirs = together.edges.target == row, graph.edges.target == n
        np.testing.assert_array_equal(together.edges.source[mine], graph.edges.source[theirs])
        np.testing.assert_allclose(together.edges.weight[mine], graph.edges.weight[theirs], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(MIXED[0], "mlp_feature"), (MIXED[0], "attention_feature"), ("gpt2_mtc", "mtc_key"), ("gpt2_mtc", "mtc_query"),
     ("gpt2_mtc_ranks", "mtc_query"), ("gpt2_value", "value_feature"), ("gpt2_own", "attention_feature"),
     ("gpt2_residual_middle", "mtc_query")],
)  # fmt: skip
def test_feature_as_target(name: str, kind: str) -> None:
    """A feature node explained by itself: influence starts there and reaches nothing above; its edges are the same."""
    whole = full_graph(name)
    number = np.flatnonzero((whole.nodes.kind == kind) & (whole.nodes.layer == 1) & (whole.nodes.position == 4))[0]
    feature = int(whole.nodes.feature[number])
    graph = circuits.trace(model_of(name), CASES[name].token_ids, [FeatureTarget(kind, 1, feature, 4)], UNPRUNED)
    assert "logit" not in graph.nodes.kind
    assert graph.nodes.target_weight[number] == 1.0
    assert graph.nodes.target_weight.sum() == 1.0
    assert set(graph.nodes.position[graph.nodes.influence > 0]) <= set(range(5))
    assert not graph.nodes.influence[graph.nodes.layer > 1].any()
    above = ("mlp_feature", "mtc_query") if kind in ("mtc_key", "value_feature") else ()
    assert not graph.nodes.influence[np.isin(graph.nodes.kind, above) & (graph.nodes.layer == 1)].any()
    np.testing.assert_allclose(graph.nodes.influence, graph_influence(graph.nodes, graph.edges), rtol=1e-4, atol=1e-7)
    mine, theirs = graph.edges.target == number, whole.edges.target == number
    np.testing.assert_allclose(graph.edges.weight[mine], whole.edges.weight[theirs], rtol=1e-5, atol=1e-7)
    pruned = circuits.trace(model_of(name), CASES[name].token_ids, [FeatureTarget(kind, 1, feature, 4)])
    assert (pruned.nodes.is_target & (pruned.nodes.kind == kind)).sum() == 1


@pytest.mark.parametrize(
    "target",
    [TokenTarget(11), TokenTarget(3, 6), FeatureTarget("mlp_feature", 0, 999), Direction(torch.zeros(3)),
     Direction(torch.zeros(D_MODEL), site="attn_out.0"), Direction(torch.zeros(D_MODEL), site=f"resid_pre.{N_LAYERS}")],
)  # fmt: skip
def test_target_that_does_not_exist(target: Target) -> None:
    """A clear error for tokens, positions, features, shapes and sites that are not there."""
    with pytest.raises(circuits.CircuitsError, match=r"vocabulary|outside the prompt|not active|shape|cannot be read"):
        circuits.trace(model_of(MIXED[0]), CASES[MIXED[0]].token_ids, [target])


@pytest.mark.parametrize(
    "name",
    ["llama_clt_middle_frozen", "gpt2_skip_top_z", "llama_clt_z", *MIXED_MOVING, "gpt2_mixed", "gpt2_mtc_ranks",
     "llama_value_over_frozen", "llama_residual_over_frozen", "llama_weakly_causal_mlp"],
)  # fmt: skip
def test_blocks_of_any_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many targets are taken at once changes nothing but the rounding."""
    monkeypatch.setattr(circuits.rows, "SPREAD_BUDGET", 300)
    monkeypatch.setattr(circuits.rows, "ROW_BUDGET", 40)
    small = circuits.trace(model_of(name), CASES[name].token_ids, settings=UNPRUNED)
    whole = full_graph(name)
    assert small.node_ids() == whole.node_ids()
    targets = sources = keys(whole)
    difference = np.abs(matrix(small, targets, sources) - matrix(whole, targets, sources))
    assert difference.max() < 1e-5 * np.abs(whole.edges.weight).max()
    np.testing.assert_allclose(small.nodes.influence, whole.nodes.influence, rtol=1e-4, atol=1e-7)
    for column in ("edge", "layer", "head", "key", "query"):
        np.testing.assert_array_equal(getattr(small.heads, column), getattr(whole.heads, column))
    np.testing.assert_allclose(small.heads.weight, whole.heads.weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "neox"])
def test_weights_in_half_precision(family: str, dtype: torch.dtype) -> None:
    """Whatever the weights are stored in, the trace is the float32 one of those same rounded weights."""
    moved = ("mtc-rank2.1",) if dtype == torch.bfloat16 else ("lorsa-rotary.1",)
    case = Case(family, attention={0: "z", 2: "attn_out"}, moved=moved, dtype=dtype, seed=20)  # type: ignore[arg-type]
    model = build(case)
    graph = circuits.trace(model, case.token_ids, settings=UNPRUNED)
    assert {parameter.dtype for parameter in model.base.lm.parameters()} == {dtype}
    assert graph.metadata["ledger"]["max_relative_gap"] < 1e-4
    widened = build(case)
    widened.base.lm.float()
    expected = circuits.trace(widened, case.token_ids, settings=UNPRUNED)
    assert keys(graph) == keys(expected)
    difference = matrix(graph, keys(graph), keys(graph)) - matrix(expected, keys(graph), keys(graph))
    assert np.abs(difference).max() < 1e-5 * np.abs(expected.edges.weight).max()


@pytest.mark.parametrize("name", MIXED + MIXED_MOVING)
def test_same_trace_same_bytes(name: str, tmp_path: Path) -> None:
    """Twice the same trace, from a model built twice, saved: the same bytes in every format."""
    for turn in ("first", "second"):
        graph = circuits.trace(build(CASES[name]), CASES[name].token_ids)
        for suffix in ("json", "npz", "svg"):
            graph.save(tmp_path / f"{turn}.{suffix}")
    for suffix in ("json", "npz", "svg"):
        assert (tmp_path / f"first.{suffix}").read_bytes() == (tmp_path / f"second.{suffix}").read_bytes()
