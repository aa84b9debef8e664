"""Hop splits add up to their edges, hold every path once, and are written down for a hand-built model."""

from functools import cache
from math import sqrt
from typing import Any

import hand_built
import numpy as np
import pytest
import torch
from every_path import Paths
from plain_reference import Reference
from tiny_models import CASES, N_HEADS, N_LAYERS, Case, Key, build

import circuits
from circuits import TokenTarget, hop_edges, hops
from circuits.graph import OWN_HEAD, REST, STAYS, Graph
from circuits.hops import hop_splits
from circuits.loading import Model
from circuits.loadings import Loadings
from circuits.prompt import prepare
from circuits.rows import RowBlock
from circuits.sweep import Sweep
from circuits.targets import TopTokens
from circuits.tracing import lay_out

Edges = tuple[np.ndarray, np.ndarray, np.ndarray]
Hop = tuple[int, int, int, int]


@cache
def swept(name: str) -> tuple[Sweep, Edges]:
    """The sweep of a case, and all of its edges: source, target, weight."""
    return all_edges(build(CASES[name]), CASES[name].token_ids)


def all_edges(model: Model, token_ids: tuple[int, ...]) -> tuple[Sweep, Edges]:
    """The sweep of a prompt and all of its edges."""
    sweep = lay_out(model, prepare(model.base, token_ids), [TopTokens()])
    pieces: list[Edges] = []

    def keep(block: RowBlock) -> None:
        row, column = np.nonzero(block.weights.numpy())
        source, target = block.sources.numpy()[column], block.targets.nodes.numpy()[row]
        pieces.append((source, target, block.weights.numpy()[row, column]))

    with torch.no_grad():
        sweep.run(0.0, on_rows=keep)
    source, target, weight = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    return sweep, (source, target, weight)


def totals(split: Loadings, n_edges: int) -> np.ndarray:
    """The sum of each edge's entries."""
    found = np.zeros(n_edges)
    np.add.at(found, split.edge, split.weight)
    return found


def columns(sweep: Sweep) -> dict[str, np.ndarray]:
    """Kind, layer, position and feature of the nodes and of the output targets after them."""
    table, outputs = sweep.table, sweep.targets.outputs
    n_outputs = sweep.targets.n_outputs
    return {
        "kind": np.append(table.kind, ["logit"] * n_outputs),
        "layer": np.append(table.layer, [N_LAYERS] * n_outputs),
        "position": np.append(table.position, [p for readers in outputs for p in readers.positions]),
        "feature": np.append(table.feature, [t for readers in outputs for t in readers.token_ids]),
    }


def passes_frozen(case: Case, sweep: Sweep, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Which edges a frozen layer lies under: above the source's lowest write, below the target, above its cut."""
    at = columns(sweep)
    starts = {"embedding": 0, "mlp_feature": 2, "mlp_error": 2, "block_error": 2}
    writes = np.array([starts.get(k, 1) + 2 * max(layer, 0) for k, layer in zip(at["kind"], at["layer"], strict=True)])
    into_blocks = [d.layer for d in sweep.linear.dictionaries if d.writes[0].name == "resid_post"]
    is_block = (at["kind"] == "mtc_query") & np.isin(at["layer"], into_blocks)
    writes[is_block] = 2 * at["layer"][is_block] + 2
    reads = 2 * at["layer"] + np.where((at["kind"] == "mlp_feature") & (not sweep.linear.model.parallel), 2, 1)
    found = np.zeros(len(source), dtype=bool)
    for frozen in case.frozen_layers:
        above_cuts = np.ones(len(target), dtype=bool)
        for cut in case.cut_layers:
            above_cuts &= ~((frozen < cut) & (2 * cut + 2 < reads[target]))
        found |= (writes[source] < 2 * frozen + 1) & (2 * frozen + 1 < reads[target]) & above_cuts
    return found & (at["kind"][target] != "mtc_query")


PASSING = [name for name, case in CASES.items() if case.frozen_layers]


@pytest.mark.parametrize("name", CASES)
def test_hops_add_up_to_the_edge(name: str) -> None:
    """Exactly the edges that pass frozen attention have hops; all of them, and the strongest three with the rest.

    The scale is the strongest edge of the same target: an edge that is what many writes of its source leave of each
    other has no more digits than that, here as in its row.
    """
    sweep, (source, target, weight) = swept(name)
    expected = passes_frozen(CASES[name], sweep, source, target)
    assert expected.any() == (name in PASSING)
    largest = np.zeros(target.max() + 1)
    np.maximum.at(largest, target, np.abs(weight))
    for keep in (None, 3):
        for split in hop_splits(sweep, source, target, keep):
            assert set(split.edge.tolist()) == set(np.flatnonzero(expected).tolist())
            gap = np.abs(totals(split, len(source)) - weight)[expected] / largest[target[expected]]
            assert gap.max(initial=0.0) < 2e-5
            counts = np.bincount(split.edge, minlength=1)
            assert keep is None or counts.max() <= keep + 1
            assert (split.head == REST).any() <= (keep is not None)


@pytest.mark.parametrize("name", PASSING)
def test_where_hops_begin_and_end(name: str) -> None:
    """A first hop leaves the source's position, a last one reaches the target's; what stays is one entry of its own."""
    sweep, (source, target, weight) = swept(name)
    position = columns(sweep)["position"]
    for is_last, split in enumerate(hop_splits(sweep, source, target, 5)):
        start, end = position[source[split.edge]], position[target[split.edge]]
        stays, rest = split.head == STAYS, split.head == REST
        assert (stays == (start == end)).all()
        assert len(np.unique(split.edge[stays])) == stays.sum()
        np.testing.assert_allclose(split.weight[stays], weight[split.edge[stays]], atol=1e-5 * np.abs(weight).max())
        assert (split.layer[stays | rest] == -1).all()
        assert (split.key[stays | rest] == start[stays | rest]).all()
        assert (split.query[stays | rest] == end[stays | rest]).all()
        moved = ~(stays | rest)
        assert moved.any()
        assert (split.key[moved] < split.query[moved]).all()
        assert ((split.key >= start) & (split.query <= end)).all()
        fixed, found = (split.query, end) if is_last else (split.key, start)
        assert (fixed[moved] == found[moved]).all()
        assert ((split.head[moved] == OWN_HEAD) | ((split.head[moved] >= 0) & (split.head[moved] < N_HEADS))).all()


@pytest.mark.parametrize("name", PASSING)
def test_every_path_is_in_the_splits(name: str) -> None:
    """Both splits of twelve random edges, entry by entry, by walking every path in float64."""
    case = CASES[name]
    sweep, (source, target, weight) = swept(name)
    model, at = build(case), columns(sweep)
    reference = Reference(model.base.lm, model.replacements, case.token_ids, special=case.special)
    leaving = np.flatnonzero(passes_frozen(case, sweep, source, target))
    far = leaving[at["position"][source[leaving]] < at["position"][target[leaving]]]
    random = np.random.default_rng(case.seed)
    chosen = np.append(random.choice(far, 10, replace=False), random.choice(leaving, 2))
    paths = Paths(reference)
    names: list[Key] = list(zip(*(at[n].tolist() for n in ("kind", "layer", "position", "feature")), strict=True))
    found = [by_edge(split) for split in hop_splits(sweep, source[chosen], target[chosen], None)]
    for i, edge in enumerate(chosen.tolist()):
        start, end = names[source[edge]], names[target[edge]]
        if end[0] == "logit":
            reference.add_token_target(end[3], end[2])
        for expected, split in zip(paths.splits(start, end), found, strict=True):
            bound = 1e-5 * max(abs(w) for w in expected.values())
            bound += 1e-6 * float(np.abs(weight[target == target[edge]]).max())
            entries = split.get(i, {})
            for hop in set(expected) | set(entries):
                assert entries.get(hop, 0.0) == pytest.approx(expected.get(hop, 0.0), abs=bound)


def by_edge(split: Loadings) -> dict[int, dict[Hop, float]]:
    """Edge -> (layer, head, key, query) -> weight."""
    found: dict[int, dict[Hop, float]] = {}
    places = zip(*(c.tolist() for c in (split.layer, split.head, split.key, split.query)), strict=True)
    for edge, place, weight in zip(split.edge.tolist(), places, split.weight.tolist(), strict=True):
        found.setdefault(edge, {})[place] = weight
    return found


@pytest.mark.parametrize("name", ["gpt2_skip_top_z", "llama_value_over_frozen", "gpt2_own_over_frozen"])
def test_portions_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few edges, targets and sources at a time give the same hops as all at once."""
    sweep, (source, target, _) = swept(name)
    whole = hop_splits(sweep, source, target, 4)
    monkeypatch.setattr(hop_edges, "EDGE_BUDGET", 300)
    for module in (hop_edges, hops):
        monkeypatch.setattr(module, "SPREAD_BUDGET", 400)
    for split, expected in zip(hop_splits(sweep, source, target, 4), whole, strict=True):
        for field in ("edge", "layer", "head", "key", "query"):
            np.testing.assert_array_equal(getattr(split, field), getattr(expected, field))
        np.testing.assert_allclose(split.weight, expected.weight, atol=1e-5 * np.abs(expected.weight).max())


@pytest.mark.parametrize("name", ["gpt2_clt_frozen", "llama_value_over_frozen"])
def test_pruned_graphs_have_hops(name: str) -> None:
    """Sixteen an edge and their rest, with the patterns of their heads; graphs with every edge have none."""
    model, ids = build(CASES[name]), CASES[name].token_ids
    graph = circuits.trace(model, ids, settings=circuits.TraceSettings(node_threshold=0.95))
    assert len(graph.edges) > 20
    for rows in (graph.first_hops, graph.last_hops):
        has = np.unique(rows.edge)
        assert len(has)
        total = np.bincount(rows.edge, weights=rows.weight.astype(np.float64), minlength=len(graph.edges))
        assert np.abs(total - graph.edges.weight)[has].max() < 1e-5 * np.abs(graph.edges.weight).max()
        named = set(zip(rows.layer.tolist(), rows.head.tolist(), strict=True))
        assert {at for at in named if at[1] >= 0} <= set(graph.patterns)
        assert np.bincount(rows.edge).max() <= 17
    whole = circuits.trace(model, ids, settings=circuits.TraceSettings(left_out=0.0, unpruned=True))
    assert not len(whole.first_hops) + len(whole.last_hops)


class TestTwoHops:
    """A previous-token head under an induction head, both frozen; BOS 1 2 3 1, and logit 3 is told what came before 2.

    The hand-built induction model, whose second layer's head 1 now also writes its value 4, half of BEFORE(1), as
    NEXT(3). At place 4 it looks at place 2, where head 0 of the first layer has written BEFORE(1) sqrt 8. The second
    norm is n = sqrt(16 / 10). NEXT(3) counts 3/4 for logit 3, and -1/4 for logit 2.
    """

    ids = (0, 1, 2, 3, 1)
    n = sqrt(16 / 10)
    written = np.array([0.1 * n, 0.2 * n, 1.1 * n, 0.1 * n + n * sqrt(8) / 2])
    final = sqrt(16 / (10 + float((written**2).sum())))

    @pytest.fixture
    def graph(self) -> Graph:
        """Pruned of nothing but what carries no influence."""
        lm: Any = hand_built.induction().base.lm
        lm.model.layers[1].self_attn.o_proj.weight.data[:, 12] = hand_built.NEXT(3)
        model = hand_built.assembled(lm, "two-hops", [])
        settings = circuits.TraceSettings(left_out=0.0, node_threshold=1.0, edge_threshold=1.0)
        return circuits.trace(model, self.ids, [TokenTarget(3), TokenTarget(2)], settings)

    def split(self, graph: Graph, source: str, target: str) -> list[dict[Hop, float]]:
        """First and last hops of an edge."""
        names = graph.node_ids()
        pair = (graph.edges.source == names.index(source)) & (graph.edges.target == names.index(target))
        (edge,) = np.flatnonzero(pair)
        found = []
        for rows in (graph.first_hops, graph.last_hops):
            mine = rows.take(rows.edge == edge)
            places = zip(*(c.tolist() for c in (mine.layer, mine.head, mine.key, mine.query)), strict=True)
            weights = dict(zip(places, mine.weight.tolist(), strict=True))
            found.append({hop: weight for hop, weight in weights.items() if abs(weight) > 1e-5})
        return found

    def test_a_path_of_two_hops(self, graph: Graph) -> None:
        """The 1 at place 1 leaves through the previous-token head and arrives through the induction head.

        Beside that the uniform head takes the word itself: NEXT(1) / 10, which counts -1/4 and moves in one hop.
        """
        two = self.n * sqrt(8) / 2 * 0.75 * self.final
        one = -0.25 * 0.1 * self.n * self.final
        first, last = self.split(graph, "E_1_1", "2_3_4")
        assert first == pytest.approx({(0, 0, 1, 2): two, (1, 0, 1, 4): one}, rel=1e-5)
        assert last == pytest.approx({(1, 1, 2, 4): two, (1, 0, 1, 4): one}, rel=1e-5)

    def test_a_path_of_one_hop(self, graph: Graph) -> None:
        """The 2 at place 2 goes by both heads of the second layer, whose values are n and NEXT(2) n (1/10 and 1)."""
        expected = {(1, 0, 2, 4): 0.1 * self.n * 0.75 * self.final, (1, 1, 2, 4): self.n * 0.75 * self.final}
        for split in self.split(graph, "E_2_2", "2_2_4"):
            assert split == pytest.approx(expected, rel=1e-5)

    def test_what_stays(self, graph: Graph) -> None:
        """The last 1 is where the logits are read: the uniform head sees it there too, and nothing leaves."""
        stays = -0.25 * 0.1 * self.n * self.final
        for split in self.split(graph, "E_1_4", "2_3_4"):
            assert split == pytest.approx({(-1, STAYS, 4, 4): stays}, rel=1e-4)
