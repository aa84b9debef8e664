"""QK diagonalization: against loops by the definition, on planted features, every setting, and in files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted_qk import (
    PlantedQK,
    contexts,
    fit,
    plain_dictionary,
    plain_nmse,
    plain_pattern,
)
from torch import Tensor

from circuits.replacements.errors import ReplacementError
from circuits.replacements.formats import qk_format
from circuits.replacements.qk_diagonalization import QKDiagonalization, QKSettings
from circuits.replacements.qk_figures import ablate, measure
from circuits.replacements.qk_score import QKDictionary, QKHeads, Side, pattern_of

LENGTHS = [7, 5, 4]


def _dictionary(rank: int = 1, choice: Any = "relu", prediction: Any = "softmax", seed: int = 0) -> QKDictionary:
    """Random features of heads 1 to 3 of a layer with four heads and two key-value heads of width 3."""
    random = torch.Generator().manual_seed(seed)
    of, F = QKHeads(layer=0, heads=(1, 2, 3), n_heads=4, n_kv_heads=2, d_head=3), 6

    def side(width: int) -> Side:
        W, b = torch.randn(F, rank, width, generator=random), torch.randn(F, rank, generator=random)
        threshold = None if rank == 1 else 4 * torch.rand(F, generator=random) + 1
        return Side(W, b, threshold, k=2, cut=0.4)

    weights = torch.randn(F, 3, generator=random) * 0.5
    return QKDictionary("qk.0", of, side(9), side(6), weights, prediction, choice)


def _module(rank: int = 1, seed: int = 0, **more: Any) -> QKDiagonalization:
    """A module with six features for heads 1 to 3, calibrated, its weights then shaken."""
    settings: dict[str, Any] = {"query_k": 2, "key_k": 3, "pre_activation": 0.0, "score_weight": 0.0, "seed": seed}
    module = QKDiagonalization(0, 4, 2, 3, QKSettings(6, rank, **(settings | more)), heads=(1, 2, 3))
    module.train()
    module.calibrate([contexts(LENGTHS, 4, 2, 3, seed=7)])
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=random)
    return module


def _loss(module: QKDiagonalization, batch: dict[str, Tensor], progress: float = 0.5) -> float:
    module.begin_step(progress)
    return float(module.loss(batch)[0].detach())


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("choice", ["relu", "topk", "batch_topk"])
@pytest.mark.parametrize("prediction", ["softmax", "linear"])
def test_agrees_with_loops(rank: int, choice: str, prediction: str) -> None:
    """Activations, scores and pattern are those of the definition, with grouped queries and some heads left out."""
    dictionary = _dictionary(rank, choice, prediction)
    batch = contexts([8], 4, 2, 3)
    q, k = batch["q.0:none"][0], batch["k.0:none"][0]
    u, v, scores, pattern = plain_dictionary(dictionary, q, k)
    have_u, have_v = dictionary.features(q, k)
    assert 0 < int((have_u != 0).any(-1).sum()) < have_u.shape[0] * have_u.shape[1]
    torch.testing.assert_close(have_u.double(), u, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(have_v.double(), v, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dictionary.scores(q, k).tril().double(), scores, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dictionary.pattern(q, k).double(), pattern, rtol=1e-5, atol=1e-5)
    together = dictionary.pattern(batch["q.0:none"], batch["k.0:none"])
    torch.testing.assert_close(together[0], dictionary.pattern(q, k))


def test_base_scores_with_grouped_queries() -> None:
    """The base scores of the chosen heads make the base pattern: each head meets the key head of its group."""
    of, batch = QKHeads(0, (1, 2, 3), 4, 2, 3), contexts(LENGTHS, 4, 2, 3)
    q, k = of.queries(batch["q.0:none"]), of.keys(batch["k.0:none"])
    torch.testing.assert_close(pattern_of(of.scores(q, k), "softmax"), batch["pattern.0"][:, 1:])
    plain = plain_pattern(batch["q.0:none"][0].view(7, 4, 3), batch["k.0:none"][0].view(7, 2, 3))
    torch.testing.assert_close(batch["pattern.0"][0].double(), plain, rtol=1e-5, atol=1e-6)
    only = QKHeads(0, (1,), 4, 2, 3)
    assert (only.kv_heads, only.d_query, only.d_key) == ((0,), 3, 3)


@pytest.mark.parametrize("rank", [1, 3])
def test_ledger_closes(rank: int) -> None:
    """Features' contributions alone add up to the score: nothing else is in it."""
    dictionary = _dictionary(rank, "topk")
    batch = contexts([9], 4, 2, 3)
    q, k = batch["q.0:none"][0], batch["k.0:none"][0]
    assert dictionary.ledger(q, k) < 1e-5
    _, _, scores, _ = plain_dictionary(dictionary, q, k)
    live, parts = dictionary.per_feature_scores(q, k)
    assert len(live) == len(parts) > 0
    torch.testing.assert_close(parts.sum(0).double(), scores, rtol=1e-5, atol=1e-5)
    silent = replace(dictionary.queries, b=dictionary.queries.b * 0, W=dictionary.queries.W * 0)
    assert replace(dictionary, queries=silent).ledger(q, k) == 0


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("prediction", ["softmax", "linear"])
def test_fit_is_the_normalized_mse(rank: int, prediction: str) -> None:
    """Without other terms the loss is the normalized MSE by loops; what padding holds changes nothing.

    `to_qk_dictionary` computes on raw queries and keys what the module computes on normalised ones.
    """
    module, batch = _module(rank, activation="topk", prediction=prediction), contexts(LENGTHS, 4, 2, 3, seed=1)
    module.begin_step(0.5)
    total, figures = module.loss(batch)
    loss, dictionary = float(total.detach()), module.to_qk_dictionary()
    rows = [(batch["q.0:none"][c][:n], batch["k.0:none"][c][:n]) for c, n in enumerate(LENGTHS)]
    plain = [plain_dictionary(dictionary, q, k) for q, k in rows]
    wanted = [batch["pattern.0"][c, 1:] for c in range(len(LENGTHS))]
    nmse = plain_nmse(wanted, [pattern for _, _, _, pattern in plain], LENGTHS)
    assert loss == pytest.approx(nmse, rel=1e-4)
    assert figures["nmse/pattern.0"] == pytest.approx(nmse, rel=1e-4)
    assert measure(dictionary, [batch])["nmse/pattern.0"] == pytest.approx(nmse, rel=1e-4)
    scored = [(c, p) for c, n in enumerate(LENGTHS) for p in range(1, n)]
    for name, side in (("query", 0), ("key", 1)):
        count = sum(int((plain[c][side][p] != 0).any(-1).sum()) for c, p in scored)
        assert figures[f"l0/qk.0.1-2-3.{name}"] == pytest.approx(count / len(scored))
    both = 0.0
    for c, p in scored:
        for s in range(p + 1):
            on = (plain[c][0][p] != 0).any(-1) & (plain[c][1][s] != 0).any(-1)
            both += float(wanted[c][:, p, s].mean()) * int(on.sum())
    assert figures["l0/qk.0.1-2-3.product"] == pytest.approx(both / len(scored), rel=1e-4)
    spoiled = dict(batch)
    for name in ("q.0:none", "k.0:none"):
        spoiled[name] = batch[name].clone()
        spoiled[name][1, 5:] = 50.0
    assert float(module.loss(spoiled)[0].detach()) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("rank", [1, 3])
def test_penalties_are_their_definitions(rank: int) -> None:
    """Each coefficient adds its term, by loops, times the share of the training that is over; the score term fades."""
    batch = contexts(LENGTHS, 4, 2, 3, seed=1)
    plain = _module(rank, activation="relu")
    dictionary = plain.to_qk_dictionary()
    norm = [float(row.double().norm()) for row in dictionary.head_weights]
    query = key = product = below = 0.0
    for c, n in enumerate(LENGTHS):
        q, k = batch["q.0:none"][c][:n], batch["k.0:none"][c][:n]
        u, v, _, _ = plain_dictionary(dictionary, q, k)
        for p in range(n):
            for i in range(6):
                a, b = float(u[p, i].norm()), float(v[p, i].norm())
                key += b * norm[i] ** 0.5 / sum(LENGTHS)
                if p:
                    mean = sum(float(v[s, i].norm()) for s in range(p + 1)) / (p + 1)
                    query += a * norm[i] ** 0.5 / (sum(LENGTHS) - len(LENGTHS))
                    product += a * mean * norm[i] / (sum(LENGTHS) - len(LENGTHS))
        for side, x in ((dictionary.queries, dictionary.of.queries(q)), (dictionary.keys, dictionary.of.keys(k))):
            below += float((-side.strengths(x)[1]).relu().sum()) / sum(LENGTHS)
    before = _loss(plain, batch)
    for name, term in (("query_l1", query), ("key_l1", key), ("product_l1", product)):
        with_term = _loss(_module(rank, activation="relu", **{name: 0.2}), batch)
        assert with_term - before == pytest.approx(0.2 * 0.5 * term, rel=1e-3), name
    assert _loss(_module(rank, activation="relu", pre_activation=0.2), batch) - before == pytest.approx(
        0.2 * below, rel=1e-3
    )
    missed = (_loss(_module(rank, activation="relu", score_weight=0.2), batch) - before) / (0.2 * 0.5)
    base, have = 0.0, 0.0
    for c, n in enumerate(LENGTHS):
        q, k = batch["q.0:none"][c], batch["k.0:none"][c]
        ours = plain_dictionary(dictionary, q[:n], k[:n])[2]
        for h, head in enumerate((1, 2, 3)):
            for p in range(1, n):
                kv = k[: p + 1, head // 2 * 3 : head // 2 * 3 + 3].double()
                true = kv @ q[p, head * 3 : head * 3 + 3].double()
                base += float((true - true.mean()).square().sum())
                mine = ours[h, p, : p + 1]
                have += float((true - true.mean() - mine + mine.mean()).square().sum())
    assert missed == pytest.approx(have / base, rel=1e-3)


def test_learns_planted_pairs() -> None:
    """Of 24 pairs in superposition in a head of width 16, at least 90 % are found with cosine 0.9 on both sides."""
    data = PlantedQK()
    settings = QKSettings(n_features=48, query_k=2, key_k=2, score_weight=0.3)
    module = QKDiagonalization(0, 1, 1, 16, settings, heads=(0,))
    fit(module, data, steps=400, lr=7e-3)
    dictionary = module.to_qk_dictionary()
    assert data.recovered(dictionary) >= 0.9
    batches = [next(data) for _ in range(4)]
    figures = measure(dictionary, batches)
    assert figures["nmse/pattern.0"] < 0.5
    assert figures["l0/qk.0.0.query"] < 2.3
    assert figures["l0/qk.0.0.key"] < 2.3
    rise = ablate(dictionary, batches)
    assert float(rise.max()) > 0.005
    assert float(rise.min()) > -0.002


def test_ablation_is_removal() -> None:
    """The rise is that of the normalized MSE, by loops, of the dictionary without the feature."""
    for prediction in ("softmax", "linear"):
        dictionary, batch = _dictionary(2, "batch_topk", prediction), contexts(LENGTHS, 4, 2, 3, seed=3)
        wanted = [batch["pattern.0"][c, 1:] for c in range(len(LENGTHS))]

        def nmse(weights: Tensor) -> float:
            without = replace(dictionary, head_weights=weights)  # noqa: B023
            rows = [(batch["q.0:none"][c], batch["k.0:none"][c]) for c in range(len(LENGTHS))]  # noqa: B023
            return plain_nmse(wanted, [plain_dictionary(without, q, k)[3] for q, k in rows], LENGTHS)  # noqa: B023

        rise, before = ablate(dictionary, [batch]), nmse(dictionary.head_weights)
        parts = [{name: value[c : c + 1] for name, value in batch.items()} for c in range(len(LENGTHS))]
        torch.testing.assert_close(ablate(dictionary, parts), rise, rtol=1e-4, atol=1e-6)
        for i in range(dictionary.n_features):
            weights = dictionary.head_weights.clone()
            weights[i] = 0
            assert float(rise[i]) == pytest.approx(nmse(weights) - before, rel=1e-3, abs=1e-5)


def _trained(steps: int = 60, **more: Any) -> tuple[QKDictionary, dict[str, float]]:
    """A short training on planted data, and its figures on other batches."""
    data = PlantedQK(n=12, length=16)
    settings: dict[str, Any] = {"n_features": 32, "query_k": 2, "key_k": 2}
    module = QKDiagonalization(0, 1, 1, 16, QKSettings(**(settings | more)))
    fit(module, data, steps)
    dictionary = module.to_qk_dictionary()
    return dictionary, measure(dictionary, [next(data) for _ in range(2)])


def test_l1_makes_its_side_sparser() -> None:
    """With `relu` a side's L1 lowers the L0 of that side, that of the product the L0 of the product."""
    _, plain = _trained(activation="relu")
    for name in ("query", "key", "product"):
        _, sparse = _trained(activation="relu", **{f"{name}_l1": 0.3})
        assert sparse[f"l0/qk.0.{name}"] < 0.8 * plain[f"l0/qk.0.{name}"], name


def test_pre_activation_penalty_keeps_features_alive() -> None:
    """Features that never fire have no gradient but this penalty's: with it they come back, without not one does."""
    for weight, alive in ((0.0, 0), (0.1, 16)):
        data = PlantedQK(n=12, length=16)
        module = QKDiagonalization(0, 1, 1, 16, QKSettings(32, activation="relu", pre_activation=weight))
        module.train()
        module.calibrate([next(data)])
        with torch.no_grad():
            module.b["query"][:16] = module.b["key"][:16] = -6.0
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        for _ in range(120):
            module.loss(next(data))[0].backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        batch = next(data)
        for values in module.to_qk_dictionary().features(batch["q.0:none"], batch["k.0:none"]):
            assert int((values != 0).any(-1).flatten(0, 1).any(0)[:16].sum()) == alive


def test_k_is_kept() -> None:
    """`topk` never exceeds k, `batch_topk` has it on average, each side its own."""
    dictionary, figures = _trained(activation="topk", query_k=3, key_k=1)
    batch = next(PlantedQK())
    u, v = dictionary.features(batch["q.0:none"], batch["k.0:none"])
    assert int((u != 0).any(-1).sum(-1).max()) == 3
    assert int((v != 0).any(-1).sum(-1).max()) == 1
    _, figures = _trained(activation="batch_topk", query_k=3, key_k=1)
    assert figures["l0/qk.0.query"] == pytest.approx(3, rel=0.2)
    assert figures["l0/qk.0.key"] == pytest.approx(1, rel=0.2)


def test_k_falls_from_its_start() -> None:
    """`k_start` times k are active at the beginning, k once `k_until` of the training is over."""
    module, batch = _module(activation="topk", query_k=1, key_k=1, k_start=3.0, k_until=0.4), contexts([9], 4, 2, 3)
    most = []
    for progress in (0.0, 0.2, 0.4, 0.9):
        module.begin_step(progress)
        query, _ = module._encode(batch["q.0:none"][..., 3:], batch["k.0:none"], batch["mask"])
        most.append(int(query.chosen.sum(-1).max()))
    assert most == [3, 2, 1, 1]
    module.eval()
    module.begin_step(0.0)
    query, _ = module._encode(batch["q.0:none"][..., 3:], batch["k.0:none"], batch["mask"])
    assert int(query.chosen.sum(-1).max()) == 1


def test_head_weights_settings() -> None:
    """Head weights stay one where they are not learned, and never fall below zero where they must not."""
    fixed, figures = _trained(learn_head_weights=False)
    assert torch.equal(fixed.head_weights, torch.ones(32, 1))
    assert figures["nmse/pattern.0"] < 0.95
    free, _ = _trained(positive_head_weights=False, steps=20)
    positive, _ = _trained(positive_head_weights=True, steps=20)
    assert float(free.head_weights.min()) < 0
    assert float(positive.head_weights.min()) >= 0
    assert float(positive.head_weights.max()) > 0


def test_other_settings() -> None:
    """Rank, linear prediction and seed give other features; all of them learn; `dead_after` says what is dead."""
    seen = [_trained()[0], _trained(seed=1)[0]]
    assert not torch.allclose(seen[0].queries.W, seen[1].queries.W)
    linear, figures = _trained(prediction="linear", score_weight=0.0, n_features=16, query_k=4, key_k=4)
    assert linear.prediction == "linear"
    assert figures["nmse/pattern.0"] < 0.95
    grouped, figures = _trained(rank=2, n_features=16)
    assert (grouped.rank, tuple(grouped.queries.W.shape)) == (2, (16, 2, 16))
    assert figures["nmse/pattern.0"] < 0.95
    batch = contexts(LENGTHS, 4, 2, 3)
    for dead_after, wanted in ((0, False), (10_000, True)):
        module = _module(activation="relu", dead_after=dead_after)
        with torch.no_grad():
            module.b["key"][0] = -100.0
        dead = module.loss(batch)[1]["dead/qk.0.1-2-3"]
        assert (dead == 0) is wanted


def test_is_a_trainable_of_contexts() -> None:
    """What the training loop and the streams ask of a module; bad settings and batches are refused with a reason."""
    module = QKDiagonalization(2, 4, 2, 3, QKSettings(8, query_k=2, key_k=2))
    assert module.in_context
    assert [str(read) for read in module.reads] == ["q.2:none", "k.2:none"]
    assert (module.writes, module.extra, module.to_dictionaries()) == ((), ("pattern.2",), ())
    with pytest.raises(ReplacementError, match=r"'q.2:none'"):
        module.loss(contexts(LENGTHS, 4, 2, 3))
    with pytest.raises(ReplacementError, match="width 4 x 3"):
        module.loss(contexts(LENGTHS, 2, 2, 3, layer=2) | {"pattern.2": torch.zeros(3, 4, 7, 7)})
    for bad in ({"query_k": 9}, {"rank": 0}, {"activation": "gelu"}, {"prediction": "linear"}):
        with pytest.raises(ReplacementError):
            QKSettings(8, **({"key_k": 2, "query_k": 2} | bad))  # type: ignore[arg-type]
    for heads in ((), (2, 1), (4,), (1, 1)):
        with pytest.raises(ReplacementError, match="heads"):
            QKDiagonalization(0, 4, 2, 3, QKSettings(8, query_k=2, key_k=2), heads=heads)


@pytest.mark.parametrize(("rank", "choice"), [(1, "batch_topk"), (1, "topk"), (3, "relu")])
def test_saved_is_loaded(tmp_path: Path, rank: int, choice: str) -> None:
    """What was saved computes the same after loading, exactly in float32 and closely in float16."""
    dictionary, batch = _dictionary(rank, choice), contexts([9], 4, 2, 3)
    other = replace(dictionary, name="qk.1", of=replace(dictionary.of, layer=1))
    saved = qk_format.QKReplacement("both", (dictionary, other), {"name": "tiny"}, {"steps": 3})
    pattern = dictionary.pattern(batch["q.0:none"], batch["k.0:none"])
    for dtype, tolerance in (("float16", 5e-3), ("float32", 0.0)):
        qk_format.save(saved, tmp_path / "qk", dtype)
        assert qk_format.is_qk(tmp_path / "qk")
        loaded = qk_format.load(tmp_path / "qk")
        assert (loaded.name, loaded.model, loaded.training) == ("both", {"name": "tiny"}, {"steps": 3})
        assert [one.name for one in loaded.dictionaries] == ["qk.0", "qk.1"]
        assert loaded.of_layer(1)[0].of == other.of
        have = loaded.dictionaries[0].pattern(batch["q.0:none"], batch["k.0:none"])
        torch.testing.assert_close(have, pattern, rtol=0, atol=tolerance)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["qk"]


def test_bad_files_and_targets(tmp_path: Path) -> None:
    """Whatever is wrong with a file is named; what is none is not overwritten, and nothing is left half written."""
    path, dictionary = tmp_path / "qk", _dictionary()
    saved = qk_format.QKReplacement("one", (dictionary,))
    qk_format.save(saved, path)
    manifest = json.loads((path / "manifest.json").read_text())
    entry = manifest["dictionaries"][0]
    cases: list[tuple[Any, str]] = [
        ({"format": "other"}, "circuits-qk"),
        ({"version": 9}, "version 9"),
        ({"dictionaries": []}, "no dictionaries"),
        ({"dictionaries": [{}]}, "malformed"),
        ({"dictionaries": [entry | {"n_features": 7}]}, "'query.W' should have shape"),
        ({"dictionaries": [entry | {"heads": [5]}]}, "from 0 to 3"),
        ({"dictionaries": [entry | {"file": "gone.safetensors"}]}, "no such file"),
        ({"dictionaries": [entry | {"activation": "gelu"}]}, "gelu"),
        ({"dictionaries": [entry | {"rank": "much"}]}, "malformed"),
    ]
    for change, message in cases:
        (path / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(ReplacementError, match=message):
            qk_format.load(path)
    (path / "manifest.json").write_text("{")
    with pytest.raises(ReplacementError, match="no valid JSON"):
        qk_format.load(path)
    with pytest.raises(ReplacementError, match="cannot be read"):
        qk_format.load(tmp_path / "nowhere")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ReplacementError, match="is no QK diagonalization"):
        qk_format.save(saved, tmp_path / "mine")
    with pytest.raises(ReplacementError, match="float8"):
        qk_format.save(saved, path, "float8")
    with pytest.raises(ReplacementError, match="a name of its own"):
        qk_format.save(qk_format.QKReplacement("two", (dictionary, dictionary)), tmp_path / "two")
    big = replace(dictionary, queries=replace(dictionary.queries, W=dictionary.queries.W * 1e6))
    with pytest.raises(ReplacementError, match="not finite"):
        qk_format.save(qk_format.QKReplacement("big", (big,)), tmp_path / "big", "float16")
    assert not (tmp_path / "big").exists()
    with pytest.raises(ReplacementError, match="should have shapes"):
        replace(dictionary, keys=dictionary.queries)
