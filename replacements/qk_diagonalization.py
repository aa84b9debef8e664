"""QK diagonalization as it is trained: the parameters and the loss (`qk_score.py` has what they compute).

*Progress on Attention*, "Attention Pattern Formation": "During training, we penalize the MSE between this pattern and
the base model pattern; we also apply various sparsity penalties (separate L1 penalties on the query- and key-side
activations; an L1 penalty on the product of the activations; and a negative pre-activation penalty on the query- and
key-side features)". With A the base layer's pattern, A^ the predicted one, n_i = |w_i| the norm of a feature's head
weights, |u_i[p]| and |v_i[s]| the lengths of its activations:

    fit      sum_h,p,s (A - A^)^2 / sum_h,p,s (A - mean_h A)^2          the normalized MSE of the pattern
    scores   sum_h,p,s (c - c^)^2 / sum_h,p,s c^2                       c: scores minus their mean over a query's keys
    query    mean over p of sum_i n_i^1/2 |u_i[p]|
    key      mean over s of sum_i n_i^1/2 |v_i[s]|
    product  mean over p of (mean over s <= p of sum_i n_i |u_i[p]| |v_i[s]|)
    below    mean over positions of sum_i relu(-strength_i), queries' plus keys'
    loss     = fit + sum of setting times term

`mean_h A` is taken over all entries of head h that are scored: queries p of real tokens but the first, all keys
s <= p, the first included. Only these count in the fit. Penalties on keys count all real tokens: the first is a key
like any other. A factor that moves between w, u and v (with n_i |u_i| |v_i| the same) changes the product not at all
and the two L1 terms only by the balance of the two sides, so scale cannot hide in the head weights.

Letters of shapes: C contexts, S positions, F features, R their rank, H heads that are predicted, E head width.
"""

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from circuits.replacements.dictionary import Dictionary
from circuits.replacements.errors import ReplacementError
from circuits.replacements.qk_calibration import attended_rows, centred, fit_head_weights
from circuits.replacements.qk_figures import l0_figures, scored_entries, scored_queries, spread_of, take
from circuits.replacements.qk_score import (
    Choice,
    Prediction,
    QKDictionary,
    QKHeads,
    Side,
    activations_of,
    choose_k,
    pattern_of,
    scores_of,
    strength_of,
)
from circuits.replacements.sites import ReadSite, Site
from circuits.replacements.sparsity import largest

Batch = dict[str, Tensor]
SIDES = ("query", "key")


@dataclass(frozen=True)
class QKSettings:
    """How queries and keys are diagonalized.

    n_features, rank
        F, and R of each of them.
    prediction
        "softmax": the sum of feature scores goes through a causal softmax. "linear": it is the pattern itself.
    activation
        `batch_topk`: the strongest of a batch are active, `query_k` and `key_k` a token on average; `topk`: so many
        at each token at most; `relu`: all of positive strength (then the penalties alone make features sparse).
    query_k, key_k
        With `relu` only where training begins.
    k_start, k_until
        The k of both sides falls linearly from `k_start` times its value over this first share of the training.
    query_l1, key_l1, product_l1
        Weights of the L1 penalties; they rise linearly from zero over the whole training.
    pre_activation
        Weight of the penalty on negative strengths, which keeps features alive.
    score_weight
        Weight of the error of the centred scores, which falls linearly to zero over the whole training: it gives a
        gradient where a wrong softmax is saturated. Must be zero for "linear".
    learn_head_weights, positive_head_weights
        Whether w is learned (else it stays one), and whether it must not be negative.
    dead_after
        A feature that has been active on no query, or on no key, in this many tokens is dead.
    seed
        Of the initial weights.
    """

    n_features: int
    rank: int = 1
    prediction: Prediction = "softmax"
    activation: Choice = "batch_topk"
    query_k: int = 16
    key_k: int = 16
    k_start: float = 1.0
    k_until: float = 0.3
    query_l1: float = 0.0
    key_l1: float = 0.0
    product_l1: float = 0.0
    pre_activation: float = 1e-4
    score_weight: float = 0.1
    learn_head_weights: bool = True
    positive_head_weights: bool = False
    dead_after: int = 250_000
    seed: int = 0

    def __post_init__(self) -> None:
        for value, known in ((self.prediction, Prediction), (self.activation, Choice)):
            if value not in get_args(known):
                raise ReplacementError(f"cannot train {value!r}; choose {', '.join(get_args(known))}")
        if self.n_features < 1 or self.rank < 1:
            raise ReplacementError(f"{self.n_features} features of rank {self.rank}; choose at least one of rank 1")
        if (
            not (0 < self.query_k <= self.n_features and 0 < self.key_k <= self.n_features)
            and self.activation != "relu"
        ):
            raise ReplacementError(
                f"query_k is {self.query_k} and key_k {self.key_k} with {self.n_features} features; "
                "choose 1 <= k <= features"
            )
        if self.prediction == "linear" and self.score_weight:
            raise ReplacementError("a linear prediction has no scores to fit; set score_weight to 0")


@dataclass(frozen=True, eq=False)
class Encoded:
    """One side in training: activations (C, S, F, R), strengths (C, S, F), and which were chosen (C, S, F)."""

    values: Tensor
    strength: Tensor
    chosen: Tensor


class QKDiagonalization(nn.Module):
    """Query-side and key-side encoders of one head, or of several heads of a layer jointly; see the head of this file.

    Parameters
    ----------
    layer, n_heads, n_kv_heads, d_head
        Of the base model.
    heads
        Which heads are predicted; None: all of the layer, jointly.
    """

    in_context = True
    unfired: Tensor
    cut: Tensor
    progress: Tensor

    def __init__(
        self,
        layer: int,
        n_heads: int,
        n_kv_heads: int,
        d_head: int,
        settings: QKSettings,
        heads: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        chosen = tuple(range(n_heads)) if heads is None else tuple(heads)
        self.of = QKHeads(layer, chosen, n_heads, n_kv_heads, d_head)
        self.settings = settings
        self.name = f"qk.{layer}" if heads is None else f"qk.{layer}." + "-".join(map(str, chosen))
        self.reads = (ReadSite(Site("q", layer), "none"), ReadSite(Site("k", layer), "none"))
        self.writes: tuple[Site, ...] = ()
        self.extra = (f"pattern.{layer}",)
        F, R = settings.n_features, settings.rank
        widths = {"query": self.of.d_query, "key": self.of.d_key}
        self.W = nn.ParameterDict({side: nn.Parameter(torch.zeros(F, R, width)) for side, width in widths.items()})
        self.b = nn.ParameterDict({side: nn.Parameter(torch.zeros(F, R)) for side in SIDES})
        self.threshold = nn.ParameterDict({side: nn.Parameter(torch.zeros(F)) for side in SIDES if R > 1})
        self.w = nn.Parameter(torch.ones(F, len(chosen)), requires_grad=settings.learn_head_weights)
        for side, width in widths.items():
            self.register_buffer(f"{side}_mean", torch.zeros(width))
            self.register_buffer(f"{side}_scale", torch.ones(()))
        self.register_buffer("unfired", torch.zeros(2, F, dtype=torch.int64))
        self.register_buffer("cut", torch.full((2,), -1.0))
        self.register_buffer("progress", torch.zeros(()))

    @torch.no_grad()
    def calibrate(self, batches: list[Batch]) -> None:
        """Set scales and first weights from the first batches.

        Each row of an encoder pair begins at an attended pair (p, s) of a head, drawn by its squared attention: both
        rows at q[p]/|q[p]| + k[s]/|k[s]| in that head's queries and keys, zero in other heads', since the score is
        their product. Biases (rank 1) or thresholds begin where a k-th of the positions is active, and the head
        weights at the least-squares fit to the centred scores, or to the pattern itself for "linear".
        """
        parts = [take(batch, self.of) for batch in batches]
        for side, x in enumerate(SIDES):
            values = torch.cat([part[side][part[3]] for part in parts])
            mean = values.mean(0)
            self._buffer(f"{x}_mean").copy_(mean)
            self._buffer(f"{x}_scale").copy_((values - mean).square().mean().sqrt().clamp(min=1e-8))
        q, k, pattern, mask = parts[0]
        inputs = self._normalised(0, q), self._normalised(1, k)
        chance = (pattern * scored_entries(mask)).square()
        count = self.settings.n_features * self.settings.rank
        rows = attended_rows(*inputs, chance, self.of, count, self.settings.seed)
        for side, x in enumerate(SIDES):
            self.W[x].copy_(rows[side].view_as(self.W[x]))
            pre = (inputs[side][mask] @ self.W[x].flatten(0, 1).T).view(-1, *self.b[x].shape)
            share = (self.settings.query_k, self.settings.key_k)[side] / self.settings.n_features
            length = strength_of(pre, None if self.settings.rank == 1 else torch.zeros_like(self.b[x][:, 0]))
            place = max(1, round((1 - min(0.5, share)) * len(length)))
            start = length.kthvalue(place, dim=0).values
            if self.settings.rank == 1:
                self.b[x].copy_(-start[:, None])
            else:
                self.threshold[x].copy_(start)
        self._begin_head_weights(parts[0])
        self.cut.fill_(-1.0)

    def _begin_head_weights(self, part: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        """First head weights; where they are not learned, encoders take the scale."""
        q, k, pattern, mask = part
        linear = self.settings.prediction == "linear"
        query, key = self._encode(q, k, mask)
        target = pattern if linear else self.of.scores(q, k)
        fitted = fit_head_weights(query.values, key.values, target, mask, of_scores=not linear)
        if self.settings.learn_head_weights:
            self.w.copy_(fitted.clamp(min=0.0) if self.settings.positive_head_weights else fitted)
            return
        size = fitted.mean(1)
        factor = size.clamp(min=float(size.abs().mean()) * 0.1 + 1e-12).sqrt()
        for name in SIDES:
            self.W[name].mul_(factor[:, None, None])
            self.b[name].mul_(factor[:, None])
            if self.settings.rank > 1:
                self.threshold[name].mul_(factor)

    @torch.no_grad()
    def begin_step(self, progress: float) -> None:
        """Tell how far the training is, 0 to 1: `k` falls, penalties rise, the scores' weight falls."""
        self.progress.fill_(progress)
        if self.settings.positive_head_weights:
            self.w.clamp_(min=0.0)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The loss of one batch, and the figures of that batch.

        The batch holds `q.L:none` (C, S, n_heads E), `k.L:none` (C, S, n_kv_heads E), `pattern.L` (C, n_heads, S, S)
        and `mask` (C, S). Figures: `nmse/pattern.L`, `dead/NAME`, and `l0/NAME.query`, `.key` and `.product`
        (`qk_figures.l0_figures`).
        """
        q, k, pattern, mask = take(batch, self.of)
        query, key = self._encode(q, k, mask)
        scores = scores_of(query.values, key.values, self._head_weights())
        scored = scored_entries(mask)
        error = ((pattern - pattern_of(scores, self.settings.prediction)).square() * scored).sum()
        fit = error / spread_of(pattern, scored).sum().clamp(min=1e-12)
        total = fit + self._penalties(query, key, mask)
        if self.settings.score_weight:
            keep = scored.bool()
            wanted = centred(self.of.scores(q, k), keep)
            missed = (wanted - centred(scores, keep)).square().sum() / wanted.square().sum().clamp(min=1e-12)
            total = total + self.settings.score_weight * (1 - float(self.progress)) * missed
        figures = {f"nmse/pattern.{self.of.layer}": float(fit.detach())}
        figures |= l0_figures(self.name, query.values, key.values, pattern, mask)
        if self.training:
            for side, values in enumerate((query.values, key.values)):
                fired = (values.detach()[mask] != 0).any(-1).any(0)
                self.unfired[side] = torch.where(fired, 0, self.unfired[side] + int(mask.sum()))
        dead = (self.unfired > self.settings.dead_after).any(0)
        return total, figures | {f"dead/{self.name}": float(dead.float().mean())}

    def _penalties(self, query: Encoded, key: Encoded, mask: Tensor) -> Tensor:
        """What keeps features sparse and alive; see the head of this file."""
        settings, ramp = self.settings, float(self.progress)
        norms = (self._head_weights().square().sum(1) + 1e-12).sqrt()
        u, v = (side.strength.relu() * side.chosen for side in (query, key))
        tokens, scored = mask.sum().clamp(min=1), scored_queries(mask)
        total = u.new_zeros(())
        if settings.query_l1:
            on_queries = (u[scored] * norms.sqrt()).sum() / scored.sum().clamp(min=1)
            total = total + settings.query_l1 * ramp * on_queries
        if settings.key_l1:
            total = total + settings.key_l1 * ramp * (v[mask] * norms.sqrt()).sum() / tokens
        if settings.product_l1:
            before = torch.arange(1, mask.shape[1] + 1, device=u.device)[:, None]
            pairs = (u * (v.cumsum(1) / before) * norms).sum(-1)  # a padded key stands after all real queries
            total = total + settings.product_l1 * ramp * pairs[scored].sum() / scored.sum().clamp(min=1)
        if settings.pre_activation:
            below = sum((-side.strength[mask]).relu().sum() for side in (query, key)) / tokens
            total = total + settings.pre_activation * below
        return total

    def _encode(self, q: Tensor, k: Tensor, mask: Tensor) -> tuple[Encoded, Encoded]:
        """Both sides of (C, S, d_query) and (C, S, d_key) in training; nothing is active at padding."""
        sides = []
        for side, (name, x) in enumerate(zip(SIDES, (q, k), strict=True)):
            flat = self._normalised(side, x) @ self.W[name].flatten(0, 1).T
            pre = flat.reshape(*x.shape[:-1], *self.b[name].shape) + self.b[name]
            strength = strength_of(pre, self.threshold[name] if self.settings.rank > 1 else None)
            with torch.no_grad():
                chosen = self._choose(side, strength, mask) & mask[..., None]
            sides.append(Encoded(activations_of(pre, strength, chosen), strength, chosen))
        return sides[0], sides[1]

    def _choose(self, side: int, strength: Tensor, mask: Tensor) -> Tensor:
        """(C, S, F) which features may be active; keeps the running cut of `batch_topk`."""
        settings = self.settings
        if settings.activation == "relu":
            return torch.ones_like(strength, dtype=torch.bool)
        k = (settings.query_k, settings.key_k)[side] * self._k_factor()
        if settings.activation == "topk":
            return choose_k(strength, round(min(k, settings.n_features)))
        if not self.training:
            return strength > self.cut[side].clamp(min=0.0)
        real = strength[mask]
        _, smallest = largest(real.flatten(), min(real.numel(), round(k * len(real))))
        old = self.cut[side].clone()
        self.cut[side] = torch.where(old < 0, smallest, 0.98 * old + 0.02 * smallest)
        return strength >= smallest

    def _k_factor(self) -> float:
        """By how much k is still larger than in the end."""
        if not self.training or self.settings.k_until <= 0:
            return 1.0
        share = min(1.0, float(self.progress) / self.settings.k_until)
        return self.settings.k_start + (1.0 - self.settings.k_start) * share

    def _head_weights(self) -> Tensor:
        return self.w.clamp(min=0.0) if self.settings.positive_head_weights else self.w

    def _normalised(self, side: int, x: Tensor) -> Tensor:
        return (x - self._buffer(f"{SIDES[side]}_mean")) / self._buffer(f"{SIDES[side]}_scale")

    def _buffer(self, name: str) -> Tensor:
        value = getattr(self, name)
        assert isinstance(value, Tensor)
        return value

    def to_dictionaries(self) -> tuple[Dictionary, ...]:
        """None: it writes nothing to the stream; see `to_qk_dictionary`."""
        return ()

    @torch.no_grad()
    def to_qk_dictionary(self) -> QKDictionary:
        """What was learned, as it acts on raw queries and keys: means and scales folded into the encoders."""
        sides = []
        for side, name in enumerate(SIDES):
            W = self.W[name] / self._buffer(f"{name}_scale")
            b = self.b[name] - W @ self._buffer(f"{name}_mean")
            threshold = self.threshold[name].clone() if self.settings.rank > 1 else None
            k = None if self.settings.activation == "relu" else (self.settings.query_k, self.settings.key_k)[side]
            cut = float(self.cut[side].clamp(min=0.0)) if self.settings.activation == "batch_topk" else 0.0
            sides.append(Side(W.detach().clone(), b.detach().clone(), threshold, k, cut))
        return QKDictionary(
            name=self.name,
            of=self.of,
            queries=sides[0],
            keys=sides[1],
            head_weights=self._head_weights().detach().clone(),
            prediction=self.settings.prediction,
            choice=self.settings.activation,
        )
