"""Frozen attention as a linear map: covectors are pulled down through it, writers are pushed up.

Shapes: B covectors, N writers, S positions, H query heads, K key-value heads (H = K * G), E head width, D model width.
Patterns are `A[h, query, key]`; a covector has no entry at positions after its reader, so callers cut S to the
positions that they need. Norms are the caller's: everything here starts and ends at the normalised stream.
"""

import torch
from torch import Tensor

from circuits.kernels.backend import Products, matmul, use_triton

KEYS = 256  # positions in a block of keys


def pull_readers(pattern_HSS: Tensor, positions_B: Tensor, u_BHE: Tensor, w_v_KED: Tensor, n_keys: int) -> Tensor:
    """Pull readers of the concatenated head outputs at one position each down to the keys that the heads read.

    Returns (B, n_keys, D): `c[b, s] = sum_h A_h[p_b, s] u[b, h] V_h`. Each reader goes through each head's values once,
    whatever the number of keys.
    """
    n_kv = len(w_v_KED)
    batch, n_heads, width = u_BHE.shape
    u_KBGE = u_BHE.view(batch, n_kv, -1, width).transpose(0, 1).reshape(n_kv, -1, width)
    w_BHD = (u_KBGE @ w_v_KED).view(n_kv, batch, n_heads // n_kv, -1).transpose(0, 1).reshape(batch, n_heads, -1)
    return pattern_HSS[:, positions_B, :n_keys].permute(1, 2, 0) @ w_BHD


def pull_values(
    pattern_HSS: Tensor,
    g_BSD: Tensor,
    w_o_HED: Tensor,
    n_kv: int,
    scale_S: Tensor | None = None,
    products: Products = "float32",
) -> Tensor:
    """Pull covectors that stand at every position of an attention output down to the values below it.

    Returns (B, S, K * E): `c[b, s, k] = sum_p sum of heads h of k, A_h[p, s] scale[p] g[b, p] O_h`; without `scale_S`
    the scale is one. With `bfloat16` products the factors of those with weights are rounded to it, on a GPU those with
    patterns too.
    """
    if use_triton(g_BSD, w_o_HED):
        from circuits.kernels.triton_attend import pull_values as on_triton

        return on_triton(pattern_HSS, g_BSD, w_o_HED, n_kv, scale_S, products=products)
    n_heads, width, d_model = w_o_HED.shape
    batch, n, _ = g_BSD.shape
    u = matmul(g_BSD.reshape(batch * n, d_model), w_o_HED.reshape(-1, d_model).T, products, round_sum=True)
    if scale_S is not None:
        u.view(batch, n, -1).mul_(scale_S[:n, None])
    u_HSBE = u.view(batch, n, n_heads, width).permute(2, 1, 0, 3).reshape(n_heads, n, batch * width)
    c_HSBE = u.new_empty(n_heads, n, batch * width)
    for first in range(0, n, KEYS):  # a key is read by the queries from its own position on
        keys = slice(first, min(first + KEYS, n))
        pattern = pattern_HSS[:, first:n, keys].transpose(1, 2)
        torch.bmm(pattern, u_HSBE[:, first:], out=c_HSBE[:, keys])
    c_KSBE = c_HSBE.view(n_kv, -1, n, batch * width).sum(1) if n_kv < n_heads else c_HSBE
    return c_KSBE.view(n_kv, n, batch, width).permute(2, 1, 0, 3).reshape(batch, n, n_kv * width)


def push_values(x_NSD: Tensor, w_v_KED: Tensor, n_heads: int) -> Tensor:
    """Values of every query head, (..., H, E), of normalised stream vectors (..., D)."""
    n_kv, width, d_model = w_v_KED.shape
    v = x_NSD @ w_v_KED.reshape(n_kv * width, d_model).T
    v = v.reshape(*v.shape[:-1], n_kv, 1, width)
    return v.expand(*v.shape[:-2], n_heads // n_kv, width).flatten(-3, -2)


def push_local(pattern_HSS: Tensor, positions_N: Tensor, v_NHE: Tensor, w_o_HED: Tensor) -> Tensor:
    """Push head values that stand at one position each up to the attention output everywhere.

    Returns (N, S, D): `y[n, p] = sum_h A_h[p, s_n] v[n, h] O_h`; the adjoint of `pull_readers`.
    """
    w_NHD = (v_NHE.transpose(0, 1) @ w_o_HED).transpose(0, 1)
    return pattern_HSS[:, :, positions_N].permute(2, 1, 0) @ w_NHD


def push_stream(pattern_HSS: Tensor, x_NSD: Tensor, w_o_HED: Tensor, w_v_KED: Tensor) -> Tensor:
    """Push writers that stand at every position of the normalised stream up to the attention output.

    Returns (N, S, D): `y[n, p] = sum_h sum_s A_h[p, s] O_h V_h x[n, s]`.
    """
    n_heads, _, d_model = w_o_HED.shape
    n = x_NSD.shape[1]
    v_NHSE = push_values(x_NSD, w_v_KED, n_heads).transpose(1, 2)
    z_NSHE = (pattern_HSS[:, :n, :n] @ v_NHSE).transpose(1, 2)
    return z_NSHE.flatten(2) @ w_o_HED.reshape(-1, d_model)
