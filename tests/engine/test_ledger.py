"""Everything adds up: incoming edges plus bias give the pre-activation, head loadings give the edge."""

from functools import cache

import numpy as np
import pytest
import torch
from plain_reference import Pass, Reference
from tiny_models import CASES, Case, Key, build, keys

import circuits
from circuits.graph import Graph

UNPRUNED = circuits.TraceSettings(left_out=0.0, unpruned=True)
WITH_ATTENTION = [name for name, case in CASES.items() if case.attention]
SPREADING = [name for name, case in CASES.items() if set(range(max(case.attention, default=0))) - set(case.attention)]


@cache
def full_graph(name: str) -> Graph:
    """Every node and edge of a case."""
    return circuits.trace(build(CASES[name]), CASES[name].token_ids, settings=UNPRUNED)


@cache
def reference_of(name: str) -> Reference:
    """The plain reference of a case."""
    case, model = CASES[name], build(CASES[name])
    return Reference(model.base.lm, model.replacements, case.token_ids, special=case.special)


@pytest.mark.parametrize("name", CASES)
def test_ledger_closes(name: str) -> None:
    """Of every target: each logit and each active feature, from the graph's own arrays."""
    graph = full_graph(name)
    nodes, edges = graph.nodes, graph.edges
    is_target = nodes.is_feature | (nodes.kind == "logit")
    assert graph.metadata["ledger"]["targets"] == is_target.sum() > 20
    assert graph.metadata["ledger"]["max_relative_gap"] < 1e-5
    total = np.bincount(edges.target, weights=edges.weight.astype(np.float64), minlength=len(nodes))
    largest = np.zeros(len(nodes))
    np.maximum.at(largest, edges.target, np.abs(edges.weight))
    scale = np.maximum(np.maximum(np.abs(nodes.pre_activation), np.abs(nodes.bias)), largest)[is_target]
    gap = np.abs(total + nodes.bias - nodes.pre_activation)[is_target] / scale
    assert gap.max() < 1e-5
    assert np.isnan(nodes.bias[~is_target]).all()
    assert (np.abs(total[is_target]) > 1e-3).mean() > 0.9


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("seed", range(100, 106))
def test_ledger_closes_for_any_seed(family: str, seed: int) -> None:
    """Random models of both families with a mix of everything: a CLT, or skips, over z, attn_out and a frozen layer."""
    case = Case(
        family,  # type: ignore[arg-type]
        mlp="clt" if seed % 2 else "skip",
        attention={seed % 3: "z", (seed + 1) % 3: "attn_out"},
        activation="jump_relu",
        special=seed % 4 < 2,
        seed=seed,
    )
    graph = circuits.trace(build(case), case.token_ids, settings=UNPRUNED)
    assert graph.metadata["ledger"]["targets"] > 20
    assert graph.metadata["ledger"]["max_relative_gap"] < 2e-5
    assert graph.metadata["attention"].count("frozen") == 1


@pytest.mark.parametrize("name", CASES)
def test_nodes_of_a_special_first_token(name: str) -> None:
    """Its embedding is a node, its features and errors are not; where the first token is plain, they are."""
    graph = full_graph(name)
    kinds = set(graph.nodes.kind[graph.nodes.position == 0].tolist())
    if CASES[name].special:
        assert kinds == {"embedding"}
    else:
        assert {"embedding", "mlp_feature", "mlp_error"} <= kinds


@pytest.mark.parametrize("name", CASES)
def test_loadings_add_up_to_the_edge(name: str) -> None:
    """Exactly the edges into readers of an attention output have loadings; those of one edge sum to its weight."""
    graph = full_graph(name)
    heads, edges = graph.heads, graph.edges
    reads_attention = graph.nodes.kind[edges.target] == "attention_feature"
    assert set(heads.edge.tolist()) == set(np.flatnonzero(reads_attention).tolist())
    total = np.bincount(heads.edge, weights=heads.weight.astype(np.float64), minlength=len(edges))[reads_attention]
    weight = edges.weight[reads_attention]
    if CASES[name].attention:
        assert np.abs(total - weight).max() < 1e-5 * np.abs(weight).max()
        assert (heads.query == graph.nodes.position[edges.target[heads.edge]]).all()
        assert (heads.key <= heads.query).all()
        assert (heads.layer == graph.nodes.layer[edges.target[heads.edge]]).all()
        assert set(graph.patterns) == set(zip(heads.layer.tolist(), heads.head.tolist(), strict=True))
    else:
        assert len(heads) == 0


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_keys_of_loadings(name: str) -> None:
    """With every layer below replaced the key is the source's position; over frozen layers an edge has several."""
    graph = full_graph(name)
    heads = graph.heads
    source = graph.nodes.position[graph.edges.source[heads.edge]]
    below = {layer for layer in range(3) if layer not in CASES[name].attention}
    spread = np.array([any(frozen < layer for frozen in below) for layer in heads.layer.tolist()])
    assert (heads.key[~spread] == source[~spread]).all()
    assert (heads.key >= source).all()
    assert spread.any() == (name in SPREADING)
    if spread.any():
        assert (heads.key[spread] > source[spread]).any()


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_loading_is_what_one_pattern_entry_does(name: str) -> None:
    """Zero one entry of one head's pattern, hold all else: the pre-activation falls by the loading, for this source.

    For 100 random loadings and 20 random edges over all heads and keys. "For this source" is the change with the
    source's writes in the stream less the change without them; both by the plain reference, in float64.
    """
    graph, reference = full_graph(name), reference_of(name)
    names = keys(graph)
    table = _loadings(graph, names)
    largest = float(np.abs(graph.heads.weight).max())
    random = np.random.default_rng(5)
    pairs = sorted(table)
    chosen = [pairs[i] for i in random.choice(len(pairs), 20, replace=False)]
    shape = (reference.weights.n_heads, len(reference.ids))
    wanted = [(pair, h, s) for pair in chosen for h in range(shape[0]) for s in range(pair[1][2] + 1)]
    singles = [(pair, h, s) for pair in pairs for h, s in table[pair]]
    wanted += [singles[i] for i in random.choice(len(singles), 100, replace=False)]
    for (source, target), head, key in wanted:
        change = _change(reference, target, reference.recorded, head, key)
        change -= _change(reference, target, reference.without([source]), head, key)
        assert table[source, target].get((head, key), 0.0) == pytest.approx(change, abs=1e-5 * largest)


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_loadings_of_all_sources_are_what_one_pattern_entry_does(name: str) -> None:
    """The change on zeroing an entry is the sum of all sources' loadings there, plus that of what is no node."""
    graph, reference = full_graph(name), reference_of(name)
    names = keys(graph)
    table = _loadings(graph, names)
    targets = [key for key in names if key[0] == "attention_feature"]
    empty = reference.without(reference.sources)
    largest = float(np.abs(graph.heads.weight).max())
    random = np.random.default_rng(6)
    for i in random.choice(len(targets), 8, replace=False):
        target = targets[i]
        for head in range(reference.weights.n_heads):
            for key in range(target[2] + 1):
                change = _change(reference, target, reference.recorded, head, key)
                change -= _change(reference, target, empty, head, key)
                mine = sum(found.get((head, key), 0.0) for (_, to), found in table.items() if to == target)
                assert mine == pytest.approx(change, abs=1e-4 * largest)


def _loadings(graph: Graph, names: list[Key]) -> dict[tuple[Key, Key], dict[tuple[int, int], float]]:
    """(source, target) -> (head, key position) -> loading, of every edge that has loadings."""
    table: dict[tuple[Key, Key], dict[tuple[int, int], float]] = {}
    heads = graph.heads
    for edge, head, key, weight in zip(heads.edge, heads.head, heads.key, heads.weight.tolist(), strict=True):
        pair = names[graph.edges.source[edge]], names[graph.edges.target[edge]]
        table.setdefault(pair, {})[int(head), int(key)] = weight
    return table


def _change(reference: Reference, target: Key, out: Pass, head: int, key: int) -> float:
    """By how much a target's pre-activation in a pass falls when one entry of its own layer's pattern is zeroed."""
    _, layer, position, _ = target
    pattern = reference.patterns[layer].clone()
    pattern[head, position, key] = 0.0
    with torch.no_grad():
        return float(reference.pre_activation(target, out) - reference.pre_activation(target, out, pattern))
