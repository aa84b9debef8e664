"""The heads of an attention replacement layer, and how they are chosen to be; `attention_layer.py` has the equations.

Letters of shapes: C contexts of S positions, G patterns, E rank of QK, F features (heads), r rank of their OV, D width
of the model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from circuits.replacements.attention_layer_penalty import factored_norm
from circuits.replacements.errors import ReplacementError
from circuits.replacements.movement import rotate

ACTIVATIONS = ("identity", "topk", "batch_topk")
STARTS = ("random", "base")


@dataclass(frozen=True)
class AttentionLayerSettings:
    """How an attention replacement layer is built, kept simple and kept alive.

    n_heads
        F, of each layer.
    qk_rank
        E, width of queries and keys: the largest rank of W_QK. With rotary positions even, and best the base model's
        head width or a divisor of it, because then the frequencies are the base model's.
    ov_rank
        r, the largest rank of W_OV.
    groups
        G: heads f with the same f // (F / G) share a QK. None: every head has its own.
    activation, k
        `identity`: every head always writes (k is unused). `topk`, `batch_topk`: of the positive z_f the k largest at
        each destination, or k a destination on average; these need `ov_rank` 1 and make the kind "lorsa".
    rotary_theta
        Base of the rotary positions of queries and keys, the base model's; None for a model without.
    penalty, beta
        Weight and power of `[L_nuc(W_QK) L_nuc(W_OV)]^beta`, 1/2 < beta < 1; raises the price of heads of high rank,
        lowers nuclear norms, and makes heads that are not worth theirs write less.
    pattern_sparsity
        Weight of `1 - sum_s A^2` of each head's pattern rows, weighted by the norm of what the head writes there as a
        share of the outputs' root mean square norm. That share has no gradient, so patterns get sharper, heads no
        smaller.
    start
        `random`: heads of random directions. `base`: copies of the base layer's heads with their OV cut among them, as
        `attention_layer_start.py` says; needs `qk_rank` the base model's head width, `groups` (or heads) a multiple of
        its heads, and the captures that the module names in `extra`. Far faster.
    dead_after
        A head that has not fired in this many scored positions is dead. An identity head fires where it writes more
        than 1 % of the outputs' root mean square norm.
    aux_k, aux_weight
        With `topk` and `batch_topk` the `aux_k` strongest dead heads rebuild what the live ones left over, with this
        weight in the loss (AuxK, Gao et al. 2024).
    seed
        Of the initial weights.
    """

    n_heads: int
    qk_rank: int = 32
    ov_rank: int = 4
    groups: int | None = None
    activation: str = "identity"
    k: int = 20
    rotary_theta: float | None = None
    penalty: float = 1e-4
    beta: float = 0.75
    pattern_sparsity: float = 0.0
    start: str = "random"
    dead_after: int = 250_000
    aux_k: int = 32
    aux_weight: float = 1 / 32
    seed: int = 0

    def __post_init__(self) -> None:
        def require(fine: bool, message: str) -> None:
            if not fine:
                raise ReplacementError(f"attention replacement layer: {message}")

        activation, groups = self.activation, self.n_patterns
        require(activation in ACTIVATIONS, f"cannot train activation {activation!r}; choose {', '.join(ACTIVATIONS)}")
        require(self.start in STARTS, f"unknown start {self.start!r}; choose {' or '.join(STARTS)}")
        sizes = (self.n_heads, self.qk_rank, self.ov_rank, groups)
        require(min(sizes) >= 1, f"heads, qk_rank, ov_rank and groups are {sizes}; each must be at least 1")
        require(self.n_heads % groups == 0, f"{groups} groups do not divide {self.n_heads} heads; choose a divisor")
        require(0.5 < self.beta < 1, f"beta is {self.beta}; choose 1/2 < beta < 1")
        require(min(self.penalty, self.pattern_sparsity, self.aux_weight) >= 0, "a weight of the loss is negative")
        if activation != "identity":
            require(self.ov_rank == 1, f"{activation} needs ov_rank 1, not {self.ov_rank}; for more choose 'identity'")
            require(0 < self.k <= self.n_heads, f"k is {self.k} with {self.n_heads} heads; choose 1 <= k <= heads")
        if self.rotary_theta is not None:
            require(self.qk_rank % 2 == 0, f"rotary positions turn pairs, but qk_rank is {self.qk_rank}; make it even")
            require(self.rotary_theta > 0, f"rotary_theta is {self.rotary_theta}; give the base model's")

    @staticmethod
    def lorsa(
        n_heads: int, groups: int, k: int = 20, *, qk_rank: int = 32, rotary_theta: float | None = None, seed: int = 0
    ) -> "AttentionLayerSettings":
        """Lorsa as published: rank-1 OV, shared QK, TopK over heads, no penalty."""
        return AttentionLayerSettings(
            n_heads, qk_rank, 1, groups, "topk", k, rotary_theta=rotary_theta, penalty=0.0, seed=seed
        )

    @property
    def n_patterns(self) -> int:
        """G."""
        return self.n_heads if self.groups is None else self.groups

    @property
    def kind(self) -> str:
        return "attention-layer" if self.activation == "identity" else "lorsa"


class OwnHeads(nn.Module):
    """The heads of one layer, on normalised activations."""

    def __init__(self, d_model: int, settings: AttentionLayerSettings, random: torch.Generator) -> None:
        super().__init__()
        self.settings = settings
        G, E, rows = settings.n_patterns, settings.qk_rank, settings.n_heads * settings.ov_rank

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=random) / d_model**0.5)

        self.W_q, self.W_k = normal(G, E, d_model), normal(G, E, d_model)
        self.b_q, self.b_k = nn.Parameter(torch.zeros(G, E)), nn.Parameter(torch.zeros(G, E))
        self.W_enc, self.b_enc = normal(rows, d_model), nn.Parameter(torch.zeros(rows))
        self.W_dec, self.b_dec = nn.Parameter(torch.zeros(rows, d_model)), nn.Parameter(torch.zeros(d_model))

    @property
    def scale(self) -> float:
        """Of the scores: E^-1/2."""
        return float(self.settings.qk_rank**-0.5)

    def patterns(self, u: Tensor) -> Tensor:
        """(C, G, S, S) patterns [query, key] from u (C, S, D). Padding on the right is never a real query's key."""
        q, k = self._turned(u, self.W_q, self.b_q), self._turned(u, self.W_k, self.b_k)
        future = torch.full((u.shape[1], u.shape[1]), -torch.inf, device=u.device, dtype=u.dtype).triu(1)
        return torch.softmax((q * self.scale) @ k.transpose(-1, -2) + future, dim=-1)

    def _turned(self, u: Tensor, W: Tensor, b: Tensor) -> Tensor:
        """(C, G, S, E) queries or keys."""
        flat = u @ W.flatten(0, 1).T + b.flatten()
        return rotate(flat.view(*u.shape[:2], *b.shape).transpose(1, 2), self.settings.rotary_theta)

    def moved(self, u: Tensor, patterns: Tensor) -> Tensor:
        """(C, S, F * r) pre-activations z at the destinations."""
        values = (u @ self.W_enc.T + self.b_enc).view(*u.shape[:2], patterns.shape[1], -1)
        return (patterns @ values.transpose(1, 2)).transpose(1, 2).flatten(2)

    def norms(self) -> tuple[Tensor, Tensor]:
        """(F,) proxies of the nuclear norms of W_QK and W_OV of each head.

        In units of normalised activations: W_QK maps two u to a score (so E^-1/2 counts), W_OV maps u to t. A bias is
        the column of an input that is always 1: were it free, a head could hide its QK in a large b_q and a small W_k.
        A QK that is shared counts for each of its heads.
        """

        def with_bias(W: Tensor, b: Tensor) -> Tensor:
            return torch.cat([W, b.unsqueeze(-1)], dim=-1)

        r, per_group = self.settings.ov_rank, self.settings.n_heads // self.settings.n_patterns
        qk = self.scale * factored_norm(with_bias(self.W_q, self.b_q), with_bias(self.W_k, self.b_k))
        enc, dec = with_bias(self.W_enc, self.b_enc), self.W_dec
        ov = factored_norm(enc.view(-1, r, enc.shape[1]), dec.view(-1, r, dec.shape[1]))
        return qk.repeat_interleave(per_group), ov
