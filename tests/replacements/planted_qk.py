"""Queries and keys whose features are known, and a plain reference for QK diagonalization: loops in float64."""

import math

import torch
from torch import Tensor, nn

from circuits.replacements.qk_diagonalization import QKDiagonalization
from circuits.replacements.qk_score import QKDictionary, Side

Batch = dict[str, Tensor]


def plain_pattern(q: Tensor, k: Tensor) -> Tensor:
    """(H, S, S) causal softmax of q . k, q (S, H, E) and k (S, K, E); head h has the key head h // (H / K)."""
    S, H, _ = q.shape
    A = torch.zeros(H, S, S, dtype=torch.float64)
    for h in range(H):
        for p in range(S):
            scores = [float(q[p, h].double() @ k[s, h // (H // k.shape[1])].double()) for s in range(p + 1)]
            top = [math.exp(score - max(scores)) for score in scores]
            for s in range(p + 1):
                A[h, p, s] = top[s] / sum(top)
    return A


def plain_activations(side: Side, x: Tensor, choice: str) -> Tensor:
    """(S, F, R) by the definition; x (S, D)."""
    S, (F, R) = len(x), side.b.shape
    result = torch.zeros(S, F, R, dtype=torch.float64)
    for s in range(S):
        pre = [side.W[i].double() @ x[s].double() + side.b[i].double() for i in range(F)]
        strength = [
            float(pre[i][0]) if side.threshold is None else float(pre[i].norm()) - float(side.threshold[i])
            for i in range(F)
        ]
        for i in range(F):
            if choice == "topk":
                on = sum(other > strength[i] for other in strength) < (side.k or 0)
            else:
                on = strength[i] > (side.cut if choice == "batch_topk" else 0.0)
            if on and strength[i] > 0:
                result[s, i] = pre[i] if side.threshold is None else pre[i] / pre[i].norm() * strength[i]
    return result


def plain_dictionary(dictionary: QKDictionary, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Activations u, v, scores and pattern of one context, q (S, n_heads E) and k (S, n_kv_heads E)."""
    of, S = dictionary.of, len(q)
    E, group = of.d_head, of.n_heads // of.n_kv_heads
    key_heads: list[int] = []
    for h in of.heads:
        if h // group not in key_heads:
            key_heads.append(h // group)
    u = plain_activations(
        dictionary.queries, torch.cat([q[:, h * E : h * E + E] for h in of.heads], 1), dictionary.choice
    )
    v = plain_activations(
        dictionary.keys, torch.cat([k[:, h * E : h * E + E] for h in key_heads], 1), dictionary.choice
    )
    scores = torch.zeros(len(of.heads), S, S, dtype=torch.float64)
    pattern = torch.zeros_like(scores)
    for h in range(len(of.heads)):
        for p in range(S):
            for s in range(p + 1):
                for i in range(dictionary.n_features):
                    scores[h, p, s] += float(dictionary.head_weights[i, h]) * float(u[p, i] @ v[s, i])
            row = scores[h, p, : p + 1]
            pattern[h, p, : p + 1] = row if dictionary.prediction == "linear" else row.exp() / row.exp().sum()
    return u, v, scores, pattern


def plain_nmse(wanted: list[Tensor], predicted: list[Tensor], lengths: list[int]) -> float:
    """Normalized MSE of patterns (H, S, S) of contexts with so many real tokens."""
    H = len(wanted[0])
    error = spread = 0.0
    for h in range(H):
        entries = [(c, p, s) for c, n in enumerate(lengths) for p in range(1, n) for s in range(p + 1)]
        mean = sum(float(wanted[c][h, p, s]) for c, p, s in entries) / len(entries)
        error += sum((float(wanted[c][h, p, s]) - float(predicted[c][h, p, s])) ** 2 for c, p, s in entries)
        spread += sum((float(wanted[c][h, p, s]) - mean) ** 2 for c, p, s in entries)
    return error / spread


def contexts(lengths: list[int], n_heads: int, n_kv_heads: int, d_head: int, layer: int = 0, seed: int = 0) -> Batch:
    """A batch of random queries and keys, padded with garbage, and their pattern."""
    random = torch.Generator().manual_seed(seed)
    S = max(lengths)
    q = torch.randn(len(lengths), S, n_heads, d_head, generator=random)
    k = torch.randn(len(lengths), S, n_kv_heads, d_head, generator=random)
    mask = torch.arange(S) < torch.tensor(lengths)[:, None]
    pattern = torch.stack([plain_pattern(a, b) for a, b in zip(q, k)]).float()
    names = f"q.{layer}:none", f"k.{layer}:none", f"pattern.{layer}"
    return {names[0]: q.flatten(2), names[1]: k.flatten(2), names[2]: pattern, "mask": mask}


class PlantedQK:
    """Batches of one head whose queries and keys are sparse sums of the same `planted` nearly orthogonal directions.

    A key is attended where it shares a direction with the query: q . k is `9 sum_i a_i[p] b_i[s]`, but for what
    directions that are more than the head is wide have in common.
    """

    def __init__(self, planted: int = 24, width: int = 16, n: int = 24, length: int = 24, active: float = 1.5) -> None:
        self.planted, self.n, self.length, self.made = planted, n, length, 0
        self.active = active
        start = torch.randn(planted, width, generator=torch.Generator().manual_seed(1))
        self.directions = nearly_orthogonal(start)

    def __iter__(self) -> "PlantedQK":
        return self

    def __next__(self) -> Batch:
        random = torch.Generator().manual_seed(1000 + self.made)
        self.made += 1
        shape = (2, self.n, self.length, self.planted)
        on = torch.rand(shape, generator=random) < self.active / self.planted
        q, k = 3.0 * (on * (1 + 0.3 * torch.rand(shape, generator=random))) @ self.directions
        future = torch.ones(self.length, self.length, dtype=torch.bool).triu(1)
        pattern = (q @ k.transpose(1, 2)).masked_fill(future, -torch.inf).softmax(-1)
        mask = torch.ones(self.n, self.length, dtype=torch.bool)
        return {"q.0:none": q, "k.0:none": k, "pattern.0": pattern[:, None], "mask": mask}

    def recovered(self, dictionary: QKDictionary, least: float = 0.9) -> float:
        """Share of planted directions to which one feature's two encoders both have a cosine of at least `least`."""
        a = nn.functional.normalize(dictionary.queries.W[:, 0], dim=1) @ self.directions.T
        b = nn.functional.normalize(dictionary.keys.W[:, 0], dim=1) @ self.directions.T
        return float((torch.minimum(a, b).max(0).values >= least).float().mean())


def nearly_orthogonal(start: Tensor, steps: int = 300) -> Tensor:
    """Unit vectors that gradient descent has pushed apart."""
    vectors = nn.functional.normalize(start, dim=1)
    for _ in range(steps):
        products = vectors @ vectors.T - torch.eye(len(vectors))
        vectors = nn.functional.normalize(vectors - 0.2 * products**3 @ vectors, dim=1)
    return vectors


def fit(module: QKDiagonalization, batches: PlantedQK, steps: int, lr: float = 1e-2) -> dict[str, float]:
    """Calibrate and train; the figures of the last step."""
    module.train()
    module.calibrate([next(batches) for _ in range(2)])
    optimizer = torch.optim.Adam(module.parameters(), lr=lr)
    figures: dict[str, float] = {}
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (steps - step) / (0.4 * steps))
        module.begin_step(step / steps)
        loss, figures = module.loss(next(batches))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return figures
