"""The sparse forward and backward against dense autograd, which shares no code with them."""

import pytest
import torch

from circuits.replacements.sparse import Pattern, decode_at, encode_at

B, F, D, E = 7, 13, 5, 3


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_gradients_are_those_of_the_dense_product(share: float) -> None:
    torch.manual_seed(0)
    mask = torch.rand(B, F) < share
    x, goal = torch.randn(B, D), torch.randn(B, E)
    sparse = [torch.randn(F, D), torch.randn(F), torch.randn(F, E)]
    dense = [tensor.clone().requires_grad_() for tensor in sparse]
    sparse = [tensor.requires_grad_() for tensor in sparse]

    rows, features = mask.nonzero(as_tuple=True)
    pattern = Pattern.build(rows, features, B, F)
    values = torch.relu(encode_at(x, sparse[0], sparse[1], pattern))
    got = decode_at(values, sparse[2], pattern)
    (got - goal).pow(2).sum().backward()

    want = (torch.relu(x @ dense[0].T + dense[1]) * mask) @ dense[2]
    (want - goal).pow(2).sum().backward()

    assert torch.allclose(got, want, atol=1e-5)
    for mine, plain in zip(sparse, dense, strict=True):
        assert mine.grad is not None
        assert plain.grad is not None
        assert torch.allclose(mine.grad, plain.grad, atol=1e-4)


def test_pattern_knows_its_entries_by_feature() -> None:
    pattern = Pattern.build(torch.tensor([0, 0, 2]), torch.tensor([1, 3, 1]), 3, 4)
    assert pattern.row_starts.tolist() == [0, 2, 2, 3]
    assert pattern.rows_by_feature.tolist() == [0, 2, 0]
    assert pattern.feature_starts.tolist() == [0, 0, 2, 2]
