"""Move: features from the positions where they are active to those where attention carries them.

Plain PyTorch on any device; Triton on a GPU (`triton_move.py`).

Letters of shapes: T positions, F features, H heads, n active entries, m distinct features among them, r rank.
"""

import torch
from torch import Tensor

from circuits.kernels.backend import use_triton


def move_features(
    positions: Tensor, features: Tensor, values: Tensor, loading: Tensor, pattern: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`moved[p, f] = sum_s P_f[p, s] values[s, f]` with `P_f = sum_h loading_fh A_h + loading_f,id I`.

    Only features that are active somewhere are moved, so nothing of size T x F exists. Summed in float64: loadings are
    signed, and what heads carry may cancel.

    Parameters
    ----------
    positions, features
        (n,) the active entries.
    values
        (n,) or (n, r).
    loading
        (F, H + 1), the last column for the identity.
    pattern
        (H, T, T), [query, key].

    Returns
    -------
    positions, features, values
        (k,), (k,), and (k,) or (k, r): what arrives, exact zeros left out; sorted by position, then feature.
    """
    if use_triton(values, loading, pattern):
        from circuits.kernels.triton_move import move_features as on_triton

        return on_triton(positions, features, values, loading, pattern)
    n_positions = pattern.shape[-1]
    unique, place = torch.unique(features, return_inverse=True)
    wide = (values.unsqueeze(-1) if values.ndim == 1 else values).double()
    loading, pattern = loading.double(), pattern.double()
    here = wide.new_zeros(n_positions, len(unique), wide.shape[-1])
    here[positions, place] = wide
    moved = here * loading[unique, -1].unsqueeze(-1)
    for head, weights in enumerate(pattern):
        moved += (weights @ here.flatten(1)).view_as(here) * loading[unique, head].unsqueeze(-1)
    at, which = moved.abs().amax(-1).nonzero(as_tuple=True)
    arrived = moved[at, which].to(values)
    return at, unique[which], arrived.squeeze(-1) if values.ndim == 1 else arrived


def mix(patterns: Tensor, values: Tensor, group: Tensor) -> Tensor:
    """Values (T, F, r) moved by patterns (G, T, T), feature f by that of `group[f]`: (T, F, r)."""
    moved = torch.empty_like(values)
    for number, weights in enumerate(patterns):
        mine = (group == number).nonzero().squeeze(1)
        if len(mine):
            moved[:, mine] = (weights @ values[:, mine].flatten(1)).view(len(values), len(mine), -1)
    return moved
