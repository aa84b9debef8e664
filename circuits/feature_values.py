"""Values of a few features of a dictionary on what a run reads: only their rows of the encoder where that is enough.

Letters of shapes: T positions, F features of the dictionary, n chosen ones, r rank.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from circuits.kernels.encode import BLOCK, gate
from circuits.replacements.dictionary import Dictionary


def needs_all(dictionary: Dictionary) -> bool:
    """Whether a feature's activation depends on the other features at its position."""
    return dictionary.activation.kind == "topk"


def pre_activations(dictionary: Dictionary, x: Tensor, features: Tensor | None) -> Tensor:
    """`E_f x + b_f` (..., n, r) of some features, or of all, for x (..., d_read)."""
    if features is None:
        weights, bias = dictionary.W_enc, dictionary.b_enc
    else:
        weights = dictionary.encoder_rows(features).reshape(-1, dictionary.d_read)
        bias = dictionary.encoder_bias(features).reshape(-1)
    pre = torch.addmm(bias, x.to(weights).reshape(-1, dictionary.d_read), weights.T).to(x.device)
    return pre.reshape(*x.shape[:-1], len(bias) // dictionary.rank, dictionary.rank)


def gated(dictionary: Dictionary, pre: Tensor, features: Tensor | None) -> Tensor:
    """Activations (T, n, r) of pre-activations (T, n, r); of rank one the activation, else a vector along `pre`.

    `features` None: all of them, as an activation that chooses among them needs.
    """
    size = pre.squeeze(-1) if dictionary.rank == 1 else pre.norm(dim=-1)
    threshold = dictionary.threshold
    if threshold is not None and features is not None and threshold.numel() > 1:
        threshold = threshold[features.to(threshold.device)]
    threshold = None if threshold is None else threshold.to(size.device)
    positions, columns, activations, _ = gate(size, dictionary.activation, threshold)
    kept = torch.zeros_like(size)
    kept[positions, columns] = activations
    if dictionary.rank == 1:
        return kept.unsqueeze(-1)
    return kept.unsqueeze(-1) * unit(pre)


def values(dictionary: Dictionary, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Pre-activations and activations (T, n, r) of some features on x (T, d_read), without movement."""
    if not needs_all(dictionary):
        pre = pre_activations(dictionary, x, features)
        return pre, gated(dictionary, pre, features)
    pieces = [(pre[:, features], gated(dictionary, pre, None)[:, features]) for pre in _blocks(dictionary, x)]
    return torch.cat([pre for pre, _ in pieces]), torch.cat([active for _, active in pieces])


def all_sizes(dictionary: Dictionary, x: Tensor) -> Tensor:
    """How strongly every feature is active at every position, (T, F): what a choice of the context sums up."""
    pieces = [gated(dictionary, pre, None) for pre in _blocks(dictionary, x)]
    active = torch.cat(pieces)
    return active.squeeze(-1) if dictionary.rank == 1 else active.norm(dim=-1)


def strongest(totals: Tensor, k: int) -> Tensor:
    """(..., F) of bool: the k features whose activations, summed over a context, are largest, as
    `Dictionary.encode` chooses them; all where no more than k are active."""
    largest = totals.topk(min(k, totals.shape[-1])).indices
    chosen = torch.zeros_like(totals, dtype=torch.bool).scatter_(-1, largest, True)
    return chosen | ((totals > 0).sum(-1, keepdim=True) <= k)


def unit(vectors: Tensor) -> Tensor:
    """Vectors (..., r) as their directions; what is zero stays zero."""
    length: Tensor = vectors.norm(dim=-1, keepdim=True)
    return vectors / length.clamp(min=1e-30)


def _blocks(dictionary: Dictionary, x: Tensor) -> Iterator[Tensor]:
    """Pre-activations of all features, for as many positions at once as fit into `BLOCK` entries."""
    step = max(1, BLOCK // max(1, dictionary.encoder.shape[0]))
    for first in range(0, max(1, len(x)), step):
        yield pre_activations(dictionary, x[first : first + step], None)
