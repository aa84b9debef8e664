"""Rows of the attribution matrix: the edges into a block of targets, from readers and writers, without autograd.

A covector starts local, at its reader's position, and is pulled down. Where every sublayer is replaced nothing
passes, and a row is one product with the writers at the same position. A live sublayer (frozen attention, a skip
connection) changes the covector; attention spreads it over positions, never beyond its reader's. Between two live
sublayers it is constant, so the writers of that stretch are summed first and multiplied once.

Shapes: B targets, S positions, D model width, n nodes.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from circuits.kernels.contract import contract_spread
from circuits.linearize import LinearizedModel
from circuits.nodes import NodeTable

SPREAD_BUDGET = 2**24
ROW_BUDGET = 2**24


@dataclass(frozen=True)
class Targets:
    """Targets that read at one depth; node numbers, positions and recorded pre-activations, (B,) each.

    Either `covectors` (B, D) of the stream below `depth`, or `heads` (B, H, E): readers of the head outputs of
    `attention_layer`, whose keys read below `depth`. `constants` (B,) are the encoder's and the read norm's biases.
    """

    depth: int
    nodes: Tensor
    positions: Tensor
    values: Tensor
    constants: Tensor
    covectors: Tensor | None = None
    heads: Tensor | None = None
    attention_layer: int = -1

    def __len__(self) -> int:
        return len(self.nodes)

    def take(self, index: Tensor) -> "Targets":
        """Some of the targets."""
        return Targets(
            self.depth,
            self.nodes[index],
            self.positions[index],
            self.values[index],
            self.constants[index],
            None if self.covectors is None else self.covectors[index],
            None if self.heads is None else self.heads[index],
            self.attention_layer,
        )


@dataclass(frozen=True)
class RowBlock:
    """Edges into B targets from nodes `first:first + n`: `weights` (B, n), and the targets' ledger `bias` (B,)."""

    targets: Targets
    first: int
    weights: Tensor
    bias: Tensor

    def gaps(self) -> Tensor:
        """The ledger's relative gap of each target, (B,)."""
        largest = self.weights.abs().amax(1) if self.weights.shape[1] else torch.zeros_like(self.bias)
        scale = torch.stack([self.targets.values.abs(), largest, self.bias.abs()]).amax(0).clamp(min=1e-30)
        return (self.weights.sum(1) + self.bias - self.targets.values).abs() / scale


@dataclass(frozen=True)
class _Stretch:
    """Writers summed over the depths of one stretch: `nodes` (m,) ascending, `starts` by position."""

    nodes: Tensor
    vectors: Tensor
    starts: list[int]
    constant: Tensor


class Rows:
    """Computes rows for blocks of targets on one linearized prompt."""

    def __init__(self, linear: LinearizedModel, table: NodeTable) -> None:
        self.linear, self.table = linear, table
        self._stretches: OrderedDict[tuple[int, int], _Stretch] = OrderedDict()

    def blocks(self, targets: Targets) -> Iterator[RowBlock]:
        """Row blocks that together hold every target once, in the order of their positions."""
        targets = targets.take(torch.argsort(targets.positions, stable=True))
        spread = targets.heads is not None or any(depth < targets.depth for depth in self.linear.live_depths)
        start = 0
        while start < len(targets):
            position = int(targets.positions[start])
            if spread:
                stop = self._chunk_end(targets, start)
            else:
                stop = int(torch.searchsorted(targets.positions, position, right=True))
                width = self.table.starts[position + 1] - self.table.starts[position]
                stop = min(stop, start + max(1, ROW_BUDGET // max(1, width)))
            index = torch.arange(start, stop, device=targets.nodes.device)
            yield (self._spread_block if spread else self._local_block)(targets.take(index))
            start = stop

    def _chunk_end(self, targets: Targets, start: int) -> int:
        model = self.linear.model.shape
        stop = start
        while stop < len(targets):
            n_keys = int(targets.positions[stop]) + 1
            count = stop + 1 - start
            fits = count * n_keys * model.d_model <= SPREAD_BUDGET
            fits = fits and count * self.table.starts[n_keys] <= ROW_BUDGET
            if not fits and count > 1:
                break
            stop += 1
        return stop

    def _local_block(self, targets: Targets) -> RowBlock:
        assert targets.covectors is not None
        position = int(targets.positions[0])
        first, last = self.table.starts[position], self.table.starts[position + 1]
        stretch = self._stretch(0, targets.depth)
        rows = slice(stretch.starts[position], stretch.starts[position + 1])
        weights = targets.covectors.new_zeros(len(targets), last - first)
        weights[:, stretch.nodes[rows] - first] = targets.covectors @ stretch.vectors[rows].T
        return RowBlock(targets, first, weights, targets.constants + targets.covectors @ stretch.constant[position])

    def _spread_block(self, targets: Targets) -> RowBlock:
        n_keys = int(targets.positions[-1]) + 1
        g, bias = self._start(targets, n_keys)
        weights = g.new_zeros(len(targets), self.table.starts[n_keys])
        high = targets.depth
        for live in (*(depth for depth in self.linear.live_depths if depth < targets.depth), 0):
            stretch = self._stretch(live, high)
            weights[:, stretch.nodes[: stretch.starts[n_keys]]] += contract_spread(g, stretch.vectors, stretch.starts)
            bias = bias + torch.einsum("bsd,sd->b", g, stretch.constant[:n_keys])
            if live in self.linear.skips:
                g = g + self.linear.skips[live].pull(g, slice(0, n_keys))
            elif live:
                g = g + self.linear.attention[(live - 1) // 2].pull(g)
            high = live
        return RowBlock(targets, 0, weights, bias)

    def _start(self, targets: Targets, n_keys: int) -> tuple[Tensor, Tensor]:
        """Covectors (B, n_keys, D) below the targets' depth, and the constants met on the way there."""
        if targets.heads is not None:
            attention = self.linear.attention[targets.attention_layer]
            bias = torch.einsum("bhe,bhe->b", targets.heads, attention.head_bias[targets.positions])
            return attention.pull_heads(targets.positions, targets.heads, n_keys), targets.constants + bias
        assert targets.covectors is not None
        g = targets.covectors.new_zeros(len(targets), n_keys, targets.covectors.shape[1])
        g[torch.arange(len(targets), device=g.device), targets.positions] = targets.covectors
        return g, targets.constants

    def _stretch(self, low: int, high: int) -> _Stretch:
        """Writers of depths `low <= depth < high`, summed for each node."""
        key = (low, high)
        if key in self._stretches:
            self._stretches.move_to_end(key)
            return self._stretches[key]
        table = self.table
        depths = [depth for depth in range(low, high) if depth in table.writes]
        constant = sum((table.constants[depth] for depth in range(low, high)), torch.zeros_like(table.constants[0]))
        if len(depths) == 1:
            nodes, vectors = table.writes[depths[0]].nodes, table.writes[depths[0]].vectors
        elif depths:
            nodes, inverse = torch.unique(
                torch.cat([table.writes[depth].nodes for depth in depths]), return_inverse=True
            )
            vectors = constant.new_zeros(len(nodes), constant.shape[1])
            vectors.index_add_(0, inverse, torch.cat([table.writes[depth].vectors for depth in depths]))
        else:
            nodes, vectors = (
                torch.zeros(0, dtype=torch.long, device=constant.device),
                constant.new_zeros(0, constant.shape[1]),
            )
        starts = torch.searchsorted(nodes.cpu(), torch.tensor(table.starts)).tolist()
        self._stretches[key] = _Stretch(nodes, vectors, starts, constant)
        while len(self._stretches) > len(self.linear.live_depths) + 2:
            self._stretches.popitem(last=False)
        return self._stretches[key]
