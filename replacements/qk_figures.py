"""How good a QK diagonalization is on given contexts, and what each feature is good for.

All figures are over the *scored* entries of a pattern: queries p of real tokens but the first, and all keys s <= p, the
first included. Letters of shapes: C contexts, S positions, F features, R their rank, H heads that are predicted.
"""

import torch
from torch import Tensor

from circuits.replacements.errors import ReplacementError
from circuits.replacements.qk_score import QKDictionary, QKHeads, pattern_of, scores_of

Batch = dict[str, Tensor]
Figures = dict[str, float]


def scored_queries(mask: Tensor) -> Tensor:
    """(C, S) real tokens but the first of each context."""
    return torch.cat([torch.zeros_like(mask[:, :1]), mask[:, 1:]], dim=1)


def scored_entries(mask: Tensor) -> Tensor:
    """(C, 1, S, S) one at entries that are scored, else zero."""
    causal = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device).tril()
    return (scored_queries(mask)[:, None, :, None] & causal).float()


def spread_of(pattern: Tensor, scored: Tensor) -> Tensor:
    """(H,) `sum |A - mean A|^2` of each head over scored entries: what its normalized MSE is divided by."""
    mean = (pattern * scored).sum((0, 2, 3)) / scored.sum().clamp(min=1)
    return ((pattern - mean[:, None, None]).square() * scored).sum((0, 2, 3))


def take(batch: Batch, of: QKHeads) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries (C, S, d_query), keys (C, S, d_key), pattern (C, H, S, S) of the heads, and mask (C, S) of a batch."""
    names = [f"q.{of.layer}:none", f"k.{of.layer}:none", f"pattern.{of.layer}", "mask"]
    missing = [name for name in names if name not in batch]
    if missing:
        raise ReplacementError(f"the batch should hold {', '.join(map(repr, missing))}; it has {', '.join(batch)}")
    q, k, pattern, mask = (batch[name].detach() for name in names)
    if pattern.ndim != 4 or pattern.shape[1] != of.n_heads:
        raise ReplacementError(
            f"{names[2]} should have shape (contexts, {of.n_heads}, S, S), but has {tuple(pattern.shape)}"
        )
    return of.queries(q).float(), of.keys(k).float(), pattern[:, list(of.heads)].float(), mask.bool()


def l0_figures(name: str, u: Tensor, v: Tensor, pattern: Tensor, mask: Tensor) -> Figures:
    """Active features of activations (C, S, F, R) under the dictionary's `name`.

    `.query` and `.key`: a scored position. `.product`: features active on both sides of an attended pair (p, s), pairs
    weighted by the base pattern, averaged over its heads: `mean over p of sum_s mean_h A_h[p, s] |active both|`.
    """
    scored = scored_queries(mask)
    count = max(1, int(scored.sum()))
    on_u, on_v = ((side.detach() != 0).any(-1).float() for side in (u, v))
    both = (on_u @ on_v.transpose(1, 2)) * pattern.mean(1) * scored[:, :, None]
    return {
        f"l0/{name}.query": float(on_u[scored].sum()) / count,
        f"l0/{name}.key": float(on_v[scored].sum()) / count,
        f"l0/{name}.product": float(both.sum()) / count,
    }


@torch.no_grad()
def measure(dictionary: QKDictionary, batches: list[Batch]) -> Figures:
    """Figures over all `batches` together, as the trainer names them.

    `nmse/pattern.L` over all heads, `nmse/pattern.L.H` of each head, and the three of `l0_figures`.
    """
    of = dictionary.of
    error, spread, count = torch.zeros(len(of.heads)), torch.zeros(len(of.heads)), 0
    mean = _mean(batches, of)
    l0: Figures = {}
    for batch in batches:
        q, k, pattern, mask = take(batch, of)
        scored, here = scored_entries(mask), int(scored_queries(mask).sum())
        u, v = dictionary.encode(q, k)
        predicted = pattern_of(scores_of(u, v, dictionary.head_weights), dictionary.prediction)
        error += ((pattern - predicted).square() * scored).sum((0, 2, 3)).cpu()
        spread += ((pattern - mean[:, None, None]).square() * scored).sum((0, 2, 3)).cpu()
        for name, value in l0_figures(dictionary.name, u, v, pattern, mask).items():
            l0[name] = (l0.get(name, 0.0) * count + value * here) / (count + here)
        count += here
    figures = {f"nmse/pattern.{of.layer}": float(error.sum() / spread.sum())}
    for place, head in enumerate(of.heads):
        figures[f"nmse/pattern.{of.layer}.{head}"] = float(error[place] / spread[place])
    return figures | l0


def _mean(batches: list[Batch], of: QKHeads) -> Tensor:
    """(H,) the mean of each head's pattern over the scored entries of all batches."""
    total, count = torch.zeros(len(of.heads)), 0.0
    for batch in batches:
        _, _, pattern, mask = take(batch, of)
        scored = scored_entries(mask)
        total, count = total.to(pattern.device) + (pattern * scored).sum((0, 2, 3)), count + float(scored.sum())
    return total / max(1.0, count)


@torch.no_grad()
def ablate(dictionary: QKDictionary, batches: list[Batch]) -> Tensor:
    """(F,) by how much the pattern's normalized MSE rises when one feature alone is taken out of the scores.

    The note measures with such "ablation experiments" that most features "contribute negligibly to the MSE". Positive:
    the feature is of use. Only rows of queries on which a feature is active change, and only these are computed again.
    The mean of a head's pattern is that of all batches together.
    """
    of, weights = dictionary.of, dictionary.head_weights
    rise = torch.zeros(dictionary.n_features, device=weights.device)
    mean = _mean(batches, of)
    spread = torch.zeros((), device=weights.device)
    for batch in batches:
        q, k, pattern, mask = take(batch, of)
        spread += ((pattern - mean[:, None, None]).square() * scored_entries(mask)).sum()
        u, v = dictionary.encode(q, k)
        scores = scores_of(u, v, weights)
        before = pattern_of(scores, dictionary.prediction)
        on = (u != 0).any(-1) & scored_queries(mask)[..., None]
        for i in on.any(0).any(0).nonzero().squeeze(1).tolist():
            c, p = on[..., i].nonzero(as_tuple=True)
            part = torch.einsum("nr,nsr->ns", u[c, p, i], v[c, :, i])
            left = scores[c, :, p] - weights[i][:, None] * part[:, None]
            future = torch.arange(left.shape[-1], device=p.device) > p[:, None, None]
            if dictionary.prediction == "linear":
                after = left.masked_fill(future, 0.0)
            else:
                after = left.masked_fill(future, -torch.inf).softmax(-1)
            wanted = pattern[c, :, p]
            rise[i] += ((wanted - after).square() - (wanted - before[c, :, p]).square()).sum()
    return rise / spread
