"""Models whose layers lie on two devices, by a test double of them: there is no machine with several GPUs here."""

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from drawn import draw, watch
from tiny_models import CASES, Case, build
from torch import nn
from two_devices import CPU, HOME, OTHER, devices

import circuits
from circuits.faithfulness import logits_of_parts
from circuits.generation import generate
from circuits.graph import Graph
from circuits.interventions import Bench
from circuits.loading import Model, place
from circuits.model import BaseModel
from circuits.placing import run_where_it_lies
from circuits.verification import verify

KINDS = (
    "gpt2_clt_frozen", "gpt2_clt_attn_out", "gpt2_mtc_single_skip", "gpt2_weakly_causal", "gpt2_mixed",
    "gpt2_own_over_frozen", "llama_skip_scale_z", "llama_mtc_ranks", "llama_clt_middle_frozen", "llama_lorsa",
    "llama_value_over_frozen", "llama_residual_over_frozen", "gemma2_before_post_norm",
)  # fmt: skip
SETTINGS = circuits.TraceSettings(explain=True)
AT_HOME = ("wte", "wpe", "embed_tokens", "rotary_emb")


def spread(case: Case, last: torch.device = OTHER) -> Model:
    """The model of a case dispatched by accelerate: tokens, an unembedding tied to them and the first layer at home,
    the second layer on the other device, the third and the end on `last`."""
    from accelerate import dispatch_model

    model = build(case)
    lm: Any = model.base.lm
    trunk = model.base.family.trunk
    places: dict[str, Any] = {"lm_head": HOME if lm.config.tie_word_embeddings else last}
    for name, module in getattr(lm, trunk).named_children():
        if isinstance(module, nn.ModuleList):
            places |= {f"{trunk}.{name}.{i}": at for i, at in enumerate((HOME, OTHER, last))}
        else:
            places[f"{trunk}.{name}"] = HOME if name in AT_HOME else last
    places = {name: "cpu" if at.type == "cpu" else str(at) for name, at in places.items()}
    dispatch_model(lm, places, skip_keys=lm._skip_keys_device_placement)
    run_where_it_lies(lm, places)
    base = BaseModel(lm, None, model.base.name)
    assert (base.device, base.layer_devices) == (HOME, (HOME, OTHER, last))
    for replacement in model.replacements:
        for dictionary in replacement.dictionaries:
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


@pytest.mark.parametrize(
    ("name", "last"), [*((name, OTHER) for name in KINDS), ("gpt2_clt_frozen", CPU), ("llama_mtc_ranks", CPU)], ids=str
)
def test_a_trace_does_not_depend_on_where_layers_lie(name: str, last: torch.device) -> None:
    """Nodes, edges, their splits by head, explained scores and the ledger are those of one device, and so is what
    `explain` tells of the strongest node."""
    case = CASES[name]
    plain = build(case)
    expected = circuits.trace(plain, list(case.token_ids), settings=SETTINGS)
    with devices():
        model = spread(case, last)
        found = circuits.trace(model, list(case.token_ids), settings=SETTINGS)
        told = circuits.explain(model, expected, expected.node_ids()[-1])
    assert len(expected.edges) > 20
    assert_same(found, expected)
    assert found.metadata["ledger"]["max_relative_gap"] < 1e-5
    assert told.words == circuits.explain(plain, expected, expected.node_ids()[-1]).words


@pytest.mark.parametrize("name", KINDS)
def test_interventions_do_not_depend_on_where_layers_lie(name: str) -> None:
    """Logits, and what every node reads and becomes, in real, frozen and constrained runs."""
    case = CASES[name]
    bench = Bench(build(case), list(case.token_ids))
    batch, nodes = draw(bench, case, count=3), watch(bench)
    ways: list[dict[str, Any]] = [{}, {"mode": "frozen"}, {"layers": range(1, 3)}, {"freeze_attention": True}]
    expected = [bench.run(batch, features=nodes, **options) for options in ways]
    with devices():
        bench = Bench(spread(case), list(case.token_ids))
        found = [bench.run(batch, features=nodes, **options) for options in ways]
        for what in ("logits", "features", "activations"):
            for mine, theirs in zip(found, expected, strict=True):
                assert near(getattr(mine, what).cpu().numpy(), getattr(theirs, what).numpy()), what
    assert float((expected[0].logits - expected[0].baseline_logits).abs().max()) > 0.01


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
