"""Traces of tiny models with what OpenMOSS publishes: they add up, and edges into a Lorsa are gradients."""

from pathlib import Path
from typing import Any

import openmoss_files as of
import pytest
import torch
from openmoss_files import D
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import circuits
from circuits.graph import Graph
from circuits.linearize import check_replacements
from circuits.loading import Model
from circuits.model import BaseModel
from circuits.replacements import load_replacement
from circuits.replacements.movement import OwnAttention

UNPRUNED = circuits.TraceSettings(left_out=0.0, unpruned=True)


def tiny(family: str) -> BaseModel:
    """A random model of two layers and width D."""
    common = {"vocab_size": 11, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": D}
    common |= {"max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(11)
    if family == "llama":
        config = LlamaConfig(**common, intermediate_size=24, num_key_value_heads=2, attn_implementation="eager")
        lm: torch.nn.Module = LlamaForCausalLM(config)
    else:
        lm = GPT2LMHeadModel(GPT2Config(**common, attn_implementation="eager"))
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return BaseModel(lm, None, f"tiny-{family}")


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "meta-llama/Llama-3.2-1B", {"use_post_qk_ln": True, "normalization_type": "RMS"}),
    "llama, jumprelu": ("llama", "meta-llama/Llama-3.2-1B", {"act_fn": "jumprelu", "rotary_dim": 4} | of.NTK),
    "gpt2": ("gpt2", "openai-community/gpt2", {"positional_embedding_type": "none"}),
}


def traced(family: str, folder: Path) -> tuple[Graph, Model]:
    """A trace with all that a folder holds, unpruned."""
    model = Model(tiny(family), (load_replacement(folder),))
    check_replacements(model.base, model.replacements)
    return circuits.trace(model, (0, 3, 7, 1, 3, 10), settings=UNPRUNED), model


def traced_case(tmp_path: Path, case: str) -> tuple[Graph, Model]:
    family, name, lorsa = CASES[case]
    return traced(family, of.write_all(tmp_path, name, **lorsa))


@pytest.mark.parametrize("case", CASES)
def test_trace(tmp_path: Path, case: str) -> None:
    """Incoming edges and bias add up to every target; a LayerNorm's `hook_normalized` has gain and bias in it."""
    graph, model = traced_case(tmp_path, case)
    assert graph.metadata["ledger"]["max_relative_gap"] < 1e-4
    kinds = set(graph.nodes.kind.tolist())
    assert {"attention_feature", "mlp_feature"} <= kinds
    norms = {dictionary.read.norm for dictionary in model.replacements[0].dictionaries}
    assert norms == {"full" if case == "gpt2" else "scale"}


@pytest.mark.parametrize("act_fn", ["jumprelu", "topk"])
@pytest.mark.parametrize("before", [False, True])
def test_trace_of_llama_scope(tmp_path: Path, before: bool, act_fn: str) -> None:
    """Attention SAEs and transcoders of 2024 in a tiny Llama."""
    more = {"act_fn": act_fn, "apply_decoder_bias_to_pre_encoder": before}
    for layer in range(2):
        attention, block = f"blocks.{layer}.hook_attn_out", f"blocks.{layer}"
        values = of.llama_scope_values(attention, attention, **more)
        of.write_llama_scope(tmp_path, f"Llama3_1-8B-Base-L{layer}A-8x", 40 + layer, values)
        values = of.llama_scope_values(f"{block}.ln2.hook_normalized", f"{block}.hook_mlp_out", **more)
        of.write_llama_scope(tmp_path, f"Llama3_1-8B-Base-L{layer}TC-8x", 50 + layer, values)
    graph, _ = traced("llama", tmp_path)
    assert graph.metadata["ledger"]["max_relative_gap"] < 1e-5
    assert {"attention_feature", "mlp_feature"} <= set(graph.nodes.kind.tolist())


@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize(("family", "name"), [("llama", "Qwen/Qwen3-tiny"), ("gpt2", "openai-community/gpt2")])
def test_trace_of_cross_layer(tmp_path: Path, family: str, name: str, act_fn: str) -> None:
    """A CLT of both layers, behind either kind of norm."""
    graph, _ = traced(family, of.write(tmp_path, *of.cross_layer(2, act_fn=act_fn), name))
    assert graph.metadata["ledger"]["max_relative_gap"] < 1e-5
    assert graph.nodes.kind.tolist().count("mlp_feature") > 10


@pytest.mark.parametrize("case", CASES)
def test_edges_into_lorsa(tmp_path: Path, case: str) -> None:
    """Edges into features of the upper Lorsa are gradients of `sum_s A[p, s] (W_V N(x_s) + b_V)` with A and the norm's
    denominator as recorded, along what embeddings and features of the lower Lorsa wrote into the stream."""
    graph, model = traced_case(tmp_path, case)
    lower, upper = (d for d in model.replacements[0].dictionaries if d.kind == "lorsa")
    lm = model.base.lm.double()
    ids = torch.tensor([[0, 3, 7, 1, 3, 10]])
    states = lm(ids, output_hidden_states=True).hidden_states
    x = states[1][0].detach()
    gains = lm.transformer.h[1].ln_1 if case == "gpt2" else lm.model.layers[1].input_layernorm
    centred = x - x.mean(-1, keepdim=True) if case == "gpt2" else x
    epsilon = gains.eps if case == "gpt2" else gains.variance_epsilon
    size = (centred.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()

    def normed(stream: Tensor) -> Tensor:
        stream = stream - stream.mean(-1, keepdim=True) if case == "gpt2" else stream
        return stream / size * gains.weight + gains.bias if case == "gpt2" else stream / size

    own = upper.moved_by
    assert isinstance(own, OwnAttention)
    pattern = own.patterns(normed(x).float()).double()
    nodes, edges = graph.nodes, graph.edges
    targets = [i for i in range(len(nodes)) if nodes.kind[i] == "attention_feature" and nodes.layer[i] == 1]
    checked = 0
    for target in targets[::3]:
        feature, position = int(nodes.feature[target]), int(nodes.position[target])
        stream = x.clone().requires_grad_()
        sent = normed(stream) @ upper.W_enc[feature].double() + upper.b_enc[feature].double()
        pre = pattern[own.group[feature], position] @ sent
        assert float(pre.detach()) == pytest.approx(float(nodes.pre_activation[target]), abs=2e-4)
        (gradient,) = torch.autograd.grad(pre, stream)
        for edge in (edges.target == target).nonzero()[0]:
            source = int(edges.source[edge])
            kind, at = str(nodes.kind[source]), int(nodes.position[source])
            if kind == "attention_feature" and nodes.layer[source] == 0:
                rows = lower.decoder_rows(torch.tensor([int(nodes.feature[source])]), lower.writes[0])
                wrote = rows[0].double() * float(nodes.activation[source])
            elif kind == "embedding":
                wrote = lm.get_input_embeddings().weight[ids[0, at]].detach()
            else:
                continue
            assert float(edges.weight[edge]) == pytest.approx(float(gradient[at] @ wrote), abs=2e-4, rel=1e-3)
            checked += 1
    assert checked > 20
