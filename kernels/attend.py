"""Frozen attention as a linear map: covectors are pulled down through it, writers are pushed up.

Shapes: B covectors, N writers, S positions, H query heads, K key-value heads (H = K * G), E head width, D model width.
Patterns are `A[h, query, key]`; a covector has no entry at positions after its reader, so callers cut S to the
positions that they need. Norms are the caller's: everything here starts and ends at the normalised stream.
"""

import torch
from torch import Tensor


def pull_readers(pattern_HSS: Tensor, positions_B: Tensor, u_BHE: Tensor, w_v_KED: Tensor, n_keys: int) -> Tensor:
    """Pull readers of the concatenated head outputs at one position each down to the keys that the heads read.

    Returns (B, n_keys, D): `c[b, s] = sum_h A_h[p_b, s] u[b, h] V_h`.
    """
    n_kv, width, d_model = w_v_KED.shape
    batch = len(positions_B)
    a_BKGS = pattern_HSS[:, positions_B, :n_keys].transpose(0, 1).reshape(batch, n_kv, -1, n_keys)
    u_BKGE = u_BHE.reshape(batch, n_kv, -1, width)
    c_BSKE = torch.einsum("bkgs,bkge->bske", a_BKGS, u_BKGE)
    return c_BSKE.reshape(batch, n_keys, n_kv * width) @ w_v_KED.reshape(n_kv * width, d_model)


def pull_values(pattern_HSS: Tensor, g_BSD: Tensor, w_o_HED: Tensor, n_kv: int) -> Tensor:
    """Pull covectors that stand at every position of an attention output down to the values below it.

    Returns (B, S, K * E): `c[b, s, k] = sum_p sum of heads h of k, A_h[p, s] g[b, p] O_h`.
    """
    n_heads, width, d_model = w_o_HED.shape
    batch, n, _ = g_BSD.shape
    u_BHSE = (g_BSD @ w_o_HED.reshape(-1, d_model).T).view(batch, n, n_heads, width).transpose(1, 2)
    c_BHSE = pattern_HSS[:, :n, :n].transpose(1, 2) @ u_BHSE
    c_BKSE = c_BHSE.reshape(batch, n_kv, -1, n, width).sum(2)
    return c_BKSE.transpose(1, 2).reshape(batch, n, n_kv * width)


def pull_stream(pattern_HSS: Tensor, g_BSD: Tensor, w_o_HED: Tensor, w_v_KED: Tensor) -> Tensor:
    """The same down to the normalised stream: (B, S, D), `c[b, s] = sum_h sum_p A_h[p, s] g[b, p] O_h V_h`."""
    return pull_values(pattern_HSS, g_BSD, w_o_HED, w_v_KED.shape[0]) @ w_v_KED.flatten(0, 1)


def push_values(x_NSD: Tensor, w_v_KED: Tensor, n_heads: int) -> Tensor:
    """Values of every query head, (..., H, E), of normalised stream vectors (..., D)."""
    n_kv, width, d_model = w_v_KED.shape
    v = x_NSD @ w_v_KED.reshape(n_kv * width, d_model).T
    v = v.reshape(*v.shape[:-1], n_kv, 1, width)
    return v.expand(*v.shape[:-2], n_heads // n_kv, width).flatten(-3, -2)


def push_stream(pattern_HSS: Tensor, x_NSD: Tensor, w_o_HED: Tensor, w_v_KED: Tensor) -> Tensor:
    """Push writers that stand at every position of the normalised stream up to the attention output.

    Returns (N, S, D): `y[n, p] = sum_h sum_s A_h[p, s] O_h V_h x[n, s]`; the adjoint of `pull_stream`.
    """
    n_heads, _, d_model = w_o_HED.shape
    n = x_NSD.shape[1]
    v_NHSE = push_values(x_NSD, w_v_KED, n_heads).transpose(1, 2)
    z_NSHE = (pattern_HSS[:, :n, :n] @ v_NHSE).transpose(1, 2)
    return z_NSHE.flatten(2) @ w_o_HED.reshape(-1, d_model)
