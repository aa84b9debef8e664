"""Global weights: how strongly features act on each other whatever the prompt, and the strongest partners of one.

The weights are those of `circuits.paths`. Virtual weights are from "A Mathematical Framework for Transformer Circuits"
(Elhage et al. 2021); "Circuit Tracing" (Ameisen et al. 2025), "Global Weights", shows them between features, and
warns of interference: features that are never active together have weights too, and these mean nothing. So each weight
is given with its z-score among all weights of its list.

Heads have patterns of their own, so there is no sum over heads without a prompt: of several heads the one with the
largest weight, by size, stands for a pair, and is named. The weight of a feature of rank r > 1 is the norm over its r
rows, without a sign.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from circuits.endpoints import End, Ends
from circuits.errors import CircuitsError
from circuits.graph import IDENTITY_HEAD, head_name
from circuits.loading import Model
from circuits.paths import (
    Label,
    Reader,
    Side,
    Through,
    blocks,
    links,
    parse_through,
    readers,
    score_links,
    score_readers,
    value_links,
)
from circuits.prompt import token_texts
from circuits.replacements.dictionary import Dictionary
from circuits.replacements.movement import HeadLoading

Of = Literal["features", "tokens"]


@dataclass(frozen=True)
class Partner:
    """One entry of a list.

    kind
        As of the nodes of a graph.
    weight, z
        The virtual weight, and by how many standard deviations it differs from the mean of all weights of the list.
    layer, head
        Of the head on the way, the strongest for this partner; None without one.
    share
        The head's part of the partner's weights through all heads of the list, by size.
    text
        Of a token.
    loadings
        What carries a feature of a multitoken transcoder, (head, alpha) for each head and the identity.
    """

    address: str
    kind: str
    weight: float
    z: float
    layer: int | None = None
    head: int | None = None
    share: float = 1.0
    text: str = ""
    loadings: tuple[tuple[int, float], ...] = ()

    @property
    def head_name(self) -> str:
        """`L2H5`; empty without a head on the way."""
        return "" if self.head is None else head_name(self.head, layer=self.layer)


@dataclass(frozen=True)
class Partners:
    """The strongest partners of a feature on one side.

    `rows` are sorted by size of the weight. They are taken from `weights` weights, one for each candidate and head, of
    this `mean` and standard `deviation`.
    """

    feature: str
    side: Side
    through: str
    of: Of
    offset: int
    rows: tuple[Partner, ...]
    weights: int
    mean: float
    deviation: float


@torch.no_grad()
def partners(
    model: Model,
    feature: str,
    *,
    through: str = "residual",
    side: Side | None = None,
    top: int = 20,
    offset: int = 0,
    of: Of = "features",
) -> Partners:
    """The strongest partners of a feature, by size of the virtual weight.

    Parameters
    ----------
    feature
        An address without position: `2_153`, `a2_153`, `k1_5`, `q1_5`, `v0_3`; a token of the input `E_17`, or of the
        output `4_17` (4 being the number of layers).
    through
        `residual`, `L2H5` (the OV circuit of a head) or `ov` (of every head), `qk:L2H5` or `qk`.
    side
        What the feature does. `reads`: partners are what it reads; `writes`: what reads it (the default); with `qk`
        `queries`: the keys that it looks for (the default); `keys`: the queries that look for it.
    top
        How many.
    offset
        Places from the key to the query, for models with rotary positions; it changes nothing in others.
    of
        `features`, or `tokens`: the embedding's rows where partners write, the unembedding's less their mean where
        they read.

    Raises
    ------
    CircuitsError
        There is no such feature, head or side.
    """
    ends = Ends(model)
    end, number = ends.find(feature)
    way = parse_through(ends, through)
    side = side or ("queries" if way.kind == "qk" else "writes")
    _check_side(end, feature, way, side)
    _check_numbers(ends, of, top, offset)
    found = _List(top)
    if (side, end.kind) in (("writes", "mtc_key"), ("reads", "mtc_query")):
        if of == "features":
            _add_other_side(ends, found, end, number, way)
    elif side == "writes":
        _add_readers(ends, found, end, number, way, of)
    elif side == "reads":
        _add_writers(ends, found, readers(ends, end, number, way), of)
        if of == "features":
            _add_values(ends, found, end, number, way)
    else:
        _add_writers(ends, found, score_readers(ends, end, number, way, side, offset), of)
    mean, deviation = found.statistics()
    return Partners(feature, side, through, of, offset, found.partners(ends, of), found.count, mean, deviation)


@torch.no_grad()
def virtual_weights(
    model: Model, source: Dictionary, target: Dictionary, through: str = "residual", *, offset: int = 0
) -> Tensor:
    """Virtual weights of every feature of one dictionary to every feature of another, (F_source, F_target).

    Decoders are read in blocks. Each entry is that of its strongest head; where there is no path it is zero. Through a
    QK circuit `source` is in the query and `target` in the key.

    Raises
    ------
    CircuitsError
        There is no such head, or one of the dictionaries takes no part in the model.
    """
    ends = Ends(model)
    way = parse_through(ends, through)
    first = _end_of(ends, source, not_kind="mtc_key")
    second = _end_of(ends, target, not_kind="mtc_key" if way.kind == "qk" else "mtc_query")
    best = torch.zeros(first.n_features, second.n_features)
    if way.kind == "qk":
        found = score_links(ends, first, second, way, offset)
    else:
        found = ((some, link) for some in blocks(ends, first) for link in links(ends, first, some, second, way))
    for features, (_, weights) in found:
        rows = slice(int(features[0]), int(features[-1]) + 1)
        folded = _folded(weights, first.rank, second.rank).cpu()
        best[rows] = torch.where(folded.abs() > best[rows].abs(), folded, best[rows])
    return best


def sides_of(model: Model, feature: str, through: str = "residual") -> tuple[Side, ...]:
    """The sides that a feature has on a way: `reads` and `writes`, `queries` and `keys`, one of them, or none.

    Raises
    ------
    CircuitsError
        There is no such feature or head.
    """
    ends = Ends(model)
    end, _ = ends.find(feature)
    way = parse_through(ends, through)
    return tuple(side for side in get_args(Side) if _refusal(end, way, side) is None)


def _refusal(end: End, way: Through, side: Side) -> str | None:
    """Why a feature does not have a side on a way; None if it does."""
    if (way.kind == "qk") != (side in ("queries", "keys")):
        return "a QK circuit has the sides queries and keys, every other way reads and writes"
    if end.kind == "embedding" and side == "reads":
        return "a token of the input reads nothing"
    if end.kind == "logit" and side != "reads":
        return "a token of the output writes nothing, it only reads"
    if way.kind == "qk" and not end.writes_stream:
        return "it reaches the stream only through heads, so it is in no query and no key by itself"
    return None


def _check_side(end: End, feature: str, way: Through, side: Side) -> None:
    if side not in get_args(Side):
        raise CircuitsError(f"side {side!r} is not one of {', '.join(get_args(Side))}")
    if (refusal := _refusal(end, way, side)) is not None:
        raise CircuitsError(f"{feature} has no side {side!r} there: {refusal}")


def _check_numbers(ends: Ends, of: Of, top: int, offset: int) -> None:
    if of not in get_args(Of):
        raise CircuitsError(f"of is {of!r}, expected features or tokens")
    if top < 1:
        raise CircuitsError(f"top is {top}, expected at least 1")
    if not 0 <= offset < ends.shape.context:
        raise CircuitsError(
            f"offset is {offset}, expected 0 to {ends.shape.context - 1}: places in the model's context"
        )


def _end_of(ends: Ends, dictionary: Dictionary, *, not_kind: str) -> End:
    for end in ends.all:
        if end.dictionary is dictionary and end.kind != not_kind:
            return end
    names = ", ".join(sorted({end.dictionary.name for end in ends.all if end.dictionary is not None}))
    raise CircuitsError(f"dictionary {dictionary.name} takes no part in this model; there are {names}")


def _folded(weights: Tensor, rank: int, other: int) -> Tensor:
    """Weights (n r, m r') of rows as weights (n, m) of features: the norm where a rank is above one."""
    if rank == other == 1:
        return weights
    size = weights.shape[0] // rank, rank, weights.shape[1] // other, other
    return weights.reshape(size).square().sum((1, 3)).sqrt()


class _List:
    """Takes weights block by block, sums over all, and keeps the strongest."""

    def __init__(self, top: int) -> None:
        self.top, self.count, self.sum, self.squares = top, 0, 0.0, 0.0
        self.kept: list[tuple[float, End, int, Label, float]] = []

    def add(self, end: End, first: int, labels: list[Label], weights: Tensor, total: float | None = None) -> None:
        """Weights (n, P) of the features of an end from `first` on, through P heads; shares are of their sum, or of
        `total`."""
        weights = weights.double().cpu()
        self.count += weights.numel()
        self.sum += float(weights.sum())
        self.squares += float(weights.square().sum())
        size, place = weights.abs().max(1)
        totals = weights.abs().sum(1) if total is None else torch.full_like(size, total)
        for i in size.topk(min(self.top, len(size))).indices.tolist():
            at, share = int(place[i]), float(size[i] / totals[i].clamp(min=1e-300))
            self.kept.append((float(weights[i, at]), end, first + i, labels[at], share))
        self.kept = sorted(self.kept, key=lambda entry: -abs(entry[0]))[: self.top]

    def statistics(self) -> tuple[float, float]:
        """Mean and standard deviation of all weights."""
        mean = self.sum / max(self.count, 1)
        return mean, max(self.squares / max(self.count, 1) - mean * mean, 0.0) ** 0.5

    def partners(self, ends: Ends, of: Of) -> tuple[Partner, ...]:
        """What was kept, the strongest first."""
        mean, deviation = self.statistics()
        numbers = [number for _, _, number, _, _ in self.kept]
        texts = token_texts(ends.base, numbers) if of == "tokens" else [""] * len(numbers)
        found = []
        for text, (weight, end, number, (layer, head), share) in zip(texts, self.kept, strict=True):
            z = (weight - mean) / deviation if deviation else 0.0
            place = end.address(number), end.kind
            found.append(Partner(*place, weight, z, layer, head, share, text, _loadings(end, number)))
        return tuple(found)


def _loadings(end: End, feature: int) -> tuple[tuple[int, float], ...]:
    """(head, alpha) of what moves a feature; nothing where heads do not."""
    if end.dictionary is None or not isinstance(end.dictionary.moved_by, HeadLoading):
        return ()
    *heads, identity = end.dictionary.moved_by.weights[feature].tolist()
    return *enumerate(heads), (IDENTITY_HEAD, identity)


def _add_other_side(ends: Ends, found: _List, end: End, feature: int, way: Through) -> None:
    """Key side and query side of a multitoken transcoder's feature: its head loadings are the weights."""
    assert end.dictionary is not None
    other = _end_of(ends, end.dictionary, not_kind=end.kind)
    loadings = _loadings(end, feature)
    total = sum(abs(alpha) for _, alpha in loadings)
    for head, alpha in loadings:
        if way.has(end.layer, head):
            found.add(other, feature, [(end.layer, head)], torch.tensor([[alpha]]), total)


def _add_readers(ends: Ends, found: _List, end: End, feature: int, way: Through, of: Of) -> None:
    """Everything that reads what a feature writes."""
    for target in ends.all:
        if not target.reads_stream or (target.dictionary is None) != (of == "tokens"):
            continue
        if ways := list(links(ends, end, torch.tensor([feature]), target, way)):
            weights = torch.cat([_folded(w, end.rank, target.rank) for _, w in ways])
            found.add(target, 0, [label for label, _ in ways], weights.T)


def _add_writers(ends: Ends, found: _List, reading: list[Reader], of: Of) -> None:
    """Everything that writes to readers of the stream; each decoder row is read once."""
    for end in ends.all:
        sites = ends.sites(end) if (end.dictionary is None) == (of == "tokens") else ()
        live = [reader for reader in reading if any(depth in ends.stretch(reader.depth) for depth, _ in sites)]
        if not live:
            continue
        covectors = torch.stack([reader.rows for reader in live])
        for features in blocks(ends, end):
            weights = covectors.new_zeros(len(features) * end.rank, *covectors.shape[:2])
            for depth, site in sites:
                reached = torch.tensor([depth in ends.stretch(reader.depth) for reader in live], device=weights.device)
                if reached.any():
                    rows = ends.rows(end, features, site)
                    weights[:, reached] += torch.einsum("nd,prd->npr", rows, covectors[reached])
            rank = covectors.shape[1]
            folded = _folded(weights.flatten(1), end.rank, rank)
            found.add(end, int(features[0]), [reader.label for reader in live], folded)


def _add_values(ends: Ends, found: _List, target: End, feature: int, way: Through) -> None:
    """Value features that write to a reader of the stream through the heads of their layer."""
    for end in ends.all:
        for features in blocks(ends, end) if end.kind == "value_feature" else ():
            if ways := list(value_links(ends, end, features, target, feature, way)):
                weights = torch.cat([_folded(w, end.rank, target.rank) for _, w in ways], dim=1)
                found.add(end, int(features[0]), [label for label, _ in ways], weights)
