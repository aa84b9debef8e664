"""Frozen interventions are the graph's edges: a node taken away takes the weights of its edges away."""

import numpy as np
import pytest
import torch
from tiny_models import CASES, build

import circuits
from circuits.graph import Graph
from circuits.interventions import Bench, Change, PatternChange
from circuits.replacements import Dictionary

UNPRUNED = circuits.TraceSettings(left_out=0.0, unpruned=True)


def addresses(graph: Graph) -> list[str]:
    """The address of every node, with its dictionary where its id has a number at its end."""
    nodes = graph.nodes
    ids = graph.node_ids()
    return [f"{i}@{d}" if d and i.count("_") < 3 else i for i, d in zip(ids, nodes.dictionary.tolist())]


@pytest.mark.parametrize("name", sorted(CASES))
def test_ablations_take_the_edges_away(name: str) -> None:
    """Every node ablated: every target's pre-activation changes by minus the edge, logits less their mean likewise."""
    case, model = CASES[name], build(CASES[name])
    graph = circuits.trace(model, case.token_ids, settings=UNPRUNED)
    bench, names, nodes = Bench(model, case.token_ids), addresses(graph), graph.nodes
    sources = np.flatnonzero(nodes.kind != "logit")
    targets = np.flatnonzero(nodes.is_feature)
    logits = np.flatnonzero(nodes.kind == "logit")
    outcome = bench.run(
        [[Change(names[i], "ablate")] for i in sources],
        mode="frozen",
        features=[names[i] for i in targets],
        batch_size=256,
    )
    weights = np.zeros((len(nodes), len(nodes)))
    weights[graph.edges.source, graph.edges.target] = graph.edges.weight
    expected = -weights[np.ix_(sources, targets)]
    found = (outcome.features - outcome.baseline_features).numpy()
    scale = np.maximum(np.abs(nodes.pre_activation[targets]), np.abs(expected).max(0, initial=0.0)) + 1e-6
    assert np.abs(expected).max() > 0.1
    assert (np.abs(found - expected) / scale).max() < 1e-4
    assert torch.allclose(
        outcome.baseline_features, torch.from_numpy(nodes.pre_activation[targets]), rtol=1e-4, atol=1e-5
    )
    change = outcome.logits[:, 0] - outcome.baseline_logits[0]
    change = change - change.mean(-1, keepdim=True)
    expected = -weights[np.ix_(sources, logits)]
    found = change[:, nodes.feature[logits]].numpy()
    assert (np.abs(found - expected) / (np.abs(expected).max(0) + 1e-6)).max() < 1e-4


@pytest.mark.parametrize("name", ["gpt2_mctc", "llama_mtc_top4", "gpt2_mtc_single_skip"])
def test_a_head_kept_from_a_key_takes_its_loadings_away(name: str) -> None:
    """One entry of a pattern set to zero: query sides at that position lose what that head carried from that key."""
    case, model = CASES[name], build(CASES[name])
    graph = circuits.trace(model, case.token_ids, settings=UNPRUNED)
    bench, names, nodes = Bench(model, case.token_ids), addresses(graph), graph.nodes
    targets = np.flatnonzero(nodes.kind == "mtc_query")
    heads, checked = graph.heads, 0
    for layer, head, query, key in ((0, 1, 4, 2), (2, 3, 3, 3), (2, 0, 4, 0)):
        place = (layer, head, query, key)
        batch = [[PatternChange(*place, "set", 0.0)], [PatternChange(*place, "scale", 3.0)]]
        outcome = bench.run(batch, mode="frozen", features=[names[i] for i in targets])
        chosen = (heads.layer == layer) & (heads.head == head) & (heads.query == query) & (heads.key == key)
        carried = np.zeros(len(nodes))
        np.add.at(carried, graph.edges.target[heads.edge[chosen]], heads.weight[chosen])
        found = (outcome.features - outcome.baseline_features).numpy()
        at = nodes.layer[targets] == layer
        assert np.allclose(found[0, at], -carried[targets][at], atol=1e-5)
        assert np.allclose(found[1, at], 2 * carried[targets][at], atol=2e-5)
        checked += int((np.abs(carried) > 1e-3).sum())
    assert checked > 5


@pytest.mark.parametrize("name", ["gpt2_clt_attn_out", "llama_clt_z", "gpt2_clt_frozen", "llama_value"])
def test_a_patched_pattern_moves_whole_values(name: str) -> None:
    """What a frozen head adds from a key is `A O_h V_h N(x[s])` with all biases: to readers of its layer's attention
    output, and to the stream where attention is frozen or moves replaced values."""
    case, model = CASES[name], build(CASES[name])
    bench = Bench(model, case.token_ids)
    t, layer, head, query, key = bench.table, 1, 2, 4, 3
    attention, recording = bench.linear.attention[layer], bench.recording
    shape = model.base.shape
    values = attention.read_values(recording.resid_pre[layer])[key].view(shape.n_kv_heads, -1)
    moved = values[head // (shape.n_heads // shape.n_kv_heads)] @ attention.weights.w_o[head]
    lost = -attention.pattern[head, query, key] * moved
    nodes = np.flatnonzero((t.kind == "attention_feature") & (t.layer == layer) & (t.position == query))
    names = [f"a{layer}_{t.feature[i]}_{query}" for i in nodes]
    change = [[PatternChange(layer, head, query, key, "set", 0.0)]]
    outcome = bench.run(change, mode="frozen", features=names, positions=[query])
    found = (outcome.features - outcome.baseline_features)[0]
    for i, expected in zip(nodes, found.tolist(), strict=True):
        dictionary: Dictionary = bench.linear.dictionaries[t.dictionary[i]]
        reader = dictionary.encoder_rows(torch.tensor([t.feature[i]]))[0]
        if dictionary.read.site.name == "z":
            z = -attention.pattern[head, query, key] * values[head // (shape.n_heads // shape.n_kv_heads)]
            width = slice(head * shape.d_head, (head + 1) * shape.d_head)
            assert expected == pytest.approx(float(reader[width] @ z), abs=1e-5)
        else:
            assert expected == pytest.approx(float(reader @ lost), abs=1e-5)
    logits = (outcome.logits[0, 0] - outcome.baseline_logits[0]).abs().max()
    passes = layer in bench.linear.frozen_attention
    assert float(logits) > 1e-3 if passes else float(logits) < 1e-6
    assert passes or len(names) > 2
