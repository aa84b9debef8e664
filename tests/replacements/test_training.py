"""The training loop on planted sparse data whose features are known."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from circuits.kernels.decode import gather_decode
from circuits.replacements import Replacement, load_replacement
from circuits.replacements.attention_sae import AttentionSAE
from circuits.replacements.checkpoints import read_log
from circuits.replacements.clt import CrossLayerTranscoder
from circuits.replacements.coder import Coder, CoderSettings, JumpSettings
from circuits.replacements.errors import ReplacementError
from circuits.replacements.formats import native
from circuits.replacements.sites import Site
from circuits.replacements.training import Reports, TrainingSettings, train

D, PLANTED, LAYERS = 16, 24, 2


class Planted:
    """Activations that are sparse sums of known directions, moved and scaled as raw activations are."""

    def __init__(self, n: int = 256, kill_at: int | None = None) -> None:
        random = torch.Generator().manual_seed(0)
        self.reads = nn.functional.normalize(torch.randn(LAYERS, PLANTED, D, generator=random), dim=2)
        self.writes = torch.randn(LAYERS, PLANTED, D, generator=random)
        self.n, self.made, self.kill_at = n, 0, kill_at

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        if self.made == self.kill_at:
            raise KeyboardInterrupt
        random = torch.Generator().manual_seed(1000 + self.made)
        self.made += 1
        batch, above = {}, torch.zeros(self.n, D)
        for layer in range(LAYERS):
            on = torch.rand(self.n, PLANTED, generator=random) < 2 / PLANTED
            a = on * (1 + torch.rand(self.n, PLANTED, generator=random))
            x = 7.0 * a @ self.reads[layer] + 3.0
            batch[f"resid_mid.{layer}:full"] = batch[f"attn_out.{layer}:none"] = x
            above = above + 0.2 * a @ self.writes[layer]
            batch[f"mlp_out.{layer}"] = above - 5.0
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"made": self.made, "as_tensor": torch.tensor(self.made)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert int(state["as_tensor"]) == state["made"]
        self.made = int(state["made"])


def _settings(activation: str = "batch_topk", **more: Any) -> CoderSettings:
    k = 4 if activation == "topk" else 2  # the planted ones are 2 a token on average
    return CoderSettings(n_features=36, activation=activation, k=k, dead_after=3000, aux_k=8, **more)


def _clt(activation: str = "batch_topk") -> CrossLayerTranscoder:
    jump = JumpSettings(sparsity=0.04)
    return CrossLayerTranscoder(LAYERS, D, _settings(activation, jump=jump))


@pytest.mark.parametrize("activation", ["batch_topk", "topk", "jump_relu"])
def test_clt_learns_planted_features(tmp_path: Path, activation: str) -> None:
    clt, seen = _clt(activation), []
    settings = TrainingSettings(steps=900, lr=4e-3, warmup=20, figures_every=200)
    last = train(clt, Planted(), settings, tmp_path, lambda step, figures: seen.append((step, figures)))
    assert [step for step, _ in seen] == [*range(200, 801, 200), 900]
    assert all(last[f"nmse/mlp_out.{layer}"] < 0.15 for layer in range(LAYERS)), last
    assert all(last[f"l0/clt.{layer}"] < 5 for layer in range(LAYERS)), last
    planted = Planted()
    for layer, dictionary in enumerate(clt.to_dictionaries()):
        rows = dictionary.decoder_rows(torch.arange(36), Site("mlp_out", layer))
        cosines = nn.functional.normalize(planted.writes[layer], dim=1) @ nn.functional.normalize(rows, dim=1).T
        assert float((cosines.max(1).values > 0.9).float().mean()) >= 0.9, (layer, cosines.max(1).values)


def test_attention_sae_learns_planted_features(tmp_path: Path) -> None:
    sae = AttentionSAE(range(LAYERS), D, _settings())
    last = train(sae, Planted(), TrainingSettings(steps=700, lr=4e-3, warmup=20), tmp_path)
    assert all(last[f"nmse/attn_out.{layer}"] < 0.1 for layer in range(LAYERS)), last
    for layer, dictionary in enumerate(sae.to_dictionaries()):
        rows = nn.functional.normalize(dictionary.decoder_rows(torch.arange(36), Site("attn_out", layer)), dim=1)
        best = (Planted().reads[layer] @ rows.T).max(1).values
        assert float((best > 0.9).float().mean()) >= 0.9, best


@pytest.mark.parametrize("activation", ["batch_topk", "jump_relu"])
def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path: Path, activation: str) -> None:
    settings = TrainingSettings(steps=60, warmup=5, checkpoint_every=20)
    whole, killed, resumed = _clt(activation), _clt(activation), _clt(activation)
    train(whole, Planted(), settings, tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    unfinished = tmp_path / "killed" / ".checkpoint.safetensors.1"  # left by a process killed while writing
    unfinished.touch()
    with pytest.raises(KeyboardInterrupt):
        train(killed, Planted(kill_at=37), settings, tmp_path / "killed")
    torch.manual_seed(99)
    train(resumed, Planted(), settings, tmp_path / "killed")
    assert not unfinished.exists()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    again, batches = _clt(activation), Planted(kill_at=0)
    train(again, batches, settings, tmp_path / "whole")  # finished: nothing left to do
    assert torch.equal(again.W_enc[0], whole.W_enc[0])


def test_log_has_every_step_once_and_is_cut_where_the_checkpoint_is(tmp_path: Path) -> None:
    """Also where the last line was cut off by the kill; the curve is that of a training that was not stopped."""
    settings = TrainingSettings(steps=60, warmup=5, checkpoint_every=20, figures_every=3)
    train(_clt(), Planted(), settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(_clt(), Planted(kill_at=57), settings, tmp_path / "killed")
    assert [line["step"] for line in read_log(tmp_path / "killed")] == list(range(3, 52, 3))
    with (tmp_path / "killed" / "log.jsonl").open("a") as file:
        file.write('{"step": 54, "lo')
    done: list[tuple[int, int]] = []
    reports = Reports(step=lambda step, steps: done.append((step, steps)))
    train(_clt(), Planted(), settings, tmp_path / "killed", reports)
    whole, killed = read_log(tmp_path / "whole"), read_log(tmp_path / "killed")
    assert [line["step"] for line in whole] == [*range(3, 60, 3), 60]
    assert whole == killed
    assert {"loss", "lr", "gradient_norm", "nmse/mlp_out.0"} <= set(whole[0])
    assert done == [(step, 60) for step in range(40, 61)]  # once before the first step of this process


def test_resume_refuses_other_settings_and_modules(tmp_path: Path) -> None:
    train(_clt(), Planted(), TrainingSettings(steps=3), tmp_path)
    with pytest.raises(ReplacementError, match="made with settings"):
        train(_clt(), Planted(), TrainingSettings(steps=4), tmp_path)
    with pytest.raises(ReplacementError, match="belongs to another module"):
        train(AttentionSAE([0], D, _settings()), Planted(), TrainingSettings(steps=3), tmp_path)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"damaged")
    with pytest.raises(ReplacementError, match="no checkpoint"):
        train(_clt(), Planted(), TrainingSettings(steps=3), tmp_path)


@pytest.mark.parametrize("activation", ["batch_topk", "topk", "jump_relu"])
def test_bfloat16_keeps_master_weights_and_learns(tmp_path: Path, activation: str) -> None:
    """Parameters, Adam's moments and gradients are float32; the loss is near float32's, and falls as far."""
    last, curves = {}, {}
    for precision in ("float32", "bfloat16"):
        clt = _clt(activation)
        settings = TrainingSettings(
            steps=250,
            lr=4e-3,
            warmup=20,
            figures_every=10,
            precision=precision,  # type: ignore[arg-type]
        )
        seen: set[torch.dtype] = set()
        for parameter in clt.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p, seen=seen: seen.update({p.dtype, p.grad.dtype}))  # type: ignore[misc]
        last[precision] = train(clt, Planted(), settings, tmp_path / precision)
        curves[precision] = read_log(tmp_path / precision)
        assert seen == {torch.float32}
        with safe_open(tmp_path / precision / "checkpoint.safetensors", framework="pt") as file:
            moments = {file.get_tensor(name).dtype for name in file.keys() if "exp_avg" in name}  # noqa: SIM118
        assert moments == {torch.float32}
    ours, theirs = last["bfloat16"], last["float32"]
    first = curves["bfloat16"][0]["loss"]
    assert first == pytest.approx(curves["float32"][0]["loss"], rel=0.02)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.15)
    assert ours["loss"] < 0.6 * first
    assert curves["bfloat16"] != curves["float32"] or activation == "batch_topk"  # chosen in bfloat16 either way
    with pytest.raises(ReplacementError, match="cannot train in 'float8'"):
        TrainingSettings(1, precision="float8")  # type: ignore[arg-type]
    with pytest.raises(ReplacementError, match="made with settings"):
        train(_clt(activation), Planted(), TrainingSettings(150, lr=4e-3, warmup=20), tmp_path / "bfloat16")


class _Contexts(nn.Module):
    """A linear map on whole contexts: the mean over real tokens of what is left of the output."""

    reads, writes, in_context, extra = (), (), True, ("pattern.1",)

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.zeros(D, D))

    def calibrate(self, batches: list[dict[str, Tensor]]) -> None:
        assert len({batch["pattern.1"].shape[-1] for batch in batches}) > 1

    def begin_step(self, progress: float) -> None:
        pass

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        assert batch["mask"].dtype == torch.bool
        moved = batch["pattern.1"].sum(1) @ (batch["x"] @ self.W)
        assert moved.dtype == (torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32)
        error = (moved - batch["y"])[batch["mask"]]
        return error.square().mean(), {"nmse/y": float(error.detach().square().mean())}


class _Ragged(Planted):
    def __next__(self) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(self.made)
        self.made += 1
        S = 4 + self.made % 5
        mask = torch.arange(S) < torch.randint(2, S + 1, (6, 1), generator=random)
        x, pattern = torch.randn(6, S, D, generator=random), torch.rand(6, 2, S, S, generator=random).tril()
        return {"x": x, "y": pattern.sum(1) @ x @ self.writes[0][:D], "pattern.1": pattern, "mask": mask}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_contexts_train_in_either_precision(tmp_path: Path, precision: Any) -> None:
    """Batches of other sizes each step, with patterns and a mask that stays boolean."""
    settings = TrainingSettings(steps=300, lr=3e-2, warmup=1, clip=1e9, figures_every=1, precision=precision)
    train(_Contexts(), _Ragged(), settings, tmp_path)
    losses = [line["loss"] for line in read_log(tmp_path)]
    assert sum(losses[-20:]) < 0.02 * sum(losses[:20])


class _Finite(Planted):
    def __next__(self) -> dict[str, Tensor]:
        if self.made == 6:
            raise StopIteration
        return super().__next__()


class _Broken(Planted):
    def __next__(self) -> dict[str, Tensor]:
        batch = super().__next__()
        return batch if self.made < 6 else {name: tensor * float("nan") for name, tensor in batch.items()}


def test_errors_of_training(tmp_path: Path) -> None:
    with pytest.raises(ReplacementError, match="ran out before step 2"):
        train(_clt(), _Finite(), TrainingSettings(steps=5), tmp_path / "a")
    with pytest.raises(ReplacementError, match="step 1: the loss is nan"):
        train(_clt("jump_relu"), _Broken(), TrainingSettings(steps=5), tmp_path / "b")
    assert not (tmp_path / "b").exists()
    with pytest.raises(ReplacementError, match="cannot train activation 'relu'"):
        _settings("relu")
    with pytest.raises(ReplacementError, match=r"'resid_mid.0:full' of shape \(n, 8\)"):
        CrossLayerTranscoder(LAYERS, 8, _settings()).loss(next(Planted()))


def _normalised_outputs(coder: Coder, batch: dict[str, Tensor]) -> dict[Site, Tensor]:
    """The coder's equation with dense products, at the dictionaries' own gates."""
    out = {site: bias.expand(256, -1) for site, bias in zip(coder.writes, coder.b_dec, strict=True)}
    for i, layout in enumerate(coder.layouts):
        u = (batch[str(layout.read)] - coder.in_mean[i]) / coder.in_scale[i]
        pre = u @ coder.W_enc[i].T + coder.b_enc[i]
        if coder.settings.activation == "jump_relu":
            a = pre * (pre > coder.log_threshold[i].exp())
        else:
            a = pre * (pre > coder.threshold[i])
        for site, W_dec in zip(layout.writes, coder._decoders(i), strict=True):
            out[site] = out[site] + a @ W_dec
    return out


@pytest.mark.parametrize("activation", ["batch_topk", "jump_relu"])
def test_saved_dictionaries_act_on_raw_activations(tmp_path: Path, activation: str) -> None:
    clt = _clt(activation)
    train(clt, Planted(), TrainingSettings(steps=30, warmup=5), tmp_path / "run")
    replacement = Replacement("clt", tmp_path, "circuits", clt.to_dictionaries(), training={"steps": 30})
    native.save(replacement, tmp_path / "saved")
    batch = next(Planted())
    with torch.no_grad():
        want = _normalised_outputs(clt, batch)
    got: dict[Site, Tensor] = {}
    for dictionary in load_replacement(tmp_path / "saved").dictionaries:
        active = dictionary.encode(batch[str(dictionary.read)])
        for site in dictionary.writes:
            rows = dictionary.decoder_rows(active.features, site)
            y = gather_decode(active.positions, None, active.activations, rows, 256)
            bias = dictionary.output_bias(site)
            y = y if bias is None else y + bias
            got[site] = got.get(site, torch.zeros(256, D)) + y
    for place, site in enumerate(clt.writes):
        assert torch.allclose(got[site], want[site] * clt.out_scale[place], atol=1e-3)


def test_auxiliary_loss_revives_dead_features() -> None:
    shares = {}
    for weight in (0.0, 1 / 4):
        torch.manual_seed(0)
        sae = AttentionSAE([0], D, _settings(aux_weight=weight))
        batches = Planted()
        sae.calibrate([next(batches)])
        with torch.no_grad():
            sae.W_enc[0][:18] *= 0.02  # half of the features never win a place
        optimizer = torch.optim.Adam(sae.parameters(), lr=4e-3)
        for _ in range(300):
            loss, figures = sae.loss(next(batches))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        shares[weight] = figures["dead/attention-sae.0"]
    assert shares[1 / 4] < shares[0.0] / 2, shares


def test_evaluating_changes_nothing() -> None:
    clt, batch = _clt(), next(Planted())
    clt.calibrate([batch])
    clt.eval()
    before = {name: tensor.clone() for name, tensor in clt.state_dict().items()}
    clt.loss(batch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in clt.state_dict().items())


def test_learning_rate_rises_and_falls() -> None:
    settings = TrainingSettings(steps=100, lr=1.0, warmup=10, decay=0.5)
    rates = [settings.lr_at(step) for step in range(100)]
    assert rates[0] == 0.1
    assert rates[9:50] == [1.0] * 41
    assert rates[99] == pytest.approx(0.02)
