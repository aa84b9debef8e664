"""Matrices that differ from stored ones by factors or a transpose, or are made of several, read by rows like these.

Letters of shapes: F features, D width of what is read or written, r a rank.
"""

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from circuits.replacements.errors import ReplacementError
from circuits.replacements.weights import HeldTensor, LazyTensor, Rows

Stored = LazyTensor | HeldTensor


def part(stored: Stored, index: int) -> Stored:
    """Entry `index` of the first axis, still in its file."""
    if isinstance(stored, HeldTensor):
        return HeldTensor(f"{stored.name}[{index}]", stored.tensor[index])
    size = prod(stored.shape[1:]) * stored.itemsize
    return replace(stored, name=f"{stored.name}[{index}]", shape=stored.shape[1:], offset=stored.offset + index * size)


@dataclass(frozen=True)
class _Multiplied:
    """`inner` (F, D) with its rows, or its columns, multiplied by `factor`."""

    inner: Rows
    factor: Tensor

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape


@dataclass(frozen=True)
class Scaled(_Multiplied):
    """`inner` (F, D), row f multiplied by `factor[f]`."""

    def rows(self, index: Tensor, *, column: int | None = None, out: Tensor | None = None) -> Tensor:
        found = self.inner.rows(index, column=column, out=out)
        return found.mul_(self.factor.to(found.device)[index.to(found.device)].unsqueeze(1))

    def all(self) -> Tensor:
        found = self.inner.all()
        return found * self.factor.to(found.device).unsqueeze(1)


@dataclass(frozen=True)
class ColumnScaled(_Multiplied):
    """`inner` (F, D), column d multiplied by `factor[d]`."""

    def rows(self, index: Tensor, *, column: int | None = None, out: Tensor | None = None) -> Tensor:
        found = self.inner.rows(index, column=column, out=out)
        return found.mul_(self.factor.to(found.device))

    def all(self) -> Tensor:
        found = self.inner.all()
        return found * self.factor.to(found.device)


@dataclass(frozen=True)
class Joined:
    """The rows of several matrices (F_i, D), one below the other; given on the CPU."""

    pieces: tuple[Rows, ...]

    @property
    def name(self) -> str:
        return self.pieces[0].name

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(piece.shape[0] for piece in self.pieces), *self.pieces[0].shape[1:])

    def rows(self, index: Tensor, *, column: int | None = None, out: Tensor | None = None) -> Tensor:
        assert column is None
        index, first = index.cpu(), 0
        found = torch.zeros(len(index), *self.shape[1:])
        for piece in self.pieces:
            mine = (index >= first) & (index < first + piece.shape[0])
            if mine.any():
                found[mine] = piece.rows(index[mine] - first).cpu()
            first += piece.shape[0]
        return found

    def all(self) -> Tensor:
        return torch.cat([piece.all().cpu() for piece in self.pieces])


@dataclass(frozen=True)
class LowRank:
    """The product of `left` (F, r) and `right` (r, D), added to `base` (F, D)."""

    left: Rows
    right: Tensor
    base: Rows

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def rows(self, index: Tensor, *, column: int | None = None, out: Tensor | None = None) -> Tensor:
        assert column is None
        left = self.left.rows(index)
        return self.base.rows(index) + left @ self.right.to(left)

    def all(self) -> Tensor:
        left = self.left.all()
        return self.base.all() + left @ self.right.to(left)


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

    def rows(self, index: Tensor, *, column: int | None = None, out: Tensor | None = None) -> Tensor:
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
    if lazy.is_meta:
        return torch.empty(len(index), lazy.shape[0], device="meta")
    stored = lazy.stored()
    near = last - first == len(index)
    chosen = stored[:, first:last] if near else stored.index_select(1, index.cpu())
    found = lazy.checked(chosen.T.float().contiguous())
    return found[index.cpu() - first] if near else found
