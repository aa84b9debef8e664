"""Activation functions and penalties against their formulas, the choice of entries against a sort."""

import pytest
import torch

from circuits.replacements.sparsity import (
    choose_above,
    choose_candidates,
    choose_topk,
    jump_relu,
    largest,
    pre_activation_penalty,
    tanh_penalty,
)


def test_jump_relu_gradient_is_the_rectangle() -> None:
    pre = torch.tensor([[0.2, 0.9], [0.6, 1.3], [2.0, -1.0]], requires_grad=True)
    threshold = torch.tensor([0.5, 1.0], requires_grad=True)
    out = jump_relu(pre, threshold, 0.4)
    assert torch.allclose(out, torch.tensor([[0.0, 0.0], [0.6, 1.3], [2.0, 0.0]]))
    out.backward(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    assert pre.grad is not None
    assert threshold.grad is not None
    assert torch.equal(pre.grad, torch.tensor([[0.0, 0.0], [3.0, 4.0], [5.0, 0.0]]))
    # Feature 0: only 0.6 lies within 0.2 of 0.5. Feature 1: only 0.9 lies within 0.2 of 1.0.
    assert torch.allclose(threshold.grad, torch.tensor([-(0.5 / 0.4) * 3.0, -(1.0 / 0.4) * 2.0]))


def test_penalties_by_hand() -> None:
    a, norms = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([3.0, 0.5])
    by_hand = torch.tanh(torch.tensor(4 * 0.5)) + torch.tanh(torch.tensor(4 * 6.0))
    assert torch.isclose(tanh_penalty(a, norms, 4.0), by_hand)
    lift = pre_activation_penalty(torch.tensor([[-1.0, 2.0]]), torch.tensor([0.5, 1.0]), norms)
    assert lift.item() == pytest.approx(1.5 * 3.0)


def test_choose_topk_takes_the_largest_positive_of_each_row() -> None:
    torch.manual_seed(1)
    x, W, b = torch.randn(63, 8), torch.randn(31, 8), torch.randn(31) - 4.0
    rows, features = choose_topk(x, W, b, 5)
    pre = x @ W.T + b
    for token in range(63):
        ordered = pre[token].sort(descending=True).indices[:5]
        want = sorted(int(f) for f in ordered if pre[token, f] > 0)
        assert features[rows == token].tolist() == want


@pytest.mark.parametrize("shift", [0.0, -3.0, -100.0])
def test_candidates_hold_the_batch_top_k(shift: float) -> None:
    torch.manual_seed(2)
    x, W, b, k = torch.randn(600, 16), torch.randn(90, 16), torch.randn(90) + shift, 4
    pre = x @ W.T + b
    positive = int((pre > 0).sum())
    rows, features = choose_candidates(x, W, b, k)
    chosen, smallest = largest(pre[rows, features], k * 600)
    got = set(zip(rows[chosen].tolist(), features[chosen].tolist(), strict=True))
    best = pre.view(-1).sort(descending=True).indices[: min(k * 600, positive)]
    assert got == {(int(i) // 90, int(i) % 90) for i in best}
    assert float(smallest) == (float(pre.view(-1)[best[-1]]) if len(best) else 0.0)


def test_candidates_when_the_sample_misses_the_batch() -> None:
    """All activity is in tokens that the sample does not see fairly: the choice stays exact."""
    x = torch.full((1024, 1), 0.01)
    x[::4] = 100.0
    W, b = torch.ones(50, 1), torch.zeros(50)
    rows, _ = choose_candidates(x, W, b, 20)
    assert len(rows) >= 20 * 1024


def test_choose_above_is_the_dense_comparison() -> None:
    torch.manual_seed(3)
    x, W, b, threshold = torch.randn(63, 8), torch.randn(31, 8), torch.randn(31), torch.randn(31)
    want = (x @ W.T + b > threshold).nonzero()
    assert torch.equal(torch.stack(choose_above(x, W, b, threshold), dim=1), want)
