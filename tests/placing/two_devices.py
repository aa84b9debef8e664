"""A test double of a machine with GPUs: tensors on `distant:0` and `distant:1` that are really on the CPU.

A `Distant` tensor wraps one of the CPU and says that it is elsewhere, as PyTorch's own FakeTensor does; unlike that it
has numbers. Within `devices()` every operation is seen before it runs: one on tensors of two devices raises as CUDA
would, `.to`, `.cpu` and `copy_` are the ways across, and what is made with `device=` is where it should be. As on a GPU
a tensor of the CPU may be an index, or a number without dimensions, and nothing else; `numpy` works on the CPU only.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

CPU = torch.device("cpu")
HOME, OTHER = torch.device("privateuseone", 0), torch.device("privateuseone", 1)  # PyTorch's free device type
CROSSING = ("aten::copy_", "aten::_to_copy", "aten::_local_scalar_dense")


class Distant(Tensor):
    """A tensor of the CPU that says it is on another device."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor, device: torch.device | None = None, requires_grad: bool = False) -> Any:
        if device is None:  # accelerate makes a parameter anew by its class
            return near
        made: Distant = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=device,
        )
        made.near = near
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Distant({self.near!r}, {self.device})"

    def data_ptr(self) -> int:
        return self.near.data_ptr()

    def tolist(self) -> Any:
        return self.near.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def _near(value: Any) -> Any:
    return value.near if isinstance(value, Distant) else value


def run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """One operation of PyTorch, on whatever device its tensors are."""
    given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    name = func._schema.name
    device = _meeting(name, args, given) if name not in CROSSING else given[0].device
    if (asked := kwargs.get("device")) is not None:
        device, kwargs = torch.device(asked), {**kwargs, "device": CPU}
    near = tree_map(_near, (args, kwargs))
    found = func(*near[0], **near[1])
    if device == CPU and not any(isinstance(value, Distant) for value in given):
        return found
    mutated = [
        kwargs.get(a.name) if a.kwarg_only else args[i] if i < len(args) else kwargs.get(a.name)
        for i, a in enumerate(func._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]
    if mutated and len(func._schema.returns) == 1:
        return mutated[0]
    if device == CPU:
        return found
    return tree_map(lambda value: Distant(value, device) if isinstance(value, Tensor) else value, found)


def _meeting(name: str, args: Sequence[Any], given: Sequence[Tensor]) -> torch.device:
    """The one device of an operation's tensors."""
    if name.startswith("aten::index") and len(args) > 1 and isinstance(args[1], list | tuple):
        given = [tensor for tensor in given if tensor.device != CPU or tensor is args[0]]
    found = {tensor.device for tensor in given if tensor.ndim or tensor.device != CPU} or {CPU}
    if len(found) > 1:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {sorted(map(str, found))}")
    return found.pop()


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


@contextmanager
def devices() -> Iterator[None]:
    """Within the context there are `distant:0` and `distant:1`."""
    _register()
    before = torch._C._only_lift_cpu_tensors()  # type: ignore[attr-defined]
    torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
    try:
        with _Mode():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)  # type: ignore[attr-defined]


@cache
def _register() -> None:
    """Give PyTorch's free device type this name, and what it asks of one."""
    _setup_privateuseone_for_python_backend("distant")
