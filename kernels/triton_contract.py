"""The grouped product of readers with writers on a GPU: one launch for all positions, however ragged.

Shapes: B covectors, N writers, S positions, D model width; M columns of the weights.

Roofline: `2 B N D` operations on `(B S + N) D + 2 B N` numbers, so arithmetic for more than about 50 covectors (float32
on an H200: 67 TFLOP/s, 4.8 TB/s), memory below. PyTorch launches one product a position, each too small to fill a card:
with 64 positions of 100 writers, 768 wide, and 256 covectors, one is 0.04 GFLOP, less time than its launch. A block of
covectors that has ended before a position (`last_B`) is skipped there.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from circuits.kernels.backend import Products, dot_mode, on_device
from circuits.kernels.triton_products import product, tile

TILE = 64  # writers of one tile


@triton.jit
def _contract(
    weights,
    g,
    writers,
    tiles,
    last,
    n_covectors,
    width,
    weights_stride,
    g_stride,
    position_stride,
    writer_stride,
    HAS_LAST: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(n_covectors, BLOCK_B)  # covectors vary fastest, so that a tile of writers stays in the cache
    number = tl.program_id(0) // blocks
    b = (tl.program_id(0) % blocks) * BLOCK_B + tl.arange(0, BLOCK_B)
    position = tl.load(tiles + number * 4)
    first = tl.load(tiles + number * 4 + 1)
    end = tl.load(tiles + number * 4 + 2)
    column = tl.load(tiles + number * 4 + 3)
    there = b < n_covectors
    reached = position
    if HAS_LAST:
        reached = tl.max(tl.load(last + b, mask=there, other=-1), 0).to(tl.int64)
    if reached >= position:
        n = tl.arange(0, BLOCK_N)
        mine = first + n < end
        total = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
        g_rows = g + b.to(tl.int64)[:, None] * g_stride + position * position_stride
        writer_rows = writers + (first + n)[None, :] * writer_stride
        for begin in range(0, width, BLOCK_D):
            d = begin + tl.arange(0, BLOCK_D)
            inside = d < width
            covectors = tl.load(g_rows + d[None, :], mask=there[:, None] & inside[None, :], other=0.0)
            vectors = tl.load(writer_rows + d[:, None], mask=mine[None, :] & inside[:, None], other=0.0)
            total = product(covectors, vectors, total, MODE)
        at = weights + b.to(tl.int64)[:, None] * weights_stride + (column + n)[None, :]
        mask = there[:, None] & mine[None, :]
        tl.store(at, tl.load(at, mask=mask, other=0.0) + total, mask=mask)


def contract_spread(
    weights_BM: Tensor,
    g_BSD: Tensor,
    writers_ND: Tensor,
    starts: Sequence[int],
    columns: Sequence[int],
    *,
    last_B: Tensor | None = None,
    products: Products = "float32",
) -> None:
    """As `circuits.kernels.contract.contract_spread`, in place.

    last_B
        (B,) the last position at which each covector has an entry; zeros beyond it are then not multiplied.
    products
        `bfloat16` rounds covectors and writers to it and adds the products in float32.
    """
    batch, n_positions, width = g_BSD.shape
    tiles = _tiles(starts, columns, n_positions)
    if not len(tiles) or not batch:
        return
    g, writers = _rows(g_BSD), _rows(writers_ND)
    assert weights_BM.stride(1) == 1, "weights are written in place, row by row"
    block = tile(batch, 64)
    with on_device(g):
        _contract[(len(tiles) * triton.cdiv(batch, block),)](
            weights_BM,
            g,
            writers,
            tiles.to(g.device, non_blocking=True),
            g if last_B is None else last_B,
            batch,
            width,
            weights_BM.stride(0),
            g.stride(0),
            g.stride(1),
            writers.stride(0),
            HAS_LAST=last_B is not None,
            MODE=dot_mode(products),
            BLOCK_B=block,
            BLOCK_N=TILE,
            BLOCK_D=32,
        )


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _tiles(starts: Sequence[int], columns: Sequence[int], n_positions: int) -> Tensor:
    """(tiles, 4) on the CPU: position, first writer, end of the position's writers, first column."""
    begin = torch.tensor(list(starts[:n_positions]), dtype=torch.long)
    end = torch.tensor(list(starts[1 : n_positions + 1]), dtype=torch.long)
    column = torch.tensor(list(columns[:n_positions]), dtype=torch.long)
    count = (end - begin + TILE - 1) // TILE
    position = torch.repeat_interleave(torch.arange(n_positions), count)
    within = (torch.arange(len(position)) - torch.repeat_interleave(count.cumsum(0) - count, count)) * TILE
    return torch.stack([position, begin[position] + within, end[position], column[position] + within], dim=1)
