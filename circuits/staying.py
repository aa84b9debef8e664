"""What stays at a position of the linearized model: paths that no head carries to another position.

Residual stream, live skip connections, and the share of itself that each frozen head sees, `A_h[s, s]`. Local, so
cheap: the lower part of a source's first hop and the upper part of a target's last hop (`circuits.hops`).

Shapes: B targets, N sources, H heads, E head width, D model width.
"""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from circuits.frozen import FrozenAttention
from circuits.linearize import LinearizedModel
from circuits.nodes import NodeTable
from circuits.rows import Targets


class StayingStreams:
    """The stream that each of N sources makes at its own position by paths that stay there.

    Writes below the cut `floor` are left out. Values that a source writes enter as what its layer's heads bring back to
    its own position.
    """

    def __init__(self, linear: LinearizedModel, table: NodeTable, floor: int, nodes: np.ndarray) -> None:
        self.linear, self.table, self.floor, self.nodes = linear, table, floor, nodes
        self.positions = torch.from_numpy(table.position[nodes]).to(table.constants[0].device)
        self._values: dict[int, Tensor] = {}

    @cached_property
    def _below(self) -> list[Tensor]:
        """The stream (N, D) below each depth from the floor up."""
        linear, table, at = self.linear, self.table, self.positions
        number = torch.from_numpy(self.nodes).to(at.device)
        x = torch.zeros(len(number), linear.model.shape.d_model, device=at.device)
        found = []
        for depth in range(self.floor, linear.n_depths + 1):
            found.append(x)
            above = x
            if depth > self.floor and (skip := linear.skip_at(depth)) is not None:
                above = above + skip.push(x, at)
            if depth > self.floor and (attention := linear.passing_at(depth)) is not None:
                above = above + _own_output(attention, attention.values(x, at), at)
            if (layer := linear.heads_at(depth)) is not None and layer in table.value_writes:
                hit, values = head_values(linear, table, layer, number)
                above = above.index_add(0, hit, _own_output(linear.attention[layer], values, at[hit]))
            if depth in table.writes:
                hit, vectors = writers_of(table.writes[depth].nodes, table.writes[depth].vectors, number)
                above = above.index_add(0, hit, vectors)
            x = above
        return found

    def stream(self, depth: int) -> Tensor:
        """The stream (N, D) that a reader of this depth sees."""
        return self._below[depth - self.floor]

    def arriving(self, layer: int, *, by_heads: bool = True) -> Tensor:
        """The values (N, H, E) that this stream has in a layer, or (N, 1, D), the stream as its attention reads it."""
        attention = self.linear.attention[layer]
        if not by_heads:
            return attention.norm.apply(self.stream(2 * layer + 1), self.positions).unsqueeze(1)
        if layer not in self._values:
            self._values[layer] = attention.values(self.stream(2 * layer + 1), self.positions)
        return self._values[layer]


def writers_of(nodes: Tensor, vectors: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the wanted nodes (N,) are among `nodes`, ascending, and their vectors."""
    if not len(nodes):
        return wanted[:0], vectors
    found = torch.searchsorted(nodes, wanted).clamp(max=len(nodes) - 1)
    hit = torch.nonzero(nodes[found] == wanted)[:, 0]
    return hit, vectors[found[hit]]


def head_values(linear: LinearizedModel, table: NodeTable, layer: int, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the wanted nodes (N,) write values of a layer, and these as each head sees them, (n, H, E)."""
    hit, vectors = writers_of(table.value_writes[layer].nodes, table.value_writes[layer].vectors, wanted)
    shape = linear.model.shape
    vectors = vectors.view(len(hit), shape.n_kv_heads, shape.d_head)
    return hit, vectors.repeat_interleave(shape.n_heads // shape.n_kv_heads, dim=1)


def staying_reader(linear: LinearizedModel, targets: Targets) -> Tensor:
    """Covectors (B, D) of the stream below the targets' depth, of what their own positions read there."""
    attention = linear.attention[targets.attention_layer]
    if targets.heads is not None:
        return _own_readers(attention, targets.heads, targets.positions)
    assert targets.covectors is not None
    if targets.keys is None:
        return targets.covectors
    own = targets.keys.gather(1, targets.positions.unsqueeze(1))
    return attention.norm.pull(own * targets.covectors, targets.positions)


def staying_head_readers(linear: LinearizedModel, targets: Targets) -> dict[int, Tensor]:
    """Layer -> readers (B, H, E) of its head outputs: the covectors that stay at the targets' positions, on their way
    down to each frozen attention."""
    g, at = staying_reader(linear, targets), targets.positions
    found = {}
    for live in linear.passed(targets.depth):
        below = g
        if (skip := linear.skip_at(live)) is not None:
            below = below + skip.pull(g, at)
        if (layer := linear.heads_at(live)) is not None:
            found[layer] = linear.attention[layer].head_readers(g, at)
        if layer is not None and (attention := linear.passing_at(live)) is not None:
            below = below + _own_readers(attention, found[layer], at)
        g = below
    return found


def _own_output(attention: FrozenAttention, values: Tensor, positions: Tensor) -> Tensor:
    """What heads write from values (n, H, E) at `positions` back to the same positions, (n, D)."""
    own = attention.pattern[:, positions, positions].T.unsqueeze(-1)
    return attention.write((own * values).flatten(1), positions)


def _own_readers(attention: FrozenAttention, u: Tensor, positions: Tensor) -> Tensor:
    """Readers (B, H, E) of the head outputs as covectors (B, D) of `resid_pre` at the same positions."""
    own = attention.pattern[:, positions, positions].T.unsqueeze(-1) * u
    own = own.view(len(u), len(attention.weights.w_v), -1, u.shape[2]).sum(2)
    return attention.pull_value_readers(own.flatten(1), positions)[0]
