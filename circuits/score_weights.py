"""Query and key weights of one layer, and what the family does between them and the attention score.

    score[p, s] = cap(scale (R_p norm(W_Q x + b_Q)) . (R_s norm(W_K x + b_K)))

Shapes: H query heads, K key-value heads, E head width, R of its dimensions that turn, D model width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Tables (S, R) of a rotary position embedding; pairs (i, i + R / 2) of the first R dimensions turn."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class ScoreWeights:
    """One layer's weights in float32.

    w_q, b_q, w_k, b_k
        (H, E, D), (H, E), (K, E, D), (K, E); biases None where the family has none.
    query_norm, key_norm
        Gain (E,) and epsilon of an RMS norm over each head's query and key, where the family has them; gain (H, E)
        and (K, E) where the norm goes over all heads at once.
    scale
        Of the product.
    soft_cap
        The score is `cap tanh(score / cap)`.
    window
        A query sees so many keys, itself included.
    rotary
        None without a rotary position embedding.
    """

    w_q: Tensor
    b_q: Tensor | None
    w_k: Tensor
    b_k: Tensor | None
    query_norm: tuple[Tensor, float] | None
    key_norm: tuple[Tensor, float] | None
    scale: float
    soft_cap: float | None
    window: int | None
    rotary: Rotary | None

    def scales_over_all(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """One over the denominators (S,) of the norms of queries and of keys that go over all heads, for what the layer
        reads, x (S, D), behind its norm; None for norms of each head."""
        found: list[Tensor | None] = []
        for w, b, norm in ((self.w_q, self.b_q, self.query_norm), (self.w_k, self.b_k, self.key_norm)):
            if norm is None or norm[0].ndim == 1:
                found.append(None)
                continue
            heads = x @ w.flatten(0, 1).T
            heads = heads if b is None else heads + b.flatten()
            found.append((heads.pow(2).mean(-1) + norm[1]).rsqrt())
        return found[0], found[1]

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotary position embedding of x (..., n, E) at positions (n,)."""
        if self.rotary is None:
            return x
        cos, sin = self.rotary.cos[positions], self.rotary.sin[positions]
        width = cos.shape[-1]
        a, b = x[..., :width].chunk(2, dim=-1)
        turned = x[..., :width] * cos + torch.cat([-b, a], dim=-1) * sin
        return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], dim=-1)
