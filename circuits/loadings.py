"""Head loadings of the edges that are left after pruning: which head carried how much, from which key.

For an edge into a feature that reads an attention output at position p, from node i,

    w_hs = A_h[p, s] u_h . V_h N(x_i[s])        sum over heads h and keys s = the edge's weight

where `u_h` is the reader at head h and `x_i` the stream that node i makes below the layer. With every layer below
replaced, `x_i` stands at the node's own position only; frozen layers below may carry it to several keys.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from circuits.linearize import LinearizedModel
from circuits.nodes import NodeTable
from circuits.sweep import feature_targets

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


def head_loadings(linear: LinearizedModel, table: NodeTable, source: np.ndarray, target: np.ndarray) -> Loadings:
    """Loadings of the edges (source, target) whose target reads an attention output; others have none."""
    pieces = []
    reads_attention = np.array([d.read.site.name in ("attn_out", "z") for d in linear.dictionaries] + [False])
    dictionary = np.append(table.dictionary, -1)[np.minimum(target, len(table))]
    for index in np.unique(dictionary[reads_attention[dictionary]]):
        edges = np.flatnonzero(dictionary == index)
        targets, row = np.unique(target[edges], return_inverse=True)
        sources, column = np.unique(source[edges], return_inverse=True)
        device = table.constants[0].device
        readers = feature_targets(linear, table, int(index), targets, device)
        assert readers.heads is not None
        layer = readers.attention_layer
        for start in range(0, len(sources), CHUNK):
            chosen = (column >= start) & (column < start + CHUNK)
            if chosen.any():
                keys, values = _values(linear, table, sources[start : start + CHUNK], layer)
                query = readers.positions[row[chosen]]
                key = keys[column[chosen] - start]
                u = readers.heads[row[chosen]]
                weights = _contract(linear.attention[layer].pattern, u, values[column[chosen] - start], query, key)
                pieces.append(_flat(edges[chosen], layer, weights, key, query))
    if not pieces:
        none = np.zeros(0, dtype=np.int64)
        return Loadings(none, none, none, none, none, np.zeros(0, dtype=np.float32))
    columns = [np.concatenate(parts) for parts in zip(*pieces, strict=True)]
    order = np.lexsort((columns[3], columns[2], columns[0]))
    return Loadings(*(column[order] for column in columns))


def _values(linear: LinearizedModel, table: NodeTable, nodes: np.ndarray, layer: int) -> tuple[Tensor, Tensor]:
    """Keys (N, S') and values (N, S', H, E) at layer `layer` of what each node makes in the stream below it."""
    below = 2 * layer + 1
    device = table.constants[0].device
    n = linear.recording.n_positions
    number = torch.from_numpy(nodes).to(device)
    position = torch.from_numpy(table.position[nodes]).to(device)
    spreads = any(depth < below for depth in linear.live_depths)
    shape = (len(nodes), n if spreads else 1, linear.model.shape.d_model)
    writers: dict[int, Tensor] = {}
    for depth, write in table.writes.items():
        if depth >= below:
            continue
        found = torch.searchsorted(write.nodes, number).clamp(max=len(write.nodes) - 1)
        hit = torch.nonzero(write.nodes[found] == number)[:, 0]
        writers[depth] = torch.zeros(shape, device=device)
        writers[depth][hit, position[hit] if spreads else 0] = write.vectors[found[hit]]
    attention = linear.attention[layer]
    if not spreads:
        stream = torch.stack(list(writers.values())).sum(0)[:, 0]
        return position.unsqueeze(1), attention.values(stream, position).unsqueeze(1)
    stream = linear.push(writers, below)
    keys = torch.arange(n, device=device).expand(len(nodes), n)
    values = attention.values(stream.flatten(0, 1), keys.flatten())
    return keys, values.reshape(len(nodes), n, *values.shape[1:])


def _contract(pattern: Tensor, u: Tensor, values: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Loadings (edges, S', H) from readers (edges, H, E), values (edges, S', H, E), and the pattern's entries."""
    entries = pattern[:, query.unsqueeze(1), key].permute(1, 2, 0)
    return entries * torch.einsum("ehd,eshd->esh", u, values)


def _flat(edges: np.ndarray, layer: int, weights: Tensor, key: Tensor, query: Tensor) -> tuple[np.ndarray, ...]:
    w = weights.cpu().numpy()
    size = np.abs(w)
    row, s, head = np.nonzero(size > NEGLIGIBLE * size.sum((1, 2), keepdims=True))
    keys, queries = key.cpu().numpy(), query.cpu().numpy()
    return edges[row], np.full(len(row), layer), head, keys[row, s], queries[row], w[row, s, head]
