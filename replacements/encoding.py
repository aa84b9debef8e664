"""Encoders that are held in memory or stay in their file, and encoding with a block of features at a time.

Letters of shapes: T positions, F features, r their rank, D width of the read site, n active entries, f features of one
block.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from circuits.kernels.encode import BLOCK, Activation, gate
from circuits.replacements.weights import HeldTensor, LazyTensor, Rows

BLOCK_BYTES = 1 << 26  # of an encoder that are read at once
FEWEST = 64  # features of a block, however many positions there are

Gated = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


class Encoder:
    """The field `W_enc` of a dictionary: a tensor to those who read it, whether it is held or still in its file.

    It may be set to a tensor, or to `Rows` of a file, which stay there: who reads the field then gets the whole encoder
    as float32 on the dictionary's device, read anew each time and not kept; or, not to be written to, the file's own
    memory. Who needs some rows only asks
    `Dictionary.encoder` or `Dictionary.encoder_rows`.
    """

    def __get__(self, owner: Any, kind: Any = None) -> Tensor:
        if owner is None:
            raise AttributeError("W_enc is a field of each dictionary")  # so that the dataclass sees no default
        held: Rows = owner.__dict__["_encoder"]
        if isinstance(held, LazyTensor) and held.reads_as_stored:
            return held.span(0, held.shape[0]).to(owner.b_enc.device)
        return held.tensor if isinstance(held, HeldTensor) else held.all().to(owner.b_enc.device)

    def __set__(self, owner: Any, value: "Tensor | Rows") -> None:
        owner.__dict__["_encoder"] = HeldTensor("W_enc", value) if isinstance(value, Tensor) else value


def blocks(encoder: Rows, n_positions: int, rank: int, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """The encoder in blocks of whole features that fit the budgets: which features, and their rows (f r, D)."""
    n_features, width = encoder.shape[0] // rank, encoder.shape[1]
    fits = min(BLOCK // max(1, n_positions * rank), BLOCK_BYTES // max(1, 4 * width * rank))
    step = max(FEWEST, fits)
    for first in range(0, n_features, step):
        last = min(first + step, n_features)
        yield slice(first, last), _span(encoder, first * rank, last * rank, device)


def _span(encoder: Rows, first: int, last: int, device: torch.device) -> Tensor:
    """Neighbouring rows of an encoder, without a copy where that can be."""
    if isinstance(encoder, HeldTensor):
        return encoder.tensor[first:last]
    if isinstance(encoder, LazyTensor):
        return encoder.span(first, last).to(device)
    return encoder.rows(torch.arange(first, last)).to(device)


def read(encoder: Rows, index: Tensor, device: torch.device) -> Tensor:
    """The rows `index` (n,) of an encoder, on a device; those of a file are read once each."""
    if isinstance(encoder, HeldTensor):
        return encoder.tensor[index.to(encoder.tensor.device)].to(device)
    unique, inverse = torch.unique(index.cpu(), return_inverse=True)
    return encoder.rows(unique).to(device)[inverse.to(device)]


def encode_blocks(
    parts: Iterator[tuple[slice, Tensor]], activation: Activation, threshold: Tensor | None, rank: int = 1
) -> Gated:
    """Active features from the pre-activations of one block of features after another.

    Each entry passes or not by itself, so the blocks are gated one by one; only a top-k compares features of several
    blocks, and keeps the k largest so far (of rank one; above, there may be one block only).

    Parameters
    ----------
    parts
        Blocks from the first feature on: which features, and their pre-activations (T, f, r).
    activation, threshold
        As for `circuits.kernels.encode.encode`; for r > 1 they see lengths.

    Returns
    -------
    positions, features, activations, pre_activations, directions
        (n,) each, sorted by position, then feature; directions (n, r) for r > 1, else None.
    """
    if activation.kind == "topk" and rank == 1:
        return _largest(parts, activation)
    found = []
    for block, pre in parts:
        size = pre.squeeze(-1) if rank == 1 else pre.norm(dim=-1)
        mine = threshold[block] if threshold is not None and threshold.numel() > 1 else threshold
        positions, features, activations, sizes = gate(size, activation, mine)
        directions = pre[positions, features] / sizes.unsqueeze(1) if rank > 1 else None
        found.append((positions, features + block.start, activations, sizes, directions))
    if len(found) == 1:
        return found[0]
    positions = torch.cat([part[0] for part in found])
    order = torch.argsort(positions, stable=True)
    features, activations, sizes = (torch.cat(column)[order] for column in list(zip(*found, strict=True))[1:4])
    some = [part[4] for part in found if part[4] is not None]
    return positions[order], features, activations, sizes, torch.cat(some)[order] if some else None


def _largest(parts: Iterator[tuple[slice, Tensor]], activation: Activation) -> Gated:
    """The entries of blocks of pre-activations (T, f, 1) under a top-k."""
    assert activation.k is not None
    values, features = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    for block, part in parts:
        pre = part.squeeze(-1)
        mine = torch.arange(block.start, block.stop, device=pre.device).expand(len(pre), -1)
        if block.start:
            pre, mine = torch.cat([values, pre], dim=1), torch.cat([features, mine], dim=1)
        values, at = pre.topk(min(activation.k, pre.shape[1]), dim=1)
        features = mine.gather(1, at)
    features, order = features.sort(dim=1)
    values = values.gather(1, order)
    positions, column = (values > 0 if activation.rectify else values != 0).nonzero(as_tuple=True)
    sizes = values[positions, column]
    return positions, features[positions, column], sizes, sizes.clone(), None
