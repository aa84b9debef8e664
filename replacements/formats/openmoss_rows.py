"""The tensors of an OpenMOSS checkpoint, and matrices that differ from them by a factor, a transpose or a place.

Letters of shapes: F features, D width of what is read or written.
"""

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from circuits.replacements.errors import ReplacementError, wrong_shape
from circuits.replacements.weights import NUMPY_TYPES, HeldTensor, LazyTensor, Rows, open_safetensors

BLOCK = 4096  # decoder rows in memory at once while their norms are taken
Stored = LazyTensor | HeldTensor


@dataclass(frozen=True)
class Scaled:
    """`inner` (F, D), row f multiplied by `factor[f]`."""

    inner: Rows
    factor: Tensor

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    def rows(self, index: Tensor, *, column: int | None = None) -> Tensor:
        found = self.inner.rows(index, column=column)
        return found * self.factor.to(found.device)[index.to(found.device)].unsqueeze(1)

    def all(self) -> Tensor:
        found = self.inner.all()
        return found * self.factor.to(found.device).unsqueeze(1)


@dataclass(frozen=True)
class Transposed:
    """`inner` (D, F) of a file, by its columns: (F, D)."""

    inner: Stored

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape[::-1]

    def rows(self, index: Tensor, *, column: int | None = None) -> Tensor:
        assert column is None
        if isinstance(self.inner, HeldTensor):
            return self.inner.tensor[:, index.to(self.inner.tensor.device)].float().T.contiguous()
        return _columns(self.inner, index)

    def all(self) -> Tensor:
        return self.inner.all().T.contiguous()


def _columns(lazy: LazyTensor, index: Tensor) -> Tensor:
    """Columns of a matrix in a file as rows; a stretch of neighbours is read without its surroundings."""
    if not len(index):
        return torch.zeros(0, lazy.shape[0])
    first, last = int(index.min()), int(index.max()) + 1
    if first < 0 or last > lazy.shape[1]:
        raise ReplacementError(
            f"{lazy.path}: column {last - 1} of tensor {lazy.name!r} was asked for, which has {lazy.shape[1]} columns"
        )
    mapped = np.memmap(
        lazy.path, dtype=np.dtype(NUMPY_TYPES[lazy.dtype]), mode="r", offset=lazy.offset, shape=lazy.shape
    )
    near = last - first == len(index)
    chosen = mapped[:, first:last] if near else mapped[:, index.cpu().numpy()]
    found = lazy._to_float32(np.array(chosen)).T.contiguous()  # widens and checks like its own rows
    return found[index.cpu() - first] if near else found


def part(stored: Stored, index: int) -> Stored:
    """Entry `index` of the first axis, still in its file."""
    if isinstance(stored, HeldTensor):
        return HeldTensor(f"{stored.name}[{index}]", stored.tensor[index])
    size = prod(stored.shape[1:]) * np.dtype(NUMPY_TYPES[stored.dtype]).itemsize
    return replace(stored, name=f"{stored.name}[{index}]", shape=stored.shape[1:], offset=stored.offset + index * size)


def squares(decoder: Rows) -> Tensor:
    """(F,) the squared norms of a decoder's rows, a block at a time."""
    blocks = torch.split(torch.arange(decoder.shape[0]), BLOCK)
    return torch.cat([decoder.rows(block).double().square().sum(1) for block in blocks])


class Checkpoint:
    """The tensors of one `.safetensors` or `.pt` file. Every method raises `ReplacementError` for a bad one."""

    def __init__(self, path: Path, device: str) -> None:
        self.path, self._device = path, device
        self._tensors: dict[str, Stored] = {}
        if path.suffix == ".safetensors":
            self._tensors.update(open_safetensors(path))
        else:
            self._tensors.update(_unpack(path))

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def stored(self, name: str, shape: tuple[int, ...]) -> Stored:
        """A tensor left where it is."""
        if name not in self._tensors:
            raise ReplacementError(
                f"{self.path}: tensor {name!r} is missing, expected with shape {shape}; the file has "
                f"{', '.join(sorted(self._tensors)) or 'no tensors'}"
            )
        if self._tensors[name].shape != shape:
            raise wrong_shape(self.path, name, shape, self._tensors[name].shape)
        return self._tensors[name]

    def whole(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor as float32 on the device."""
        return self.stored(name, shape).all().to(self._device)

    def n_rows(self, name: str) -> int:
        """The first size of a tensor."""
        return self._tensors[name].shape[0] if name in self._tensors else 0


def _unpack(path: Path) -> dict[str, HeldTensor]:
    """A `.pt` file `{"sae": {name: tensor}, "version": ...}`: tensors and nothing else is unpickled."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        tensors = dict(content["sae"])
    except Exception as error:
        raise ReplacementError(
            f"{path}: cannot be read as tensors under the key 'sae' ({error}); save it again as safetensors"
        ) from error
    for name, tensor in tensors.items():
        fine = isinstance(tensor, Tensor)
        if not fine or (not name.startswith("dataset_average") and not _finite(tensor)):
            raise ReplacementError(
                f"{path}: {name!r} is no tensor of finite numbers; the file is damaged or its training diverged"
            )
    return {name: HeldTensor(name, tensor.detach()) for name, tensor in tensors.items()}


def _finite(tensor: Tensor) -> bool:
    """Whether the numbers are finite; the buffer IGNORE of a Lorsa is not, and is not used."""
    return tensor.ndim == 0 or not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
