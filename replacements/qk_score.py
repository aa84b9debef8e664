"""QK diagonalization as it is used: what the features of queries and keys make of one layer's attention patterns.

    pre^q_i[p] = E^q_i q[p] + b^q_i            (R,)   q: queries of the heads side by side, after rotary and scale
    pre^k_i[s] = E^k_i k[s] + b^k_i            (R,)   k: keys of their key-value heads side by side
    u_i[p], v_i[s]                                    what the activation function leaves of them (see below)
    score^_h[p, s] = sum_i w_ih <u_i[p], v_i[s]>      feature i meets only feature i
    A^_h[p, s] = softmax over s <= p of score^_h[p, s]             prediction "softmax"
    A^_h[p, s] = score^_h[p, s] for s <= p, else 0                 prediction "linear"

*Progress on Attention*, "Attention Pattern Formation": "route the query and key vectors from a given attention head in
the base model through separate encoders [...] only consider the interaction between the i-th query feature and the
i-th key feature [...] sum these feature-wise attention scores across all features and softmax the result"; "how much
a feature writes to a given head is determined by a learned head weights matrix" w (F, H).

A feature's *strength* at a position is `pre` for rank 1, and `|pre| - theta_i` for a higher rank R ("high-rank QK
features": encoders are matrices, the interaction is a dot product). It is active where it is chosen and its strength
is positive; its activation then has the strength as its length and the direction of `pre`: ReLU for rank 1, a group
soft threshold for a higher one. Nothing else is added: there is no bias, for the first key or for any other, outside
the features, so their contributions are the whole score.

Letters of shapes: C contexts, S positions, F features, R their rank, H heads that are predicted, E head width.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from circuits.replacements.errors import ReplacementError

Prediction = Literal["softmax", "linear"]
Choice = Literal["relu", "topk", "batch_topk"]


@dataclass(frozen=True)
class QKHeads:
    """Which heads of which layer are predicted, and where their queries and keys stand in the base model's.

    layer, heads
        `heads` in ascending order.
    n_heads, n_kv_heads, d_head
        Of the layer. With grouped queries head h uses key-value head h // (n_heads // n_kv_heads).
    """

    layer: int
    heads: tuple[int, ...]
    n_heads: int
    n_kv_heads: int
    d_head: int

    def __post_init__(self) -> None:
        if min(self.n_heads, self.n_kv_heads, self.d_head) < 1 or self.n_heads % self.n_kv_heads:
            raise ReplacementError(
                f"{self.n_heads} heads, {self.n_kv_heads} key-value heads of width {self.d_head}: the heads must be a "
                "multiple of the key-value heads, and all numbers positive"
            )
        if not self.heads or list(self.heads) != sorted(set(self.heads) & set(range(self.n_heads))):
            raise ReplacementError(
                f"heads {self.heads} of layer {self.layer}: expected different heads from 0 to {self.n_heads - 1}, "
                "in ascending order"
            )

    @property
    def kv_heads(self) -> tuple[int, ...]:
        """The key-value heads that the heads use, each once."""
        return tuple(sorted({h // (self.n_heads // self.n_kv_heads) for h in self.heads}))

    @property
    def d_query(self) -> int:
        return len(self.heads) * self.d_head

    @property
    def d_key(self) -> int:
        return len(self.kv_heads) * self.d_head

    def queries(self, q: Tensor) -> Tensor:
        """(..., d_query) of the site's (..., n_heads E)."""
        return self._some(q, self.n_heads, self.heads, "q")

    def keys(self, k: Tensor) -> Tensor:
        """(..., d_key) of the site's (..., n_kv_heads E)."""
        return self._some(k, self.n_kv_heads, self.kv_heads, "k")

    def keys_of(self, place: int) -> slice:
        """The columns of `keys` that the head at `place` in `heads` uses."""
        kv = self.kv_heads.index(self.heads[place] // (self.n_heads // self.n_kv_heads))
        return slice(kv * self.d_head, (kv + 1) * self.d_head)

    def _some(self, x: Tensor, count: int, chosen: tuple[int, ...], name: str) -> Tensor:
        if x.shape[-1] != count * self.d_head:
            raise ReplacementError(
                f"{name}.{self.layer} should have the width {count} x {self.d_head}, but has {x.shape[-1]}; "
                "is this the model that the encoders were trained on?"
            )
        if len(chosen) == count:
            return x
        heads = x.reshape(*x.shape[:-1], count, self.d_head)
        return heads[..., list(chosen), :].flatten(-2)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """(..., H, S, S) the base model's own scores `q . k`, soft caps and position biases left out."""
        parts = [
            q[..., i * self.d_head : (i + 1) * self.d_head] @ k[..., self.keys_of(i)].transpose(-1, -2)
            for i in range(len(self.heads))
        ]
        return torch.stack(parts, dim=-3)


def strength_of(pre: Tensor, threshold: Tensor | None) -> Tensor:
    """(..., F) of pre-activations (..., F, R): `pre`, or `|pre| - theta` with a threshold theta (F,)."""
    if threshold is None:
        return pre.squeeze(-1)
    return (pre.square().sum(-1) + 1e-12).sqrt() - threshold


def activations_of(pre: Tensor, strength: Tensor, chosen: Tensor | None) -> Tensor:
    """(..., F, R) activations: of length `strength` where it is positive and `chosen`, in the direction of `pre`."""
    length = strength.relu() if chosen is None else strength.relu() * chosen
    if pre.shape[-1] == 1:
        return length.unsqueeze(-1)
    return pre * (length / (pre.square().sum(-1) + 1e-12).sqrt()).unsqueeze(-1)


def choose_k(strength: Tensor, k: int) -> Tensor:
    """(..., F) true at the k largest of each position."""
    places = strength.topk(min(k, strength.shape[-1]), dim=-1, sorted=False).indices
    return torch.zeros_like(strength, dtype=torch.bool).scatter_(-1, places, True)


def scores_of(u: Tensor, v: Tensor, head_weights: Tensor) -> Tensor:
    """(..., H, S, S) `sum_i w_ih <u_i[p], v_i[s]>` of activations (..., S, F, R) and weights (F, H)."""
    flat_u, keys = u.flatten(-2), v.flatten(-2).transpose(-1, -2)
    spread = head_weights.repeat_interleave(u.shape[-1], dim=0)
    return torch.stack([(flat_u * spread[:, h]) @ keys for h in range(spread.shape[1])], dim=-3)


def pattern_of(scores: Tensor, prediction: Prediction) -> Tensor:
    """(..., S, S) the pattern that scores stand for; zero where the key comes after the query."""
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    if prediction == "linear":
        return scores.masked_fill(future, 0.0)
    return scores.masked_fill(future, -torch.inf).softmax(-1)


@dataclass(frozen=True, eq=False)
class Side:
    """The encoder of queries or of keys.

    W, b
        (F, R, D) and (F, R).
    threshold
        (F,) theta of the group soft threshold; None for rank 1.
    k, cut
        For `topk`, and for the record for `batch_topk`, which lets through strengths above `cut`.
    """

    W: Tensor
    b: Tensor
    threshold: Tensor | None = None
    k: int | None = None
    cut: float = 0.0

    def strengths(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-activations (..., F, R) and strengths (..., F) of x (..., D)."""
        pre = (x @ self.W.flatten(0, 1).T).reshape(*x.shape[:-1], *self.b.shape) + self.b
        return pre, strength_of(pre, self.threshold)

    def activations(self, x: Tensor, choice: Choice) -> Tensor:
        """(..., F, R) of x (..., D)."""
        pre, strength = self.strengths(x)
        chosen = None
        if choice == "topk":
            assert self.k is not None
            chosen = choose_k(strength, self.k)
        elif choice == "batch_topk":
            chosen = strength > self.cut
        return activations_of(pre, strength, chosen)


@dataclass(frozen=True, eq=False)
class QKDictionary:
    """Trained features of queries and keys, frozen; see the head of this file. It writes nothing to the stream.

    Parameters
    ----------
    name
        Such as "qk.1".
    of
        Which heads of which layer.
    queries, keys
        The two encoders, on raw activations.
    head_weights
        (F, H) w.
    prediction, choice
        What the sum of scores is, and which features may be active: all of positive strength (`relu`), the k
        strongest of a position (`topk`), or those above a side's `cut` (`batch_topk`).
    source
        The file it came from.
    """

    name: str
    of: QKHeads
    queries: Side
    keys: Side
    head_weights: Tensor
    prediction: Prediction = "softmax"
    choice: Choice = "relu"
    source: str = ""

    def __post_init__(self) -> None:
        if self.prediction not in get_args(Prediction) or self.choice not in get_args(Choice):
            raise ReplacementError(
                f"{self.name}: prediction {self.prediction!r} and activation {self.choice!r}; expected one of "
                f"{', '.join(get_args(Prediction))}, and one of {', '.join(get_args(Choice))}"
            )
        F, R = self.n_features, self.rank
        for side, part, width in (("queries", self.queries, self.of.d_query), ("keys", self.keys, self.of.d_key)):
            if part.W.shape != (F, R, width) or part.b.shape != (F, R):
                raise ReplacementError(
                    f"{self.name}: W and b of the {side} should have shapes {(F, R, width)} and {(F, R)}, but have "
                    f"{tuple(part.W.shape)} and {tuple(part.b.shape)}"
                )
            if (part.threshold is None) != (R == 1) or (part.threshold is not None and part.threshold.shape != (F,)):
                raise ReplacementError(f"{self.name}: the {side} need a threshold ({F},) if, and only if, rank {R} > 1")
            if self.choice == "topk" and (part.k is None or part.k < 1):
                raise ReplacementError(f"{self.name}: activation 'topk' needs k of at least 1 for the {side}")
        if self.head_weights.shape != (F, len(self.of.heads)):
            raise ReplacementError(
                f"{self.name}: head weights should have shape {(F, len(self.of.heads))}, but have "
                f"{tuple(self.head_weights.shape)}"
            )

    @property
    def n_features(self) -> int:
        return self.queries.W.shape[0]

    @property
    def rank(self) -> int:
        return self.queries.W.shape[1]

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """u and v, (..., S, F, R) each, of the sites q.l (..., S, n_heads E) and k.l (..., S, n_kv_heads E)."""
        return self.encode(self.of.queries(q).float(), self.of.keys(k).float())

    def encode(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The same of the queries (..., S, d_query) and keys (..., S, d_key) of this dictionary's heads alone."""
        return self.queries.activations(q, self.choice), self.keys.activations(k, self.choice)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """(..., H, S, S) predicted scores [query, key]; with "linear", of the pattern itself.

        A softmax does not see what is the same for all keys of a query, so these may differ from the base model's
        scores by any number for each query.
        """
        return scores_of(*self.features(q, k), self.head_weights)

    def pattern(self, q: Tensor, k: Tensor) -> Tensor:
        """(..., H, S, S) the predicted patterns [query, key]."""
        return pattern_of(self.scores(q, k), self.prediction)

    def per_feature_scores(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Which features score anything in one context, (n,), and what, (n, H, S, S): `w_ih <u_i[p], v_i[s]>`.

        `q` and `k` are (S, width). Entries with the key after the query are zero.
        """
        u, v = self.features(q, k)
        live = ((u != 0).any(-1).any(0) & (v != 0).any(-1).any(0)).nonzero().squeeze(1)
        parts = torch.einsum("pnr,snr->nps", u[:, live], v[:, live]).tril()
        return live, parts.unsqueeze(1) * self.head_weights[live][:, :, None, None]

    def ledger(self, q: Tensor, k: Tensor) -> float:
        """The ledger's gap of the scores of one context: features' contributions plus bias against the score.

        `|sum + bias - score| / max(|score|, largest |contribution|, |bias|)`, the worst over heads, queries and keys
        up to the query. The bias has no parts: all that makes a score is a feature's.
        """
        score = self.scores(q, k).tril()
        _, parts = self.per_feature_scores(q, k)
        if not len(parts):
            return float(score.abs().max() > 0)
        size = torch.maximum(score.abs(), parts.abs().amax(0))
        gap = (parts.sum(0) - score).abs() / size.clamp(min=torch.finfo(score.dtype).tiny)
        return float(gap.max())
