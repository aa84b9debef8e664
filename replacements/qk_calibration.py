"""First weights of a QK diagonalization, from the first batch. Letters of shapes as in `qk_diagonalization.py`."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from circuits.replacements.qk_score import QKHeads

CONTEXTS = 32  # of the first batch, from which head weights are fitted


def attended_rows(x: Tensor, y: Tensor, chance: Tensor, of: QKHeads, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Encoder rows (count, d_query) and (count, d_key) that begin at attended pairs (p, s).

    x (C, S, d_query) and y (C, S, d_key) are normalised queries and keys; pairs are drawn by `chance` (C, H, S, S).
    Both rows of a pair of head h are `x[p]/|x[p]| + y[s]/|y[s]|` in that head's columns, normalised, and zero
    elsewhere: a head's score is the product of the two, so a query and a key that go together lie near each other.
    """
    _, H, S, _ = chance.shape
    flat = (chance + 1e-30).flatten().double().cpu()
    random = torch.rand(count, generator=torch.Generator().manual_seed(seed)).double()
    places = torch.searchsorted(flat.cumsum(0), random * flat.sum()).clamp(max=len(flat) - 1)
    rows = x.new_zeros(count, of.d_query), y.new_zeros(count, of.d_key)
    E = of.d_head
    for row, at in enumerate(places.tolist()):
        c, h, p, s = at // (S * S * H), at // (S * S) % H, at // S % S, at % S
        own = slice(h * E, (h + 1) * E), of.keys_of(h)
        both = normalize(x[c, p, own[0]], dim=0) + normalize(y[c, s, own[1]], dim=0)
        for side in (0, 1):
            rows[side][row, own[side]] = normalize(both, dim=0)
    return rows


def fit_head_weights(u: Tensor, v: Tensor, target: Tensor, mask: Tensor, *, of_scores: bool) -> Tensor:
    """(F, H) head weights by ridge regression of `target` (C, H, S, S) on the products of activations (C, S, F, R).

    of_scores
        Whether the target is scores, of which only what is left of their mean over keys counts, or patterns.
    """
    F, H = u.shape[2], target.shape[1]
    gram, right = u.new_zeros(F, F), u.new_zeros(F, H)
    for c in range(min(len(u), CONTEXTS)):
        length = int(mask[c].sum())
        products = torch.einsum("pfr,sfr->fps", u[c, :length], v[c, :length])
        wanted = target[c, :, :length, :length]
        keep = torch.ones(length, length, dtype=torch.bool, device=u.device).tril()
        keep[0] = False
        if of_scores:
            products, wanted = centred(products, keep), centred(wanted, keep)
        gram += products[:, keep] @ products[:, keep].T
        right += products[:, keep] @ wanted[:, keep].T
    ridge = 1e-2 * gram.diagonal().mean().clamp(min=1e-12) * torch.eye(F, device=u.device)
    fitted: Tensor = torch.linalg.solve(gram + ridge, right)
    return fitted


def centred(scores: Tensor, keep: Tensor) -> Tensor:
    """Scores (..., S, S) minus their mean over the keys of each query that `keep` (..., S, S) marks; zero elsewhere."""
    weight = keep.to(scores.dtype)
    mean = (scores * weight).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True).clamp(min=1)
    return (scores - mean) * weight
