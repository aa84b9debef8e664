"""Tensors that stay in their safetensors file until rows of them are asked for.

A safetensors file is eight bytes (the length of the header, little-endian), a JSON header
`{name: {"dtype", "shape", "data_offsets"}}`, and then the tensors, row-major, without gaps. So the bytes of a row of
a tensor are at a place that can be computed, and a decoder of many gigabytes costs only the rows that are active on a
prompt. Nothing is unpickled.
"""

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from circuits.replacements.errors import ReplacementError

NUMPY_TYPES: dict[str, str] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",  # numpy has no bfloat16
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LONGEST_HEADER = 100_000_000  # bytes; the limit that the safetensors library itself sets


class Rows(Protocol):
    """A matrix (F, D), or a stack of matrices (F, W, D), read by rows; `out` is where they may be put."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, index: Tensor, *, column: int | None = None, out: Tensor | None = None) -> Tensor: ...

    def all(self) -> Tensor: ...


@dataclass(frozen=True)
class LazyTensor:
    """One tensor of a safetensors file, read by rows on demand and given as float32 on the CPU.

    Parameters
    ----------
    path, name
        The file and the tensor's name in it.
    shape
        As the header gives it.
    dtype
        The file's name of the type: "F32", "F16", "BF16", ...
    offset
        Where the tensor's first byte is, counted from the start of the file.
    is_meta
        Nothing is read: what is given is on torch's device "meta" and has a shape, but no content. A single number is
        read all the same: it is a setting and no weight.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    is_meta: bool = False

    def rows(self, index: Tensor, *, column: int | None = None, out: Tensor | None = None) -> Tensor:
        """The rows `index` (n,), in that order, repeats allowed.

        Gives (n, *shape[1:]). With `column=j` a tensor of shape (F, W, D) gives its slices [:, j], (n, D), and the
        other columns are not read. Rows stored as float32 go straight to `out`, where that is given.

        Raises
        ------
        ReplacementError
            A row does not exist, the type is not a float, or a number that was read is not finite.
        """
        rows = index.detach().cpu().long()
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= self.shape[0]):
            bad = int(rows.max()) if int(rows.max()) >= self.shape[0] else int(rows.min())
            raise ReplacementError(
                f"{self.path}: row {bad} of tensor {self.name!r} was asked for, which has {self.shape[0]} rows"
            )
        tail = self.shape[1:] if column is None else self.shape[2:]
        if self.is_meta:
            return torch.empty((len(rows), *tail), device="meta")
        if not len(rows) or 0 in self.shape:
            return torch.zeros((len(rows), *tail))
        stored = self.stored()
        stored = stored if column is None else stored[:, column]
        if self.dtype == "F32":
            return self.checked(torch.index_select(stored, 0, rows, out=out))
        return self.checked(stored.index_select(0, rows).float())

    @property
    def reads_as_stored(self) -> bool:
        """Whether rows need no conversion: `span` then gives them where they lie."""
        return self.dtype == "F32"

    def span(self, first: int, last: int) -> Tensor:
        """The rows `first` to `last` - 1; without a copy if they need no conversion: mapped into memory until `unmap`,
        and not to be written to."""
        if not self.reads_as_stored or 0 in self.shape:
            return self.rows(torch.arange(first, last))
        return self.checked(self.stored()[first:last])

    def all(self) -> Tensor:
        """The whole tensor. For encoders and biases; decoders are read through `rows`."""
        if 0 in self.shape:
            return torch.zeros(self.shape)
        self._check_type()
        if self.is_meta and prod(self.shape) > 1:
            return torch.empty(self.shape, device="meta")
        bits = np.fromfile(self.path, np.uint8, count=prod(self.shape) * self.itemsize, offset=self.offset)
        return self.checked(torch.from_numpy(bits).view(FLOATS[self.dtype]).view(self.shape).float())

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return int(np.dtype(NUMPY_TYPES[self.dtype]).itemsize)

    def stored(self) -> Tensor:
        """The tensor as it lies in its file, mapped into memory."""
        self._check_type()
        if self.is_meta:
            return torch.empty(self.shape, dtype=FLOATS[self.dtype], device="meta")
        file = self.path.stat()
        return _mapped(self.path, (file.st_ino, file.st_mtime_ns, file.st_size), self.dtype, self.shape, self.offset)

    def _check_type(self) -> None:
        if self.dtype not in FLOATS:
            raise ReplacementError(
                f"{self.path}: tensor {self.name!r} has type {self.dtype}, expected one of {', '.join(FLOATS)}; "
                "save the weights as float32, float16 or bfloat16"
            )

    def checked(self, values: Tensor) -> Tensor:
        """The values that were read, if all are finite."""
        if values.is_meta:
            return values
        # A sum is finite only if all terms are; large ones may overflow it, so the terms then decide.
        if not torch.isfinite(values.sum()) and not torch.isfinite(values).all():
            raise ReplacementError(
                f"{self.path}: tensor {self.name!r} holds NaN or infinite values; "
                "the file is damaged or its training diverged: take another checkpoint"
            )
        return values


@lru_cache(maxsize=1024)
def _mapped(path: Path, _version: tuple[int, ...], dtype: str, shape: tuple[int, ...], offset: int) -> Tensor:
    """A tensor's part of its file in memory; kept until `unmap`, for a new mapping has to find every page again.

    The mapping is private to this process and would copy what were written to; nothing is.
    """
    size = prod(shape) * np.dtype(NUMPY_TYPES[dtype]).itemsize
    bits = np.memmap(path, dtype=np.uint8, mode="c", offset=offset, shape=(size,))
    return torch.from_numpy(bits).view(FLOATS[dtype]).view(shape)


def unmap() -> None:
    """Let go of the files that rows were read from: what was read of them counts as this process's memory."""
    _mapped.cache_clear()


@dataclass(frozen=True)
class HeldTensor:
    """A tensor in memory behind the same face as `LazyTensor`: for replacements built in Python."""

    name: str
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def rows(self, index: Tensor, *, column: int | None = None, out: Tensor | None = None) -> Tensor:
        chosen = index.to(self.tensor.device)
        return self.tensor[chosen].float() if column is None else self.tensor[chosen, column].float()

    def all(self) -> Tensor:
        return self.tensor.float()


def open_safetensors(path: Path | str, *, is_meta: bool = False) -> dict[str, LazyTensor]:
    """Read the header of a safetensors file and check that the file is as long as the header says.

    is_meta
        Nothing but the header is ever read: see `LazyTensor`.

    Raises
    ------
    ReplacementError
        The file does not exist, is truncated, or is no safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise ReplacementError(f"{path}: no such file; check the path, or copy the replacement again")
    size = path.stat().st_size
    header, start = _read_header(path, size)
    tensors: dict[str, LazyTensor] = {}
    end_of_data = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        tensor, end = _read_entry(path, name, entry, start)
        tensors[name] = replace(tensor, is_meta=is_meta)
        end_of_data = max(end_of_data, end)
    if start + end_of_data != size:
        what = "is truncated" if start + end_of_data > size else "has bytes that its header does not know"
        raise ReplacementError(
            f"{path}: the file {what}: {size} bytes, expected {start + end_of_data}; copy or download it again"
        )
    return tensors


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The JSON header and the place where the tensors begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or 8 + min(length, LONGEST_HEADER) > size:
            raise ReplacementError(
                f"{path}: the file is truncated or no safetensors file: {size} bytes, its header alone should take "
                f"{8 + length}; copy or download it again"
            )
        try:
            header = json.loads(file.read(min(length, LONGEST_HEADER)))
        except ValueError as error:
            raise ReplacementError(f"{path}: no safetensors file: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise ReplacementError(f"{path}: no safetensors file: its header is not a JSON object")
    return header, 8 + length


def _read_entry(path: Path, name: str, entry: Any, start: int) -> tuple[LazyTensor, int]:
    """One line of the header, and where its tensor ends, counted from `start`."""
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
        begin, end = (int(place) for place in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise ReplacementError(f"{path}: the header's entry of tensor {name!r} cannot be read: {entry!r}") from error
    if dtype not in NUMPY_TYPES:
        raise ReplacementError(
            f"{path}: tensor {name!r} has type {dtype}, which is not supported; "
            "save the weights as float32, float16 or bfloat16"
        )
    needed = prod(shape) * np.dtype(NUMPY_TYPES[dtype]).itemsize
    if begin < 0 or end - begin != needed:
        raise ReplacementError(
            f"{path}: tensor {name!r} of shape {shape} and type {dtype} needs {needed} bytes, "
            f"the header gives it {end - begin}; the file is damaged: copy or download it again"
        )
    return LazyTensor(path, name, shape, dtype, start + begin), end
