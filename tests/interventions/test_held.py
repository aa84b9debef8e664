"""Graphs of changed models: the ledger closes with changes held, and they explain what the run with changes says."""

import random
from functools import cache

import numpy as np
import pytest
import torch
from drawn import watch
from tiny_models import CASES, MOVING, build

import circuits
from circuits import Change, CircuitsError, Graph
from circuits.graph import ID_PREFIXES
from circuits.interventions import Bench
from circuits.loading import Model, check_fits

UNPRUNED = circuits.TraceSettings(left_out=0.0, unpruned=True)


@cache
def bench_of(name: str) -> Bench:
    """A case's model on its prompt."""
    return Bench(build(CASES[name]), CASES[name].token_ids)


@cache
def drawn(name: str) -> tuple[Change, ...]:
    """Seven changes: features upstream and downstream of each other ablated and scaled, an error and a token scaled."""
    bench, generator = bench_of(name), random.Random(3)
    table, n = bench.table, bench.recording.n_positions
    nodes = generator.sample(watch(bench), 5)
    changes = [Change(nodes[0], "ablate"), Change(nodes[1], "ablate"), Change(nodes[2], "scale", 2.5)]
    changes += [Change(nodes[3], "scale", -0.7), Change(nodes[4], "scale", 1.8)]
    error = generator.choice([i for i in range(len(table)) if str(table.kind[i]).endswith("_error")])
    place = f"{ID_PREFIXES[table.kind[error]]}{table.layer[error]}_error_{table.position[error]}"
    changes.append(Change(place, "scale", 0.4))
    at = generator.randrange(1, n)
    changes.append(Change(f"E_{CASES[name].token_ids[at]}_{at}", "scale", 1.3))
    return tuple(changes)


@cache
def graph_of(name: str) -> Graph:
    """The whole graph with these changes held."""
    bench = bench_of(name)
    return circuits.trace(bench.model, CASES[name].token_ids, settings=UNPRUNED, changes=drawn(name))


@pytest.mark.parametrize("name", CASES)
def test_the_ledger_closes_with_changes_held(name: str) -> None:
    """Of every logit and every feature, changed or not, from the graph's own arrays; head loadings add up too."""
    graph = graph_of(name)
    nodes, edges = graph.nodes, graph.edges
    bound = 4e-5 if name in MOVING else 2e-5
    is_target = nodes.is_feature | (nodes.kind == "logit")
    assert graph.metadata["ledger"]["targets"] == is_target.sum() > 20
    assert graph.metadata["ledger"]["max_relative_gap"] < bound
    total = np.bincount(edges.target, weights=edges.weight.astype(np.float64), minlength=len(nodes))
    largest = np.zeros(len(nodes))
    np.maximum.at(largest, edges.target, np.abs(edges.weight))
    size = np.maximum(np.maximum(np.abs(nodes.pre_activation), np.abs(nodes.bias)), largest)
    gap = np.abs(total + nodes.bias - nodes.pre_activation)[is_target] / size[is_target]
    assert gap.max() < bound
    assert graph.metadata["changes"] == [change.__dict__ for change in drawn(name)]


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_graph_of_the_changed_run(name: str) -> None:
    """Targets have the logits of the intervention; features have its pre-activations, and the activations of after."""
    bench, graph, changes = bench_of(name), graph_of(name), list(drawn(name))
    outcome = bench.run([changes], features=watch(bench))
    assert float((outcome.logits - outcome.baseline_logits).abs().max()) > 0.01
    centred = outcome.logits[0, 0] - outcome.logits[0, 0].mean()
    nodes = graph.nodes
    for node in np.flatnonzero(nodes.kind == "logit").tolist():
        token = int(nodes.feature[node])
        assert float(nodes.pre_activation[node]) == pytest.approx(float(centred[token]), abs=2e-4, rel=1e-4)
        assert float(nodes.probability[node]) == pytest.approx(float(outcome.probabilities[0, 0, token]), abs=2e-4)
    known = {
        (str(nodes.kind[i]), str(nodes.dictionary[i]), int(nodes.feature[i]), int(nodes.position[i])): i
        for i in range(len(nodes))
    }
    names, table, seen = [d.name for d in bench.linear.dictionaries], bench.table, 0
    watched = [i for i in range(len(table)) if table.dictionary[i] >= 0]
    for i, row in zip(watched, outcome.watched(), strict=True):
        key = (str(table.kind[i]), names[table.dictionary[i]], int(table.feature[i]), int(table.position[i]))
        rank_one = bench.linear.dictionaries[table.dictionary[i]].rank == 1
        if key not in known:
            assert abs(row.new_activation) < 1e-4, row
        elif rank_one:
            assert float(nodes.activation[known[key]]) == pytest.approx(row.new_activation, abs=5e-4, rel=5e-4), row
            pre = float(nodes.pre_activation[known[key]])
            assert pre == pytest.approx(row.new_pre_activation, abs=5e-4, rel=5e-4), row
            seen += 1
    assert seen > 3 or not any(d.rank == 1 for d in bench.linear.dictionaries)


def test_scaling_by_one_gives_the_graph_itself() -> None:
    """Held at what they are, features give the same edges as no changes at all."""
    name = "llama_mtc_top4"
    bench = bench_of(name)
    changes = [Change(node, "scale", 1.0) for node in watch(bench)[:9]]
    same, alone = (
        circuits.trace(bench.model, CASES[name].token_ids, settings=UNPRUNED, changes=given) for given in (changes, [])
    )
    assert same.node_ids() == alone.node_ids()
    assert np.array_equal(same.edges.source, alone.edges.source)
    assert float(np.abs(same.edges.weight - alone.edges.weight).max()) < 1e-5


@pytest.mark.parametrize("name", ["gpt2_mixed", "llama_residual_weakly_causal"])
def test_an_error_that_is_ablated_alone_is_zero(name: str) -> None:
    """And every other node at or below it is what it was."""
    bench = bench_of(name)
    table = bench.table
    at = max(i for i in range(len(table)) if str(table.kind[i]).endswith("_error"))
    place = f"{ID_PREFIXES[table.kind[at]]}{table.layer[at]}_error_{table.position[at]}"
    from circuits.tracing import lay_out

    changed = lay_out(bench.model, bench.prepared, [], [Change(place, "ablate")]).table
    assert changed.kind[at] == table.kind[at]
    depth, position = int(table.depth[at]), int(table.position[at])
    before, after = (vector(t, depth, at) for t in (table, changed))
    assert float(before.norm()) > 0.1
    assert float(after.norm()) < 1e-5 * float(before.norm())
    assert position == int(changed.position[at])


def vector(table: object, depth: int, node: int) -> torch.Tensor:
    """What a node writes at a depth."""
    write = table.writes[depth]  # type: ignore[attr-defined]
    found: torch.Tensor = write.vectors[write.nodes.tolist().index(node)]
    return found


def test_what_cannot_be_held_is_refused() -> None:
    """Other changes than ablating and scaling; and the graph of a changed model is none of the model's own."""
    bench = bench_of("gpt2_mixed")
    node = watch(bench)[0]
    with pytest.raises(CircuitsError, match="ablated or scaled, not with 'set'"):
        circuits.trace(bench.model, CASES["gpt2_mixed"].token_ids, changes=[Change(node, "set", 1.0)])
    model: Model = bench.model
    check_fits(circuits.trace(model, CASES["gpt2_mixed"].token_ids), model)
    with pytest.raises(CircuitsError, match="7 of its nodes changed"):
        check_fits(graph_of("gpt2_mixed"), model)
