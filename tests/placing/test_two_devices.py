"""Models whose layers lie on two devices, by a test double of them: there is no machine with several GPUs here."""

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from drawn import draw, watch
from tiny_models import CASES, Case, build
from torch import nn
from two_devices import HOME, OTHER, devices

import circuits
from circuits.faithfulness import logits_of_parts
from circuits.generation import generate
from circuits.graph import Graph
from circuits.interventions import Bench
from circuits.loading import Model, place
from circuits.model import BaseModel
from circuits.verification import verify

KINDS = (
    "gpt2_clt_frozen", "gpt2_clt_attn_out", "gpt2_mtc_single_skip", "gpt2_weakly_causal", "gpt2_mixed",
    "gpt2_own_over_frozen", "llama_skip_scale_z", "llama_mtc_ranks", "llama_clt_middle_frozen", "llama_lorsa",
    "llama_value_over_frozen", "llama_residual_over_frozen", "gemma2_before_post_norm",
)  # fmt: skip
SETTINGS = circuits.TraceSettings(explain=True)
AT_HOME = ("wte", "wpe", "embed_tokens", "rotary_emb")


def spread(case: Case) -> Model:
    """The model of a case with its first layer at home, the others and the end on the other device, by the hooks with
    which accelerate runs such models."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = build(case)
    lm: Any = model.base.lm
    modules = [*getattr(lm, model.base.family.trunk).named_children(), ("lm_head", lm.lm_head)]
    for name, module in modules:
        for number, one in enumerate(module if isinstance(module, nn.ModuleList) else [module]):
            at = HOME if name in AT_HOME or (isinstance(module, nn.ModuleList) and number == 0) else OTHER
            one.to(at)
            add_hook_to_module(one, AlignDevicesHook(execution_device=at))
    base = BaseModel(lm, None, model.base.name)
    assert (base.device, base.layer_devices) == (HOME, (HOME, OTHER, OTHER))
    for replacement in model.replacements:
        for dictionary in replacement.dictionaries:
            dictionary.place(HOME)
            dictionary.output_biases = {site: bias.to(HOME) for site, bias in dictionary.output_biases.items()}
            dictionary.moved_by = _moved(dictionary.moved_by)
        place(base, replacement, 2**30)
    return Model(base, model.replacements)


def _moved(movement: Any) -> Any:
    """How features move, with its tensors at home."""
    if movement is None:
        return None
    values = {field.name: getattr(movement, field.name) for field in fields(movement)}
    return type(movement)(**{k: v.to(HOME) if isinstance(v, torch.Tensor) else v for k, v in values.items()})


def near(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether numbers are the same but for the last bits of the largest."""
    size = float(np.abs(expected[np.isfinite(expected)]).max(initial=1.0))
    return bool(np.allclose(found, expected, rtol=0, atol=2e-6 * size, equal_nan=True))


def assert_same(found: Graph, expected: Graph) -> None:
    """The same rows in every table."""
    for name in ("nodes", "edges", "heads", "first_hops", "last_hops", "scores", "pairs"):
        mine, theirs = getattr(found, name), getattr(expected, name)
        for column in (field.name for field in fields(theirs)):
            one, other = np.asarray(getattr(mine, column)), np.asarray(getattr(theirs, column))
            same = near(one, other) if other.dtype.kind == "f" else bool((one == other).all())
            assert one.shape == other.shape, (name, column)
            assert same, (name, column)


@pytest.mark.parametrize("name", KINDS)
def test_a_trace_does_not_depend_on_where_layers_lie(name: str) -> None:
    """Nodes, edges, their splits by head, explained scores and the ledger are those of one device, and so is what
    `explain` tells of the strongest node."""
    case = CASES[name]
    plain = build(case)
    expected = circuits.trace(plain, list(case.token_ids), settings=SETTINGS)
    with devices():
        model = spread(case)
        found = circuits.trace(model, list(case.token_ids), settings=SETTINGS)
        told = circuits.explain(model, expected, expected.node_ids()[-1])
    assert len(expected.edges) > 20
    assert_same(found, expected)
    assert found.metadata["ledger"]["max_relative_gap"] < 1e-5
    assert told.words == circuits.explain(plain, expected, expected.node_ids()[-1]).words


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("options", [{}, {"mode": "frozen"}, {"layers": range(1, 3)}], ids=str)
def test_interventions_do_not_depend_on_where_layers_lie(name: str, options: dict[str, Any]) -> None:
    """Logits, and what every node reads and becomes, in real, frozen and constrained runs."""
    case = CASES[name]
    bench = Bench(build(case), list(case.token_ids))
    batch, nodes = draw(bench, case, count=3), watch(bench)
    expected = bench.run(batch, features=nodes, **options)
    with devices():
        found = Bench(spread(case), list(case.token_ids)).run(batch, features=nodes, **options)
        pairs = {
            what: (getattr(found, what).cpu().numpy(), getattr(expected, what).numpy())
            for what in ("logits", "features", "activations")
        }
    assert float((expected.logits - expected.baseline_logits).abs().max()) > 0.01
    for what, (mine, theirs) in pairs.items():
        assert near(mine, theirs), what


@pytest.mark.parametrize("name", ["gpt2_mixed", "llama_mtc_ranks", "llama_skip_scale_z", "gemma2_before_post_norm"])
def test_generation_and_verification_do_not_depend_on_where_layers_lie(name: str) -> None:
    """Generated tokens, runs that keep a part of the nodes, and the figures of `verify`."""
    case = CASES[name]
    plain, ids = build(case), list(case.token_ids)
    graph = circuits.trace(plain, ids)
    bench = Bench(plain, ids)
    changes = draw(bench, case, count=1)[0]
    mask = np.arange(len(bench.table)) % 2 == 0
    verified, text = verify(plain, graph), generate(plain, ids, changes, max_new_tokens=4)
    part = logits_of_parts(bench.linear, bench.table, mask[None]).numpy()
    with devices():
        model = spread(case)
        bench = Bench(model, ids)
        again, more = verify(model, graph), generate(model, ids, changes, max_new_tokens=4)
        assert near(logits_of_parts(bench.linear, bench.table, mask[None]).cpu().numpy(), part)
    assert more.changed.token_ids == text.changed.token_ids
    assert near(np.array(more.changed.probabilities), np.array(text.changed.probabilities))
    for name in ("sufficiency", "necessity"):
        assert again.metadata["verification"][name] == pytest.approx(verified.metadata["verification"][name], abs=1e-4)
    assert near(again.nodes.measured, verified.nodes.measured)
