"""Encode on a GPU: norm, product, activation and sparse output in one pass; `positions x features` is never dense.

Letters of shapes: T positions, F features, D width of the read site, n active entries.

A program computes the pre-activations of a tile of positions and features in registers, counts the active ones, takes
so many places of the output with one atomic addition, and writes position, feature and value there. The places come in
an order that changes from run to run, the entries do not: sorted by their distinct keys `position F + feature` they are
the same each time. If the places run out, the count goes on, and a second run has room for all.

Roofline: `2 T F D` operations on `F D + T D` numbers read and 12 octets written an active entry: memory up to about
T = 28 in float32 on an H200 (67 TFLOP/s, 4.8 TB/s; T = 330 with bfloat16 products), arithmetic above. The PyTorch
reference writes and reads the pre-activations, `T F` numbers, about five times in addition (bias, compare, nonzero,
gather): the larger part where memory is the limit and D is below a few hundred, a twentieth where arithmetic is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from circuits.kernels.backend import Products, dot_mode, on_device
from circuits.kernels.triton_products import product, tile

ROOM = 512  # entries a position that are expected at most; more are found by a second run


@triton.jit
def _encode(
    x,
    mean,
    scale,
    gain,
    offset,
    weights,
    bias,
    threshold,
    count,
    keys,
    values,
    n_positions,
    n_features,
    width,
    room,
    x_stride,
    weights_stride,
    threshold_stride,
    NORM: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)  # varies fastest: a tile of the encoder stays in the cache
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    here, there = t < n_positions, f < n_features
    x_rows = x + t.to(tl.int64)[:, None] * x_stride
    encoder_rows = weights + f.to(tl.int64)[None, :] * weights_stride
    if NORM:
        centre = tl.load(mean + t, mask=here, other=0.0)[:, None]
        factor = tl.load(scale + t, mask=here, other=0.0)[:, None]
    total = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
    for begin in range(0, width, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        inside = d < width
        read = tl.load(x_rows + d[None, :], mask=here[:, None] & inside[None, :], other=0.0)
        if NORM:
            read = (read - centre) * factor * tl.load(gain + d, mask=inside, other=0.0)[None, :]
            read += tl.load(offset + d, mask=inside, other=0.0)[None, :]
        rows = tl.load(encoder_rows + d[:, None], mask=there[None, :] & inside[:, None], other=0.0)
        total = product(read, rows, total, MODE)
    pre = total + tl.load(bias + f, mask=there, other=0.0).to(tl.float32)[None, :]
    least = tl.load(threshold + f * threshold_stride, mask=there, other=0.0).to(tl.float32)[None, :]
    active = (pre > least) & (pre != 0.0) & here[:, None] & there[None, :]
    ones = active.to(tl.int32)
    in_row = tl.sum(ones, 1)
    place = (tl.cumsum(in_row, 0) - in_row)[:, None] + tl.cumsum(ones, 1) - 1
    at = tl.atomic_add(count, tl.sum(in_row, 0).to(tl.int64)) + place
    kept = active & (at < room)
    tl.store(keys + at, t.to(tl.int64)[:, None] * n_features + f[None, :], mask=kept)
    tl.store(values + at, pre, mask=kept)


def encode_gated(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    norm: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    products: Products = "float32",
) -> tuple[Tensor, Tensor, Tensor]:
    """Entries whose pre-activation is above the threshold and not zero, for activations that judge each by itself.

    Parameters
    ----------
    x, W_enc, b_enc
        (T, D), (F, D) and (F,).
    threshold
        (F,) or one number.
    norm
        Mean (T,), one over the denominator (T,), gain (D,) and bias (D,): the product reads
        `(x - mean) scale gain + bias`.
    products
        `bfloat16` rounds what is read and the encoder to it and adds the products in float32.

    Returns
    -------
    positions, features, pre_activations
        (n,) each, sorted by position, then feature.
    """
    n_positions, width = x.shape
    n_features = len(W_enc)
    room = min(n_positions * n_features, max(1 << 16, ROOM * n_positions))
    x, W_enc = (y if y.stride(1) == 1 else y.contiguous() for y in (x, W_enc))
    block_t, block_f = tile(n_positions, 64), tile(n_features, 64)
    grid = (triton.cdiv(n_positions, block_t), triton.cdiv(n_features, block_f))
    while True:
        count = torch.zeros(1, dtype=torch.long, device=x.device)
        keys = torch.empty(room, dtype=torch.long, device=x.device)
        values = torch.empty(room, dtype=torch.float32, device=x.device)
        if n_positions and n_features:
            with on_device(x):
                _encode[grid](
                    x,
                    *((x, x, x, x) if norm is None else (part.contiguous() for part in norm)),
                    W_enc,
                    b_enc.contiguous(),
                    threshold.contiguous(),
                    count,
                    keys,
                    values,
                    n_positions,
                    n_features,
                    width,
                    room,
                    x.stride(0),
                    W_enc.stride(0),
                    int(threshold.numel() > 1),
                    NORM=norm is not None,
                    MODE=dot_mode(products),
                    BLOCK_T=block_t,
                    BLOCK_F=block_f,
                    BLOCK_D=32,
                )
        found = int(count)
        if found <= room:
            break
        room = found
    ordered, order = torch.sort(keys[:found])
    return ordered // max(1, n_features), ordered % max(1, n_features), values[order]
