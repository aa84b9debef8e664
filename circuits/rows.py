"""Rows of the attribution matrix: the edges into a block of targets, from readers and writers, without autograd.

A covector starts local, at its reader's position, and is pulled down. Where every sublayer is replaced nothing
passes, and a row is one product with the writers at the same position. A live sublayer (frozen attention, a skip
connection) changes the covector; attention spreads it over positions, never beyond its reader's. Between two live
sublayers it is constant, so the writers of that stretch are summed first and multiplied once.

Shapes: B targets, S positions, D model width, n nodes.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from circuits.kernels.contract import contract_spread
from circuits.linearize import LinearizedModel
from circuits.nodes import NodeTable
from circuits.replacements.movement import HeadLoading

SPREAD_BUDGET = 2**24
ROW_BUDGET = 2**24


@dataclass(frozen=True)
class Targets:
    """Targets that read at one depth; node numbers, positions and recorded pre-activations, (B,) each.

    `constants` (B,) are the encoder's and the read norm's biases. What they read is one of

    - `covectors` (B, D) of the stream below `depth`, at the target's position;
    - `heads` (B, H, E): readers of the head outputs of `attention_layer`, whose keys read below `depth`;
    - `covectors` with `keys` (B, S): the same covector at every position, weighted with the target's own pattern, of
      what `attention_layer` reads (its norm's linear part);
    - `carried` (B, r): the reader of what arrives from the key sides of dictionary `dictionary`, with the target's
      `features` (B,).
    """

    depth: int
    nodes: Tensor
    positions: Tensor
    values: Tensor
    constants: Tensor
    covectors: Tensor | None = None
    heads: Tensor | None = None
    keys: Tensor | None = None
    carried: Tensor | None = None
    features: Tensor | None = None
    attention_layer: int = -1
    dictionary: int = -1

    def __len__(self) -> int:
        return len(self.nodes)

    def take(self, index: Tensor) -> "Targets":
        """Some of the targets."""
        columns: dict[str, Any] = {
            field.name: column[index]
            for field in fields(self)
            if isinstance(column := getattr(self, field.name), Tensor)
        }
        return replace(self, **columns)


@dataclass(frozen=True)
class RowBlock:
    """Edges into B targets from the nodes `sources` (n,): `weights` (B, n), and the targets' ledger `bias` (B,)."""

    targets: Targets
    sources: Tensor
    weights: Tensor
    bias: Tensor

    def gaps(self) -> Tensor:
        """The ledger's relative gap of each target, (B,)."""
        largest = self.weights.abs().amax(1) if self.weights.shape[1] else torch.zeros_like(self.bias)
        scale = torch.stack([self.targets.values.abs(), largest, self.bias.abs()]).amax(0).clamp(min=1e-30)
        return (self.weights.sum(1) + self.bias - self.targets.values).abs() / scale


@dataclass(frozen=True)
class Stage:
    """Covectors `g` (B, S, D) of the stream on their way down, valid for writes of depths `low` to `high` - 1."""

    low: int
    high: int
    g: Tensor


@dataclass(frozen=True)
class Stretch:
    """Writers summed over the depths of one stretch: `nodes` (m,) ascending, `starts` by position."""

    nodes: Tensor
    vectors: Tensor
    starts: list[int]
    constant: Tensor


class Rows:
    """Computes rows for blocks of targets on one linearized prompt."""

    def __init__(self, linear: LinearizedModel, table: NodeTable) -> None:
        self.linear, self.table = linear, table
        self._stretches: OrderedDict[tuple[int, int], Stretch] = OrderedDict()

    def blocks(self, targets: Targets) -> Iterator[RowBlock]:
        """Row blocks that together hold every target once, in the order of their positions."""
        targets = targets.take(torch.argsort(targets.positions, stable=True))
        local = targets.heads is None and targets.keys is None and not self.linear.passed(targets.depth)
        compute = (
            self._carried_block if targets.carried is not None else self._local_block if local else self._spread_block
        )
        start = 0
        while start < len(targets):
            position = int(targets.positions[start])
            if targets.carried is not None:
                stop = start + max(1, ROW_BUDGET // max(1, len(self.table.carried[targets.dictionary].nodes)))
                stop = min(stop, len(targets))
            elif not local:
                stop = self._chunk_end(targets, start)
            else:
                stop = int(torch.searchsorted(targets.positions, position, right=True))
                width = self.table.starts[position + 1] - self.table.starts[position]
                stop = min(stop, start + max(1, ROW_BUDGET // max(1, width)))
            index = torch.arange(start, stop, device=targets.nodes.device)
            yield compute(targets.take(index))
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
        stretch = self.stretch(self.linear.floor(targets.depth), targets.depth)
        rows = slice(stretch.starts[position], stretch.starts[position + 1])
        weights = targets.covectors.new_zeros(len(targets), last - first)
        weights[:, stretch.nodes[rows] - first] = targets.covectors @ stretch.vectors[rows].T
        bias = targets.constants + targets.covectors @ stretch.constant[position]
        return RowBlock(targets, torch.arange(first, last, device=weights.device), weights, bias)

    def _spread_block(self, targets: Targets) -> RowBlock:
        n_keys = int(targets.positions[-1]) + 1
        weights = targets.constants.new_zeros(len(targets), self.table.starts[n_keys])
        bias = targets.constants + self._start_bias(targets)
        for stage in self.stages(targets):
            stretch = self.stretch(stage.low, stage.high)
            self._add(weights, stage.g, stretch.nodes, stretch.vectors, stretch.starts)
            bias = bias + torch.einsum("bsd,sd->b", stage.g, stretch.constant[:n_keys])
            layer = (stage.low - 1) // 2
            if stage.low % 2 == 1 and layer in self.linear.replaced_values:
                g = self.linear.attention[layer].pull_values(stage.g)
                written = self.table.value_writes[layer]
                self._add(weights, g, written.nodes, written.vectors, self._starts(written.nodes))
                bias = bias + torch.einsum("bsd,sd->b", g, self.table.value_constants[layer][:n_keys])
        return RowBlock(targets, torch.arange(weights.shape[1], device=weights.device), weights, bias)

    def _carried_block(self, targets: Targets) -> RowBlock:
        """Edges from key side to query side of features that the base layer's heads move."""
        sent = self.table.carried[targets.dictionary]
        weights = targets.values.new_zeros(len(targets), len(sent.nodes))
        row, column, arrived = self._meeting(targets, sent.positions, sent.features, sent.values)
        weights[row, column] = arrived
        row, _, arrived = self._meeting(targets, *sent.hidden)
        return RowBlock(targets, sent.nodes, weights, targets.constants.index_add(0, row, arrived))

    def _meeting(
        self, targets: Targets, positions: Tensor, features: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs (row, column) of a query side and a key side of the same feature at or before it, and what arrives."""
        assert targets.features is not None
        meets = (targets.features[:, None] == features) & (positions <= targets.positions[:, None])
        row, column = meets.nonzero(as_tuple=True)
        arrived = pair_loadings(self.linear, targets.take(row), positions[column], values[column]).sum(1)
        return row, column, arrived.float()

    def stages(self, targets: Targets) -> Iterator[Stage]:
        """The covectors of targets on their way down to the cut below them, (B, n_keys, D), stage by stage."""
        n_keys = int(targets.positions.max()) + 1
        g, high = self._start(targets, n_keys), targets.depth
        for live in self.linear.passed(targets.depth):
            yield Stage(live, high, g)
            g, high = self.linear.pull_past(live, g), live
        yield Stage(self.linear.floor(targets.depth), high, g)

    def _start(self, targets: Targets, n_keys: int) -> Tensor:
        """Covectors (B, n_keys, D) of the stream just below the targets' depth."""
        if targets.heads is not None:
            attention = self.linear.attention[targets.attention_layer]
            return attention.pull_heads(targets.positions, targets.heads, n_keys)
        assert targets.covectors is not None
        if targets.keys is not None:
            norm = self.linear.recording.attention_norms[targets.attention_layer]
            return norm.pull(targets.keys[:, :n_keys, None] * targets.covectors[:, None], slice(0, n_keys))
        g = targets.covectors.new_zeros(len(targets), n_keys, targets.covectors.shape[1])
        g[torch.arange(len(targets), device=g.device), targets.positions] = targets.covectors
        return g

    def _start_bias(self, targets: Targets) -> Tensor:
        """What norm and value biases make of readers of head outputs, (B,); zero for other readers."""
        if targets.heads is None:
            return torch.zeros_like(targets.constants)
        attention = self.linear.attention[targets.attention_layer]
        return torch.einsum("bhe,bhe->b", targets.heads, attention.head_bias[targets.positions])

    def _add(self, weights: Tensor, g: Tensor, nodes: Tensor, vectors: Tensor, starts: list[int]) -> None:
        """Add the products of covectors (B, S, D) with writers at the same positions to the weights."""
        weights[:, nodes[: starts[g.shape[1]]]] += contract_spread(g, vectors, starts)

    def _starts(self, nodes: Tensor) -> list[int]:
        """Where the nodes of each position begin in a list of ascending nodes."""
        starts: list[int] = torch.searchsorted(nodes.cpu(), torch.tensor(self.table.starts)).tolist()
        return starts

    def stretch(self, low: int, high: int) -> Stretch:
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
        self._stretches[key] = Stretch(nodes, vectors, self._starts(nodes), constant)
        while len(self._stretches) > len(self.linear.live_depths) + len(self.linear.replaced_blocks) + 2:
            self._stretches.popitem(last=False)
        return self._stretches[key]


def pair_loadings(linear: LinearizedModel, targets: Targets, positions: Tensor, values: Tensor) -> Tensor:
    """What arrives at each query side from one key side of the same feature, (k, H + 1) float64, head by head.

        w_h = alpha_fh A_h[p, s] e . a_f[s]        e: the query side's reader; the identity is the last head

    Parameters
    ----------
    targets
        k query sides.
    positions, values
        (k,) and (k, r): where the key sides stand, and what they send.
    """
    movement = linear.dictionaries[targets.dictionary].moved_by
    assert isinstance(movement, HeadLoading)
    assert targets.features is not None
    assert targets.carried is not None
    moved = linear.recording.patterns[targets.attention_layer][:, targets.positions, positions].T
    moved = torch.cat([moved, (targets.positions == positions).to(moved).unsqueeze(1)], dim=1)
    loading = movement.weights.to(moved.device)[targets.features]
    return moved.double() * loading * (targets.carried.double() * values).sum(1, keepdim=True)
