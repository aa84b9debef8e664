"""The tensors of an OpenMOSS checkpoint."""

from pathlib import Path

import torch
from torch import Tensor

from circuits.replacements.errors import ReplacementError, wrong_shape
from circuits.replacements.weights import HeldTensor, Rows, open_safetensors
from circuits.replacements.weights_views import Stored

BLOCK = 4096  # decoder rows in memory at once while their norms are taken


def squares(decoder: Rows) -> Tensor:
    """(F,) the squared norms of a decoder's rows, a block at a time."""
    blocks = torch.split(torch.arange(decoder.shape[0]), BLOCK)
    return torch.cat([decoder.rows(block).double().square().sum(1) for block in blocks])


class Checkpoint:
    """The tensors of one `.safetensors` or `.pt` file. Every method raises `ReplacementError` for a bad one.

    On the device "meta" no weight is read: see `LazyTensor`.
    """

    def __init__(self, path: Path, device: str) -> None:
        self.path, self._device = path, device
        self._tensors: dict[str, Stored] = {}
        if path.suffix == ".safetensors":
            self._tensors.update(open_safetensors(path, is_meta=device == "meta"))
        else:
            self._tensors.update(_unpack(path, is_meta=device == "meta"))

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

    def number(self, name: str) -> float:
        """A tensor of a single number."""
        return float(self.stored(name, ()).all())

    def n_rows(self, name: str) -> int:
        """The first size of a tensor."""
        return self._tensors[name].shape[0] if name in self._tensors else 0


def _unpack(path: Path, *, is_meta: bool) -> dict[str, HeldTensor]:
    """A `.pt` file `{"sae": {name: tensor}, "version": ...}`: tensors and nothing else is unpickled.

    is_meta
        Only single numbers are read, as by `LazyTensor`.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        tensors = dict(content["sae"])
    except Exception as error:
        raise ReplacementError(
            f"{path}: cannot be read as tensors under the key 'sae' ({error}); save it again as safetensors"
        ) from error
    for name, tensor in tensors.items():
        fine = isinstance(tensor, Tensor)
        if fine and is_meta and tensor.ndim:
            tensors[name] = tensor.to("meta")
        elif not fine or (not name.startswith("dataset_average") and not _finite(tensor)):
            raise ReplacementError(
                f"{path}: {name!r} is no tensor of finite numbers; the file is damaged or its training diverged"
            )
    return {name: HeldTensor(name, tensor.detach()) for name, tensor in tensors.items()}


def _finite(tensor: Tensor) -> bool:
    """Whether the numbers are finite; the buffer IGNORE of a Lorsa is not, and is not used."""
    return tensor.ndim == 0 or not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
