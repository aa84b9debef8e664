"""Rows read from a safetensors file, and files that cannot be read."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from circuits.replacements.errors import ReplacementError
from circuits.replacements.weights import HeldTensor, Rows, open_safetensors
from circuits.replacements.weights_views import ColumnScaled, Joined, LowRank, Scaled, Transposed, part


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_rows_are_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    held = {"odd": torch.randn(3, dtype=torch.float16), "W": torch.randn(11, 3, 5).to(dtype), "s": torch.tensor(2.5)}
    save_file(held, tmp_path / "a.safetensors")
    tensors = open_safetensors(tmp_path / "a.safetensors")
    index = torch.tensor([7, 0, 7, 10])
    W = held["W"].float()
    assert torch.equal(tensors["W"].rows(index), W[index])
    assert torch.equal(tensors["W"].rows(index, column=2), W[index, 2])
    assert torch.equal(tensors["W"].all(), W)
    assert tensors["W"].rows(index[:0], column=1).shape == (0, 5)
    assert tensors["s"].all().item() == 2.5
    assert tensors["W"].shape == (11, 3, 5)
    assert tensors["W"].path.name == "a.safetensors"


def test_row_that_does_not_exist(tmp_path: Path) -> None:
    save_file({"W": torch.zeros(4, 2)}, tmp_path / "a.safetensors")
    tensor = open_safetensors(tmp_path / "a.safetensors")["W"]
    for row in (4, -1):
        with pytest.raises(ReplacementError, match=f"row {row} of tensor 'W'"):
            tensor.rows(torch.tensor([0, row]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_only_in_rows_that_are_read(tmp_path: Path, value: float) -> None:
    W = torch.zeros(4, 2)
    W[2, 1] = value
    save_file({"W": W}, tmp_path / "a.safetensors")
    tensor = open_safetensors(tmp_path / "a.safetensors")["W"]
    assert tensor.rows(torch.tensor([0, 3])).shape == (2, 2)
    with pytest.raises(ReplacementError, match=r"a\.safetensors: tensor 'W' holds NaN"):
        tensor.rows(torch.tensor([2]))


@pytest.mark.parametrize("keep", [0, 5, 20, -1])
def test_truncated(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"W": torch.zeros(4, 2)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ReplacementError, match=r"a\.safetensors: .*truncated.* bytes"):
        open_safetensors(path)


def test_other_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(ReplacementError, match="no such file"):
        open_safetensors(path)
    path.write_bytes((4).to_bytes(8, "little") + b"what")
    with pytest.raises(ReplacementError, match="not JSON"):
        open_safetensors(path)
    header = json.dumps({"W": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    with pytest.raises(ReplacementError, match="needs 8 bytes, the header gives it 4"):
        open_safetensors(path)


def test_integers_are_no_weights(tmp_path: Path) -> None:
    save_file({"k": torch.tensor(20)}, tmp_path / "a.safetensors")
    with pytest.raises(ReplacementError, match="type I64"):
        open_safetensors(tmp_path / "a.safetensors")["k"].all()


def test_views(tmp_path: Path) -> None:
    """Rows of matrices made of stored ones, in any order and repeated, are those of the whole that it should be."""
    drawn = {name: torch.randn(shape) for name, shape in {"a": (5, 4), "b": (7, 4), "left": (5, 2)}.items()}
    drawn |= {"stack": torch.randn(3, 5, 4), "right": torch.randn(2, 4)}
    drawn |= {"rows": torch.rand(5), "columns": torch.rand(4)}
    save_file(drawn, tmp_path / "views.safetensors")
    lazy = open_safetensors(tmp_path / "views.safetensors")
    a, right = drawn["a"], drawn["right"]
    views: list[tuple[Rows, torch.Tensor]] = [
        (part(lazy["stack"], 2), drawn["stack"][2]),
        (part(HeldTensor("stack", drawn["stack"]), 1), drawn["stack"][1]),
        (Scaled(lazy["a"], drawn["rows"]), a * drawn["rows"].unsqueeze(1)),
        (ColumnScaled(lazy["a"], drawn["columns"]), a * drawn["columns"]),
        (Transposed(lazy["a"]), a.T),
        (Joined((lazy["a"], lazy["b"], lazy["a"])), torch.cat([a, drawn["b"], a])),
        (LowRank(lazy["left"], right, lazy["a"]), a + drawn["left"] @ right),
    ]
    for view, whole in views:
        assert view.shape == whole.shape
        torch.testing.assert_close(view.all(), whole)
        for index in ([len(whole) - 1, 0, 2, 0], [1, 2, 3], []):
            torch.testing.assert_close(view.rows(torch.tensor(index, dtype=torch.long)), whole[index])
