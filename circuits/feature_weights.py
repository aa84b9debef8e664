"""What a feature does whatever the text: output tokens by direct effect, features with like decoders, head loadings.

The direct effect on a token is what one unit of the feature adds to the stream, summed over its write sites, through
the final norm's linear part and the unembedding, the mean over the vocabulary taken off. Left out are the norm's
denominator (so only sizes beside one another count), every later MLP and attention layer, a soft cap of the logits,
and, for values, attention patterns: they count as if each head passed them on whole. A feature of rank r has a row for
each of its r decoder rows, and its effect is their norm, without a sign (as in `circuits.virtual_weights`).
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from circuits.endpoints import End, Ends
from circuits.graph import IDENTITY_HEAD, head_name
from circuits.replacements.dictionary import Dictionary
from circuits.replacements.movement import HeadLoading
from circuits.strongest import Ints

ROWS = 1 << 24  # entries of a block of products
Floats = npt.NDArray[np.float64]


def ends_of(ends: Ends, dictionaries: Sequence[Dictionary]) -> list[End | None]:
    """Where each dictionary's features write; None for one that takes no part in the model."""
    found = []
    for dictionary in dictionaries:
        mine = [end for end in ends.all if end.dictionary is dictionary and end.kind != "mtc_key"]
        found.append(mine[0] if mine else None)
    return found


def written(ends: Ends, end: End, features: Tensor) -> Tensor:
    """What one unit of features adds to the stream, summed over all write sites, (n, r, D)."""
    if end.kind == "value_feature":
        rows = ends.value_rows(end, features).sum(1)
    else:
        rows = torch.stack([ends.rows(end, features, site) for _, site in ends.sites(end)]).sum(0)
    return rows.view(len(features), end.rank, -1)


def outputs(
    ends: Ends, end: End, count: int
) -> Iterator[tuple[Ints, tuple[Ints, Floats], tuple[Ints, Floats]]]:
    """Blocks of features with their top and bottom tokens: (features, (tokens, weights), (tokens, weights))."""
    logits, vocabulary = ends.all[-1], ends.shape.vocabulary
    step = max(1, ROWS // (vocabulary * end.rank))
    count = min(count, vocabulary)
    for first in range(0, end.n_features, step):
        features = torch.arange(first, min(first + step, end.n_features))
        ((_, effects),) = ends.responses(logits, written(ends, end, features).flatten(0, 1))
        effects = effects.view(len(features), end.rank, -1)
        effects = effects.squeeze(1) if end.rank == 1 else effects.norm(dim=1)
        top, bottom = effects.topk(count), (-effects).topk(count)
        yield (
            features.numpy(),
            (top.indices.cpu().numpy(), top.values.double().cpu().numpy()),
            (bottom.indices.cpu().numpy(), -bottom.values.double().cpu().numpy()),
        )


def near_by_decoder(
    ends: Ends, found: Sequence[End | None], near: int, partners: Sequence[Sequence[int]]
) -> Iterator[tuple[int, Ints, Ints, Floats]]:
    """The features whose decoders point in most nearly the same direction; see `coactivation.correlated`.

    For features of ranks above one it is `|A B^T| / sqrt(|A A^T| |B B^T|)` of their decoder rows A and B, |.| being the
    Frobenius norm: 1 where they span the same in the same way, and the size of the cosine for rank one.
    """

    @lru_cache(maxsize=max((len(others) for others in partners), default=1))
    def units(number: int) -> Tensor:
        end = found[number]
        assert end is not None
        return _unit_rows(written(ends, end, torch.arange(end.n_features)))

    for number, others in enumerate(partners):
        if found[number] is None:
            continue
        mine, widths = units(number), [len(units(other)) for other in others]
        at = sum(widths[: list(others).index(number)])
        step = max(1, ROWS // (sum(widths) * mine.shape[1]))
        for first in range(0, len(mine), step):
            features = torch.arange(first, min(first + step, len(mine)))
            table = torch.cat([_alike(mine[first : first + step], units(other)) for other in others], dim=1)
            table[torch.arange(len(features)), at + features] = -torch.inf
            best = table.topk(min(near, table.shape[1] - 1), dim=1)
            yield number, features.numpy(), best.indices.cpu().numpy(), best.values.double().cpu().numpy()


def head_loading(dictionary: Dictionary, feature: int, shares: Floats) -> list[list[int | str | float]]:
    """(head, weight) of each head, none where heads have no part.

    Of a multitoken transcoder's feature these are its loadings, the identity among them. Of one that reads an attention
    output they are shares of what the heads give to it at the tokens of the sample where it is active: `shares` (H,)
    are the sums, and over their sizes the weights add up to one.
    """
    if isinstance(dictionary.moved_by, HeadLoading):
        *heads, identity = dictionary.moved_by.weights[feature].tolist()
        return [*([head, weight] for head, weight in enumerate(heads)), [head_name(IDENTITY_HEAD), identity]]
    total = float(np.abs(shares).sum())
    return [[head, float(share) / total] for head, share in enumerate(shares)] if total else []


def _unit_rows(rows_nrD: Tensor) -> Tensor:
    """Rows scaled so that a feature is 1 near itself; those of a feature that writes nothing stay zero."""
    gram_nrs: Tensor = torch.einsum("nrd,nsd->nrs", rows_nrD, rows_nrD)
    size: Tensor = torch.linalg.vector_norm(gram_nrs, dim=(1, 2))
    return rows_nrD / size.sqrt().clamp(min=1e-30)[:, None, None]


def _alike(mine_nrD: Tensor, others_msD: Tensor) -> Tensor:
    """(n, m) of features of ranks r and s."""
    products: Tensor = torch.einsum("nrd,msd->nrms", mine_nrD, others_msD)
    signed = products.shape[1] == products.shape[3] == 1
    alike: Tensor = products[:, 0, :, 0] if signed else products.square().sum((1, 3)).sqrt()
    return alike
