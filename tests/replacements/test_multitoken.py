"""Multitoken transcoders: the loss by definition, what is saved, planted features, and what each setting does."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import PlantedMoves, activations, fit, found, nearly_orthogonal, random_patterns, spread_loading
from torch import Tensor
from torch.nn import functional

from circuits.replacements import Replacement, ReplacementError, load_replacement
from circuits.replacements.formats import native
from circuits.replacements.multitoken import MultiTokenTranscoder
from circuits.replacements.multitoken_settings import MultiTokenSettings, write_sites
from circuits.replacements.training import Batch

H, D, F = 4, 32, 32
RELU = MultiTokenSettings(n_features=12, activation="relu", k=3, context_k=12, lift=0.0)
CASES = {
    "relu": RELU,
    "one head": replace(RELU, heads="one"),
    "no identity": replace(RELU, identity=False),
    "few move": replace(RELU, context_k=3),
    "penalties": replace(RELU, sparsity=0.02, negative=0.03, penalty_tokens=10_000),
    "joint": replace(RELU, joint=True, heads="one"),
    "ranks": replace(RELU, activation="group_soft", ranks=((1, 0.5), (3, 0.5)), context_k=4),
    "ranks, penalties": replace(RELU, activation="group_soft", ranks=((2, 1.0),), sparsity=0.1),
}


def small(settings: MultiTokenSettings, *, later: bool = True) -> tuple[MultiTokenTranscoder, Batch]:
    """A module of random weights, MCTC write sites, and contexts of several lengths."""
    random = torch.Generator().manual_seed(3)
    width, heads, C, S = 6, 2, 3, 5
    sites = write_sites(0, 2, "attention", later=later, mlp=later)
    module = MultiTokenTranscoder([(0, sites)], heads, width, settings)
    pattern = random_patterns(heads)(C, S, random)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool)
    batch = {"mask": mask, "pattern.0": pattern, "resid_pre.0:full": torch.randn(C, S, width, generator=random)}
    batch |= {str(site): torch.randn(C, S, width, generator=random) for site in sites}
    module.calibrate([batch])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=random)
    return module, batch


def by_definition(module: MultiTokenTranscoder, batch: Batch) -> tuple[dict[str, list[list[Tensor]]], float]:
    """What is rebuilt at every real position of every site, normalised, and the penalties; float64, in loops."""
    s, mask = module.settings, batch["mask"]
    rebuilt = {str(site): [[b.detach().double() for _ in range(5)] for _ in mask] for site, b in
               zip(module.writes, module.b_dec)}  # fmt: skip
    penalty, tokens = 0.0, int(mask.sum())
    for i, lay in enumerate(module.layouts):
        E, b = module.W_enc[i].detach().double(), module.b_enc[i].detach().double()
        alpha = module.loading[i].detach().double().clone()
        if not s.identity:
            alpha[:, -1] = 0
        for row in alpha if s.heads == "one" else ():
            row[[h for h in range(len(row)) if h != int(row.abs().argmax())]] = 0
        decoders = [W.detach().double().view(lay.n_features, lay.rank, -1) for W in module._decoders(i)]
        theta = module.log_threshold[i].detach().double().exp() if s.activation == "group_soft" else None
        for c in range(len(mask)):
            length, a = int(mask[c].sum()), {}
            for p in range(length):
                u = (batch["resid_pre.0:full"][c, p].double() - module.in_mean[0]) / module.in_scale[0]
                pre = (E @ u + b).view(lay.n_features, lay.rank)
                for f in range(lay.n_features):
                    size = pre[f].norm() if lay.rank > 1 else pre[f, 0]
                    cut = 0.0 if theta is None else float(theta[f])
                    if size > cut:
                        a[f, p] = pre[f] * (1 - cut / size)
                    if s.negative:
                        penalty += s.negative * max(0.0, -float(pre[f, 0])) / tokens
            for (f, _), value in a.items():
                norm = alpha[f].norm() * torch.cat([W[f].flatten() for W in decoders]).norm()
                penalty += s.sparsity * float(value.norm() * norm) / tokens
            total = {f: sum(float(v.norm()) for (g, _), v in a.items() if g == f) for f, _ in a}
            moving = sorted(total, key=lambda f: -total[f])[: s.context_k]
            for (f, at), value in a.items():
                for p in range(at, length) if f in moving else ():
                    weight = alpha[f, -1] * (p == at)
                    for h in range(module.n_heads):
                        weight = weight + alpha[f, h] * batch["pattern.0"][c, h, p, at].double()
                    for site, W in zip(lay.writes, decoders):
                        rebuilt[str(site)][c][p] = rebuilt[str(site)][c][p] + weight * value @ W[f]
    return rebuilt, penalty


@pytest.mark.parametrize("name", CASES)
def test_loss_by_definition(name: str) -> None:
    """Reconstruction and penalties are those of explicit loops; padding and first positions are not scored."""
    module, batch = small(CASES[name])
    loss, figures = module.loss(batch)
    rebuilt, expected = by_definition(module, batch)
    for place, site in enumerate(module.writes):
        errors = [
            batch[str(site)][c, p].double() / module.out_scale[place] - rebuilt[str(site)][c][p]
            for c in range(3)
            for p in range(1, int(batch["mask"][c].sum()))
        ]
        expected += float(torch.stack(errors).square().mean())
    if module.settings.joint:
        u = (batch["resid_pre.0:full"][batch["mask"]] - module.in_mean[0]) / module.in_scale[0]
        a = torch.relu(u @ module.W_enc[0].T + module.b_enc[0])
        expected += (u - a @ module.W_sae[0]).square().mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert all(figures[f"dead/{layout.name}"] == 0 for layout in module.layouts)


@pytest.mark.parametrize("name", ["relu", "one head", "no identity", "few move", "ranks"])
def test_dictionaries_do_what_the_module_does(name: str, tmp_path: Path) -> None:
    """Encode, move and decode of what was saved and read back give the module's output on raw activations."""
    module, batch = small(CASES[name])
    saved = Replacement("mctc", tmp_path, "circuits", module.to_dictionaries())
    native.save(saved, tmp_path / "mctc")
    dictionaries = load_replacement(tmp_path / "mctc").dictionaries
    rebuilt, _ = by_definition(module, batch)
    for place, site in enumerate(module.writes):
        for c in range(3):
            length = int(batch["mask"][c].sum())
            y = torch.zeros(length, 6)
            for d in dictionaries:
                active = d.encode(batch["resid_pre.0:full"][c, :length])
                moved = d.move(active, batch["pattern.0"][c, :, :length, :length])
                rows = d.decoder_rows(moved.features, site, moved.directions) * moved.activations[:, None]
                y.index_add_(0, moved.positions, rows)
                if (bias := d.output_bias(site)) is not None:
                    y += bias
            wanted = torch.stack(rebuilt[str(site)][c][:length]).float() * module.out_scale[place]
            torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)


def test_joint_encoder_learns_from_the_sae_alone() -> None:
    """The MTC's error gives the encoder no gradient: it is the same whatever the MTC has to rebuild."""
    gradients = []
    for scale in (1.0, 100.0):
        module, batch = small(CASES["joint"])
        batch |= {str(site): scale * batch[str(site)] for site in module.writes}
        module.loss(batch)[0].backward()  # type: ignore[no-untyped-call]
        gradients.append((module.W_enc[0].grad, module.loading[0].grad))
    torch.testing.assert_close(gradients[0][0], gradients[1][0])
    assert not torch.allclose(gradients[0][1], gradients[1][1])  # type: ignore[arg-type]


def planted(loading: Tensor, **more: Any) -> PlantedMoves:
    return PlantedMoves(
        nearly_orthogonal(F, D, 1), loading, {"attn_out.0": nearly_orthogonal(F, D, 3)}, random_patterns(H), **more
    )


def trained(data: PlantedMoves, steps: int = 500, **more: Any) -> tuple[MultiTokenTranscoder, dict[str, float]]:
    settings = MultiTokenSettings(**({"n_features": 48, "k": 2, "context_k": 48, "dead_after": 20_000} | more))
    sites = write_sites(0, 1, "attention", later=False, mlp=False)
    module = MultiTokenTranscoder([(0, sites)], H, D, settings)
    return module, fit(module, data, steps)


def test_superposition_across_heads() -> None:
    """Skip-trigrams that two heads carry each: the MTC finds 90 % of them, with one head a feature none is found."""
    data = planted(spread_loading(F, H, 2))
    module, figures = trained(data)
    single, single_figures = trained(data, heads="one")
    assert found(data, module.to_dictionaries()[0]).share >= 0.9
    assert found(data, single.to_dictionaries()[0]).share <= 0.2
    assert figures["nmse/attn_out.0"] < 0.1 < 0.2 < single_figures["nmse/attn_out.0"]


def test_single_heads_are_enough_where_one_head_carries() -> None:
    """The single-head MTC finds features that one head carries; so does the one with a joint SAE encoder."""
    data = planted(spread_loading(F, H, 1))
    for more in ({}, {"joint": True}):
        module, _ = trained(data, heads="one", steps=600, **more)
        assert found(data, module.to_dictionaries()[0]).decoder.ge(0.9).float().mean() >= 0.8, more


def induction_patterns(n: int, length: int, random: torch.Generator) -> Tensor:
    """Head 0 looks at the previous token, head 1 at a token some steps back, heads 2 and 3 anywhere."""
    pattern = random_patterns(H)(n, length, random)
    back = torch.randint(2, 6, (n,), generator=random)
    for c in range(n):
        for p in range(length):
            for head, at in ((0, p - 1), (1, p - int(back[c]))):
                pattern[c, head, p] = functional.one_hot(torch.tensor(max(0, at)), length)
    return pattern


def test_induction_pair() -> None:
    """Features that a previous-token head or an induction-like head carries go to that head, with what it writes."""
    loading = torch.zeros(F, H + 1)
    loading[: F // 2, 0] = loading[F // 2 :, 1] = 1.0
    data = planted(loading)
    data.patterns = induction_patterns
    module, _ = trained(data)
    match = found(data, module.to_dictionaries()[0])
    assert match.share >= 0.9, match.worst


def test_vectors_that_move() -> None:
    """Features of rank two are found whole: both principal angles of what they read and write are small."""
    n, width = 10, 32
    reads = nearly_orthogonal(2 * n, width, 1).view(n, 2, width)
    writes = nearly_orthogonal(2 * n, width, 3).view(n, 2, width)
    data = PlantedMoves(reads, spread_loading(n, H, 2), {"attn_out.0": writes}, random_patterns(H), active=1.0)
    module, figures = trained(
        data, 800, n_features=20, activation="group_soft", ranks=((2, 1.0),), sparsity=1e-2, context_k=20
    )
    (dictionary,) = module.to_dictionaries()
    decoders = dictionary.decoders[dictionary.writes[0]].all().view(-1, 2, width)
    cosines = [[_angles(writes[f], decoders[g]) for g in range(len(decoders))] for f in range(n)]
    best = torch.tensor(cosines).amax(1)
    assert float((best >= 0.9).float().mean()) >= 0.9, (best, figures)


def _angles(a: Tensor, b: Tensor) -> float:
    """The smaller of the cosines of the principal angles between two planes."""
    q, r = torch.linalg.qr(a.T)[0], torch.linalg.qr(b.T)[0]
    return float(torch.linalg.svdvals(q.T @ r).min())


def test_identity_is_needed_for_what_stays() -> None:
    """Features that stay where they are: rebuilt with the identity head, not without it; then its loading is zero."""
    loading = torch.zeros(F, H + 1)
    loading[:, -1] = 1.0
    data = planted(loading)
    with_it, figures = trained(data, 300)
    without, bare = trained(data, 300, identity=False)
    assert figures["nmse/attn_out.0"] < 0.15 < 0.4 < bare["nmse/attn_out.0"]
    assert without.effective_loading(0)[:, -1].abs().max() == 0
    assert with_it.effective_loading(0)[:, -1].abs().max() > 0.5


def test_penalties_do_what_they_say() -> None:
    """L1 lowers what is active, and no scale hides from it; the other penalty makes pre-activations less negative."""
    data = planted(spread_loading(F, H, 2))
    x = data.batch(5)[0]["resid_pre.0:full"]
    active, negative = {}, {}
    for name, more in {"none": {}, "sparsity": {"sparsity": 0.1}, "negative": {"negative": 0.01}}.items():
        module, figures = trained(data, 150, activation="relu", **more)
        active[name] = figures["l0/mtc.0"]
        (dictionary,) = module.to_dictionaries()
        pre = x.flatten(0, 1) @ dictionary.W_enc.T + dictionary.b_enc
        negative[name] = float((pre < 0).float().mean())
    assert active["sparsity"] < 0.8 * active["none"]
    assert negative["negative"] < 0.8 * negative["none"]
    module, batch = small(replace(RELU, sparsity=1.0))
    losses = []
    for scale in (1.0, 4.0):
        with torch.no_grad():
            module.W_enc[0] *= 1 / scale
            module.b_enc[0] *= 1 / scale
            for W_dec in module._decoders(0):
                W_dec *= scale
        losses.append(module.loss(batch)[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_context_k_and_lift() -> None:
    """No context moves more than context_k features; dead features get a gradient from `lift` alone."""
    data = planted(spread_loading(F, H, 2))
    _, figures = trained(data, 20, context_k=5)
    assert figures["moved/mtc.0"] == 5
    for lift in (0.0, 1.0):
        module, _ = trained(data, 1, lift=lift, dead_after=10)
        with torch.no_grad():
            module.b_enc[0][:8] = -100.0
        module.unfired_0[:8] = 1000
        module.loss(data.batch(7)[0])[0].backward()  # type: ignore[no-untyped-call]
        gradient = module.b_enc[0].grad
        assert gradient is not None
        assert bool((gradient[:8] < 0).all()) == (lift > 0)


def test_activations_of_saved_features_are_those_of_training() -> None:
    """BatchTopK with the threshold that training has estimated: about k features a token."""
    data = planted(spread_loading(F, H, 2))
    module, _ = trained(data, 200)
    (dictionary,) = module.to_dictionaries()
    dense = activations(dictionary, data.batch(9)[0]["resid_pre.0:full"])
    assert float((dense > 0).float().sum(-1).mean()) == pytest.approx(2.0, rel=0.25)


@pytest.mark.parametrize(
    "more",
    [{"activation": "jump"}, {"k": 0}, {"k": 13}, {"context_k": 0}, {"ranks": ((0, 1.0),)}, {"ranks": ((2, 1.0),)}],
)
def test_settings_that_make_no_sense(more: dict[str, Any]) -> None:
    with pytest.raises(ReplacementError, match=r"choose|expected|group_soft|at least"):
        MultiTokenSettings(**({"n_features": 12, "activation": "relu", "k": 3} | more))


def test_residual_target_writes_nowhere_else() -> None:
    assert [str(site) for site in write_sites(1, 3, "residual", later=False, mlp=False)] == ["resid_post.1"]
    with pytest.raises(ReplacementError, match="whole block"):
        write_sites(1, 3, "residual", later=True, mlp=False)
