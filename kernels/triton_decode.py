"""Gather-decode on a GPU: a segment sum over the entries of each position.

Letters of shapes: T positions, D width, n entries, M rows held.

Roofline: memory. Each decoder row is read once an entry, `n D` numbers, and `T D` are written; `2 n D` operations are
too few to matter (0.5 an octet, a card has 10 to 200). PyTorch's gather, product and `index_add_` move `n D` numbers
six times, need `n D` of memory, and add with atomics in an order that changes from run to run; here a position's
entries are added in their order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from circuits.kernels.backend import on_device
from circuits.kernels.triton_products import tile


@triton.jit
def _decode(
    starts,
    order,
    features,
    activations,
    rows,
    out,
    width,
    row_stride,
    HAS_FEATURES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(starts + position)
    last = tl.load(starts + position + 1)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for begin in range(first, last, BLOCK_N):
        at = begin + tl.arange(0, BLOCK_N)
        inside = at < last
        entry = tl.load(order + at, mask=inside, other=0)
        row = tl.load(features + entry, mask=inside, other=0) if HAS_FEATURES else entry
        activation = tl.load(activations + entry, mask=inside, other=0.0).to(tl.float32)
        mask = inside[:, None] & (d < width)[None, :]
        vectors = tl.load(rows + row.to(tl.int64)[:, None] * row_stride + d[None, :], mask=mask, other=0.0)
        total += tl.sum(vectors.to(tl.float32) * activation[:, None], 0)
    tl.store(out + position * width + d, total, mask=d < width)


def gather_decode(
    positions: Tensor, features: Tensor | None, activations: Tensor, rows: Tensor, n_positions: int
) -> Tensor:
    """As `circuits.kernels.decode.gather_decode`; entries in any order (sorting sorted ones is little)."""
    width = rows.shape[1]
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = rows.new_empty(n_positions, width)
    if not out.numel():
        return out
    ordered, order = torch.sort(positions, stable=True)
    every = torch.arange(n_positions + 1, device=positions.device, dtype=ordered.dtype)
    starts = torch.searchsorted(ordered, every)
    block = tile(width, 128)
    with on_device(rows):
        _decode[(n_positions, triton.cdiv(width, block))](
            starts,
            order,
            order if features is None else features.contiguous(),
            activations.contiguous(),
            rows,
            out,
            width,
            rows.stride(0),
            HAS_FEATURES=features is not None,
            BLOCK_N=16,
            BLOCK_D=block,
        )
    return out
