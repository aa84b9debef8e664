"""encode and decode against loops over positions."""

import pytest
import torch

from circuits.kernels import encode as encode_module
from circuits.kernels.decode import gather_decode
from circuits.kernels.encode import Activation, encode

T, F, D = 9, 23, 6


def _plain(pre: torch.Tensor, activation: Activation, threshold: torch.Tensor | None) -> list[tuple[int, int, float]]:
    entries = []
    for position in range(len(pre)):
        order = sorted(range(pre.shape[1]), key=lambda f: -float(pre[position, f]))
        for feature in range(pre.shape[1]):
            value = float(pre[position, feature])
            if activation.kind == "relu":
                active = value > 0
            elif activation.kind == "topk":
                active = feature in order[: activation.k] and (value > 0 or not activation.rectify)
            else:
                assert threshold is not None
                active = value > float(threshold.expand(pre.shape[1])[feature])
            if active:
                entries.append((position, feature, value))
    return entries


@pytest.mark.parametrize("block", [1 << 24, 60])
@pytest.mark.parametrize(
    "activation",
    [Activation("relu"), Activation("jump_relu"), Activation("topk", 4), Activation("topk", 20, rectify=False),
     Activation("topk", 20), Activation("batch_topk", 4)],
)  # fmt: skip
def test_encode(activation: Activation, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_module, "BLOCK", block)
    torch.manual_seed(0)
    x, W, b = torch.randn(T, D), torch.randn(F, D), torch.randn(F)
    threshold = {"jump_relu": torch.rand(F) - 0.2, "batch_topk": torch.tensor([0.7])}.get(activation.kind)
    positions, features, activations, pre = encode(x, W, b, activation, threshold)
    want = _plain(x @ W.T + b, activation, threshold)
    assert list(zip(positions.tolist(), features.tolist(), strict=True)) == [entry[:2] for entry in want]
    assert activations.tolist() == pytest.approx([entry[2] for entry in want], abs=1e-5)
    assert torch.equal(activations, pre)


def test_encode_of_no_positions() -> None:
    entries = encode(torch.zeros(0, D), torch.zeros(F, D), torch.zeros(F), Activation("relu"), None)
    assert [len(entry) for entry in entries] == [0, 0, 0, 0]


def test_activation_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="unknown activation 'gelu'"):
        Activation("gelu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs k"):
        Activation("topk")


def test_gather_decode() -> None:
    torch.manual_seed(0)
    positions, features = torch.tensor([0, 0, 3]), torch.tensor([2, 1, 2])
    activations, decoder = torch.randn(3), torch.randn(4, D)
    dense = torch.zeros(5, 4)
    dense[positions, features] = activations
    want = dense @ decoder
    assert torch.allclose(gather_decode(positions, features, activations, decoder, 5), want, atol=1e-6)
    assert torch.allclose(gather_decode(positions, None, activations, decoder[features], 5), want, atol=1e-6)
