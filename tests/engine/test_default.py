"""The embedded default: what it predicts, that its ledgers close, and that head loadings are what patterns carry."""

import numpy as np
import pytest
import torch

import circuits
from circuits.linearize import write_depth
from circuits.prompt import prepare
from circuits.recording import record
from circuits.settings import TraceSettings

PROMPTS = (
    "When Mary and John went to the store, John gave a drink to",
    "Once upon a time there was a little dog who lived in the",
    "Tom began to count: four, five, six,",
    "Options: cat A, saw B, pear C, coat D. Where is the pear?",
    "The king went out of the castle and rode away on his",
)


@pytest.fixture(scope="module")
def model() -> circuits.Model:
    return circuits.load()


def test_it_predicts_the_other_name(model: circuits.Model) -> None:
    graph = circuits.trace(model, PROMPTS[0])
    logits = graph.nodes.kind == "logit"
    best = graph.nodes.label[logits][np.argmax(graph.nodes.probability[logits])]
    assert best == " Mary"
    assert graph.metadata["attention"] == ["replaced"] * model.base.shape.n_layers


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ledger_closes_with_every_target_expanded(model: circuits.Model, prompt: str) -> None:
    graph = circuits.trace(model, prompt, settings=TraceSettings(left_out=0.0))
    assert graph.metadata["left_out_influence"] == 0.0
    assert graph.metadata["ledger"]["targets"] > 100
    assert graph.metadata["ledger"]["max_relative_gap"] <= 1e-4


def test_a_hundred_head_loadings_are_what_one_pattern_entry_carries(model: circuits.Model) -> None:
    """Set one entry of one head's pattern to zero, hold everything else: the target loses exactly that loading.

    The loss is taken in a forward computation of the attention layer from the source's own vector, written out here.
    """
    rng = np.random.default_rng(0)
    checked = 0
    for prompt in PROMPTS:
        graph = circuits.trace(model, prompt)
        recording = record(model.base, torch.tensor(prepare(model.base, prompt).token_ids))
        for row in rng.choice(len(graph.heads), 20, replace=False):
            edge = graph.heads.edge[row]
            layer, head = int(graph.heads.layer[row]), int(graph.heads.head[row])
            key, query = int(graph.heads.key[row]), int(graph.heads.query[row])
            stream = _written_below(model, recording, graph, int(graph.edges.source[edge]), layer)
            reader = _reader(model, graph, int(graph.edges.target[edge]))
            zeroed = recording.patterns[layer].clone()
            zeroed[head, query, key] = 0.0
            before = _attention(model, recording, layer, recording.patterns[layer], stream, key)[query]
            after = _attention(model, recording, layer, zeroed, stream, key)[query]
            change = float(reader @ (before - after))
            assert change == pytest.approx(float(graph.heads.weight[row]), rel=1e-3, abs=1e-5)
            checked += 1
    assert checked == 100


def _written_below(model, recording, graph, node: int, layer: int) -> torch.Tensor:
    """What a node writes to the stream below the attention of a layer."""
    nodes = graph.nodes
    kind, position = str(nodes.kind[node]), int(nodes.position[node])
    dictionaries = {d.name: d for r in model.replacements for d in r.dictionaries}
    if kind == "embedding":
        return recording.embedding[position]
    if kind.endswith("error"):
        own = int(nodes.layer[node])
        depth = 2 * own + (1 if kind == "attention_error" else 2)
        base = (recording.attn_out if kind == "attention_error" else recording.mlp_out)[own][position]
        rebuilt = torch.zeros_like(base)
        for d in dictionaries.values():
            for site in d.writes:
                if write_depth(site) == depth:
                    active = d.encode(recording.read(d.read))
                    here = active.positions == position
                    rows = d.decoder_rows(active.features[here], site)
                    rebuilt = rebuilt + active.activations[here] @ rows
                    bias = d.output_bias(site)
                    rebuilt = rebuilt if bias is None else rebuilt + bias
        return base - rebuilt
    dictionary = dictionaries[str(nodes.dictionary[node])]
    feature = torch.tensor([int(nodes.feature[node])])
    total = torch.zeros(model.base.shape.d_model)
    for site in dictionary.writes:
        if site.layer < layer:
            total = total + float(nodes.activation[node]) * dictionary.decoder_rows(feature, site)[0]
    return total


def _reader(model, graph, node: int) -> torch.Tensor:
    name = str(graph.nodes.dictionary[node])
    dictionary = next(d for r in model.replacements for d in r.dictionaries if d.name == name)
    return dictionary.encoder_rows(torch.tensor([int(graph.nodes.feature[node])]))[0]


def _attention(model, recording, layer: int, pattern, vector, key: int) -> torch.Tensor:
    """Attention output at every query of one stream vector that stands at `key`, with a given pattern."""
    block = model.base.lm.model.layers[layer]
    x = recording.resid_pre[layer][key]
    normed = vector * block.input_layernorm.weight.float() / torch.sqrt(x.pow(2).mean() + 1e-5)
    heads, width = model.base.shape.n_heads, model.base.shape.d_head
    value = (block.self_attn.v_proj.weight.float() @ normed).view(heads, width)
    z = pattern[:, :, key].T.unsqueeze(-1) * value
    return z.flatten(1) @ block.self_attn.o_proj.weight.float().T


@pytest.mark.parametrize("name", ["mtc", "weakly-causal"])
def test_other_embedded_replacements(name: str) -> None:
    """What `--replacement NAME` loads traces the same prediction with a closed ledger, and heads add up to edges."""
    graph = circuits.trace(circuits.load(None, name), PROMPTS[0], settings=circuits.TraceSettings(left_out=0.0))
    assert graph.metadata["ledger"]["max_relative_gap"] < 1e-4
    assert graph.nodes.label[np.nanargmax(graph.nodes.probability)] == " Mary"
    total = np.bincount(graph.heads.edge, weights=graph.heads.weight.astype(np.float64), minlength=len(graph.edges))
    named = np.isin(np.arange(len(graph.edges)), graph.heads.edge)
    assert np.abs(total - graph.edges.weight)[named].max() < 1e-4 * np.abs(graph.edges.weight[named]).max()
    kinds = set(graph.nodes.kind.tolist())
    assert ({"mtc_key", "mtc_query"} <= kinds) == (name == "mtc")
    into_query = np.isin(graph.nodes.kind[graph.edges.target], ["mtc_query"])
    assert named[into_query].all()
