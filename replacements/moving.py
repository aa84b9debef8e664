"""Decode active entries and move the result through the heads of the base layer, with gradients.

    d[c, h, s] = sum over entries i at (c, s) of w_ih D_(f_i)
    y[c, p]    = d[c, id, p] + sum_h sum_s A_ch[p, s] d[c, h, s]

Decoding comes first, head by head, so that decoders meet active entries only; all heads then move in one product, with
(h, s) as its inner dimension. What was decoded is not kept for the backward pass, which needs the patterns and the
entries alone.

Letters of shapes: C contexts, S positions, H heads, n active entries, F rows of the decoder, D width.
"""

from typing import Any

import torch
from torch import Tensor

from circuits.replacements.sparse import Pattern


def by_query(pattern_CHSS: Tensor) -> Tensor:
    """(C, S, H S): the patterns of all heads side by side, [query, (head, key)]."""
    return pattern_CHSS.transpose(1, 2).flatten(2)


class _DecodeAndMove(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, W_dec: Tensor, entries: Pattern, moves: Tensor) -> Tensor:
        n_contexts, n_positions, wide = moves.shape
        n_heads, width = wide // n_positions, W_dec.shape[1]
        decoded = weights.new_empty(n_contexts, n_heads, n_positions, width)
        columns = weights.T.contiguous()
        for head in range(n_heads):
            decoded[:, head] = entries.gather(columns[head], W_dec).view(n_contexts, n_positions, width)
        ctx.save_for_backward(columns, W_dec, moves)
        ctx.entries = entries
        stays = entries.gather(columns[-1], W_dec).view(n_contexts, n_positions, width)
        return torch.baddbmm(stays, moves, decoded.flatten(1, 2))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        columns, W_dec, moves = ctx.saved_tensors
        entries, grad = ctx.entries, grads[0].contiguous()
        n_contexts, n_positions, width = grad.shape
        pulled = torch.bmm(moves.transpose(1, 2), grad).view(n_contexts, -1, n_positions, width)
        grad_weights, grad_W = torch.empty_like(columns), torch.zeros_like(W_dec)
        for head in range(len(columns)):
            here = (pulled[:, head] if head < pulled.shape[1] else grad).reshape(-1, width)
            grad_weights[head] = entries.dot(here, W_dec)
            grad_W += entries.scatter(columns[head], here)
        return grad_weights.T, grad_W, None, None


def decode_and_move(weights: Tensor, W_dec: Tensor, entries: Pattern, moves: Tensor) -> Tensor:
    """(C, S, D); differentiable in `weights` and `W_dec`.

    Parameters
    ----------
    weights
        (n, H + 1): what each entry sends through each head, the identity last.
    entries
        Rows count positions, c S + s.
    moves
        (C, S, H S) from `by_query`.
    """
    result: Tensor = _DecodeAndMove.apply(weights.float(), W_dec.float(), entries, moves.float())  # type: ignore[no-untyped-call]
    return result
