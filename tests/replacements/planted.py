"""Contexts whose moved features are known, what a training found of them, and the small training loop of these tests.

    x[s] = 4 sum_f a_f[s] E_f + 2        y[p] = sum_f D_f sum_s P_f[p, s] a_f[s] - 1        P_f = sum_h alpha_fh A_h

a sparse, A random causal patterns or those that the caller makes. Letters of shapes: C contexts, S positions, F planted
features, G learnt ones, r rank, D width, H heads.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from circuits.replacements.dictionary import Dictionary
from circuits.replacements.movement import HeadLoading
from circuits.replacements.training import Batch, Figures, Trainable

Patterns = Callable[[int, int, torch.Generator], Tensor]


def nearly_orthogonal(n: int, width: int, seed: int = 1, steps: int = 200) -> Tensor:
    """(n, width) unit vectors that gradient descent has pushed apart."""
    start = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    vectors = functional.normalize(start, dim=1)
    for _ in range(steps):
        products = vectors @ vectors.T - torch.eye(n)
        vectors = functional.normalize(vectors - 0.2 * products**3 @ vectors, dim=1)
    return vectors


def random_patterns(n_heads: int, sharpness: float = 2.0) -> Patterns:
    """Causal softmax of random scores: the patterns say nothing of what is moved."""

    def make(n: int, length: int, random: torch.Generator) -> Tensor:
        scores = sharpness * torch.randn(n, n_heads, length, length, generator=random)
        return scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)

    return make


def spread_loading(n: int, n_heads: int, per_feature: int, seed: int = 2, *, identity: bool = False) -> Tensor:
    """(n, n_heads + 1) unit vectors with `per_feature` heads each, nearly equal in size, some negative."""
    random = torch.Generator().manual_seed(seed)
    loading = torch.zeros(n, n_heads + 1)
    for row in loading:
        heads = torch.randperm(n_heads + identity, generator=random)[:per_feature]
        signs = torch.tensor([1.0, 1.0, -1.0])[torch.randint(3, (per_feature,), generator=random)]
        row[heads] = signs * (0.8 + 0.4 * torch.rand(per_feature, generator=random))
    return functional.normalize(loading, dim=1)


@dataclass
class PlantedMoves:
    """Batches for `in_context` kinds; every batch is new, and the same in every run.

    reads
        (F, D), or (F, r, D) for features of rank r.
    loading
        (F, H + 1).
    writes
        Write site -> (F, D) or (F, r, D).
    active
        Mean number of active planted features a position.
    """

    reads: Tensor
    loading: Tensor
    writes: dict[str, Tensor]
    patterns: Patterns
    active: float = 2.0
    n: int = 24
    length: int = 16
    layer: int = 0
    noise: float = 0.0
    made: int = field(default=0, init=False)

    def __iter__(self) -> "PlantedMoves":
        return self

    def __next__(self) -> Batch:
        self.made += 1
        return self.batch(1000 + self.made)[0]

    def batch(self, seed: int) -> tuple[Batch, Tensor]:
        """The batch, and its activations (C, S, F) or (C, S, F, r)."""
        random = torch.Generator().manual_seed(seed)
        shape = (self.n, self.length, len(self.reads))
        on = torch.rand(shape, generator=random) < self.active / len(self.reads)
        a = on * (0.5 + torch.rand(shape, generator=random))
        if self.reads.ndim == 3:
            angle = functional.normalize(torch.randn(*shape, self.reads.shape[1], generator=random), dim=-1)
            a = a.unsqueeze(-1) * angle
        pattern = self.patterns(self.n, self.length, random)
        eye = torch.eye(self.length).expand(self.n, 1, -1, -1)
        own = torch.einsum("fh,chps->cfps", self.loading, torch.cat([pattern, eye], dim=1))
        wide = a if a.ndim == 4 else a.unsqueeze(-1)
        arrived = torch.einsum("cfps,csfr->cpfr", own, wide).flatten(2)
        x = 4 * wide.flatten(2) @ self.reads.flatten(0, -2) + 2
        batch = {f"resid_pre.{self.layer}:full": x, f"pattern.{self.layer}": pattern}
        for site, write in self.writes.items():
            y = arrived @ write.flatten(0, -2) - 1
            batch[site] = y + self.noise * torch.randn(y.shape, generator=random)
        batch["mask"] = torch.ones(self.n, self.length, dtype=torch.bool)
        return batch, a


@dataclass(frozen=True)
class Found:
    """Cosines of planted features (F,) with the nearest learnt one: what it reads, how it moves, what it writes.

    What is read is compared by the activations over the tokens of new contexts: an encoder row itself is not
    identified where the planted directions are not orthogonal. Loading and decoder are known up to a common sign.
    """

    activation: Tensor
    loading: Tensor
    decoder: Tensor
    nearest: Tensor

    @property
    def worst(self) -> Tensor:
        return torch.stack([self.activation, self.loading, self.decoder]).amin(0)

    @property
    def share(self) -> float:
        """Of the planted features, those with all three cosines at least 0.9."""
        return float((self.worst >= 0.9).float().mean())


def found(planted: PlantedMoves, dictionary: Dictionary, seed: int = 5) -> Found:
    """Match planted features of rank 1 with those of a dictionary."""
    batch, a = planted.batch(seed)
    learnt = activations(dictionary, batch[str(dictionary.read)])
    read = functional.normalize(a.flatten(0, 1), dim=0).T @ functional.normalize(learnt.flatten(0, 1), dim=0)
    assert isinstance(dictionary.moved_by, HeadLoading)
    moved = functional.normalize(planted.loading, dim=1) @ functional.normalize(dictionary.moved_by.weights, dim=1).T
    rows = torch.cat([dictionary.decoders[site].all() for site in dictionary.writes], dim=1)
    wanted = torch.cat([planted.writes[str(site)] for site in dictionary.writes], dim=1)
    wrote = functional.normalize(wanted, dim=1) @ functional.normalize(rows, dim=1).T
    sign = moved.sign()
    cosines = torch.stack([read, sign * moved, sign * wrote])
    nearest = cosines.amin(0).argmax(1)
    return Found(*cosines[:, torch.arange(len(nearest)), nearest], nearest)


def activations(dictionary: Dictionary, x: Tensor) -> Tensor:
    """(C, S, G) of the contexts x (C, S, D)."""
    dense = torch.zeros(*x.shape[:2], dictionary.n_features)
    for context, here in zip(dense, x, strict=True):
        active = dictionary.encode(here)
        context[active.positions, active.features] = active.activations
    return dense


def fit(module: nn.Module, batches: Iterable[Batch], steps: int, lr: float = 1e-2, clip: float = 1.0) -> Figures:
    """Calibrate and train as `training.train` does, without its files; the mean figures of the last twenty steps."""
    source, trainable = iter(batches), _as_trainable(module)
    module.train()
    trainable.calibrate([next(source) for _ in range(2)])
    optimizer = torch.optim.Adam(module.parameters(), lr=lr, fused=True)
    seen: list[Figures] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20, (steps - step) / (0.4 * steps))
        trainable.begin_step(step / steps)
        loss, figures = trainable.loss(next(source))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen.append(figures | {"loss": float(loss.detach())})
    last = seen[-20:]
    return {name: sum(figures[name] for figures in last) / len(last) for name in last[0]}


def _as_trainable(module: nn.Module) -> Trainable:
    trainable: Trainable = module  # type: ignore[assignment]
    return trainable
