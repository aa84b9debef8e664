"""How the features of a dictionary get from the position where they are read to the positions where they write.

A dictionary without movement reads and writes at the same position. `HeadLoading` carries features through a mixture
of the base layer's own heads (multitoken transcoders); `OwnAttention` has queries and keys of its own (attention
replacement layers, Lorsa).

Letters of shapes: F features, H heads of the base layer, G patterns, E width of a pattern's queries, T positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class HeadLoading:
    """Features move by `P_f[p, s] = sum_h alpha_fh A_h[p, s] + alpha_f,id [p = s]`, A the base layer's patterns.

    *Progress on Attention*, "Multitoken Transcoders": "a vector specifying a linear combination of attention patterns
    from heads in the base layer, padded with an identity pattern to imitate the residual connection".

    weights
        (F, H + 1) the head loading vectors alpha; the last column is the identity.
    context_k
        Only so many features of a context move, those with the largest activation summed over it; None: all.
    """

    weights: Tensor
    context_k: int | None = None


@dataclass(frozen=True, eq=False)
class OwnAttention:
    """Features move by patterns of their own, `A_g = softmax(scale q_p . k_s)`, causal.

        q_p = R_p n(W_Q x_p + b_Q)      k_s = R_s n(W_K x_s + b_K)      R: rotary position     n: a norm, if any

    W_q, b_q, W_k, b_k
        (G, E, D) and (G, E).
    group
        (F,) which of the G patterns moves a feature.
    scale
        Of the scores.
    rotary_theta
        Base of the rotary position embedding of queries and keys (halves turned against each other, as in Llama); None
        for none.
    rotary_speeds
        (E / 2,) how far each pair (i, i + E / 2) turns from one position to the next, in radians, where that is no
        power of one base; zero for pairs that do not turn. Instead of `rotary_theta`.
    q_gain, k_gain
        (G, E), where queries and keys are divided by their root mean square and multiplied by a gain before they turn.
    norm_eps
        Is added to the mean square.
    """

    W_q: Tensor
    b_q: Tensor
    W_k: Tensor
    b_k: Tensor
    group: Tensor
    scale: float
    rotary_theta: float | None = None
    rotary_speeds: Tensor | None = None
    q_gain: Tensor | None = None
    k_gain: Tensor | None = None
    norm_eps: float = 1e-6

    def queries(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """(..., G, T, E) of x (..., T, D) as the dictionary reads it, at positions (T,), by default 0 to T - 1."""
        return self._turned(x, self.W_q, self.b_q, self.q_gain, positions)

    def keys(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """The same of the keys."""
        return self._turned(x, self.W_k, self.b_k, self.k_gain, positions)

    def _turned(self, x: Tensor, W: Tensor, b: Tensor, gain: Tensor | None, positions: Tensor | None) -> Tensor:
        made = torch.einsum("...td,ged->...gte", x, W) + b.unsqueeze(1)
        if gain is not None:
            made = made * self.norm_factor(made) * gain.unsqueeze(1)
        return self.turn(made, positions)

    def norm_factor(self, x: Tensor) -> Tensor:
        """(..., 1): one over the root mean square of queries or keys (..., E) before their norm."""
        return (x.square().mean(-1, keepdim=True) + self.norm_eps).rsqrt()

    def turn(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Queries or keys (..., T, E) turned by their positions (T,), by default 0 to T - 1."""
        return rotate(x, self.rotary_theta if self.rotary_speeds is None else self.rotary_speeds, positions)

    def patterns(self, x: Tensor) -> Tensor:
        """(G, T, T) patterns [query, key] on one context, x (T, D) as the dictionary reads it."""
        scores = self.scale * (self.queries(x) @ self.keys(x).transpose(-1, -2))
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        return scores.masked_fill(future, -torch.inf).softmax(-1)


Movement = HeadLoading | OwnAttention


def rotate(x: Tensor, theta: float | Tensor | None, positions: Tensor | None = None) -> Tensor:
    """Rotary position embedding of x (..., T, E) at positions (T,), by default 0 to T - 1: pairs (i, i + E / 2), as in
    Llama.

    theta
        The base, or how far each pair turns from one position to the next, (E / 2,); None: x stays as it is.
    """
    if theta is None:
        return x
    length, width = x.shape[-2:]
    if isinstance(theta, Tensor):
        speed = theta.to(x.device, torch.float32)
    else:
        speed = theta ** (-torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width)
    places = torch.arange(length, device=x.device) if positions is None else positions
    angle = places.float()[:, None] * speed
    cos, sin = angle.cos().to(x), angle.sin().to(x)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
