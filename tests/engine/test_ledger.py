"""Everything adds up: incoming edges plus bias give the pre-activation, head loadings give the edge."""

from functools import cache
from typing import get_args

import numpy as np
import pytest
import torch
from plain_attention import IDENTITY, OWN
from plain_reference import Pass, Reference
from tiny_models import CASES, MOVING, N_HEADS, Case, FamilyName, Key, build, keys

import circuits
from circuits.graph import Graph
from circuits.replacements.movement import OwnAttention

UNPRUNED = circuits.TraceSettings(left_out=0.0, unpruned=True)
VALUES = ("value_feature", "value_error")
THROUGH_HEADS = ("attention_feature", "mtc_query")


def attention_readers(case: Case) -> set[int]:
    """Layers with features that read an attention output or the stream through attention of their own."""
    return (set(case.attention) | case.layers_of("type2", "lorsa", "own")) - case.cut_layers


WITH_ATTENTION = [name for name, case in CASES.items() if attention_readers(case)]
WITH_HEADS = [
    name for name, case in CASES.items() if attention_readers(case) or case.layers_of("mtc", "mctc", "residual")
]
SPREADING = [
    name for name, case in CASES.items() if any(f < max(attention_readers(case), default=0) for f in case.frozen_layers)
]


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
    bound = 2e-5 if name in MOVING else 1e-5  # the heads that carry a feature may cancel
    nodes, edges = graph.nodes, graph.edges
    is_target = nodes.is_feature | (nodes.kind == "logit")
    assert graph.metadata["ledger"]["targets"] == is_target.sum() > 20
    assert graph.metadata["ledger"]["max_relative_gap"] < bound
    total = np.bincount(edges.target, weights=edges.weight.astype(np.float64), minlength=len(nodes))
    largest = np.zeros(len(nodes))
    np.maximum.at(largest, edges.target, np.abs(edges.weight))
    scale = np.maximum(np.maximum(np.abs(nodes.pre_activation), np.abs(nodes.bias)), largest)[is_target]
    gap = np.abs(total + nodes.bias - nodes.pre_activation)[is_target] / scale
    assert gap.max() < bound
    assert np.isnan(nodes.bias[~is_target]).all()
    assert (np.abs(total[is_target]) > 1e-3).mean() > 0.9


@pytest.mark.parametrize("family", get_args(FamilyName))
@pytest.mark.parametrize("seed", range(100, 106))
def test_ledger_closes_for_any_seed(family: str, seed: int) -> None:
    """Random models of every family with a mix of everything: a CLT, or skips, over z, attn_out and a frozen layer."""
    case = Case(
        family,  # type: ignore[arg-type]
        mlp="clt" if seed % 2 else "skip",
        attention={seed % 3: "z", (seed + 1) % 3: "attn_out"},
        activation="jump_relu",
        special=seed % 4 < 2,
        before_post_norm=seed % 3 == 0,
        seed=seed,
    )
    graph = circuits.trace(build(case), case.token_ids, settings=UNPRUNED)
    assert graph.metadata["ledger"]["targets"] > 20
    assert graph.metadata["ledger"]["max_relative_gap"] < 2e-5
    assert graph.metadata["attention"].count("frozen") == 1


@pytest.mark.parametrize("seed", range(200, 212))
def test_ledger_closes_for_any_mixture(seed: int) -> None:
    """Random models whose layers each have a replacement drawn at random, over MLPs drawn at random."""
    random = np.random.default_rng(seed)
    kinds = ["mtc", "mtc-top4", "mtc-rank2", "mctc", "value", "lorsa-rotary", "own-rank2", "type2", "residual", ""]
    moved = [f"{random.choice(kinds)}.{layer}" for layer in range(3)]
    written = min((int(name[-1]) for name in moved if name.startswith(("mctc", "type2"))), default=3)
    moved = [name for name in moved if name[0] != "." and not (name.startswith("value") and int(name[-1]) >= written)]
    case = Case(
        random.choice(["gpt2", "llama"]),
        mlp=random.choice(["clt", "skip", "transcoder"]),
        moved=tuple(moved),
        together=True,
        special=bool(random.integers(2)),
        seed=seed,
    )
    graph = circuits.trace(build(case), case.token_ids, settings=UNPRUNED)
    assert graph.metadata["ledger"]["targets"] > 20
    assert graph.metadata["ledger"]["max_relative_gap"] < 5e-5


@pytest.mark.parametrize("name", CASES)
def test_nodes_of_a_special_first_token(name: str) -> None:
    """Its embedding is a node, its features and errors are not; where the first token is plain, they are."""
    graph = full_graph(name)
    kinds = set(graph.nodes.kind[graph.nodes.position == 0].tolist())
    if CASES[name].special:
        assert kinds == {"embedding"}
    else:
        assert kinds == set(graph.nodes.kind.tolist()) - {"logit"}
        assert len(kinds) > 2


def carrying_layer(graph: Graph) -> np.ndarray:
    """Of each edge, the layer that its loadings are of, -1 for an edge without.

    Values leave through the heads of their own layer, whatever reads them; all others come to a reader of an attention
    output, of an attention of its own, or of what an MTC moves, through the reader's layer.
    """
    nodes, edges = graph.nodes, graph.edges
    into = np.where(np.isin(nodes.kind[edges.target], THROUGH_HEADS), nodes.layer[edges.target], -1)
    return np.where(np.isin(nodes.kind[edges.source], VALUES), nodes.layer[edges.source], into)


@pytest.mark.parametrize("name", CASES)
def test_loadings_add_up_to_the_edge(name: str) -> None:
    """Exactly the edges that attention carries to a reader, or that carry values, have loadings; they sum to it."""
    graph = full_graph(name)
    heads, nodes, edges = graph.heads, graph.nodes, graph.edges
    layer = carrying_layer(graph)
    assert set(heads.edge.tolist()) == set(np.flatnonzero(layer >= 0).tolist())
    assert bool(len(heads)) == (name in WITH_HEADS or bool(CASES[name].value_layers))
    if not len(heads):
        return
    total = np.bincount(heads.edge, weights=heads.weight.astype(np.float64), minlength=len(edges))[layer >= 0]
    weight = edges.weight[layer >= 0]
    assert np.abs(total - weight).max() < 1e-5 * np.abs(weight).max()
    assert (heads.layer == layer[heads.edge]).all()
    assert (heads.key <= heads.query).all()
    values = np.isin(nodes.kind[edges.source[heads.edge]], VALUES)
    position = nodes.position[edges.target[heads.edge]]
    assert (heads.query[~values] == position[~values]).all()
    assert (heads.query[values] <= position[values]).all()
    own = np.char.startswith(nodes.dictionary[edges.target[heads.edge]].astype(str), "own.") & ~values
    assert (heads.head[own] == OWN).all()
    identity = (nodes.kind[edges.target[heads.edge]] == "mtc_query") & ~values & (heads.head == -1)
    assert (heads.key[identity] == heads.query[identity]).all()
    assert ((heads.head[~own & ~identity] >= 0) & (heads.head[~own & ~identity] < N_HEADS)).all()
    used = set(zip(heads.layer.tolist(), heads.head.tolist(), strict=True))
    assert {(at, head) for at, head in graph.patterns if head >= 0} == {(at, head) for at, head in used if head >= 0}


@pytest.mark.parametrize("name", [name for name in CASES if name in WITH_HEADS or CASES[name].value_layers])
def test_keys_of_loadings(name: str) -> None:
    """The key is the source's position, except for what comes to an attention reader through frozen layers below."""
    graph, case = full_graph(name), CASES[name]
    heads = graph.heads
    source = graph.nodes.position[graph.edges.source[heads.edge]]
    spread = np.array([any(frozen < layer for frozen in case.frozen_layers) for layer in heads.layer.tolist()])
    spread &= graph.nodes.kind[graph.edges.target[heads.edge]] == "attention_feature"
    spread &= ~np.isin(graph.nodes.kind[graph.edges.source[heads.edge]], VALUES)
    assert (heads.key[~spread] == source[~spread]).all()
    assert (heads.key >= source).all()
    assert spread.any() == (name in SPREADING)
    if spread.any():
        assert (heads.key[spread] > source[spread]).any()


@pytest.mark.parametrize("name", WITH_HEADS)
def test_loading_is_what_one_pattern_entry_does(name: str) -> None:
    """Zero one entry of one head's pattern, hold all else: the pre-activation falls by the loading, for this source.

    For 100 random loadings and 20 random edges over all heads and keys. "For this source" is the change with the
    source's writes in the stream less the change without them; both by the plain reference, in float64. The pattern is
    the base layer's, its identity included for an MTC, or the feature's own.
    """
    graph, reference = full_graph(name), reference_of(name)
    names = keys(graph)
    table = _loadings(graph, names)
    largest = float(np.abs(graph.heads.weight).max())
    random = np.random.default_rng(5)
    pairs = sorted(table)
    chosen = [pairs[i] for i in random.choice(len(pairs), 20, replace=False)]
    wanted = [(pair, h, s) for pair in chosen for h in _heads_of(reference, pair[1]) for s in range(pair[1][2] + 1)]
    singles = [(pair, h, s) for pair in pairs for h, s in table[pair]]
    wanted += [singles[i] for i in random.choice(len(singles), min(100, len(singles)), replace=False)]
    for (source, target), head, key in wanted:
        change = _change(reference, target, reference.recorded, head, key)
        change -= _change(reference, target, reference.without([source]), head, key)
        assert table[source, target].get((head, key), 0.0) == pytest.approx(change, abs=1e-5 * largest)


@pytest.mark.parametrize("name", WITH_HEADS)
def test_loadings_of_all_sources_are_what_one_pattern_entry_does(name: str) -> None:
    """The change on zeroing an entry is the sum of all sources' loadings there, plus that of what is no node.

    Values below a reader have their loadings where they are moved, not here: they are left in the stream.
    """
    graph, reference = full_graph(name), reference_of(name)
    names = keys(graph)
    table = _loadings(graph, names)
    targets = [key for key in names if key[0] in THROUGH_HEADS]
    empty = reference.without([key for key in reference.sources if key[0] not in VALUES])
    largest = float(np.abs(graph.heads.weight).max())
    random = np.random.default_rng(6)
    for i in random.choice(len(targets), 8, replace=False):
        target = targets[i]
        for head in _heads_of(reference, target):
            for key in range(target[2] + 1):
                change = _change(reference, target, reference.recorded, head, key)
                change -= _change(reference, target, empty, head, key)
                mine = sum(found.get((head, key), 0.0) for (_, to), found in table.items() if to == target)
                assert mine == pytest.approx(change, abs=1e-4 * largest)


def _loadings(graph: Graph, names: list[Key]) -> dict[tuple[Key, Key], dict[tuple[int, int], float]]:
    """(source, target) -> (head, key position) -> loading, of every edge but those of values."""
    table: dict[tuple[Key, Key], dict[tuple[int, int], float]] = {}
    heads = graph.heads
    for edge, head, key, weight in zip(heads.edge, heads.head, heads.key, heads.weight.tolist(), strict=True):
        pair = names[graph.edges.source[edge]], names[graph.edges.target[edge]]
        if pair[0][0] not in VALUES:
            table.setdefault(pair, {})[int(head), int(key)] = weight
    return table


def _heads_of(reference: Reference, target: Key) -> list[int]:
    """The heads that may carry something to a target."""
    if isinstance(reference.owners[target].moved_by, OwnAttention):
        return [OWN]
    return list(range(N_HEADS)) + ([IDENTITY] if target[0] == "mtc_query" else [])


def _change(reference: Reference, target: Key, out: Pass, head: int, key: int) -> float:
    """By how much a target's pre-activation in a pass falls when one entry of the pattern it reads by is zeroed."""
    _, _, position, feature = target
    pattern = reference.carriers(target).clone()
    if head == OWN:
        movement = reference.owners[target].moved_by
        assert isinstance(movement, OwnAttention)
        head = int(movement.group[feature])
    pattern[head, position, key] = 0.0
    with torch.no_grad():
        return float(reference.pre_activation(target, out) - reference.pre_activation(target, out, pattern))
