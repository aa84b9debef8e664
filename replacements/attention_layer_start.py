"""Let an attention replacement layer begin as the base layer itself, cut into many heads.

Learning queries and keys from nothing is what makes these layers hard to train (the note: "we hit significant ML
difficulties that we were unable to resolve"); the authors of Lorsa start theirs from the base layer's weights. Here the
weights are read off what the base layer's heads hold on the calibration batches, by least squares, so that no model is
needed: queries and keys (rotary positions taken back) and values are linear in u, outputs t linear in the values moved.

    base head h of pattern g: h = g mod H,   W_Q,g, W_K,g = those of h, balanced
    W_V,h^T W_O,h = U S V^T,   a row of W_enc is xi . S^1/2 U^T and of W_dec xi . S^1/2 V^T

with xi the rows of random orthogonal matrices over the leading singular values, each of them with both signs where
features are gated. If the heads of all patterns of a base head have together the rank of its OV, the plain layer begins
as an exact copy.

Letters of shapes: H, K query and key-value heads of the base layer, E their width, N scored positions, D width.
"""

import torch
from torch import Tensor

from circuits.replacements.attention_layer_heads import OwnHeads
from circuits.replacements.errors import ReplacementError
from circuits.replacements.movement import rotate

CAPTURES = ("q", "k", "v", "z")
RIDGE = 1e-5  # share of the inputs' mean square that keeps the least squares solvable


def begin_as_base(heads: OwnHeads, u: Tensor, t: Tensor, held: dict[str, Tensor], random: torch.Generator) -> None:
    """Set the heads' weights, but for `b_dec`.

    Parameters
    ----------
    u, t
        (N, D) normalised inputs and outputs.
    held
        (N, H * E) "q" and "z", (N, K * E) "k" and "v" of the base layer on the same positions, rotary taken back.
    """
    settings = heads.settings
    E = settings.qk_rank
    H, K = held["q"].shape[1] // E, held["k"].shape[1] // E
    if held["q"].shape[1] % E or held["k"].shape[1] % E or settings.n_patterns % H or settings.n_heads % H:
        raise ReplacementError(
            f"to start from the base layer, qk_rank ({E}) must be its head width, and groups ({settings.n_patterns}) a "
            f"multiple of its heads; its queries have width {held['q'].shape[1]}; change them or choose start='random'"
        )
    W_q, b_q = (part.reshape(H, E, -1) for part in _linear(u, held["q"]))
    W_k, b_k = (part.reshape(K, E, -1).repeat_interleave(H // K, 0) for part in _linear(u, held["k"]))
    balance = (W_k.norm(dim=(1, 2), keepdim=True) / W_q.norm(dim=(1, 2), keepdim=True).clamp(min=1e-8)).sqrt()
    balance, root = balance.clamp(min=1e-3), heads.scale**-0.5
    copies = settings.n_patterns // H
    heads.W_q.copy_((W_q * balance * root).repeat(copies, 1, 1))
    heads.b_q.copy_((b_q * balance * root).squeeze(2).repeat(copies, 1))
    heads.W_k.copy_((W_k / balance * root).repeat(copies, 1, 1))
    heads.b_k.copy_((b_k / balance * root).squeeze(2).repeat(copies, 1))
    W_v = _linear(u, held["v"])[0].reshape(K, E, -1).repeat_interleave(H // K, 0)
    W_o = _linear(held["z"], t)[0].T.reshape(H, E, -1)
    U, S, Vh = torch.linalg.svd(W_v.transpose(1, 2) @ W_o, full_matrices=False)
    gated, rows = settings.activation != "identity", len(heads.W_enc) // H
    enc, dec = [], []
    for h in range(H):
        xi = _directions(rows, E, gated, random).to(u)
        m = xi.shape[1]
        enc.append(xi @ (U[h, :, :m] * S[h, :m].sqrt()).T)
        dec.append(xi @ (S[h, :m, None].sqrt() * Vh[h, :m]))
    heads.W_enc.copy_(_by_pattern(torch.stack(enc), copies))
    heads.W_dec.copy_(_by_pattern(torch.stack(dec), copies))


def turned_back(x: Tensor, width: int, theta: float | None) -> Tensor:
    """Rotary positions taken back from x (C, S, H * E); E is `width`."""
    if theta is None:
        return x
    a, b = x.view(*x.shape[:2], -1, width).transpose(1, 2).chunk(2, dim=-1)
    b, a = rotate(torch.cat([b, a], dim=-1), theta).chunk(2, dim=-1)  # turning (b, a) forward is turning (a, b) back
    return torch.cat([a, b], dim=-1).transpose(1, 2).flatten(2)


def _directions(rows: int, width: int, gated: bool, random: torch.Generator) -> Tensor:
    """(rows, m) rows of random orthogonal matrices, m at most `width`; with both signs if `gated`."""
    different = (rows + 1) // 2 if gated else rows
    m = min(different, width)
    blocks = [torch.linalg.qr(torch.randn(m, m, generator=random, device="cpu"))[0] for _ in range(-(-different // m))]
    xi = torch.cat(blocks)[:different]
    return torch.cat([xi, -xi])[:rows] if gated else xi


def _by_pattern(rows: Tensor, copies: int) -> Tensor:
    """(H, n, D) rows of each base head -> (H n, D) in the order of patterns, pattern g standing for head g mod H."""
    return rows.view(len(rows), copies, -1, rows.shape[2]).transpose(0, 1).flatten(0, 2)


def _linear(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares y ~ W x + b: W (D_y, D_x), b (D_y,)."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x
    gram = gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram), device=x.device, dtype=x.dtype)
    W = torch.linalg.solve(gram, x.T @ y).T
    return W, y_mean - W @ x_mean
