"""Interventions in which everything is recomputed, against a second account of them, and facts that must hold."""

import random

import pytest
import torch
from drawn import draw, watch
from plain_interventions import Plain, plain
from tiny_models import CASES, N_HEADS, N_LAYERS, Case, build

from circuits.errors import CircuitsError
from circuits.families import part
from circuits.interventions import Bench, Change, Mode, PatternChange
from circuits.loading import Model
from circuits.replacements.movement import HeadLoading


@pytest.mark.parametrize("name", sorted(CASES))
def test_as_the_plain_account_has_it(name: str) -> None:
    """Logits everywhere, and what every node reads and becomes, for three interventions of three changes each."""
    case, model = CASES[name], build(CASES[name])
    bench = Bench(model, case.token_ids)
    batch, nodes = draw(bench, case, count=3), watch(bench)
    n = bench.recording.n_positions
    found = bench.run(batch, features=nodes, positions=range(n))
    moved = 0.0
    for row, changes in enumerate(batch):
        expected, run = plain(model, list(case.token_ids), changes, special=case.special)
        assert torch.allclose(found.logits[row].double(), expected, atol=2e-4, rtol=1e-4), changes
        moved = max(moved, float((expected - found.baseline_logits).abs().max()))
        for number, node in enumerate(nodes):
            pre, active = seen(bench, run, node)
            assert float(found.features[row, number]) == pytest.approx(pre, abs=5e-4, rel=5e-4), (node, changes)
            assert float(found.activations[row, number]) == pytest.approx(active, abs=5e-4, rel=5e-4), (node, changes)
    assert moved > 0.1


def seen(bench: Bench, run: Plain, node: str) -> tuple[float, float]:
    """Pre-activation and activation of a node in a plain run, along its recorded direction."""
    place, dictionary = node.split("@")
    prefix = place[0] if place[0] in "kq" else ""
    side = {"k": "key", "q": "query"}.get(prefix, "own")
    _, feature, position = place.split("_")
    assert run.recorded is not None
    at = int(position), int(feature)
    recorded = run.recorded.before[dictionary, side][at]
    along = torch.ones(1).double() if len(recorded) == 1 else recorded / recorded.norm()
    return float(run.pre[dictionary, side][at] @ along), float(run.activations[dictionary, side][at] @ along)


@pytest.mark.parametrize("name", ["gpt2_mtc_ranks", "llama_value", "gpt2_own", "llama_residual_weakly_causal"])
def test_scaling_by_one_changes_nothing(name: str) -> None:
    """Every node, feature, error and token, scaled by one: the base model, to rounding."""
    case, model = CASES[name], build(CASES[name])
    bench = Bench(model, case.token_ids)
    t, errors = bench.table, ["a{}_error_{}", "{}_error_{}", "v{}_error_{}", "r{}_error_{}"]
    names = dict(zip(["attention_error", "mlp_error", "value_error", "block_error"], errors, strict=True))
    nodes = watch(bench)
    nodes += [names[k].format(layer, p) for k, layer, p in zip(t.kind, t.layer, t.position) if k in names]
    nodes += [f"E_{token}_{p}" for p, token in enumerate(case.token_ids)]
    assert len(nodes) == len(t)
    for mode in ("real", "frozen"):
        found = bench.run([[Change(node, "scale", 1.0) for node in nodes], []], mode=mode, features=watch(bench))  # type: ignore[arg-type]
        assert float((found.logits - found.baseline_logits).abs().max()) < 2e-6
        assert torch.allclose(found.features[0], found.baseline_features, atol=2e-6, rtol=1e-5)
        assert torch.allclose(found.activations[0], found.baseline_activations, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2_mixed", "llama_mtc_top4", "llama_lorsa"])
@pytest.mark.parametrize("mode", ["real", "frozen"])
def test_a_batch_is_its_rows_one_by_one(name: str, mode: Mode) -> None:
    """Rows do not meet, whatever the batch size; with patterns changed too, in some rows."""
    case, model = CASES[name], build(CASES[name])
    bench = Bench(model, case.token_ids)
    batch = draw(bench, case, count=7, seed=5)
    batch[2].append(PatternChange(1, 2, 4, 2, "set", 0.9, renormalize=True))
    batch[4] = [PatternChange(0, 1, None, 1, "scale", 0.0)]
    nodes = watch(bench)
    together = bench.run(batch, mode=mode, features=nodes)
    for size in (1, 3):
        apart = bench.run(batch, mode=mode, features=nodes, batch_size=size)
        assert torch.allclose(together.logits, apart.logits, atol=1e-5)
        assert torch.allclose(together.features, apart.features, atol=1e-5)
        assert torch.allclose(together.activations, apart.activations, atol=1e-5)
    assert float((together.logits[4] - together.baseline_logits).abs().max()) > (1e-3 if mode == "real" else -1)


@pytest.mark.parametrize(
    "name", ["gpt2_weakly_causal", "llama_mtc_ranks", "llama_value", "gpt2_own", "gpt2_clt_frozen"]
)
@pytest.mark.parametrize("freeze", [False, True])
def test_patterns_that_are_changed_or_held(name: str, freeze: bool) -> None:
    """Entries, columns and rows of patterns, beside changes of features; all patterns held at the recording or not."""
    case, model = CASES[name], build(CASES[name])
    bench = Bench(model, case.token_ids)
    generator, n = random.Random(11), bench.recording.n_positions
    batch = draw(bench, case, count=5, each=2, seed=9)
    for changes in batch:
        for _ in range(3):
            query = generator.choice([None, *range(1, n)])
            key = generator.choice([None, *range(query or n)])
            how = generator.choice(["set", "scale"] if key is None else ["set", "scale", "row"])
            value = round(generator.uniform(0, 1.5), 3)
            place = generator.randrange(N_LAYERS), generator.randrange(N_HEADS)
            changes.append(PatternChange(*place, query, key, how, value, renormalize=generator.random() < 0.5))  # type: ignore[arg-type]
    found = bench.run(batch, positions=range(n), freeze_attention=freeze)
    for row, changes in enumerate(batch):
        expected, _ = plain(model, list(case.token_ids), changes, special=case.special, freeze_attention=freeze)
        assert torch.allclose(found.logits[row].double(), expected, atol=2e-4, rtol=1e-4), changes
        assert float((expected - found.baseline_logits).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["gpt2_mtc", "gpt2_value", "llama_residual_all", "llama_clt_z"])
def test_errors_and_tokens(name: str) -> None:
    """An error's or a token's recorded vector is taken away, or half of it added, where it was written."""
    case, model = CASES[name], build(CASES[name])
    bench = Bench(model, case.token_ids)
    t, n = bench.table, bench.recording.n_positions
    places = {"embedding": "embedding", "attention_error": "attention", "mlp_error": "mlp", "value_error": "value"}
    places["block_error"] = "block"
    prefixes = {"attention_error": "a", "mlp_error": "", "value_error": "v", "block_error": "r"}
    chosen = [i for i in range(len(t)) if t.dictionary[i] < 0 and t.position[i] in (0, 2, 3)]
    batch, vectors = [], []
    for i in chosen:
        kind, layer, at = t.kind[i], int(t.layer[i]), int(t.position[i])
        where = [layer for layer, write in t.value_writes.items() if i in write.nodes.tolist()]
        write = t.value_writes[where[0]] if where else next(w for w in t.writes.values() if i in w.nodes.tolist())
        vector = write.vectors[write.nodes.tolist().index(i)].double()
        name_ = f"E_{t.feature[i]}_{at}" if kind == "embedding" else f"{prefixes[kind]}{layer}_error_{at}"
        for how, value, factor in (("ablate", 0.0, -1.0), ("add", 0.5, 0.5)):
            batch.append([Change(name_, how, value)])  # type: ignore[arg-type]
            whole = torch.zeros(n, len(vector), dtype=torch.float64)
            whole[at] = factor * vector
            vectors.append({(places[kind], max(layer, 0)): whole})
    found = bench.run(batch, positions=range(n))
    for row, vector in enumerate(vectors):
        expected, _ = plain(model, list(case.token_ids), [], special=case.special, vectors=vector)
        assert torch.allclose(found.logits[row].double(), expected, atol=2e-4, rtol=1e-4), batch[row]
        assert float((expected - found.baseline_logits).abs().max()) > 1e-3


# --- constrained patching -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2_weakly_causal", "llama_mtc_ranks", "gpt2_value", "gpt2_own", "llama_clt_z",
                                  "llama_residual_all", "gpt2_mtc", "gpt2_mixed", "llama_mctc_clt"])  # fmt: skip
def test_with_every_layer_held_the_stream_changes_by_the_writes_alone(name: str) -> None:
    """Held everywhere, the stream at the top is the recorded one and the writes, each by its recorded activation.

    The writes by hand: of one feature at one position, `delta` times its decoder rows; moved by the recorded patterns
    for key sides, by the heads for values. The final norm and the logits are taken anew.
    """
    case, model = CASES[name], build(CASES[name])
    bench = Bench(model, case.token_ids)
    recording, t, n = bench.recording, bench.table, bench.recording.n_positions
    nodes = [(i, address) for i, address in zip((t.dictionary >= 0).nonzero()[0], watch(bench), strict=True)][::5]
    found = bench.run([[Change(a, "ablate")] for _, a in nodes], layers=range(N_LAYERS), positions=range(n))
    top = recording.resid_mid[-1] + recording.mlp_out[-1]
    for row, (i, address) in enumerate(nodes):
        dictionary = bench.linear.dictionaries[t.dictionary[i]]
        kind, p, feature = t.kind[i], int(t.position[i]), torch.tensor([t.feature[i]])
        directions = t.directions_of(t.feature[i : i + 1] * 0 + i, dictionary.rank)
        there = torch.zeros(n)
        there[p] = -float(t.activation[i])
        if kind == "mtc_key":
            assert isinstance(dictionary.moved_by, HeadLoading)
            loading = dictionary.moved_by.weights[feature[0]]
            pattern = torch.einsum("h,hps->ps", loading[:-1], recording.patterns[dictionary.layer])
            there = (pattern + loading[-1] * torch.eye(n)) @ there
        written = torch.zeros_like(top)
        for site in bench.linear.writes_of(dictionary):
            rows = bench.linear.through_output(site, dictionary.decoder_rows(feature, site, directions))
            vectors = there[:, None] * rows
            if site.name == "v":
                attention = bench.linear.attention[site.layer]
                per_head = vectors.view(n, -1, model.base.shape.d_head).transpose(0, 1)
                per_head = per_head.repeat_interleave(attention.n_heads // len(per_head), dim=0)
                vectors = torch.einsum("hps,hse,hed->pd", attention.pattern, per_head, attention.weights.w_o)
            written = written + vectors
        stream = top + written
        norm = recording.final_norm
        centred = stream - stream.mean(-1, keepdim=True) if norm.centred else stream
        _, _, epsilon = model.base.norm_parameters(_final_norm(model))
        normed = centred * (centred.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt() * norm.gain
        normed = normed if norm.bias is None else normed + norm.bias
        expected = normed @ model.base.unembedding.T
        assert torch.allclose(found.logits[row], expected, atol=1e-4, rtol=1e-4), address


def _final_norm(model: Model) -> torch.nn.Module:
    return part(model.base.lm, model.base.family.final_norm)


def test_below_the_held_layers_all_is_recomputed_and_above_too() -> None:
    """Held layers 1:2 of three: layer 1 adds what it added on the recording, layers 0 and 2 answer to the change."""
    case, model = CASES["gpt2_clt_frozen"], build(CASES["gpt2_clt_frozen"])
    bench = Bench(model, case.token_ids)
    change = [Change("E_7_2", "ablate"), PatternChange(1, 0, 4, 3, "set", 0.7)]
    n, recording = bench.recording.n_positions, bench.recording
    found = bench.run([change], layers=range(1, 2), positions=range(n))
    plain_run = Plain(model, [], n)
    weights = plain_run.weights
    x = weights.embedding[list(case.token_ids)] + weights.w["transformer.wpe.weight"][:n]
    x[2] -= weights.embedding[7]
    x = plain_run._block(0, x)
    attention = bench.linear.attention[1]
    value = attention.values(recording.resid_pre[1], torch.arange(n))[3, 0]
    bias = attention.weights.b_v
    assert bias is not None
    norm_bias = attention.norm.bias
    assert norm_bias is not None
    value = value + bias[0] + attention.weights.w_v[0] @ norm_bias
    patched = recording.attn_out[1].clone()
    patched[4] += (0.7 - attention.pattern[0, 4, 3]) * value @ attention.weights.w_o[0]
    x = x + patched.double() + recording.mlp_out[1].double()
    plain_run.patterns.append(torch.zeros(0))
    x = plain_run._block(2, x)
    expected = plain_run._norm(x, "final", 0) @ weights.unembedding.T
    assert torch.allclose(found.logits[0].double(), expected, atol=2e-4, rtol=1e-4)
    free = bench.run([change], positions=range(n))
    assert float((free.logits - found.logits).abs().max()) > 1e-2


def test_what_does_not_go_together_is_refused() -> None:
    """Modes, layers, positions and heads that are not there."""
    bench = Bench(build(CASES["gpt2_mtc"]), CASES["gpt2_mtc"].token_ids)
    for options, words in (
        ({"mode": "frozen", "layers": range(1, 2)}, "everything is held"),
        ({"layers": range(2, 5)}, "0 <= FROM < TO <= 3"),
        ({"positions": [6]}, "outside the prompt of 6 tokens"),
        ({"mode": "warm"}, "expected real or frozen"),
        ({"batch_size": 0}, "at least 1"),
        ({"features": ["1_3_2:4"]}, "one position"),
    ):
        with pytest.raises(CircuitsError, match=words):
            bench.run([[]], **options)  # type: ignore[arg-type]
    for change, words in (
        (PatternChange(1, 7, 2, 1, "set"), "heads 0 to 3"),
        (PatternChange(1, 1, 9, 1, "set"), "query 9 is outside"),
    ):
        with pytest.raises(CircuitsError, match=words):
            bench.run([[change]])
    with pytest.raises(CircuitsError, match="comes after"):
        PatternChange(1, 1, 2, 3, "set")
    with pytest.raises(CircuitsError, match="one of ablate, set, scale, add"):
        Change("1_1_1", "kill")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_weights_in_half_precision(family: str) -> None:
    """Weights stored as bfloat16 are computed with in float32, as in the recording: without a change no difference."""
    case = Case(family, attention={1: "attn_out"}, moved=("mtc.0",), dtype=torch.bfloat16, seed=71)  # type: ignore[arg-type]
    model = build(case)
    bench = Bench(model, case.token_ids)
    (changes,) = draw(bench, case, count=1)
    found = bench.run([[], changes], positions=range(bench.recording.n_positions))
    assert torch.allclose(found.logits[0], found.baseline_logits, atol=2e-6)
    expected, _ = plain(model, list(case.token_ids), changes, special=case.special)
    assert torch.allclose(found.logits[1].double(), expected, atol=2e-4, rtol=1e-4)
    assert next(model.base.lm.parameters()).dtype == torch.bfloat16
