"""What multitoken transcoders are made of before they have weights: settings, layouts and write sites."""

from dataclasses import dataclass
from typing import Literal

from circuits.kernels.encode import ActivationKind
from circuits.replacements.errors import ReplacementError
from circuits.replacements.sites import ReadSite, Site

ACTIVATIONS = ("relu", "topk", "batch_topk", "group_soft")


@dataclass(frozen=True)
class MultiTokenSettings:
    """How multitoken transcoders are built.

    n_features
        F of each layer, shared out over `ranks`.
    activation, k
        `relu` is the note's; its L0 follows from `sparsity`. `topk` and `batch_topk` have k active features a source
        token. `group_soft` is for features of higher rank: the vector `E_f u + b_f` loses a learned length.
    context_k
        Features that move in one context at most.
    heads
        `all`: any mixture. `one`: "a Top-1 selection on top of the head loading vector", the largest in size.
    identity
        Whether the identity is among the heads.
    sparsity, negative
        Weights of the two penalties of the loss; `negative` looks at `penalty_tokens` tokens of each batch.
    ranks
        Blocks of features as (rank, share of `n_features`); each is a dictionary of its own.
    joint
        The encoder is trained as an SAE of u, with a decoder of its own, and what moves is trained on activations that
        carry no gradient ("the MTC training in this case detaches gradients on the encoder"). No parameter is in both
        losses, so a step on their sum is one SAE step and one MTC step on the same examples.
    dead_after
        A feature that has not fired in this many tokens is dead; dead features of `topk` and `batch_topk` are lifted
        towards their threshold with weight `lift`.
    """

    n_features: int
    activation: ActivationKind = "batch_topk"
    k: int = 18
    context_k: int = 768
    heads: Literal["all", "one"] = "all"
    identity: bool = True
    sparsity: float = 0.0
    negative: float = 0.0
    ranks: tuple[tuple[int, float], ...] = ((1, 1.0),)
    joint: bool = False
    dead_after: int = 250_000
    lift: float = 1e-4
    penalty_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ReplacementError(f"cannot train activation {self.activation!r}; choose {', '.join(ACTIVATIONS)}")
        if not 0 < self.k <= self.n_features:
            raise ReplacementError(f"k is {self.k} with {self.n_features} features; choose 1 <= k <= features")
        if self.context_k < 1:
            raise ReplacementError(f"context_k is {self.context_k}; at least one feature of a context has to move")
        if any(rank < 1 or share <= 0 for rank, share in self.ranks):
            raise ReplacementError(f"ranks are {self.ranks}; expected pairs of a rank from 1 on and a share above 0")
        if any(rank > 1 for rank, _ in self.ranks) and self.activation != "group_soft":
            raise ReplacementError(f"features of rank above 1 need activation 'group_soft', not {self.activation!r}")

    def blocks(self) -> list[tuple[int, int]]:
        """(rank, features) of each block."""
        total = sum(share for _, share in self.ranks)
        return [(rank, max(1, round(self.n_features * share / total))) for rank, share in self.ranks]


@dataclass(frozen=True)
class MultiTokenLayout:
    """One dictionary before it has weights: its name, layer, rank, number of features, and write sites."""

    name: str
    layer: int
    rank: int
    n_features: int
    writes: tuple[Site, ...]

    @property
    def read(self) -> ReadSite:
        return ReadSite(Site("resid_pre", self.layer), "full")


def write_sites(
    layer: int, n_layers: int, target_site: Literal["attention", "residual"], *, later: bool, mlp: bool
) -> tuple[Site, ...]:
    """Write sites of an MTC: attention output or stream after the layer; with `later` (MCTC) attention outputs of all
    later layers too, and with `mlp` the MLP outputs of this and all later ones."""
    if target_site == "residual":
        if later or mlp:
            raise ReplacementError("a residual-target MTC stands for its whole block and writes nowhere else")
        return (Site("resid_post", layer),)
    last = n_layers if later else layer + 1
    attention = tuple(Site("attn_out", at) for at in range(layer, last))
    return attention + (tuple(Site("mlp_out", at) for at in range(layer, last)) if mlp else ())
