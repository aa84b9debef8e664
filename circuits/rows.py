"""Rows of the attribution matrix: the edges into a block of targets, from readers and writers, without autograd.

A covector starts local, at its reader's position, and is pulled down. Where every sublayer is replaced nothing
passes, and a row is one product with the writers at the same position. A live sublayer (frozen attention, a skip
connection) changes the covector; attention spreads it over positions, never beyond its reader's. Between two live
sublayers it is constant, so the writers of that stretch are summed first and multiplied once. Below the lowest live
sublayer there are only the tokens, as a rule: these are pushed up through it once, so that no covector has to be
pulled.

Shapes: B targets, S positions, D model width, n nodes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuits.kernels.contract import contract_spread
from circuits.linearize import LinearizedModel
from circuits.nodes import NodeTable
from circuits.replacements.movement import HeadLoading
from circuits.stretches import Stretch, Stretches

SPREAD_BUDGET = 2**21  # numbers in the covectors of a block: they should stay in the cache between two products
ROW_BUDGET = 2**24
FEWEST = 8  # targets that a block has whatever their length: all writers are read for each block
PADDING = 1.25  # a block's covectors are as long as its last target needs, by so much more than on average
SMALL = 256  # covectors that are too few to save any


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

    (B, S, D), or (B, D) with `positions` (B,) as long as no attention has spread them. `rows` says which of all the
    targets on their way they are.
    """

    low: int
    high: int
    rows: slice
    g: Tensor
    positions: Tensor | None = None


class Rows:
    """Computes rows for blocks of targets on one linearized prompt."""

    def __init__(self, linear: LinearizedModel, table: NodeTable) -> None:
        self.linear, self.table = linear, table
        self.stretches = Stretches(linear, table)
        self.device = table.constants[0].device
        self._numbers = torch.arange(len(table), device=self.device)

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
            fits = count <= FEWEST or count * n_keys * self.linear.model.shape.d_model <= SPREAD_BUDGET
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
        stretch = self.stretches.between(self.linear.floor(targets.depth), targets.depth)
        rows = stretch.rows(position)
        weights = targets.covectors.new_zeros(len(targets), last - first)
        weights[:, stretch.nodes[rows] - first] = targets.covectors @ stretch.vectors[rows].T
        bias = targets.constants + targets.covectors @ stretch.constant[position]
        return RowBlock(targets, self._numbers[first:last], weights, bias)

    def together(self, groups: Sequence[Targets]) -> Iterator[tuple[int, RowBlock]]:
        """Row blocks of several groups of targets, and which group each is of.

        Readers of the stream go down together, whatever the depth at which they start: products get larger.
        """
        joined: dict[int, list[int]] = {}
        for number, targets in enumerate(groups):
            plain = targets.covectors is not None and targets.keys is None
            if plain and self.linear.passed(targets.depth):
                joined.setdefault(self.linear.floor(targets.depth), []).append(number)
            else:
                yield from ((number, block) for block in self.blocks(targets))
        for members in joined.values():
            members.sort(key=lambda number: -groups[number].depth)
            at = [groups[number].positions.cpu().numpy() for number in members]
            member = np.repeat(np.arange(len(members)), [len(positions) for positions in at])
            row = np.concatenate([np.arange(len(positions)) for positions in at])
            order = np.argsort(np.concatenate(at), kind="stable")
            start, positions = 0, np.concatenate(at)[order].tolist()
            while start < len(order):
                chosen = order[start : self._chunk_end(positions, start)]
                there = np.unique(member[chosen]).tolist()
                rows = [torch.from_numpy(row[chosen[member[chosen] == k]]) for k in there]
                parts = [groups[members[k]].take(index.to(self.device)) for k, index in zip(there, rows, strict=True)]
                yield from zip((members[k] for k in there), self._spread_blocks(parts), strict=True)
                start += len(chosen)

    def _spread_block(self, targets: Targets) -> RowBlock:
        return self._spread_blocks([targets])[0]

    def _spread_blocks(self, parts: Sequence[Targets]) -> list[RowBlock]:
        """Rows of readers of the stream above the same cut, the highest depth first."""
        n_keys = int(max(part.positions[-1] for part in parts)) + 1
        bias = torch.cat([part.constants + self._start_bias(part) for part in parts])
        weights = bias.new_zeros(len(bias), self.table.starts[n_keys])
        passed = self.linear.passed(parts[0].depth)
        lowest = self.stretches.pushed(passed[-1]) if passed else None
        for stages in self._descent(parts, n_keys):
            for stage in stages:
                mine, stretch = weights[stage.rows], self.stretches.between(stage.low, stage.high)
                bias[stage.rows] += self._meet(mine, stage, stretch)
                layer = (stage.low - 1) // 2
                if stage.low % 2 == 1 and (values := self.stretches.values(layer)) is not None:
                    g = self.linear.attention[layer].pull_values(self._spread(stage, n_keys))
                    bias[stage.rows] += self._meet(mine, replace(stage, g=g, positions=None), values)
                if lowest is not None and stage.low == passed[-1]:
                    g = self._spread(stage, n_keys).flatten(1)
                    nodes = lowest.nodes[: lowest.starts[n_keys]]
                    mine.index_add_(1, nodes, g @ lowest.vectors[: g.shape[1], : len(nodes)])
                    bias[stage.rows] += g @ lowest.constant[:n_keys].flatten()
            if lowest is not None and stages[0].low == passed[-1]:
                break
        sources = self._numbers[: weights.shape[1]]
        sizes = [len(part) for part in parts]
        split = zip(parts, torch.split(weights, sizes), torch.split(bias, sizes), strict=True)
        return [RowBlock(part, sources, w, b) for part, w, b in split]

    def _meet(self, weights: Tensor, stage: Stage, stretch: Stretch) -> Tensor:
        """Add the products of a stage's covectors with the writers of a stretch to the weights; what they make of its
        constant, (B,)."""
        if stage.positions is None:
            n_keys, products = stage.g.shape[1], self.linear.products
            if stretch.columns is not None:
                contract_spread(weights, stage.g, stretch.vectors, stretch.starts, stretch.columns, products)
            else:
                nodes = stretch.nodes[: stretch.starts[n_keys]]
                dense = weights.new_zeros(len(weights), len(nodes))
                contract_spread(dense, stage.g, stretch.vectors, stretch.starts, stretch.starts, products)
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
        for (stage,) in self._descent([targets], n_keys):
            yield replace(stage, g=self._spread(stage, n_keys), positions=None)

    def _descent(self, parts: Sequence[Targets], n_keys: int) -> Iterator[list[Stage]]:
        """What is on its way between two live sublayers, from the top down: all that came from above, and those parts
        that start there, (B, D) as long as no attention has spread them."""
        floor = self.linear.floor(parts[0].depth)
        passed = self.linear.passed(parts[0].depth)
        waiting, g, high = list(parts), None, parts[0].depth
        for live in [*passed, floor]:
            stages: list[Stage] = [] if g is None else [Stage(live, high, slice(0, len(g)), g)]
            while waiting and waiting[0].depth > live:
                part = waiting.pop(0)
                entered = stages[-1].rows.stop if stages else 0
                rows = slice(entered, entered + len(part))
                stages.append(Stage(live, part.depth, rows, *self._start(part, n_keys)))
            yield stages
            if live == floor:
                return
            below = [self._past(live, stage, n_keys) for stage in stages]
            g, high = below[0] if len(below) == 1 else torch.cat(below), live

    def _past(self, live: int, stage: Stage, n_keys: int) -> Tensor:
        """A stage's covectors below the live depth that it comes to, (B, n_keys, D)."""
        if stage.positions is None:
            return self.linear.pull_past(live, stage.g)
        return self.linear.pull_local_past(live, stage.g, stage.positions, n_keys)

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
