"""What the kernels compute, written out as loops over positions and entries in float64; shares no code with them."""

import torch
from torch import Tensor

Entries = dict[tuple[int, int], float]


def encode(x: Tensor, W: Tensor, b: Tensor, least: Tensor) -> tuple[Entries, float]:
    """Entries above their threshold, and how near the nearest pre-activation comes to its own."""
    pre = (
        torch.stack([W.double() @ row + b.double() for row in x.double()])
        if len(x)
        else x.new_zeros(0, len(W)).double()
    )
    entries, nearest = {}, float("inf")
    for t in range(len(pre)):
        for f in range(len(W)):
            value, threshold = float(pre[t, f]), float(least[f] if len(least) > 1 else least[0])
            nearest = min(nearest, abs(value - threshold))
            if value > threshold and value != 0:
                entries[t, f] = value
    return entries, nearest


def norm(x: Tensor, scale: Tensor, gain: Tensor | None, bias: Tensor | None, centred: bool) -> Tensor:
    """A norm with a frozen denominator, row by row."""
    rows = []
    for t, row in enumerate(x.double()):
        row = (row - row.sum() / len(row) if centred else row) * float(scale[t])
        row = row if gain is None else row * gain.double()
        rows.append(row if bias is None else row + bias.double())
    return torch.stack(rows)


def decode(positions: Tensor, features: Tensor | None, activations: Tensor, rows: Tensor, n: int) -> Tensor:
    """Decoder rows added up entry by entry."""
    out = torch.zeros(n, rows.shape[1], dtype=torch.float64)
    for i, p in enumerate(positions.tolist()):
        out[p] += float(activations[i]) * rows[i if features is None else int(features[i])].double()
    return out


def move(positions: Tensor, features: Tensor, values: Tensor, loading: Tensor, pattern: Tensor) -> Tensor:
    """What arrives, dense (T, F, r), entry by entry and head by head."""
    n_heads, n = len(pattern), pattern.shape[1]
    wide = values.double().reshape(len(values), -1)
    out = torch.zeros(n, len(loading), wide.shape[1], dtype=torch.float64)
    for i, (s, f) in enumerate(zip(positions.tolist(), features.tolist(), strict=True)):
        out[s, f] += float(loading[f, n_heads]) * wide[i]
        for h in range(n_heads):
            for p in range(n):
                out[p, f] += float(loading[f, h]) * float(pattern[h, p, s]) * wide[i]
    return out


def pull_values(pattern: Tensor, g: Tensor, w_o: Tensor, n_kv: int, scale: Tensor | None) -> Tensor:
    """Covectors pulled down head by head, query by query."""
    n_heads, width, _ = w_o.shape
    batch, n, _ = g.shape
    out = torch.zeros(batch, n, n_kv, width, dtype=torch.float64)
    for h in range(n_heads):
        for p in range(n):
            u = g[:, p].double() @ w_o[h].double().T * (1.0 if scale is None else float(scale[p]))
            for s in range(p + 1):
                out[:, s, h // (n_heads // n_kv)] += float(pattern[h, p, s]) * u
    return out.reshape(batch, n, n_kv * width)


def contract(weights: Tensor, g: Tensor, writers: Tensor, starts: list[int], columns: list[int]) -> Tensor:
    """Weights with the products of covectors and writers at the same positions added, writer by writer."""
    out = weights.double().clone()
    for s in range(g.shape[1]):
        for i in range(starts[s], starts[s + 1]):
            out[:, columns[s] + i - starts[s]] += g[:, s].double() @ writers[i].double()
    return out
