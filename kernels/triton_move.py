"""Moving features through patterns on a GPU: each active entry is sent to the positions from its own on.

Letters of shapes: T positions, F features, H heads, n active entries, m distinct features among them, r rank.

The PyTorch reference lays the entries out as a (T, m, r) array, nearly all zeros, and multiplies it with every head's
pattern: `2 H T^2 m r` operations. Here each entry meets the H patterns once, `n H T` operations in all: fewer by the
share of positions where a feature is active (times two r). Both sum in float64.

Roofline: memory. The patterns' columns of the entries are read, `n H T / 2` numbers (from the cache, where `H T^2`
numbers of patterns fit), and `T m r` numbers written, nearly all of which arrive somewhere and are the answer.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from circuits.kernels.backend import on_device

BLOCK = 1 << 24  # numbers of what arrives, in memory at once: 128 MiB of float64


@triton.jit
def _move(
    starts,
    positions,
    values,
    loading,
    pattern,
    out,
    first_position,
    end_position,
    n_positions,
    n_heads,
    n_features,
    rank,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    which = tl.program_id(0).to(tl.int64)
    begin = first_position + tl.program_id(1) * BLOCK_P
    p = begin + tl.arange(0, BLOCK_P)
    r = tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_P, BLOCK_R), tl.float64)
    own = loading + which * (n_heads + 1)
    identity = tl.load(own + n_heads)
    for entry in range(tl.load(starts + which), tl.load(starts + which + 1)):
        source = tl.load(positions + entry)
        if source < begin + BLOCK_P:  # else it lies after every position of this block
            weight = tl.where(p == source, identity, 0.0)
            for head in range(0, n_heads, BLOCK_H):
                h = head + tl.arange(0, BLOCK_H)
                shares = tl.load(own + h, mask=h < n_heads, other=0.0)
                reads = (h < n_heads)[:, None] & (p < end_position)[None, :] & (p >= source)[None, :]
                where = (source * n_heads + h)[:, None] * n_positions + p[None, :]
                carried = tl.load(pattern + where, mask=reads, other=0.0)
                weight += tl.sum(carried.to(tl.float64) * shares[:, None], 0)
            sent = tl.load(values + entry * rank + r, mask=r < rank, other=0.0).to(tl.float64)
            total += weight[:, None] * sent[None, :]
    at = ((p - first_position).to(tl.int64)[:, None] * n_features + which) * rank + r[None, :]
    tl.store(out + at, total, mask=(p < end_position)[:, None] & (r < rank)[None, :])


def move_features(
    positions: Tensor, features: Tensor, values: Tensor, loading: Tensor, pattern: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `circuits.kernels.move.move_features`; patterns must be causal, nothing above their diagonal is read."""
    n_positions, n_heads = pattern.shape[-1], len(pattern)
    unique, place = torch.unique(features, return_inverse=True)
    place, order = torch.sort(place, stable=True)
    starts = torch.searchsorted(place, torch.arange(len(unique) + 1, device=place.device))
    wide = (values.unsqueeze(-1) if values.ndim == 1 else values)[order].contiguous()
    rank = wide.shape[1]
    shares = loading[unique].double().contiguous()
    by_key = pattern.permute(2, 0, 1).contiguous()  # (T, H, T): what leaves one position lies together
    sources = positions[order]
    step = max(1, BLOCK // max(1, len(unique) * rank))
    found = []
    for first in range(0, n_positions if len(unique) else 0, step):
        end = min(first + step, n_positions)
        out = shares.new_empty(end - first, len(unique), rank)
        with on_device(out):
            _move[(len(unique), triton.cdiv(end - first, 64))](
                starts,
                sources,
                wide,
                shares,
                by_key,
                out,
                first,
                end,
                n_positions,
                n_heads,
                len(unique),
                rank,
                BLOCK_P=64,
                BLOCK_H=min(16, triton.next_power_of_2(n_heads)),
                BLOCK_R=triton.next_power_of_2(rank),
            )
        at, which = (out != 0).any(-1).nonzero(as_tuple=True)
        found.append((at + first, unique[which], out[at, which].to(values)))
    if not found:
        return positions.new_zeros(0), features.new_zeros(0), values.new_zeros((0, *values.shape[1:]))
    at, which, arrived = (torch.cat(part) for part in zip(*found, strict=True))
    return at, which, arrived.squeeze(-1) if values.ndim == 1 else arrived
