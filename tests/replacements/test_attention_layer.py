"""Attention replacement layers and Lorsa: the equations, what is saved, the penalty, and planted skip-trigrams."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from circuits.replacements.attention_layer import AttentionReplacementLayer
from circuits.replacements.attention_layer_heads import AttentionLayerSettings
from circuits.replacements.attention_layer_penalty import factored_norm, pattern_spread, simplicity
from circuits.replacements.dictionary import Dictionary
from circuits.replacements.errors import ReplacementError
from circuits.replacements.movement import OwnAttention
from circuits.replacements.training import TrainingSettings, train

D = 16
CASES = {
    "plain": AttentionLayerSettings(6, qk_rank=4, ov_rank=1),
    "rank 3": AttentionLayerSettings(6, qk_rank=3, ov_rank=3),
    "rank 3, groups, rotary": AttentionLayerSettings(6, qk_rank=4, ov_rank=3, groups=2, rotary_theta=100.0),
    "lorsa": AttentionLayerSettings.lorsa(12, groups=3, k=2, qk_rank=4),
    "lorsa, rotary": AttentionLayerSettings.lorsa(12, groups=4, k=3, qk_rank=6, rotary_theta=50.0),
    "batch topk": AttentionLayerSettings(12, 4, 1, groups=3, activation="batch_topk", k=2),
}


@dataclass
class Plain:
    """Weights of one layer for the reference; heads of rank r own r rows of `enc` and `dec`."""

    q: tuple[Tensor, Tensor]
    k: tuple[Tensor, Tensor]
    enc: tuple[Tensor, Tensor]
    dec: tuple[Tensor, Tensor]
    group: list[int]
    rank: int
    theta: float | None
    keep: int | None = None
    threshold: float | None = None


def _turned(v: Tensor, position: int, theta: float | None) -> Tensor:
    if theta is None:
        return v
    half, out = len(v) // 2, v.clone()
    for i in range(half):
        angle = position * theta ** (-2 * i / len(v))
        out[i] = v[i] * math.cos(angle) - v[i + half] * math.sin(angle)
        out[i + half] = v[i + half] * math.cos(angle) + v[i] * math.sin(angle)
    return out


def _reference(x: Tensor, plain: Plain) -> tuple[Tensor, Tensor]:
    """Outputs (T, D) and activations (T, F, r) of one context x (T, D), by loops over the definition."""
    T, F = len(x), len(plain.group)
    a = torch.zeros(T, F, plain.rank, dtype=x.dtype)
    for f, g in enumerate(plain.group):
        rows = slice(f * plain.rank, (f + 1) * plain.rank)
        for p in range(T):
            q = _turned(plain.q[0][g] @ x[p] + plain.q[1][g], p, plain.theta)
            keys = [_turned(plain.k[0][g] @ x[s] + plain.k[1][g], s, plain.theta) for s in range(p + 1)]
            weights = [math.exp(float(q @ key) / math.sqrt(len(q))) for key in keys]
            for s, weight in enumerate(weights):
                a[p, f] += weight / sum(weights) * (plain.enc[0][rows] @ x[s] + plain.enc[1][rows])
    for p in range(T):
        for place, f in enumerate(a[p, :, 0].sort(descending=True).indices.tolist()):
            if plain.keep is not None and (place >= plain.keep or float(a[p, f, 0]) <= 0):
                a[p, f] = 0
            if plain.threshold is not None and float(a[p, f, 0]) <= plain.threshold:
                a[p, f] = 0
    return a.flatten(1) @ plain.dec[0] + plain.dec[1], a


def _random_layer(settings: AttentionLayerSettings, layers: tuple[int, ...] = (2,)) -> AttentionReplacementLayer:
    """A layer in float64 whose weights, biases, means and scales are all random."""
    random = torch.Generator().manual_seed(3)
    layer = AttentionReplacementLayer(layers, D, settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) / 2)
        layer.in_mean.copy_(torch.randn(len(layers), D, generator=random))
        layer.in_scale.copy_(1 + torch.rand(len(layers), generator=random))
        layer.out_scale.copy_(1 + torch.rand(len(layers), generator=random))
        layer.threshold.fill_(0.4)
    return layer


def _of_module(layer: AttentionReplacementLayer, i: int = 0) -> Plain:
    heads, settings = layer._heads(i), layer.settings
    size = settings.n_heads // settings.n_patterns
    return Plain(
        q=(heads.W_q.detach(), heads.b_q.detach()),
        k=(heads.W_k.detach(), heads.b_k.detach()),
        enc=(heads.W_enc.detach(), heads.b_enc.detach()),
        dec=(heads.W_dec.detach(), heads.b_dec.detach()),
        group=[f // size for f in range(settings.n_heads)],
        rank=settings.ov_rank,
        theta=settings.rotary_theta,
        keep=settings.k if settings.activation == "topk" else None,
        threshold=float(layer.threshold[i]) if settings.activation == "batch_topk" else None,
    )


def _own(dictionary: Dictionary) -> OwnAttention:
    assert isinstance(dictionary.moved_by, OwnAttention)
    return dictionary.moved_by


def _of_dictionary(dictionary: Dictionary) -> Plain:
    own, (site,) = _own(dictionary), dictionary.writes
    bias = dictionary.output_bias(site)
    assert bias is not None
    assert own.scale == own.W_q.shape[1] ** -0.5
    weights = dictionary.decoders[site].rows
    return Plain(
        q=(own.W_q, own.b_q),
        k=(own.W_k, own.b_k),
        enc=(dictionary.W_enc, dictionary.b_enc),
        dec=(weights.rows(torch.arange(weights.shape[0])).to(bias), bias),
        group=own.group.tolist(),
        rank=dictionary.rank,
        theta=own.rotary_theta,
        keep=dictionary.activation.k if dictionary.activation.kind == "topk" else None,
        threshold=None if dictionary.threshold is None else float(dictionary.threshold),
    )


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_definition(case: str) -> None:
    """Batched products give what explicit loops over heads, destinations and sources give."""
    layer = _random_layer(CASES[case], (1, 3))
    x = torch.randn(2, 7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for i in range(2):
        got = layer.predict(x, i)
        for context, y in zip(x, got, strict=True):
            u = (context - layer.in_mean[i]) / layer.in_scale[i]
            want = _reference(u, _of_module(layer, i))[0] * layer.out_scale[i]
            assert torch.allclose(y, want, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_dictionaries_act_on_raw_activations(case: str) -> None:
    """Means and scales are folded exactly, and the engine's `encode` finds the same activations."""
    layer = _random_layer(CASES[case])
    x = torch.randn(1, 7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (dictionary,) = layer.to_dictionaries()
    assert (dictionary.name, str(dictionary.read)) == (f"{layer.settings.kind}.2", "resid_pre.2:full")
    want, a = _reference(x[0], _of_dictionary(dictionary))
    assert torch.allclose(layer.predict(x)[0], want, atol=1e-5)
    active = dictionary.encode(x[0])
    found = torch.zeros_like(a)
    directions = torch.ones(len(active), 1) if active.directions is None else active.directions
    found[active.positions, active.features] = active.activations[:, None] * directions.to(a)
    assert torch.allclose(found, a, atol=1e-5)


def _batch(layer: AttentionReplacementLayer, lengths: tuple[int, ...] = (7, 5, 6)) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(5)
    shape = (len(lengths), max(lengths), D)
    batch = {
        key: torch.randn(shape, dtype=torch.float64, generator=random)
        for key in (*map(str, layer.reads), *map(str, layer.writes))
    }
    batch["mask"] = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    return batch


@pytest.mark.parametrize("case", ["rank 3, groups, rotary", "lorsa, rotary"])
def test_loss_and_figures_by_definition(case: str) -> None:
    """Loss and figures from the reference, over real positions but the first, with the penalties at full weight."""
    settings = replace(CASES[case], penalty=0.01, pattern_sparsity=0.3, beta=0.7)
    layer = _random_layer(settings).train()
    layer.begin_step(1.0)
    batch, plain = _batch(layer), _of_module(layer)
    loss, figures = layer.loss(batch)
    errors, targets, counts, spread = [], [], [], 0.0
    for c, length in enumerate((7, 5, 6)):
        u = (batch["resid_pre.2:full"][c, :length] - layer.in_mean[0]) / layer.in_scale[0]
        t = batch["attn_out.2"][c, :length] / layer.out_scale[0]
        y, a = _reference(u, plain)
        pattern = layer._heads(0).patterns(u[None])[0].detach()
        for p in range(1, length):
            errors.append(t[p] - y[p])
            targets.append(t[p])
            counts.append(int((a[p] != 0).any(-1).sum()))
            for f, g in enumerate(plain.group):
                written = a[p, f] @ plain.dec[0][f * plain.rank : (f + 1) * plain.rank]
                spread += float(written.norm() * (1 - (pattern[g, p] ** 2).sum()))
    price = 0.0
    for f, g in enumerate(plain.group):
        rows = slice(f * plain.rank, (f + 1) * plain.rank)
        qk = sum(float((part[g] ** 2).sum()) for part in (*plain.q, *plain.k)) / 2 / math.sqrt(settings.qk_rank)
        ov = sum(float((part[rows] ** 2).sum()) for part in (*plain.enc, plain.dec[0])) / 2
        price += (qk * ov) ** 0.7
    error, target = torch.stack(errors), torch.stack(targets)
    mse = float((error**2).mean())
    assert loss.item() == pytest.approx(mse + 0.01 * price + 0.3 * spread / len(errors), rel=1e-5)
    around = float(((target - target.mean(0)) ** 2).sum())
    assert figures["nmse/attn_out.2"] == pytest.approx(float((error**2).sum()) / around, rel=1e-5)
    assert figures[f"penalty/{layer.names[0]}"] == pytest.approx(price, rel=1e-6)
    if settings.activation == "topk":
        assert figures["l0/lorsa.2"] == pytest.approx(sum(counts) / len(counts))


@pytest.mark.parametrize("case", CASES)
def test_padding_and_the_first_position(case: str) -> None:
    """Nothing at padding matters, even if it is not finite; the first position is a source, but has no error."""
    layer = _random_layer(CASES[case]).eval()
    batch = _batch(layer)
    before = layer.loss(batch)[0].item()
    for key in ("resid_pre.2:full", "attn_out.2"):
        changed = {name: tensor.clone() for name, tensor in batch.items()}
        changed[key][~batch["mask"]] = math.nan
        assert layer.loss(changed)[0].item() == before
        changed = {name: tensor.clone() for name, tensor in batch.items()}
        changed[key][:, 0] += 1.0
        assert (layer.loss(changed)[0].item() == before) == (key == "attn_out.2")


def test_proxy_is_the_nuclear_norm_at_its_minimum() -> None:
    """Of all factorizations of a matrix the balanced one has the least proxy, and that is the nuclear norm."""
    random = torch.Generator().manual_seed(0)
    W = torch.randn(3, 9, generator=random, dtype=torch.float64).T @ torch.randn(3, 7, generator=random).double()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    left, right = (U * S.sqrt()).T[:3], (S.sqrt()[:, None] * Vh)[:3]
    assert torch.allclose(left.T @ right, W)
    nuclear = float(torch.linalg.matrix_norm(W, "nuc"))
    assert float(factored_norm(left, right)) == pytest.approx(nuclear, rel=1e-12)
    for _ in range(100):
        M = torch.eye(3) + 0.2 * torch.randn(3, 3, generator=random, dtype=torch.float64)
        assert float(factored_norm(M.T @ left, torch.linalg.solve(M, right))) > nuclear
    turn = torch.linalg.qr(torch.randn(3, 3, generator=random, dtype=torch.float64))[0]
    assert float(factored_norm(turn.T @ left, turn.T @ right)) == pytest.approx(nuclear, rel=1e-12)


def _price(qk: Tensor, ov: Tensor, beta: float) -> float:
    """The penalty of heads (F, D, D) given as matrices, at their best factorization."""

    def norm(matrices: Tensor) -> Tensor:
        U, S, Vh = torch.linalg.svd(matrices)
        return factored_norm((U * S.sqrt().unsqueeze(-2)).transpose(-1, -2), S.sqrt().unsqueeze(-1) * Vh)

    return float(simplicity(norm(qk), norm(ov), beta))


@pytest.mark.parametrize("beta", [0.51, 0.75, 0.99])
def test_penalty_splits_skip_trigrams_and_keeps_induction_whole(beta: float) -> None:
    """The two properties that the note names, exactly, and that each bound on beta is needed for one of them."""
    e = torch.eye(8, dtype=torch.float64)
    trigrams = [(4.0 * torch.outer(e[i], e[i + 2]), torch.outer(e[i + 4], e[i + 6])) for i in range(2)]
    split = torch.stack([qk for qk, _ in trigrams]), torch.stack([ov for _, ov in trigrams])
    joint = split[0].sum(0, keepdim=True), split[1].sum(0, keepdim=True)
    assert _price(*split, beta) == pytest.approx(2 * 4**beta)
    assert _price(*joint, beta) == pytest.approx(16**beta)
    assert _price(*split, beta) < _price(*joint, beta)
    assert _price(*split, 0.45) > _price(*joint, 0.45)
    match, copy = 4.0 * torch.diag(e[0] + e[1] + e[2]), torch.diag(e[4] + e[5] + e[6] + e[7])
    whole = _price(match[None], copy[None], beta)
    parts_qk = torch.stack([4.0 * torch.outer(e[i], e[i]) for i in range(3)])
    parts_ov = torch.stack([torch.outer(e[i], e[i]) for i in range(4, 8)])
    assert whole == pytest.approx((12.0 * 4.0) ** beta)
    assert whole < _price(parts_qk, copy.expand(3, 8, 8), beta)
    assert whole < _price(match.expand(4, 8, 8), parts_ov, beta)
    assert whole < _price(parts_qk.repeat_interleave(4, 0), parts_ov.repeat(3, 1, 1), beta)
    assert _price(match[None], copy[None], 1.05) > _price(parts_qk, copy.expand(3, 8, 8), 1.05)


def test_penalty_cannot_be_evaded() -> None:
    """Moving scale between factors, or a QK into a bias and a tiny W_k, does not make a head cheaper."""
    layer = _random_layer(AttentionLayerSettings(4, qk_rank=1, ov_rank=1))
    heads = layer._heads(0)
    with torch.no_grad():
        for bias in (heads.b_q, heads.b_k, heads.b_enc):
            bias.zero_()
        for one, other in ((heads.W_q, heads.W_k), (heads.W_enc, heads.W_dec)):
            ratio = other.norm(dim=-1, keepdim=True) / one.norm(dim=-1, keepdim=True)
            one.mul_(ratio.sqrt())
            other.div_(ratio.sqrt())
        best = [norm.clone() for norm in heads.norms()]
        qk = heads.W_q.transpose(1, 2) @ heads.W_k * heads.scale
        assert torch.allclose(best[0], torch.linalg.matrix_norm(qk, "nuc"))
        heads.W_k.mul_(0.01)
        heads.W_q.mul_(100)
        assert (heads.norms()[0] > best[0]).all()
        heads.W_q.zero_()
        heads.b_q.fill_(100.0)  # the score is now 100 (0.01 W_k) . u: a key side without a query side
        assert (heads.norms()[0] > 100).all()


class Planted:
    """Contexts whose attention output is made by known skip-trigrams.

    A position holds one of 24 token directions, and noise. Head f attends from positions that hold its query direction
    to those that hold its key direction (rank-1 QK) and moves one covector's value to one direction (rank-1 OV).
    `shared` neighbours have a QK in common, which is then of that rank; `top` of the heads write at a position.
    """

    def __init__(self, n: int, shared: int = 1, top: int | None = None) -> None:
        random = torch.Generator().manual_seed(0)
        self.n, self.shared, self.top, self.made = n, shared, top, 0
        self.tokens = nn.functional.normalize(torch.randn(24, D, generator=random), dim=1)
        self.query = self.tokens[torch.randint(24, (n,), generator=random)]
        self.key = self.tokens[torch.randint(24, (n,), generator=random)]
        self.read = nn.functional.normalize(torch.randn(n, D, generator=random), dim=1)
        self.write = nn.functional.normalize(torch.randn(n, D, generator=random), dim=1)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(100 + self.made)
        self.made += 1
        C, S = 20, 12
        x = self.tokens[torch.randint(24, (C, S), generator=random)] + 0.3 * torch.randn(C, S, D, generator=random)
        parts = 8.0 * torch.einsum("cpf,csf->cfps", x @ self.query.T, x @ self.key.T)
        scores = parts.view(C, -1, self.shared, S, S).sum(2).repeat_interleave(self.shared, 1)
        pattern = (scores + torch.full((S, S), -torch.inf).triu(1)).softmax(-1)
        z = torch.einsum("cfps,csf->cpf", pattern, x @ self.read.T)
        if self.top is not None:
            z = z * ((z >= z.topk(self.top, dim=2).values[..., -1:]) & (z > 0))
        mask = torch.ones(C, S, dtype=torch.bool)
        return {"resid_pre.0:full": 3 * x + 1, "attn_out.0": 0.5 * z @ self.write + 2, "mask": mask}

    def state_dict(self) -> dict[str, Any]:
        return {"made": self.made}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.made = int(state["made"])

    def found(self, dictionary: Dictionary) -> tuple[Tensor, Tensor, Tensor]:
        """For each planted head: the smaller of the read and write cosines of the head that fits it best, that head's
        singular values of W_OV, and the cosine of its W_QK."""
        own, r = _own(dictionary), dictionary.rank
        dec = dictionary.decoders[dictionary.writes[0]].rows.all().view(-1, r, D)
        U, S, Vh = torch.linalg.svd(dictionary.W_enc.view(-1, r, D).transpose(1, 2) @ dec)
        read, write = self.read @ U[:, :, 0].T, self.write @ Vh[:, 0].T
        best = (torch.minimum(read.abs(), write.abs()) * (read * write).sign()).max(1)
        qk = (own.W_q.transpose(1, 2) @ own.W_k)[own.group[best.indices]].flatten(1)
        planted = torch.einsum("fd,fe->fde", self.query, self.key).flatten(1)
        return best.values, S[best.indices], nn.functional.cosine_similarity(qk, planted)


def _trained(
    planted: Planted, settings: AttentionLayerSettings, folder: Path, steps: int = 450
) -> tuple[AttentionReplacementLayer, dict[str, float]]:
    layer = AttentionReplacementLayer([0], D, settings)
    return layer, train(layer, planted, TrainingSettings(steps, lr=1e-2, warmup=20), folder)


def test_recovers_planted_skip_trigrams(tmp_path: Path) -> None:
    """20 skip-trigrams in 16 dimensions, OV and QK: each becomes one head of rank 1 in both, though allowed more."""
    planted = Planted(20)
    settings = AttentionLayerSettings(28, qk_rank=4, ov_rank=2, penalty=1e-3)
    layer, last = _trained(planted, settings, tmp_path)
    assert last["nmse/attn_out.0"] < 0.01, last
    cosines, singular, qk = planted.found(layer.to_dictionaries()[0])
    assert float((cosines > 0.9).float().mean()) >= 0.9, cosines
    assert float((qk > 0.9).float().mean()) >= 0.9, qk
    assert float((singular[:, 1] < 0.1 * singular[:, 0]).float().mean()) >= 0.9, singular


@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
def test_lorsa_recovers_planted_heads(tmp_path: Path, activation: str) -> None:
    """16 heads that share a QK two by two, of which 4 write at a position."""
    planted = Planted(16, shared=2, top=4)
    settings = AttentionLayerSettings(32, 4, 1, 16, activation, 4, penalty=0.0, dead_after=5000)
    layer, last = _trained(planted, settings, tmp_path, 800)
    assert last["l0/lorsa.0"] <= 4.01, last
    assert last["nmse/attn_out.0"] < 0.1, last
    cosines, _, _ = planted.found(layer.to_dictionaries()[0])
    assert float((cosines > 0.9).float().mean()) >= 0.9, cosines


def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path: Path) -> None:
    settings = AttentionLayerSettings(8, 4, 1, activation="batch_topk", k=2, pattern_sparsity=0.1)

    class Killed(Planted):
        def __next__(self) -> dict[str, Tensor]:
            if self.made == 17:
                raise KeyboardInterrupt
            return super().__next__()

    run = TrainingSettings(20, warmup=5, checkpoint_every=6)
    whole, killed, resumed = (AttentionReplacementLayer([0], D, settings) for _ in range(3))
    train(whole, Planted(4), run, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(killed, Killed(4), run, tmp_path / "killed")
    train(resumed, Planted(4), run, tmp_path / "killed")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def _entropy(layer: AttentionReplacementLayer, planted: Planted) -> float:
    """Mean entropy of the patterns' rows, weighted by what each head writes."""
    batch = next(planted)
    with torch.no_grad():
        u, heads = layer._input(batch, 0), layer._heads(0)
        pattern = heads.patterns(u)
        entropy = -(pattern * pattern.clamp(min=1e-12).log()).sum(-1)
        written = heads.moved(u, pattern).abs().transpose(1, 2) * heads.W_dec.norm(dim=1)[:, None]
    return float((entropy * written).sum() / written.sum())


def test_settings_do_what_they_say(tmp_path: Path) -> None:
    """The penalty lowers nuclear norms, and beta counts; pattern sparsity sharpens patterns; both rise from zero."""
    plain = AttentionLayerSettings(8, qk_rank=4, ov_rank=1, penalty=0.0)
    trained = {}
    for name, more in {
        "plain": {},
        "penalty": {"penalty": 0.01},
        "beta": {"penalty": 0.01, "beta": 0.95},
        "sparse": {"pattern_sparsity": 0.3},
    }.items():
        trained[name] = _trained(Planted(6), replace(plain, **more), tmp_path / name, 120)[0]  # type: ignore[arg-type]
    norms = {name: [norm.sum().item() for norm in layer._heads(0).norms()] for name, layer in trained.items()}
    assert all(less < more for less, more in zip(norms["penalty"], norms["plain"], strict=True)), norms
    assert math.prod(norms["penalty"]) < 0.6 * math.prod(norms["plain"]), norms
    assert norms["beta"][0] != pytest.approx(norms["penalty"][0], rel=0.01)
    assert _entropy(trained["sparse"], Planted(6)) < 0.8 * _entropy(trained["plain"], Planted(6))
    layer, batch = (
        AttentionReplacementLayer([0], D, replace(plain, penalty=1.0, pattern_sparsity=1.0)),
        next(Planted(6)),
    )
    layer.calibrate([batch])
    losses = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        layer.begin_step(progress)
        losses.append(float(layer.loss(batch)[0].detach()))
    assert losses[2] == losses[3]
    assert losses[1] - losses[0] == pytest.approx((losses[2] - losses[0]) / 2, rel=1e-4)


def test_penalty_is_paid_for_fewer_heads(tmp_path: Path) -> None:
    """With more heads than skip-trigrams, the penalty makes fewer of them write, and pays less."""
    figures = {}
    for penalty in (0.0, 2e-2):
        settings = AttentionLayerSettings(12, qk_rank=2, ov_rank=1, penalty=penalty, dead_after=3000)
        figures[penalty] = _trained(Planted(4), settings, tmp_path / str(penalty), 400)[1]
    plain, paid = figures[0.0], figures[2e-2]
    assert paid["l0/attention-layer.0"] < 0.9 * plain["l0/attention-layer.0"], figures
    assert paid["penalty/attention-layer.0"] < 0.7 * plain["penalty/attention-layer.0"], figures
    assert paid["nmse/attn_out.0"] > plain["nmse/attn_out.0"], figures


def test_groups_ranks_and_k_have_their_effect() -> None:
    batch = next(Planted(6))
    for k in (1, 3):
        for activation in ("topk", "batch_topk"):
            layer = AttentionReplacementLayer([0], D, AttentionLayerSettings(12, 4, 1, 3, activation, k))
            layer.calibrate([batch])
            figures = layer.loss(batch)[1]
            assert figures["l0/lorsa.0"] == pytest.approx(k, abs=0.05 * k)
    (dictionary,) = layer.to_dictionaries()
    assert _own(dictionary).W_q.shape == (3, 4, D)
    assert _own(dictionary).group.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    other = AttentionReplacementLayer([0], D, replace(layer.settings, seed=1))
    assert not torch.equal(other._heads(0).W_q, layer._heads(0).W_q)


def test_auxiliary_loss_revives_dead_heads(tmp_path: Path) -> None:
    """Heads that never win a place come back with AuxK, and more of them than without."""
    shares = {}
    for weight, aux_k in ((0.0, 8), (0.25, 8), (0.25, 1)):
        settings = AttentionLayerSettings(
            16, 4, 1, activation="topk", k=2, dead_after=1500, aux_k=aux_k, aux_weight=weight, penalty=0.0
        )
        layer, batches = AttentionReplacementLayer([0], D, settings), Planted(12, top=2)
        layer.calibrate([next(batches)])
        with torch.no_grad():
            layer._heads(0).W_enc[:8] *= 0.02
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
        for _ in range(100):
            loss, figures = layer.loss(next(batches))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        shares[weight, aux_k] = figures["dead/lorsa.0"]
    assert shares[0.25, 8] <= shares[0.0, 8] / 2, shares
    assert shares[0.25, 8] != shares[0.25, 1] or shares[0.25, 8] == 0, shares


def _base_batches(theta: float | None, kv_heads: int) -> list[dict[str, Tensor]]:
    """Batches of a base layer of 4 heads of width 4, with grouped queries, biases and rotary positions."""
    random = torch.Generator().manual_seed(7)
    H, K, E, C, S = 4, kv_heads, 4, 16, 10
    W_q, W_k, W_v = (torch.randn(n, E, D, generator=random) / 4 for n in (H, K, K))
    b_q, b_k, b_v = (torch.randn(n, E, generator=random) for n in (H, K, K))
    W_o = torch.randn(H, E, D, generator=random)
    batches = []
    for _ in range(3):
        x = 2 * torch.randn(C, S, D, generator=random) + 1

        def made(W: Tensor, b: Tensor, turn: bool, x: Tensor = x) -> Tensor:
            y = torch.einsum("csd,hed->cshe", x, W) + b
            rows = [
                [[_turned(v, p, theta) if turn else v for v in at] for p, at in enumerate(context)] for context in y
            ]
            return torch.stack([torch.stack([torch.stack(at) for at in context]) for context in rows])

        q, k, v = made(W_q, b_q, True) * E**-0.5, made(W_k, b_k, True), made(W_v, b_v, False)
        wide = [part.repeat_interleave(H // K, 2) for part in (k, v)]
        scores = torch.einsum("cphe,cshe->chps", q, wide[0]) + torch.full((S, S), -torch.inf).triu(1)
        z = torch.einsum("chps,cshe->cphe", scores.softmax(-1), wide[1])
        batches.append(
            {name: part.flatten(2) for name, part in {"q.0": q, "k.0": k, "v.0": v, "z.0": z}.items()}
            | {"resid_pre.0:full": x, "attn_out.0": torch.einsum("cphe,hed->cpd", z, W_o) + 3}
            | {"mask": torch.ones(C, S, dtype=torch.bool)}
        )
    return batches


@pytest.mark.parametrize(("theta", "kv_heads"), [(None, 4), (100.0, 4), (100.0, 2)])
def test_start_base_is_the_base_layer(theta: float | None, kv_heads: int) -> None:
    """Cut into 8 heads of rank 2, the base layer's outputs are rebuilt before any training; patterns are its own."""
    batches = _base_batches(theta, kv_heads)
    settings = AttentionLayerSettings(8, qk_rank=4, ov_rank=2, rotary_theta=theta, start="base")
    layer = AttentionReplacementLayer([0], D, settings)
    assert layer.extra == ("q.0", "k.0", "v.0", "z.0")
    layer.calibrate(batches[:2])
    assert layer.loss(batches[2])[1]["nmse/attn_out.0"] < 1e-4
    lorsa = AttentionLayerSettings(32, 4, 1, 4, "topk", 16, rotary_theta=theta, start="base")
    nmse = {}
    for start in ("base", "random"):
        layer = AttentionReplacementLayer([0], D, replace(lorsa, start=start))
        layer.calibrate(batches[:2])
        nmse[start] = layer.loss(batches[2])[1]["nmse/attn_out.0"]
    assert nmse["base"] < 0.2 < 0.5 < nmse["random"], nmse


def test_start_base_says_what_it_needs() -> None:
    batches = _base_batches(None, 4)
    for heads, width in ((8, 3), (6, 4)):
        layer = AttentionReplacementLayer([0], D, AttentionLayerSettings(heads, width, 1, start="base"))
        with pytest.raises(ReplacementError, match="must be its head width"):
            layer.calibrate(batches)
    layer = AttentionReplacementLayer([0], D, AttentionLayerSettings(8, 4, 1, start="base"))
    with pytest.raises(ReplacementError, match=r"needs 'q\.0' in the batches"):
        layer.calibrate([{name: value for name, value in batches[0].items() if name != "q.0"}])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beta": 0.5}, "beta is 0.5"),
        ({"beta": 1.0}, "beta is 1.0"),
        ({"activation": "relu"}, "cannot train activation 'relu'"),
        ({"groups": 3}, "3 groups do not divide 8 heads"),
        ({"qk_rank": 0}, "must be at least 1"),
        ({"penalty": -1.0}, "negative"),
        ({"activation": "topk"}, "topk needs ov_rank 1, not 4"),
        ({"activation": "topk", "ov_rank": 1, "k": 9}, "k is 9 with 8 heads"),
        ({"rotary_theta": 1e4, "qk_rank": 3}, "make it even"),
        ({"rotary_theta": -1.0}, "give the base model's"),
        ({"start": "warm"}, "unknown start 'warm'"),
    ],
)
def test_wrong_settings(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ReplacementError, match=message):
        AttentionLayerSettings(8, **wrong)


def test_wrong_batches() -> None:
    layer = AttentionReplacementLayer([0], 8, AttentionLayerSettings(4))
    with pytest.raises(ReplacementError, match=r"'attn_out.0' of shape \(contexts, positions, 8\).*\(20, 12, 16\)"):
        layer.loss(next(Planted(4)))


def test_spread_of_patterns() -> None:
    assert pattern_spread(torch.eye(4)).tolist() == [0.0] * 4
    assert pattern_spread(torch.full((4, 4), 0.25)).tolist() == [0.75] * 4
