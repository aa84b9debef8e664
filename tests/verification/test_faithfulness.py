"""Parts of a graph kept alone: against a plain loop, on a model built by hand, and on the embedded model."""

from functools import cache

import hand_built
import numpy as np
import pytest
import torch
from hand_built import norm
from plain_parts import SIDES, PlainParts
from tiny_models import CASES, Case, build
from torch import Tensor

import circuits
from circuits.assemble import table_numbers
from circuits.faithfulness import Faithfulness, faithfulness, logits_of_parts
from circuits.loading import Model
from circuits.prompt import Prompt, prepare
from circuits.sweep import Sweep
from circuits.targets import Target, TokenTarget
from circuits.tracing import lay_out

KINDS = [
    "gpt2_clt_attn_out", "gpt2_clt_z_not_special", "gpt2_skip_top_z", "gpt2_weakly_causal", "llama_weakly_causal_mlp",
    "gpt2_mtc_ranks", "llama_mtc_top4", "gpt2_mctc", "gpt2_residual_mctc", "llama_residual_all", "llama_value",
    "llama_lorsa", "gpt2_own", "llama_mixed", "llama_no_mlp", "qwen3_mtc", "neox_parallel_skip_z",
    "neox_parallel_value", "gemma2_before_post_norm", "gemma2_z_skip", "gemma2_weakly_causal_before",
]  # fmt: skip


def laid_out(model: Model, case: Case) -> Sweep:
    """A tiny model on its prompt, one token as target."""
    ids = case.token_ids
    prompt = Prompt("", ids, tuple(map(str, ids)), case.special)
    return lay_out(model, prompt, [TokenTarget(3)])


def plain(model: Model, sweep: Sweep, case: Case, mask: np.ndarray) -> Tensor:
    """Logits (S, V) of the plain run that keeps the nodes of a mask (n,)."""
    t, names = sweep.table, [dictionary.name for dictionary in sweep.linear.dictionaries]
    nodes, errors = set(), set()
    for i in np.flatnonzero(mask).tolist():
        kind, layer, p = str(t.kind[i]), int(t.layer[i]), int(t.position[i])
        if t.dictionary[i] >= 0:
            nodes.add((names[t.dictionary[i]], SIDES.get(kind, "own"), p, int(t.feature[i])))
        else:
            errors.add((kind, layer, p))
    n = len(case.token_ids)
    return PlainParts(model, [], n, nodes=nodes, errors=errors, first_is_special=case.special).logits(
        list(case.token_ids)
    )


@pytest.mark.parametrize("name", CASES)
def test_with_every_node_kept_the_base_model_is_left_as_it_is(name: str) -> None:
    """Every kind of dictionary in every family: same logits at all positions, though no node changes them."""
    model, case = build(CASES[name]), CASES[name]
    sweep = laid_out(model, case)
    recording = sweep.linear.recording
    every = range(recording.n_positions)
    masks = np.stack([np.ones(len(sweep.table), dtype=bool), sweep.table.kind == "embedding"])
    whole, nothing = logits_of_parts(sweep.linear, sweep.table, masks, every)
    expected = recording.resid_final @ model.base.unembedding.float().T
    assert torch.allclose(whole, expected, atol=1e-4, rtol=0)
    assert float((nothing - expected)[1:].abs().max()) > 0.5


@pytest.mark.parametrize("name", KINDS)
def test_parts_are_as_a_plain_loop_has_them(name: str) -> None:
    """No node, errors alone, features alone, and 0.7, 0.5 and 0.3 drawn at random, all rows of one batch."""
    model, case = build(CASES[name]), CASES[name]
    sweep = laid_out(model, case)
    rng, n = np.random.default_rng(case.seed), len(sweep.table)
    is_feature = sweep.table.dictionary >= 0
    masks = np.stack([np.zeros(n, dtype=bool), ~is_feature, is_feature, *(rng.random((3, n)) < [[0.7], [0.5], [0.3]])])
    found = logits_of_parts(sweep.linear, sweep.table, masks, range(len(case.token_ids)))
    for row, mask in enumerate(masks):
        expected = plain(model, sweep, case, mask)
        assert torch.allclose(found[row].double(), expected, atol=2e-4, rtol=1e-4), row
    assert all(float((a - b).abs().max()) > 1e-2 for i, a in enumerate(found) for b in found[:i])


def test_the_special_first_position_keeps_what_it_has() -> None:
    """With no node kept its logits are the base model's; where it is not special they are not."""
    for name, same in (("llama_weakly_causal_mlp", False), ("gpt2_weakly_causal", True)):
        sweep = laid_out(build(CASES[name]), CASES[name])
        recording = sweep.linear.recording
        found = logits_of_parts(sweep.linear, sweep.table, np.zeros((1, len(sweep.table)), dtype=bool), (0,))[0, 0]
        base = recording.logits(sweep.linear.model, 0)
        assert torch.allclose(found, base, atol=1e-5, rtol=0) == same


def test_weights_in_half_precision() -> None:
    """Weights stored as bfloat16 are computed with in float32, as in the recording, and left as they were."""
    case = Case("gpt2", mlp="skip", attention={1: "z"}, moved=("mtc.0", "value.2"), dtype=torch.bfloat16, seed=71)
    model = build(case)
    sweep = laid_out(model, case)
    masks = np.stack([np.ones(len(sweep.table), dtype=bool), sweep.table.dictionary >= 0])
    found = logits_of_parts(sweep.linear, sweep.table, masks)
    assert torch.allclose(found[0, 0], sweep.linear.recording.logits(model.base, -1), atol=1e-5, rtol=0)
    assert torch.allclose(found[1, 0].double(), plain(model, sweep, case, masks[1])[-1], atol=2e-4, rtol=1e-4)
    assert next(model.base.lm.parameters()).dtype == torch.bfloat16


# --- the measure --------------------------------------------------------------------------------------------------


def test_figures() -> None:
    """The two figures are what their definitions make of the four logits, at the sweep's targets in their order."""
    case = CASES["gpt2_mtc"]
    model = build(case)
    prompt = Prompt("", case.token_ids, tuple(map(str, case.token_ids)), case.special)
    sweep = lay_out(model, prompt, [TokenTarget(3, 4), TokenTarget(5, 2)])
    kept = np.random.default_rng(0).random(len(sweep.table)) < 0.7
    seen: list[Tensor] = []

    def measure(logits: Tensor) -> Tensor:
        seen.append(logits)
        return logits[:, 0, 3] - logits[:, 1, 5]

    found = faithfulness(sweep, kept, measure)
    every, none = np.ones_like(kept), np.zeros_like(kept)
    logits = logits_of_parts(sweep.linear, sweep.table, np.stack([every, none, kept, ~kept]), (4, 2))
    assert torch.equal(seen[0], logits)
    whole, nothing, alone, without = (logits[:, 0, 3] - logits[:, 1, 5]).tolist()
    assert (found.whole, found.nothing, found.kept, found.without) == (whole, nothing, alone, without)
    assert found.sufficiency == pytest.approx((alone - nothing) / (whole - nothing), abs=1e-12)
    assert found.necessity == pytest.approx((whole - without) / (whole - nothing), abs=1e-6)
    last = faithfulness(sweep, kept, lambda logits: logits[:, 0, 3], positions=(-1,))
    assert last.whole == pytest.approx(float(sweep.linear.recording.logits(model.base, -1)[3]), abs=1e-5)


def test_all_and_nothing() -> None:
    """The whole graph is enough and needed, an empty one neither; a quantity that nothing changes has no figures."""
    case = CASES["llama_value"]
    sweep = laid_out(build(case), case)
    n = len(sweep.table)

    def measure(logits: Tensor) -> Tensor:
        return logits[:, 0, 3]

    whole, empty = (faithfulness(sweep, np.full(n, value), measure) for value in (True, False))
    assert [whole.sufficiency, whole.necessity] == pytest.approx([1.0, 1.0], abs=1e-6)
    assert [empty.sufficiency, empty.necessity] == pytest.approx([0.0, 0.0], abs=1e-6)
    still = faithfulness(sweep, np.full(n, True), lambda logits: torch.ones(len(logits)))
    assert (still.sufficiency, still.necessity) == (None, None)


# --- the induction pair -------------------------------------------------------------------------------------------


def induction(*places: tuple[int, int]) -> Faithfulness:
    """Attention features and errors kept at places (layer, position); the logit of word 2 less the mean."""
    model = hand_built.induction()
    sweep = lay_out(model, prepare(model.base, (0, 1, 2, 3, 1)), [TokenTarget(2)])
    t = sweep.table
    is_attention = np.isin(t.kind, ("attention_feature", "attention_error"))
    here = [place in places for place in zip(t.layer.tolist(), t.position.tolist(), strict=True)]
    return faithfulness(sweep, is_attention & np.array(here), lambda logits: logits[:, 0, 2] - logits[:, 0].mean(-1))


def test_the_induction_path() -> None:
    """BEFORE at place 2 and the induction head at place 4, and BEFORE at place 4, which only the norms see.

    Without them nothing is written at place 4, so they are all that is needed. Kept alone, attention of layer 0 writes
    nothing at places 1 and 3, where the norm is sqrt(16 / 2) then: head 0 writes tenths of their words' NEXT that much
    longer, head 1 what it always did. Place 0 is BOS, and stays.
    """
    n, bare = norm(16, 10), norm(16, 2)
    found = induction((0, 2), (1, 4), (0, 4))
    base = {0: 0.1 * n, 1: 0.2 * n, 2: 1.1 * n, 3: 0.1 * n}
    alone = {0: 0.1 * n, 1: 0.1 * n + 0.1 * bare, 2: 1.1 * n, 3: 0.1 * bare}
    for value, written in ((found.whole, base), (found.kept, alone)):
        final = norm(16, 10 + sum(part**2 for part in written.values()))
        assert value == pytest.approx(final * (written[2] - sum(written.values()) / 4), rel=1e-5)
    assert (found.nothing, found.without) == pytest.approx((0.0, 0.0), abs=1e-6)
    assert found.necessity == pytest.approx(1.0, abs=1e-5)
    assert found.sufficiency == pytest.approx(found.kept / found.whole, abs=1e-6)
    assert found.sufficiency is not None
    assert 0.85 < found.sufficiency < 1.0


def test_half_of_the_induction_path() -> None:
    """Without BEFORE at place 2 head 1 finds no match and looks at all alike, as head 0 does: 0.3 of each word's value.

    Word 1, seen twice, is then the strongest, and hardly anything is left of word 2. Layer 0 alone writes no word.
    """
    upper, lower = induction((1, 4), (0, 4)), induction((0, 2))
    n, bare = norm(16, 10), norm(16, 2)
    # BOS at place 0 says nothing of word 1, and place 4 has BEFORE(3): no key matches the query there.
    written = {0: 0.3 * n, 1: 0.3 * (bare + n), 2: 0.3 * bare, 3: 0.3 * bare}
    final = norm(16, 10 + sum(part**2 for part in written.values()))
    assert upper.kept == pytest.approx(final * (written[2] - sum(written.values()) / 4), rel=1e-5)
    assert upper.sufficiency is not None
    assert abs(upper.sufficiency) < 0.03
    assert lower.sufficiency == pytest.approx(0.0, abs=1e-6)


# --- the embedded model -------------------------------------------------------------------------------------------

PROMPT = "When Mary and John went to the store, John gave a drink to"


@cache
def default(replacement: str) -> tuple[Sweep, np.ndarray]:
    """The nodes of the prompt, and which of them are in the graph with the default thresholds."""
    model = circuits.load(replacement=replacement)
    graph = circuits.trace(model, PROMPT)
    logits = graph.nodes.kind == "logit"
    targets: list[Target] = [TokenTarget(i) for i in graph.nodes.feature[logits].tolist()]
    sweep = lay_out(model, prepare(model.base, PROMPT), targets)
    kept = np.zeros(len(sweep.table), dtype=bool)
    numbers = table_numbers(graph, sweep)
    kept[numbers[(numbers >= 0) & (numbers < len(kept))]] = True
    return sweep, kept


@pytest.mark.parametrize(("replacement", "least"), [("attention-sae", 0.3), ("mtc", 0.8), ("weakly-causal", 0.8)])
def test_a_default_graph(replacement: str, least: float) -> None:
    """The graph's nodes, a few of a hundred, say " Mary"; without them nothing is left; as many others do neither."""
    sweep, kept = default(replacement)
    t = sweep.table

    def measure(logits: Tensor) -> Tensor:
        mary = sweep.targets.outputs[0].token_ids[0]
        return logits[:, 0, mary] - logits[:, 0].mean(-1)

    is_node = t.kind != "embedding"
    count = int((kept & is_node).sum())
    assert count < 0.1 * is_node.sum()
    found = faithfulness(sweep, kept, measure)
    assert found.sufficiency is not None
    assert found.necessity is not None
    assert found.sufficiency > least
    assert 0.8 < found.necessity < 1.3
    others = np.zeros_like(kept)
    others[np.random.default_rng(0).choice(np.flatnonzero(is_node & ~kept), count, replace=False)] = True
    random = faithfulness(sweep, others, measure)
    assert random.sufficiency is not None
    assert random.necessity is not None
    assert abs(random.sufficiency) < 0.3
    assert random.necessity < 0.5 * found.necessity
