"""Head loadings of the edges that are left after pruning: which head carried how much, from which key.

For an edge into a feature that reads an attention output at position p, from node i,

    w_hs = A_h[p, s] u_h . V_h N(x_i[s])        sum over heads h and keys s = the edge's weight

where `u_h` is the reader at head h and `x_i` the stream that node i makes below the layer. With every layer below
replaced, `x_i` stands at the node's own position only; frozen layers below may carry it to several keys. A feature
with a pattern of its own has that one head. From the key side of a feature that the base layer's heads move to its
query side the loadings are `alpha_fh A_h[p, s] a_f[s]`, the identity among the heads. An edge that leaves replaced
values is split by the heads that carry it away, and by the position where they write.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from circuits.graph import IDENTITY_HEAD, OWN_HEAD
from circuits.linearize import LinearizedModel
from circuits.nodes import NodeTable
from circuits.rows import Targets, pair_loadings
from circuits.sweep import Sweep

NEGLIGIBLE = 1e-8
CHUNK = 256


@dataclass(frozen=True)
class Loadings:
    """One entry a loading, (k,) each: edge, layer, head, key position, query position, weight."""

    edge: np.ndarray
    layer: np.ndarray
    head: np.ndarray
    key: np.ndarray
    query: np.ndarray
    weight: np.ndarray


def head_loadings(sweep: Sweep, source: np.ndarray, target: np.ndarray) -> Loadings:
    """Loadings of the edges (source, target); those that no replacement gives heads have none.

    From a value feature or error: by the heads of its own layer, through which it leaves its position. Else by what
    the target reads: an attention output, its own pattern, or the key side of the same feature.
    """
    table, pieces = sweep.table, []
    from_values = np.isin(np.append(table.kind, "")[np.minimum(source, len(table))], ("value_feature", "value_error"))
    for nodes, build in sweep.groups:
        edges = np.flatnonzero(np.isin(target, nodes))
        if not len(edges):
            continue
        targets, row = np.unique(target[edges], return_inverse=True)
        readers = build(np.searchsorted(nodes, targets))
        through = ~from_values[edges]
        if readers.carried is not None:
            pieces.append(_carried(sweep, readers, edges, row, source[edges]))
        elif through.any() and (readers.heads is not None or readers.keys is not None):
            pieces += _into_readers(sweep, readers, edges[through], row[through], source[edges[through]])
        for layer in np.unique(table.layer[source[edges[~through]]]):
            leaving = ~through & (np.append(table.layer, -1)[np.minimum(source[edges], len(table))] == layer)
            pieces += _from_values(sweep, int(layer), readers, edges[leaving], row[leaving], source[edges[leaving]])
    if not pieces:
        none = np.zeros(0, dtype=np.int64)
        return Loadings(none, none, none, none, none, np.zeros(0, dtype=np.float32))
    columns = [np.concatenate(parts) for parts in zip(*pieces, strict=True)]
    order = np.lexsort((columns[4], columns[3], columns[2], columns[0]))
    return Loadings(*(column[order] for column in columns))


def _into_readers(
    sweep: Sweep, readers: Targets, edges: np.ndarray, row: np.ndarray, source: np.ndarray
) -> Iterator[tuple[np.ndarray, ...]]:
    """Edges into targets that read through the base layer's heads, or through a pattern of their own."""
    sources, column = np.unique(source, return_inverse=True)
    layer = readers.attention_layer
    attention = sweep.linear.attention[layer]
    for start in range(0, len(sources), CHUNK):
        chosen = (column >= start) & (column < start + CHUNK)
        if not chosen.any():
            continue
        key, stream = _streams(sweep.linear, sweep.table, sources[start : start + CHUNK], 2 * layer + 1)
        at = torch.from_numpy(column[chosen] - start).to(key.device)
        of = torch.from_numpy(row[chosen]).to(key.device)
        query, key_of = readers.positions[of], key[at]
        if readers.heads is not None:
            values = attention.values(stream.flatten(0, 1), key.flatten())
            values = values.view(*key.shape, *values.shape[1:])
            weights = _contract(attention.pattern, readers.heads[of], values[at], query, key_of)
            heads = np.arange(weights.shape[2])
        else:
            assert readers.keys is not None
            assert readers.covectors is not None
            normed = attention.norm.apply(stream.flatten(0, 1), key.flatten()).view_as(stream)
            weights = torch.einsum("ed,esd->es", readers.covectors[of], normed[at])
            weights = (weights * readers.keys[of].gather(1, key_of)).unsqueeze(2)
            heads = np.array([OWN_HEAD])
        yield _flat(edges[chosen], layer, weights, key_of, query[:, None].expand_as(key_of), heads)


def _carried(
    sweep: Sweep, readers: Targets, edges: np.ndarray, row: np.ndarray, source: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Edges from the key side to the query side of a feature."""
    sent = sweep.table.carried[readers.dictionary]
    numbers, order = sent.nodes.sort()
    column = order[torch.searchsorted(numbers, torch.from_numpy(source).to(numbers))]
    queries = readers.take(torch.from_numpy(row).to(column.device))
    weights = pair_loadings(sweep.linear, queries, sent.positions[column], sent.values[column])
    key, query = sent.positions[column].unsqueeze(1), queries.positions.unsqueeze(1)
    heads = np.append(np.arange(weights.shape[1] - 1), IDENTITY_HEAD)
    return _flat(edges, readers.attention_layer, weights.unsqueeze(1), key, query, heads)


def _from_values(
    sweep: Sweep, layer: int, readers: Targets, edges: np.ndarray, row: np.ndarray, source: np.ndarray
) -> Iterator[tuple[np.ndarray, ...]]:
    """Edges that leave the values of a layer: by the head, and by the position where it writes."""
    attention, shape = sweep.linear.attention[layer], sweep.linear.model.shape
    written = sweep.table.value_writes[layer]
    stage = next(stage for stage in sweep.rows.stages(readers) if stage.low == 2 * layer + 1)
    u = attention.head_readers(stage.g)
    numbers = torch.searchsorted(written.nodes, torch.from_numpy(source).to(written.nodes))
    key = torch.from_numpy(sweep.table.position[source]).to(u.device)
    of = torch.from_numpy(row).to(u.device)
    n = u.shape[1]
    for start in range(0, len(edges), CHUNK):
        part = slice(start, start + CHUNK)
        vectors = written.vectors[numbers[part]]
        vectors = vectors.view(len(vectors), shape.n_kv_heads, -1)
        vectors = vectors.repeat_interleave(shape.n_heads // shape.n_kv_heads, dim=1)
        amounts = torch.einsum("eqhd,ehd->eqh", u[of[part]], vectors)
        entries = attention.pattern[:, :n][:, :, key[part]].permute(2, 1, 0)
        query = torch.arange(n, device=u.device).expand(len(amounts), n)
        keys = key[part].unsqueeze(1).expand(len(amounts), n)
        yield _flat(edges[part], layer, entries * amounts, keys, query, np.arange(shape.n_heads))


def _streams(linear: LinearizedModel, table: NodeTable, nodes: np.ndarray, below: int) -> tuple[Tensor, Tensor]:
    """Keys (N, S') and the stream (N, S', D) below a depth that each node makes there."""
    device = table.constants[0].device
    n = linear.recording.n_positions
    number = torch.from_numpy(nodes).to(device)
    position = torch.from_numpy(table.position[nodes]).to(device)
    spreads = bool(linear.passed(below))
    shape = (len(nodes), n if spreads else 1, linear.model.shape.d_model)
    writers: dict[int, Tensor] = {}
    for depth, write in table.writes.items():
        if not linear.floor(below) <= depth < below:
            continue
        found = torch.searchsorted(write.nodes, number).clamp(max=len(write.nodes) - 1)
        hit = torch.nonzero(write.nodes[found] == number)[:, 0]
        writers[depth] = torch.zeros(shape, device=device)
        writers[depth][hit, position[hit] if spreads else 0] = write.vectors[found[hit]]
    if not spreads:
        return position.unsqueeze(1), torch.stack(list(writers.values())).sum(0)
    return torch.arange(n, device=device).expand(len(nodes), n), linear.push(writers, below)


def _contract(pattern: Tensor, u: Tensor, values: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Loadings (edges, S', H) from readers (edges, H, E), values (edges, S', H, E), and the pattern's entries."""
    entries = pattern[:, query.unsqueeze(1), key].permute(1, 2, 0)
    return entries * torch.einsum("ehd,eshd->esh", u, values)


def _flat(
    edges: np.ndarray, layer: int, weights: Tensor, key: Tensor, query: Tensor, heads: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Columns of the loadings (edges, X, H) that are not negligible, at keys and queries (edges, X)."""
    w = weights.cpu().numpy()
    size = np.abs(w)
    row, at, head = np.nonzero(size > NEGLIGIBLE * size.sum((1, 2), keepdims=True))
    keys, queries = key.cpu().numpy(), query.cpu().numpy()
    return edges[row], np.full(len(row), layer), heads[head], keys[row, at], queries[row, at], w[row, at, head]
