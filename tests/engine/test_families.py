"""Every family of base models: the recording is the model's own computation, its parts are found, its blocks replaced.

What the linearized model makes of them is in `test_reference.py` and `test_ledger.py`.
"""

from dataclasses import replace
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import get_args

import pytest
import torch
from tiny_models import FAMILIES as CASES
from tiny_models import PROMPT, FamilyName, build, in_memory, random_lm
from torch import Tensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

import circuits
from circuits.base_models import load_base_model
from circuits.errors import CircuitsError
from circuits.evaluation import cross_entropy
from circuits.families import FAMILIES
from circuits.model import BaseModel
from circuits.prompt import prepare
from circuits.recording import Recording, record
from circuits.score_weights import ScoreWeights
from circuits.targets import TopTokens
from circuits.tracing import lay_out

NAMES = get_args(FamilyName)
POST_NORMS = ("gemma2", "gemma3", "olmo2")
WINDOWS = {
    "gemma2": {3, None},
    "gemma3": {3, None},
    "qwen2": {3, None},
    "gpt_oss": {3, None},
    "mistral": {3},
    "phi3": {3},
}
POSITIONS = torch.arange(len(PROMPT))


@cache
def recorded(name: FamilyName) -> tuple[BaseModel, Recording]:
    """A random model of a family, and its recording of the prompt."""
    base = BaseModel(random_lm(name, torch.Generator().manual_seed(11)), None, f"tiny-{name}")
    return base, record(base, torch.tensor(PROMPT))


def test_every_family_is_tried() -> None:
    """The names of this file are all the families that there are."""
    assert {recorded(name)[0].family.model_type for name in NAMES} == set(FAMILIES)
    assert [name for name in NAMES if recorded(name)[0].parallel] == ["neox"]
    assert [name for name in NAMES if recorded(name)[0].final_soft_cap is not None] == ["gemma2"]


@pytest.mark.parametrize("name", NAMES)
def test_probabilities_are_the_model_s(name: FamilyName) -> None:
    """Logits of the recording, capped where the family caps them, are those of transformers."""
    base, recording = recorded(name)
    with torch.no_grad():
        expected = base.lm(torch.tensor([PROMPT])).logits[0]
    for position in POSITIONS.tolist():
        logits, cap = recording.logits(base, position), base.final_soft_cap
        capped = logits if cap is None else cap * torch.tanh(logits / cap)
        torch.testing.assert_close(capped, expected[position], rtol=1e-5, atol=1e-5)
    model = circuits.Model(base, ())
    sweep = lay_out(model, prepare(base, PROMPT), [TopTokens()])
    found = sweep.linear.output_probabilities(len(PROMPT) - 1)
    torch.testing.assert_close(found, expected[-1].softmax(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_streams_add_up(name: FamilyName) -> None:
    """What is recorded of the sublayers is what is added to the stream; a post-norm's record gives it from before."""
    base, recording = recorded(name)
    for layer in range(base.shape.n_layers):
        above = recording.resid_pre[layer + 1] if layer + 1 < base.shape.n_layers else None
        if above is not None:
            torch.testing.assert_close(recording.resid_post(layer), above, rtol=1e-5, atol=1e-5)
        mid = recording.resid_pre[layer] + (0 if base.parallel else recording.attn_out[layer])
        torch.testing.assert_close(recording.resid_mid[layer], mid, rtol=1e-5, atol=1e-5)
        post = recording.post_norm(layer)
        assert (post is None) == (recording.attn_before is None) == (name not in POST_NORMS)
        if post is not None and recording.attn_before is not None:
            behind = post.apply(recording.attn_before[layer], slice(None))
            torch.testing.assert_close(behind, recording.attn_out[layer], rtol=1e-5, atol=1e-5)
    final = recording.final_norm.apply(recording.resid_post(base.shape.n_layers - 1), slice(None))
    final = final if recording.final_norm.bias is None else final + recording.final_norm.bias
    torch.testing.assert_close(final, recording.resid_final, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_queries_and_keys_give_the_patterns(name: FamilyName) -> None:
    """Softmax of the recorded queries . keys, capped and within the window, is the recorded pattern."""
    base, recording = recorded(name)
    windows = set()
    for layer in range(base.shape.n_layers):
        weights = base.score_weights(layer)
        windows.add(weights.window)
        keys = recording.keys[layer].repeat_interleave(base.shape.n_heads // base.shape.n_kv_heads, 1)
        scores = torch.einsum("phe,khe->hpk", recording.queries[layer], keys)
        if weights.soft_cap is not None:
            scores = weights.soft_cap * torch.tanh(scores / weights.soft_cap)
        distance = POSITIONS[:, None] - POSITIONS
        seen = (distance >= 0) & (distance < (weights.window or len(PROMPT)))
        scores = scores.masked_fill(~seen, -torch.inf)
        if base.family.sinks is not None:  # one more key, without a value
            sinks = attrgetter(base.family.sinks)(base.blocks[layer]).view(-1, 1, 1).expand(-1, len(PROMPT), 1)
            scores = torch.cat([scores, sinks], dim=-1)
        pattern = scores.softmax(-1)[..., : len(PROMPT)]
        torch.testing.assert_close(pattern, recording.patterns[layer], rtol=1e-5, atol=1e-6)
    assert windows == WINDOWS.get(name, {None})


@pytest.mark.parametrize("name", NAMES)
def test_score_weights_give_queries_and_keys(name: FamilyName) -> None:
    """Weights, biases, norms, rotary position and scale of `score_weights` make the recorded queries and keys."""
    base, recording = recorded(name)
    for layer in range(base.shape.n_layers):
        weights, norm = base.score_weights(layer), recording.attention_norms[layer]
        x = norm.apply(recording.resid_pre[layer], slice(None))
        x = x if norm.bias is None else x + norm.bias
        queries = _turned(weights, x, weights.w_q, weights.b_q, weights.query_norm) * weights.scale
        keys = _turned(weights, x, weights.w_k, weights.b_k, weights.key_norm)
        torch.testing.assert_close(queries, recording.queries[layer], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(keys, recording.keys[layer], rtol=1e-4, atol=1e-5)


def _turned(weights: ScoreWeights, x: Tensor, w: Tensor, b: Tensor | None, norm: tuple[Tensor, float] | None) -> Tensor:
    """Queries or keys (S, heads, E), the scale left out."""
    found = torch.einsum("sd,hed->she", x, w)
    found = found if b is None else found + b
    if norm is not None:
        over = (-1, -2) if norm[0].ndim == 2 else (-1,)
        found = found * (found.pow(2).mean(over, keepdim=True) + norm[1]).rsqrt() * norm[0]
    return weights.turn(found.transpose(0, 1), POSITIONS).transpose(0, 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_is_loaded_and_traced(name: FamilyName, tmp_path: Path) -> None:
    """A folder as transformers writes it: the same model, and a trace without replacements whose ledger closes."""
    lm = random_lm(name, torch.Generator().manual_seed(12))
    lm.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = load_base_model(tmp_path)
    again = record(BaseModel(lm, None, "same"), torch.tensor(PROMPT))
    torch.testing.assert_close(record(loaded, torch.tensor(PROMPT)).resid_final, again.resid_final)
    graph = circuits.trace(circuits.load(tmp_path), PROMPT)
    assert graph.metadata["model"]["family"] == loaded.family.model_type
    assert graph.metadata["ledger"]["max_relative_gap"] < 1e-5
    assert len(graph.edges) > 10
    assert set(graph.metadata["attention"]) == {"frozen"}


def test_the_text_model_of_one_with_vision(tmp_path: Path) -> None:
    """A Gemma 3 with a vision tower: its text model is read, with the logits that the whole has on text."""
    torch.manual_seed(3)
    text = recorded("gemma3")[0].lm.config.to_dict() | {"final_logit_softcapping": None}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
              "image_size": 8, "patch_size": 4}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=9)
    whole = Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    base = load_base_model(tmp_path)
    ids = torch.tensor([[0, 3, 7, 1, 3, 10]])
    with torch.no_grad():
        expected = whole(ids).logits[0]
    assert base.family.model_type == "gemma3_text"
    assert not any("vision" in name for name, _ in base.lm.named_parameters())
    recording = record(base, ids[0])
    for position in range(ids.shape[1]):
        torch.testing.assert_close(recording.logits(base, position), expected[position], rtol=1e-5, atol=1e-5)
    graph = circuits.trace(circuits.load(tmp_path), ids[0].tolist())
    assert graph.metadata["ledger"]["max_relative_gap"] < 1e-5


def test_a_mixture_before_and_behind_a_post_norm_is_traced_but_not_run() -> None:
    """Two dictionaries of one output, one trained before its post-norm: linear, so the ledger closes; a run refuses."""
    case = CASES["gemma2_clt_attn_out"]
    model = build(case)
    (clt,) = [r for r in model.replacements if r.name == "mlp"]
    first, *others = clt.dictionaries
    mixed = in_memory("mlp", [replace(first, before_post_norm=True), *others])
    settings = circuits.TraceSettings(left_out=0.0, unpruned=True)
    graph = circuits.trace(circuits.Model(model.base, (mixed,)), case.token_ids, settings=settings)
    assert graph.metadata["ledger"]["max_relative_gap"] < 1e-5
    with pytest.raises(CircuitsError, match=r"write mlp_out\.1, some before its post-norm"):
        cross_entropy(model.base, (mixed,), [case.token_ids])


def test_scores_with_sinks_are_not_explained() -> None:
    """A sink's share of a pattern is no key's: `explain` says so instead of leaving it out."""
    base = recorded("gpt_oss")[0]
    with pytest.raises(CircuitsError, match="attention sinks"):
        circuits.trace(circuits.Model(base, ()), PROMPT, settings=circuits.TraceSettings(explain=True))
