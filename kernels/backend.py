"""Which implementation a kernel runs on, and how exactly it multiplies.

A kernel has a plain PyTorch reference and may have a Triton kernel beside it. Tensors on a GPU take the Triton kernel
where Triton is installed; everything else takes PyTorch. The variable CIRCUITS_KERNELS (`triton` or `torch`) forces one
of the two, for tests and measurements; `triton` on the CPU needs Triton's interpreter, TRITON_INTERPRET=1, set before
Triton is imported.
"""

import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

Products = Literal["float32", "bfloat16"]
PRODUCTS: tuple[Products, ...] = get_args(Products)


def products_of(name: str) -> Products:
    """The products of that name."""
    for known in PRODUCTS:
        if name == known:
            return known
    raise ValueError(f"unknown products {name!r}, expected one of {', '.join(PRODUCTS)}")


@cache
def has_triton() -> bool:
    """Whether Triton is installed; it is not imported for that."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's interpreter is asked for."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(*tensors: Tensor) -> bool:
    """Whether a kernel on these tensors runs on Triton: on a GPU, not in float64, and not where autograd watches."""
    forced = os.environ.get("CIRCUITS_KERNELS", "")
    if forced not in ("", "torch", "triton"):
        raise ValueError(f"CIRCUITS_KERNELS is {forced!r}, expected triton or torch, or leave it unset")
    if forced == "torch" or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        return False
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return False
    on_gpu = all(tensor.is_cuda for tensor in tensors)
    if forced == "triton":
        if not has_triton():
            raise RuntimeError("CIRCUITS_KERNELS is triton, but it is missing; pip install 'attention-circuits[gpu]'")
        if not on_gpu and not interpreted():
            raise RuntimeError("CIRCUITS_KERNELS is triton, but the tensors are on the CPU; set TRITON_INTERPRET=1 too")
        return True
    return on_gpu and has_triton()


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: makes it the tensor's, for models that span several GPUs."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def dot_mode(products: Products) -> str:
    """How a Triton kernel multiplies: `ieee` float32 (no TF32), `bfloat16`, or `rounded` to it beforehand, which gives
    the same products and is what the interpreter can do (it multiplies the bits of bfloat16 as integers)."""
    if products_of(products) == "float32":
        return "ieee"
    return "rounded" if interpreted() else "bfloat16"


@cache
def multiplies_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices itself; others would do it number by number."""
    return torch._C._has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def matmul(a: Tensor, b: Tensor, products: Products = "float32", *, round_sum: bool = False) -> Tensor:
    """`a @ b` of matrices, summed in float32; with `bfloat16` both are rounded to it first.

    A product of two bfloat16 numbers is exact in float32, so off the GPU the rounded operands are multiplied there,
    which is no faster. With `round_sum` the sum may be rounded to bfloat16 too: what torch does, at about twice the
    speed, on a CPU that multiplies bfloat16 itself.
    """
    if products == "float32":
        return a @ b
    if a.is_cuda:
        return torch.mm(a.bfloat16(), b.bfloat16(), out_dtype=torch.float32)
    if round_sum and multiplies_bfloat16():
        return (a.bfloat16() @ b.bfloat16()).float()
    return a.bfloat16().float() @ b.bfloat16().float()


def observed_error(product: Callable[[Products], Tensor]) -> float:
    """The relative error that bfloat16 products make in a result, against float32 ones: largest difference over the
    largest magnitude. `product` computes the result with the products that it is told."""
    exact = product("float32").double()
    scale = float(exact.abs().max()) if exact.numel() else 0.0
    return float((product("bfloat16").double() - exact).abs().max()) / scale if scale else 0.0
