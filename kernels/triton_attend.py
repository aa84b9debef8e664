"""Covectors pulled through frozen heads on a GPU, over queries at or after each key and up to each reader only.

Shapes: B covectors, S positions, H query heads, K key-value heads (H = K * G), E head width, D model width.

Of the three products of `circuits.kernels.attend.pull_values` and what follows it, the first (covectors with output
weights) and the last (with value weights) are dense, and a library's. The one between,

    c[b, s, k] = sum over heads h of k, sum_{s <= p <= last_b} A_h[p, s] scale[p] u[b, p, h],

is done here: what is above the diagonal or beyond a covector's own position is neither read nor multiplied, and the
heads of a group are added in registers.

Roofline: `B H E S (S + 1)` operations (half of the dense `2 B H E S^2`) on `B S H E` numbers read, `B S K E` written
and `H S^2 / 2` of the patterns: arithmetic from about S = 50 in float32 on an H200 (67 TFLOP/s, 4.8 TB/s), memory
below. The PyTorch reference multiplies the whole square and moves four arrays of `B S H E` more, for transposes and the
sum over groups.

`pull_readers` and `push_local` have no kernel here: both are library products with the result, `B S D` numbers, as
their limit.
"""

import triton
import triton.language as tl
from torch import Tensor

from circuits.kernels.backend import Products, dot_mode, matmul, on_device
from circuits.kernels.triton_products import product, tile


@triton.jit
def _pull(
    pattern,
    u,
    scale,
    last,
    out,
    n_positions,
    width,
    n_kv,
    head_stride,
    query_stride,
    GROUP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_LAST: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    covector = (tl.program_id(0) // n_kv).to(tl.int64)
    kv = tl.program_id(0) % n_kv
    first = tl.program_id(1) * BLOCK_S
    s = first + tl.arange(0, BLOCK_S)
    e = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    end = n_positions
    if HAS_LAST:
        end = tl.minimum(n_positions, tl.load(last + covector).to(tl.int32) + 1)
    total = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    for member in range(GROUP):
        head = kv * GROUP + member
        for begin in range(first, end, BLOCK_S):
            p = begin + tl.arange(0, BLOCK_S)
            reads = (p < end)[None, :] & (s[:, None] <= p[None, :])
            where = head.to(tl.int64) * head_stride + p.to(tl.int64)[None, :] * query_stride + s[:, None]
            weights = tl.load(pattern + where, mask=reads, other=0.0)
            rows = (covector * n_positions + p) * (n_kv * GROUP) + head
            mask = (p < end)[:, None] & (e < width)[None, :]
            readers = tl.load(u + rows[:, None] * width + e[None, :], mask=mask, other=0.0)
            if HAS_SCALE:
                readers = readers * tl.load(scale + p, mask=p < end, other=0.0)[:, None]
            total = product(weights, readers, total, MODE)
    rows = (covector * n_positions + s) * n_kv + kv
    tl.store(out + rows[:, None] * width + e[None, :], total, mask=(s < n_positions)[:, None] & (e < width)[None, :])


def pull_values(
    pattern_HSS: Tensor,
    g_BSD: Tensor,
    w_o_HED: Tensor,
    n_kv: int,
    scale_S: Tensor | None = None,
    *,
    last_B: Tensor | None = None,
    products: Products = "float32",
) -> Tensor:
    """As `circuits.kernels.attend.pull_values`; patterns must be causal, nothing above their diagonal is read.

    last_B
        (B,) the last position at which each covector has an entry; what lies beyond it is then not read.
    products
        `bfloat16` rounds the factors of all products to it and adds in float32.
    """
    n_heads, width, d_model = w_o_HED.shape
    batch, n, _ = g_BSD.shape
    u = matmul(g_BSD.reshape(batch * n, d_model), w_o_HED.reshape(-1, d_model).T, products)
    out = u.new_empty(batch, n, n_kv * width)
    if not out.numel():
        return out
    pattern = pattern_HSS if pattern_HSS.stride(2) == 1 else pattern_HSS.contiguous()
    block_s, block_e = tile(n, 64), tile(width, 64)
    with on_device(u):
        _pull[(batch * n_kv, triton.cdiv(n, block_s), triton.cdiv(width, block_e))](
            pattern,
            u,
            u if scale_S is None else scale_S.contiguous(),
            u if last_B is None else last_B.contiguous(),
            out,
            n,
            width,
            n_kv,
            pattern.stride(0),
            pattern.stride(1),
            GROUP=n_heads // n_kv,
            HAS_SCALE=scale_S is not None,
            HAS_LAST=last_B is not None,
            MODE=dot_mode(products),
            BLOCK_S=block_s,
            BLOCK_E=block_e,
        )
    return out
