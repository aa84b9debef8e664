"""Rows of the attribution matrix: the edges into a block of targets, from readers and writers, without autograd.

A covector starts local, at its reader's position, and is pulled down. Where every sublayer is replaced nothing
passes, and a row is one product with the writers at the same position. A live sublayer (frozen attention, a skip
connection) changes the covector; attention spreads it over positions, never beyond its reader's. Between two live
sublayers it is constant, so the writers of that stretch are summed first and multiplied once. Below the lowest live
sublayer there are only the tokens, as a rule: these are pushed up through it once, so that no covector has to be
pulled.

Shapes: B targets, S positions, D model width, n nodes.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuits.kernels.contract import contract_spread
from circuits.linearize import LinearizedModel
from circuits.nodes import NodeTable
from circuits.replacements.movement import HeadLoading

SPREAD_BUDGET = 2**20  # numbers in the covectors of a block: they stay in the cache between two products
ROW_BUDGET = 2**24
PADDING = 1.25  # a block's covectors are as long as its last target needs, by so much more than on average
SMALL = 256  # covectors that are too few to save any
PUSHED_BUDGET = 2**24  # numbers in the lowest writers after they were pushed up


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

    def slim(self) -> "RowBlock":
        """The same without what the targets read."""
        return replace(self, targets=replace(self.targets, covectors=None, heads=None, keys=None, carried=None))

    def sizes(self) -> tuple[Tensor, Tensor]:
        """Absolute weights (B, n), and their sum for each target, (B,)."""
        sizes = self.weights.abs()
        return sizes, sizes.sum(1).clamp(min=1e-30)

    def gaps(self) -> Tensor:
        """The ledger's relative gap of each target, (B,)."""
        largest = self.weights.abs().amax(1) if self.weights.shape[1] else torch.zeros_like(self.bias)
        scale = torch.stack([self.targets.values.abs(), largest, self.bias.abs()]).amax(0).clamp(min=1e-30)
        return (self.weights.sum(1) + self.bias - self.targets.values).abs() / scale


@dataclass(frozen=True)
class Stage:
    """Covectors `g` of the stream on their way down, valid for writes of depths `low` to `high` - 1.

    (B, S, D), or (B, D) with `positions` (B,) as long as no attention has spread them.
    """

    low: int
    high: int
    g: Tensor
    positions: Tensor | None = None


@dataclass(frozen=True)
class Stretch:
    """Writers summed over the depths of one stretch: `nodes` (m,) ascending, `starts` by position.

    `columns` has the first node of each position where the others follow it without gaps, else None. `constant` is
    (S, D).
    """

    nodes: Tensor
    vectors: Tensor
    starts: list[int]
    columns: list[int] | None
    constant: Tensor

    def rows(self, position: int) -> slice:
        """The writers at a position."""
        return slice(self.starts[position], self.starts[position + 1])


@dataclass(frozen=True)
class Pushed:
    """The writers of the lowest stretch behind the lowest live sublayer: `nodes` (m,), `starts` by position, `vectors`
    (S x D, m) and `constant` (S, D)."""

    nodes: Tensor
    starts: list[int]
    vectors: Tensor
    constant: Tensor


class Rows:
    """Computes rows for blocks of targets on one linearized prompt."""

    def __init__(self, linear: LinearizedModel, table: NodeTable) -> None:
        self.linear, self.table = linear, table
        self._stretches: OrderedDict[tuple[int, int], Stretch] = OrderedDict()
        self._pushed: dict[int, Pushed | None] = {}

    def blocks(self, targets: Targets) -> Iterator[RowBlock]:
        """Row blocks that together hold every target once, in the order of their positions."""
        targets = targets.take(torch.argsort(targets.positions, stable=True))
        local = targets.heads is None and targets.keys is None and not self.linear.passed(targets.depth)
        compute = (
            self._carried_block if targets.carried is not None else self._local_block if local else self._spread_block
        )
        start, positions = 0, targets.positions.tolist()
        while start < len(targets):
            position = positions[start]
            if targets.carried is not None:
                stop = start + max(1, ROW_BUDGET // max(1, len(self.table.carried[targets.dictionary].nodes)))
                stop = min(stop, len(targets))
            elif not local:
                stop = self._chunk_end(positions, start)
            else:
                stop = int(torch.searchsorted(targets.positions, position, right=True))
                width = self.table.starts[position + 1] - self.table.starts[position]
                stop = min(stop, start + max(1, ROW_BUDGET // max(1, width)))
            index = torch.arange(start, stop, device=targets.nodes.device)
            yield compute(targets.take(index))
            start = stop

    def _chunk_end(self, positions: list[int], start: int) -> int:
        """Where the block of ascending positions ends that begins at `start`."""
        stop, needed = start, 0
        while stop < len(positions):
            n_keys, count = positions[stop] + 1, stop + 1 - start
            needed += n_keys
            fits = count * n_keys * self.linear.model.shape.d_model <= SPREAD_BUDGET
            fits = fits and count * self.table.starts[n_keys] <= ROW_BUDGET
            fits = fits and (count * n_keys <= PADDING * needed or count * n_keys <= SMALL)
            if not fits and count > 1:
                break
            stop += 1
        return stop

    def _local_block(self, targets: Targets) -> RowBlock:
        assert targets.covectors is not None
        position = int(targets.positions[0])
        first, last = self.table.starts[position], self.table.starts[position + 1]
        stretch = self.stretch(self.linear.floor(targets.depth), targets.depth)
        rows = stretch.rows(position)
        weights = targets.covectors.new_zeros(len(targets), last - first)
        weights[:, stretch.nodes[rows] - first] = targets.covectors @ stretch.vectors[rows].T
        bias = targets.constants + targets.covectors @ stretch.constant[position]
        return RowBlock(targets, torch.arange(first, last, device=weights.device), weights, bias)

    def _spread_block(self, targets: Targets) -> RowBlock:
        n_keys = int(targets.positions[-1]) + 1
        weights = targets.constants.new_zeros(len(targets), self.table.starts[n_keys])
        bias = targets.constants + self._start_bias(targets)
        passed = self.linear.passed(targets.depth)
        lowest = self.pushed(passed[-1]) if passed else None
        for stage in self._descent(targets):
            bias += self._meet(weights, stage, self.stretch(stage.low, stage.high))
            layer = (stage.low - 1) // 2
            if stage.low % 2 == 1 and layer in self.linear.replaced_values:
                g = self.linear.attention[layer].pull_values(self._spread(stage, n_keys))
                written = self.table.value_writes[layer]
                stretch = self._stretch_of(written.nodes, written.vectors, self.table.value_constants[layer])
                bias += self._meet(weights, Stage(stage.low, stage.low, g), stretch)
            if lowest is not None and stage.low == passed[-1]:
                g = self._spread(stage, n_keys).flatten(1)
                nodes = lowest.nodes[: lowest.starts[n_keys]]
                weights.index_add_(1, nodes, g @ lowest.vectors[: g.shape[1], : len(nodes)])
                bias += g @ lowest.constant[:n_keys].flatten()
                break
        return RowBlock(targets, torch.arange(weights.shape[1], device=weights.device), weights, bias)

    def _meet(self, weights: Tensor, stage: Stage, stretch: Stretch) -> Tensor:
        """Add the products of a stage's covectors with the writers of a stretch to the weights; what they make of its
        constant, (B,)."""
        if stage.positions is None:
            n_keys = stage.g.shape[1]
            if stretch.columns is not None:
                contract_spread(weights, stage.g, stretch.vectors, stretch.starts, stretch.columns)
            else:
                nodes = stretch.nodes[: stretch.starts[n_keys]]
                dense = weights.new_zeros(len(weights), len(nodes))
                contract_spread(dense, stage.g, stretch.vectors, stretch.starts, stretch.starts)
                weights.index_add_(1, nodes, dense)
            return stage.g.flatten(1) @ stretch.constant[:n_keys].flatten()
        places, counts = torch.unique_consecutive(stage.positions, return_counts=True)
        first = 0
        for position, count in zip(places.tolist(), counts.tolist(), strict=True):
            rows, mine = stretch.rows(position), slice(first, first + count)
            weights[mine, stretch.nodes[rows]] += stage.g[mine] @ stretch.vectors[rows].T
            first += count
        return (stage.g * stretch.constant[stage.positions]).sum(1)

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
        for stage in self._descent(targets):
            yield replace(stage, g=self._spread(stage, n_keys), positions=None)

    def _descent(self, targets: Targets) -> Iterator[Stage]:
        """The same, (B, D) as long as no attention has spread them."""
        n_keys = int(targets.positions.max()) + 1
        g, positions = self._start(targets, n_keys)
        high = targets.depth
        for live in self.linear.passed(targets.depth):
            yield Stage(live, high, g, positions)
            if positions is None:
                g = self.linear.pull_past(live, g)
            else:
                g, positions = self.linear.pull_local_past(live, g, positions, n_keys), None
            high = live
        yield Stage(self.linear.floor(targets.depth), high, g, positions)

    def _start(self, targets: Targets, n_keys: int) -> tuple[Tensor, Tensor | None]:
        """Covectors (B, n_keys, D), or (B, D) at the positions beside them, of the stream just below the targets."""
        if targets.heads is not None:
            attention = self.linear.attention[targets.attention_layer]
            return attention.pull_heads(targets.positions, targets.heads, n_keys), None
        assert targets.covectors is not None
        if targets.keys is not None:
            norm = self.linear.recording.attention_norms[targets.attention_layer]
            return norm.pull(targets.keys[:, :n_keys, None] * targets.covectors[:, None], slice(0, n_keys)), None
        return targets.covectors, targets.positions

    def _spread(self, stage: Stage, n_keys: int) -> Tensor:
        """A stage's covectors (B, n_keys, D)."""
        if stage.positions is None:
            return stage.g
        g = stage.g.new_zeros(len(stage.g), n_keys, stage.g.shape[1])
        g[torch.arange(len(g), device=g.device), stage.positions] = stage.g
        return g

    def _start_bias(self, targets: Targets) -> Tensor:
        """What norm and value biases make of readers of head outputs, (B,); zero for other readers."""
        if targets.heads is None:
            return torch.zeros_like(targets.constants)
        attention = self.linear.attention[targets.attention_layer]
        return torch.einsum("bhe,bhe->b", targets.heads, attention.head_bias[targets.positions])

    def pushed(self, live: int) -> Pushed | None:
        """The writers below the lowest live depth of a reader, pushed up through it; None where they are too many, or
        the covectors of the sublayer itself are needed."""
        if live not in self._pushed:
            self._pushed[live] = self._push(live)
        return self._pushed[live]

    def _push(self, live: int) -> Pushed | None:
        stretch = self.stretch(self.linear.floor(live), live)
        n, d_model = stretch.constant.shape
        many = len(stretch.nodes) > 2 * n or len(stretch.nodes) * n * d_model > PUSHED_BUDGET
        if many or (live - 1) // 2 in self.linear.replaced_values:
            return None
        positions = torch.from_numpy(self.table.position).to(stretch.nodes.device)[stretch.nodes]
        vectors = self.linear.push_local_past(live, stretch.vectors, positions).flatten(1).T.contiguous()
        constant = self.linear.push_past(live, stretch.constant[None])[0]
        return Pushed(stretch.nodes, stretch.starts, vectors, constant)

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
            nodes = torch.zeros(0, dtype=torch.long, device=constant.device)
            vectors = constant.new_zeros(0, constant.shape[1])
        self._stretches[key] = self._stretch_of(nodes, vectors, constant)
        while len(self._stretches) > len(self.linear.live_depths) + len(self.linear.replaced_blocks) + 2:
            self._stretches.popitem(last=False)
        return self._stretches[key]

    def _stretch_of(self, nodes: Tensor, vectors: Tensor, constant: Tensor) -> Stretch:
        numbers = nodes.cpu().numpy()
        starts = np.searchsorted(numbers, self.table.starts)
        first = starts[:-1][np.diff(starts) > 0]
        columns = np.zeros(len(starts), dtype=np.int64)
        columns[:-1][np.diff(starts) > 0] = numbers[first]
        together = bool((np.diff(starts) == 0).all()) or bool(
            (
                np.repeat(columns[:-1], np.diff(starts))
                + np.arange(len(numbers))
                - np.repeat(starts[:-1], np.diff(starts))
                == numbers
            ).all()
        )
        return Stretch(nodes, vectors, starts.tolist(), columns.tolist() if together else None, constant)


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
