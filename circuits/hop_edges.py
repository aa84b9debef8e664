"""The edges that hop splits are of: those that pass frozen attention, in groups whose targets read alike.

Shapes: e edges, B targets, n nodes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuits.linearize import LinearizedModel
from circuits.nodes import NodeTable
from circuits.rows import SPREAD_BUDGET, Targets
from circuits.sweep import Sweep

EDGE_BUDGET = 2**22
_VALUES = ("value_feature", "value_error")


@dataclass(frozen=True)
class HopEdges:
    """Edges that pass frozen attention, (e,) each; their numbers, sources, targets and ends.

    `row` is each edge's target among some readers; `value_layer` the layer whose values the source is, else -1;
    `lowest` the lowest depth above the cut at which the source writes; `key` and `query` the edge's ends.
    """

    numbers: np.ndarray
    source: np.ndarray
    value_layer: np.ndarray
    lowest: np.ndarray
    row: Tensor
    key: Tensor
    query: Tensor

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def leaves(self) -> np.ndarray:
        """(e,) whether an edge leaves its source's position."""
        found: np.ndarray = (self.key < self.query).cpu().numpy()
        return found

    def among(self, nodes: np.ndarray) -> Tensor:
        """(e,) where the sources stand among some nodes, ascending."""
        return torch.from_numpy(np.searchsorted(nodes, self.source)).to(self.row.device)

    def entering(self, linear: LinearizedModel, layer: int) -> "HopEdges":
        """Those that the heads of a layer may carry: from values of the layer, or from what is written below it."""
        from_values = layer in linear.replaced_values
        return self.where(self.value_layer == layer if from_values else self.lowest < 2 * layer + 1)

    def where(self, chosen: np.ndarray) -> "HopEdges":
        """Some of the edges, by mask or index."""
        index = torch.from_numpy(chosen).to(self.row.device)
        columns = [getattr(self, column.name) for column in fields(self)]
        return HopEdges(*(c[chosen] if isinstance(c, np.ndarray) else c[index] for c in columns))

    def chunks(self, size: int) -> Iterator["HopEdges"]:
        """The edges in portions whose intermediate tensors, of `size` numbers an edge, fit the budget."""
        step = max(1, EDGE_BUDGET // max(1, size))
        for start in range(0, len(self), step):
            yield self.where(np.arange(start, min(start + step, len(self))))

    @staticmethod
    def joined(parts: Sequence["HopEdges"]) -> "HopEdges":
        """Edges of several groups; `row` counts on from one to the next."""
        columns = {name: [getattr(part, name) for part in parts] for name in (field.name for field in fields(HopEdges))}
        joined: dict[str, Any] = {
            name: np.concatenate(c) if isinstance(c[0], np.ndarray) else torch.cat(c) for name, c in columns.items()
        }
        return HopEdges(**joined)


@dataclass(frozen=True)
class HopGroup:
    """Targets that read alike, and edges into them."""

    readers: Targets
    edges: HopEdges

    @property
    def by_heads(self) -> bool:
        """Whether the targets read through heads or a pattern of their own."""
        return self.readers.heads is not None or self.readers.keys is not None

    def by_targets(self, size: int) -> Iterator["HopGroup"]:
        """In portions with few targets, whose covectors of `size` numbers a position fit the budget."""
        used = torch.unique(self.edges.row)
        used = used[torch.argsort(self.readers.positions[used], stable=True)]
        positions, start = self.readers.positions[used].tolist(), 0
        place = torch.empty(len(self.readers), dtype=torch.long, device=used.device)
        place[used] = torch.arange(len(used), device=used.device)
        rows = place[self.edges.row].cpu().numpy()
        while start < len(used):
            stop = start + 1
            while stop < len(used) and (stop + 1 - start) * (positions[stop] + 1) * size <= SPREAD_BUDGET:
                stop += 1
            some = self.edges.where((rows >= start) & (rows < stop))
            yield HopGroup(self.readers.take(used[start:stop]), replace(some, row=place[some.row] - start))
            start = stop


def hop_groups(sweep: Sweep, source: np.ndarray, target: np.ndarray) -> dict[int, list[HopGroup]]:
    """The edges that pass frozen attention by the cut below them, 0 without one, and by their targets' groups."""
    table, linear = sweep.table, sweep.linear
    value_layer = np.where(np.isin(table.kind, _VALUES), table.layer, -1)
    lowest: dict[int, np.ndarray] = {}
    found: dict[int, list[HopGroup]] = {}
    for nodes, build in sweep.groups:
        edges = np.flatnonzero(np.isin(target, nodes))
        if not len(edges):
            continue
        targets, row = np.unique(target[edges], return_inverse=True)
        readers = build(np.searchsorted(nodes, targets))
        frozen = [depth for depth in linear.passed(readers.depth) if linear.passing_at(depth) is not None]
        if readers.carried is not None or not frozen:
            continue
        floor = linear.floor(readers.depth)
        if floor not in lowest:
            lowest[floor] = _lowest_writes(table, floor)
        where, key = torch.from_numpy(row).to(sweep.device), torch.from_numpy(table.position[source[edges]])
        columns = HopEdges(
            numbers=edges,
            source=source[edges],
            value_layer=value_layer[source[edges]],
            lowest=lowest[floor][source[edges]],
            row=where,
            key=key.to(sweep.device),
            query=readers.positions[where],
        )
        columns = columns.where(columns.lowest < frozen[0])
        if len(columns):
            found.setdefault(floor, []).append(HopGroup(readers, columns))
    return found


def _lowest_writes(table: NodeTable, floor: int) -> np.ndarray:
    """(n,) the lowest depth from `floor` on at which each node writes; huge where there is none."""
    lowest = np.full(len(table), np.iinfo(np.int64).max)
    places = [(depth, write.nodes) for depth, write in table.writes.items()]
    places += [(2 * layer + 1, write.nodes) for layer, write in table.value_writes.items()]
    for depth, nodes in places:
        if depth >= floor:
            at = nodes.cpu().numpy()
            lowest[at] = np.minimum(lowest[at], depth)
    return lowest
