"""Hop splits: which heads carry an edge that runs through frozen attention, by its first hop and by its last.

An edge through frozen attention sums over many paths, each of which goes through heads of several layers. A head that
attends from a position to itself does not move anything: that path stays and goes on. Each path that leaves its
source's position s does so once, and reaches its target's position p once, so both splits add up to the edge:

    first hop   A_h[p', s] (g_l[p'] O_h) . V_h N(x_l[s])     p' > s; x_l: what the source makes below layer l by paths
                                                             that stay at s; g_l: all of the target's covector above it
    last hop    A_h[p, s'] (g_l[p] O_h) . V_h N(x_l[s'])     s' < p; x_l: all that the source makes at s' below layer l;
                                                             g_l: the target's covector by paths that stay at p

The heads through which a target reads, its own pattern among them, are a hop too, and so are those through which a
value leaves. An edge whose source and target stand at one position never leaves it.

Shapes: B targets, N sources, e edges, S positions, H heads, E head width, D model width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from circuits.frozen import FrozenAttention
from circuits.graph import OWN_HEAD, STAYS
from circuits.hop_edges import HopEdges, HopGroup, hop_groups
from circuits.hop_entries import Hops, Split
from circuits.linearize import LinearizedModel
from circuits.loadings import Loadings
from circuits.rows import SPREAD_BUDGET, Targets
from circuits.staying import (
    StayingStreams,
    head_values,
    staying_head_readers,
    staying_reader,
    writers_of,
)
from circuits.sweep import Sweep


@torch.no_grad()
def hop_splits(
    sweep: Sweep, source: np.ndarray, target: np.ndarray, keep: int | None = 16
) -> tuple[Loadings, Loadings]:
    """First hops and last hops of the edges (source, target); those that pass no frozen attention have none.

    Parameters
    ----------
    sweep
        Of the graph; nodes are numbered as in it.
    source, target
        (m,) nodes, output targets after them.
    keep
        The strongest so many hops of an edge are listed, the others summed up as `REST` (layer -1, key and query those
        of source and target); None lists all. An edge within one position is `STAYS` (layer -1) whole.

    Returns
    -------
    Loadings, Loadings
        By first and by last hop: entries of each edge that add up to it.
    """
    shape, n_positions = sweep.linear.model.shape, sweep.linear.recording.n_positions
    listed = shape.n_layers * shape.n_heads * n_positions if keep is None else keep
    first, last = (Split(len(source), n_positions, listed, sweep.device) for _ in range(2))
    ends = np.zeros((2, len(source)), dtype=np.int64)
    for floor, groups in hop_groups(sweep, source, target).items():
        nodes = np.unique(np.concatenate([group.edges.source for group in groups]))
        streams = StayingStreams(sweep.linear, sweep.table, floor, nodes)
        for group in groups:
            edges = group.edges
            ends[:, edges.numbers] = edges.key.cpu().numpy(), edges.query.cpu().numpy()
            for hops in _staying(streams, HopGroup(group.readers, edges.where(~edges.leaves))):
                first.add(hops)
                last.add(hops)
        leaving = [HopGroup(group.readers, group.edges.where(group.edges.leaves)) for group in groups]
        leaving = [group for group in leaving if len(group.edges)]
        for hops in chain.from_iterable(_first_hops(sweep, group, streams) for group in leaving):
            first.add(hops)
        for hops in _last_hops(sweep, leaving, floor) if leaving else ():
            last.add(hops)
    return first.loadings(*ends), last.loadings(*ends)


def _staying(streams: StayingStreams, group: HopGroup) -> Iterator[Hops]:
    """Edges within one position: all of it stays."""
    covectors, x = staying_reader(streams.linear, group.readers), streams.stream(group.readers.depth)
    for part in group.edges.chunks(covectors.shape[1]):
        weights = (covectors[part.row] * x[part.among(streams.nodes)]).sum(1).view(-1, 1, 1)
        yield _hops(part, -1, weights, part.key.unsqueeze(1), part.query.unsqueeze(1), special=STAYS)


def _first_hops(sweep: Sweep, group: HopGroup, streams: StayingStreams) -> Iterator[Hops]:
    """Hops that leave the sources: into the targets' own heads, and below these on the covectors' way down."""
    linear, shape = sweep.linear, sweep.linear.model.shape
    if group.by_heads:
        layer, readers = group.readers.attention_layer, _own_heads(group.readers)
        arriving = streams.arriving(layer, by_heads=group.readers.heads is not None)
        for part in group.edges.where(group.edges.lowest < group.readers.depth).chunks(shape.d_model):
            amounts = (readers[part.row] * arriving[part.among(streams.nodes)]).sum(2).unsqueeze(1)
            yield _into_readers(linear.attention[layer], group.readers, part, amounts, part.key.unsqueeze(1))
    passed = [linear.heads_at(live) for live in linear.passed(group.readers.depth)]
    entered = [layer for layer in passed if layer is not None and len(group.edges.entering(linear, layer))]
    for some in group.by_targets(shape.d_model) if entered else ():
        for stage in sweep.rows.stages(some.readers):
            if (passing := linear.heads_at(stage.low)) is not None:
                yield from _leaving(sweep, passing, stage.g, some.edges.entering(linear, passing), streams)
            if passing == entered[-1]:
                break


def _leaving(sweep: Sweep, layer: int, g: Tensor, edges: HopEdges, streams: StayingStreams) -> Iterator[Hops]:
    """Hops through the heads of a layer from the sources' positions; `g` (B, S, D) are the covectors above it."""
    linear, attention = sweep.linear, sweep.linear.attention[layer]
    if not len(edges):
        return
    places = torch.arange(g.shape[1], device=g.device)
    u = attention.head_readers(g)
    is_value = layer in linear.replaced_values
    values = _values_of(sweep, layer, streams.nodes) if is_value else streams.arriving(layer)
    for part in edges.chunks(g.shape[1] * attention.n_heads):
        amounts, key = _met(u, values, part.row, part.among(streams.nodes)), part.key.unsqueeze(1)
        query = places.expand(len(part), -1)
        weights = amounts * attention.pattern[:, query, key].permute(1, 2, 0) * (query > key).unsqueeze(2)
        yield _hops(part, layer, weights, key, query)


@dataclass(frozen=True)
class _Risen:
    """What N sources make at positions `places` (S',) below the attention of a layer: the stream x (N, S', D)."""

    layer: int
    attention: FrozenAttention
    nodes: np.ndarray
    places: Tensor
    x: Tensor

    @property
    def depth(self) -> int:
        return 2 * self.layer + 1

    def of(self, edges: HopEdges) -> Iterator[HopEdges]:
        """The edges from these sources, in portions."""
        mine = edges.where(np.isin(edges.source, self.nodes))
        yield from mine.chunks(len(self.places) * self.attention.n_heads)

    @cached_property
    def values(self) -> Tensor:
        """(N, S', H, E)."""
        return self.attention.values(self.x, self.places)

    @cached_property
    def normed(self) -> Tensor:
        """(N, S', 1, D), as the attention reads it."""
        return self.attention.norm.apply(self.x, self.places).unsqueeze(2)


def _last_hops(sweep: Sweep, groups: Sequence[HopGroup], floor: int) -> Iterator[Hops]:
    """Hops that reach the targets' positions: the sources' whole streams on their way up meet what stays above."""
    nodes = np.unique(np.concatenate([group.edges.source for group in groups]))
    end = int(max(group.edges.query.max() for group in groups)) + 1
    passing = _passing(sweep.linear, groups)
    top = max([*passing, *(group.readers.attention_layer for group in groups if group.by_heads)])
    for some in _node_chunks(sweep, nodes, end):
        for risen in _rising(sweep, some, end, floor, top):
            for group in groups:
                if group.by_heads and group.readers.depth == risen.depth:
                    yield from _reading(group, risen)
            if risen.layer in passing:
                yield from _reaching_through(sweep, *passing[risen.layer], risen)


def _passing(linear: LinearizedModel, groups: Sequence[HopGroup]) -> dict[int, tuple[Tensor, HopEdges]]:
    """Layer -> the staying readers (B, H, E) of its heads of all targets above it, and the edges that may enter it."""
    found: dict[int, tuple[list[Tensor], list[HopEdges]]] = {}
    for group in groups:
        for layer, u in staying_head_readers(linear, group.readers).items():
            readers, edges = found.setdefault(layer, ([], []))
            mine = group.edges.entering(linear, layer)
            edges.append(replace(mine, row=mine.row + sum(map(len, readers))))
            readers.append(u)
    return {layer: (torch.cat(readers), HopEdges.joined(edges)) for layer, (readers, edges) in found.items()}


def _node_chunks(sweep: Sweep, nodes: np.ndarray, end: int) -> Iterator[np.ndarray]:
    """Nodes, ascending and so by position, in portions whose streams fit the budget.

    A stream has no entry before its node, so portions end, too, where half of their positions would stand empty.
    """
    position, start = sweep.table.position[nodes], 0
    while start < len(nodes):
        length = end - int(position[start])
        stop = start + max(1, SPREAD_BUDGET // (length * sweep.linear.model.shape.d_model))
        stop = max(start + 1, min(stop, int(np.searchsorted(position, end - length // 2))))
        yield nodes[start:stop]
        start = stop


def _rising(sweep: Sweep, nodes: np.ndarray, end: int, floor: int, top: int) -> Iterator[_Risen]:
    """The streams of some nodes below each attention on their way up from the cut, up to that of layer `top`."""
    linear, table = sweep.linear, sweep.table
    begin = int(table.position[nodes[0]])
    number = torch.from_numpy(nodes).to(sweep.device)
    at = torch.from_numpy(table.position[nodes] - begin).to(sweep.device)
    places = torch.arange(begin, end, device=sweep.device)
    x = torch.zeros(len(nodes), end - begin, linear.model.shape.d_model, device=sweep.device)
    for depth in range(floor, 2 * top + 2):
        above = x
        if depth > floor and (skip := linear.skip_at(depth)) is not None:
            above = above + skip.push(x, places)
        if depth % 2:
            layer = (depth - 1) // 2
            attention, pattern = linear.attention[layer], linear.recording.patterns[layer][:, begin:end, begin:end]
            risen = _Risen(layer, attention, nodes, places, x)
            yield risen
            if layer == top:
                return
            if depth > floor and linear.passing_at(depth) is not None:
                moved = (pattern @ risen.values.transpose(1, 2)).transpose(1, 2)
                above = above + attention.write(moved.flatten(2), places)
            if layer in table.value_writes:
                hit, sent = head_values(linear, table, layer, number)
                moved = pattern[:, :, at[hit]].permute(2, 1, 0).unsqueeze(3) * sent.unsqueeze(1)
                above = above.index_add(0, hit, attention.write(moved.flatten(2), places))
        if depth in table.writes:
            hit, vectors = writers_of(table.writes[depth].nodes, table.writes[depth].vectors, number)
            above = above.index_put((hit, at[hit]), vectors, accumulate=True)
        x = above


def _reading(group: HopGroup, risen: _Risen) -> Iterator[Hops]:
    """Hops into targets that read through the heads of this layer."""
    readers = _own_heads(group.readers)
    arriving = risen.normed if group.readers.heads is None else risen.values
    for part in risen.of(group.edges.where(group.edges.lowest < risen.depth)):
        amounts = _met(arriving, readers, part.among(risen.nodes), part.row)
        yield _into_readers(risen.attention, group.readers, part, amounts, risen.places.expand(len(part), -1))


def _reaching_through(sweep: Sweep, u: Tensor, edges: HopEdges, risen: _Risen) -> Iterator[Hops]:
    """Hops through the heads of this layer to the positions of targets above; `u` (B, H, E) reads them there."""
    for part in risen.of(edges):
        if risen.layer in sweep.linear.replaced_values:
            values = _values_of(sweep, risen.layer, part.source)
            amounts, key = (u[part.row] * values).sum(2).unsqueeze(1), part.key.unsqueeze(1)
        else:
            amounts = _met(risen.values, u, part.among(risen.nodes), part.row)
            key = risen.places.expand(len(part), -1)
        yield _reaching(risen.attention, risen.layer, part, amounts, key)


def _into_readers(attention: FrozenAttention, readers: Targets, part: HopEdges, amounts: Tensor, key: Tensor) -> Hops:
    """Hops into targets that read by heads, or by a pattern of their own as one head; see `_reaching`."""
    layer, query = readers.attention_layer, part.query.unsqueeze(1)
    if readers.keys is None:
        return _reaching(attention, layer, part, amounts, key)
    weights = amounts * (readers.keys[part.row].gather(1, key) * (key < query)).unsqueeze(2)
    return _hops(part, layer, weights, key, query, special=OWN_HEAD)


def _reaching(attention: FrozenAttention, layer: int, part: HopEdges, amounts: Tensor, key: Tensor) -> Hops:
    """Hops to the targets' positions; `amounts` (e, X, H) are what each head brings from keys (e, X) but for `A`."""
    query = part.query.unsqueeze(1)
    weights = amounts * attention.pattern[:, query, key].permute(1, 2, 0) * (key < query).unsqueeze(2)
    return _hops(part, layer, weights, key, query)


def _hops(
    part: HopEdges, layer: int, weights: Tensor, key: Tensor, query: Tensor, *, special: int | None = None
) -> Hops:
    heads = np.arange(weights.shape[2]) if special is None else np.array([special])
    return Hops(torch.from_numpy(part.numbers).to(key.device), layer, heads, weights, key, query)


def _own_heads(readers: Targets) -> Tensor:
    """Readers (B, H, E) of the head outputs, or (B, 1, D) of what their own pattern moves."""
    if readers.heads is not None:
        return readers.heads
    assert readers.covectors is not None
    return readers.covectors.unsqueeze(1)


def _met(many: Tensor, one: Tensor, which: Tensor, at: Tensor) -> Tensor:
    """Products (e, X, H) of `many` (M, X, H, E), number `which` (e,), with `one` (K, H, E), number `at` (e,).

    One matrix product for each of the many, so that none is copied for each edge.
    """
    many, one = many.transpose(1, 2).contiguous(), one.transpose(0, 1).contiguous()
    found = one.new_empty(len(which), many.shape[1], many.shape[2])
    order = torch.argsort(which)
    numbers, counts = torch.unique_consecutive(which[order], return_counts=True)
    at, stop = at[order], 0
    for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        start, stop = stop, stop + count
        product = many[number] @ one[:, at[start:stop]].transpose(1, 2)
        found[start:stop] = product.permute(2, 0, 1)
    return found[torch.argsort(order)].transpose(1, 2)


def _values_of(sweep: Sweep, layer: int, nodes: np.ndarray) -> Tensor:
    """What nodes give to each head of a layer as its values, (N, H, E); zero where they do not write values there."""
    linear = sweep.linear
    hit, values = head_values(linear, sweep.table, layer, torch.from_numpy(nodes).to(sweep.device))
    return values.new_zeros(len(nodes), *values.shape[1:]).index_copy(0, hit, values)
