"""Take tensors out of a safetensors file by name, with the shape that the format calls for."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from circuits.replacements.errors import ReplacementError, wrong_shape
from circuits.replacements.weights import LazyTensor, open_safetensors


class Tensors:
    """The tensors of one file. Every method raises `ReplacementError` for a missing or misshapen one.

    On the device "meta" no more than the header is read: see `LazyTensor`.
    """

    def __init__(self, path: Path, device: str) -> None:
        self.path = path
        self._device = device
        self._tensors = open_safetensors(path, is_meta=device == "meta")

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def lazy(self, name: str, shape: Sequence[int | str]) -> LazyTensor:
        """A tensor left in the file. A letter in `shape` stands for any size."""
        if name not in self._tensors:
            raise ReplacementError(
                f"{self.path}: tensor {name!r} is missing, expected with shape ({', '.join(map(str, shape))}); "
                f"the file has {', '.join(sorted(self._tensors)) or 'no tensors'}"
            )
        tensor = self._tensors[name]
        fits = len(shape) == len(tensor.shape) and all(
            isinstance(want, str) or want == have for want, have in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            raise wrong_shape(self.path, name, shape, tensor.shape)
        return tensor

    def matrix_shape(self, name: str) -> tuple[int, int]:
        """(features, width) of an encoder, from the header alone."""
        n_features, width = self.lazy(name, ("features", "width")).shape
        return n_features, width

    def whole(self, name: str, shape: Sequence[int | str]) -> Tensor:
        """The tensor as float32 on the device."""
        return self.lazy(name, shape).all().to(self._device)

    def optional(self, name: str, shape: Sequence[int | str]) -> Tensor | None:
        """The same, None where the file has no such tensor."""
        return self.whole(name, shape) if name in self else None

    def number(self, name: str, shape: Sequence[int | str] = ()) -> float:
        """A tensor of a single number."""
        return float(self.lazy(name, shape).all())

    def is_zero(self, name: str, shape: Sequence[int | str]) -> bool:
        """Whether a tensor is zero everywhere; one that is not read is taken to be."""
        found = self.whole(name, shape)
        return found.is_meta or not found.any()

    def threshold(self, name: str, n_features: int) -> Tensor:
        """One threshold for each feature, (F,), or a single number, () or (1,)."""
        if name in self and self._tensors[name].shape in ((), (1,)):
            return self.whole(name, self._tensors[name].shape)
        return self.whole(name, (n_features,))
