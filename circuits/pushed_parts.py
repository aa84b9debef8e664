"""The stream that nodes make at every position, pushed up through the linearized model depth by depth.

One rise serves all layers: below each attention stands what each node adds to the stream there, what passed through
frozen attention and skip connections included. The transpose of pulling covectors down (`circuits.rows`), and much
cheaper where many covectors of a layer are asked for, as all rows of `W_Q` and `W_K` are.

Shapes: n nodes of one position s, S positions, S' = S - s of them from the nodes' own on, D model width, H heads,
E head width, C named constants.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from circuits.frozen import FrozenAttention
from circuits.linearize import LinearizedModel
from circuits.nodes import NodeTable, Write


@dataclass(frozen=True)
class _Group:
    """The nodes (n,) of one position, by the depth of their first write, and the stream x (n, S', D) that they make.

    `row` is where each node of the position stands among them; nodes that write too high to matter have none, -1.
    """

    begin: int
    nodes: Tensor
    row: Tensor
    depths: np.ndarray
    x: Tensor

    @property
    def places(self) -> slice:
        return slice(self.begin, self.begin + self.x.shape[1])

    def reached(self, depth: int) -> int:
        """How many of the nodes have written below a depth: the first so many."""
        return int(np.searchsorted(self.depths, depth))


class PushedParts:
    """What each node, and each named constant, adds to the stream; it rises from depth to depth.

    Parameters
    ----------
    constants
        For each name `constants` and `value_constants` as a `NodeTable` has them; together they are the table's.
    """

    def __init__(
        self, linear: LinearizedModel, table: NodeTable, constants: Sequence[dict[str, dict[int, Tensor]]]
    ) -> None:
        self.linear, self.table, self.depth = linear, table, 0
        n_positions, width = table.constants[0].shape
        self.constants = table.constants[0].new_zeros(len(constants), n_positions, width)
        self._constants = constants
        self._groups = [self._group(position) for position in range(n_positions)]

    @staticmethod
    def size(linear: LinearizedModel, table: NodeTable) -> int:
        """How many numbers the streams of a prompt are."""
        width = table.constants[0].shape[1]
        last = len(table.starts) - 1
        counts = np.diff(np.searchsorted(table.position[_useful(linear, table)], np.arange(last + 1)))
        return int((counts * (last - np.arange(last))).sum()) * width

    def _group(self, position: int) -> _Group:
        first, last = self.table.starts[position], self.table.starts[position + 1]
        nodes = first + np.flatnonzero(_useful(self.linear, self.table)[first:last])
        nodes = nodes[np.argsort(self.table.depth[nodes], kind="stable")]
        _, n_positions, width = self.constants.shape
        x = self.constants.new_zeros(len(nodes), n_positions - position, width)
        row = np.full(last - first, -1)
        row[nodes - first] = np.arange(len(nodes))
        numbers, rows = (torch.from_numpy(column).to(x.device) for column in (nodes, row))
        return _Group(position, numbers, rows, self.table.depth[nodes], x)

    def parts(self, depth: int, position: int) -> tuple[Tensor, Tensor]:
        """Nodes (m,) and what they add at a position to the stream (m, D) that readers of this depth see.

        Depths must not fall from one call to the next.
        """
        while self.depth < depth:
            self._pass(self.depth)
            self.depth += 1
        found = [(group, group.reached(depth)) for group in self._groups[: position + 1]]
        nodes = torch.cat([group.nodes[:count] for group, count in found])
        return nodes, torch.cat([group.x[:count, position - group.begin] for group, count in found])

    def _pass(self, depth: int) -> None:
        """From below a depth to above it: what its live sublayers make of the streams, and what is written there."""
        layer, is_mlp = divmod(depth - 1, 2)
        is_cut = bool(is_mlp) and layer in self.linear.replaced_blocks
        for group in self._groups:
            if (count := group.reached(depth)) > 0:
                self._through(depth, group.x[:count], group.places, is_cut)
        heads = self.linear.heads_at(depth)
        if depth in self.table.writes:
            for group, row, vectors in self._written(self.table.writes[depth]):
                group.x[row, 0] += vectors
        if heads is not None and heads in self.table.value_writes:
            for group, row, vectors in self._written(self.table.value_writes[heads]):
                sent = self._by_head(heads, vectors.unsqueeze(1))
                group.x[row] += _from_values(self.linear.attention[heads], sent, group.places)
        self._through(depth, self.constants, slice(0, self.constants.shape[1]), is_cut)
        for x, named in zip(self.constants, self._constants, strict=True):
            if heads is not None and heads in named["value_constants"]:
                attention = self.linear.attention[heads]
                values = named["value_constants"][heads].unsqueeze(0)
                x += _from_values(attention, self._by_head(heads, values), slice(0, len(x)))[0]
            x += named["constants"][depth]

    def _through(self, depth: int, x: Tensor, places: slice, is_cut: bool) -> None:
        """Live sublayers at `places` only: streams have no entry before their nodes."""
        if is_cut:
            x.zero_()
            return
        skip, attention = self.linear.skip_at(depth), self.linear.passing_at(depth)
        made = None if skip is None else skip.push(x, places)
        if attention is not None:
            y = _from_values(attention, attention.values(x, places), places)
            made = y if made is None else made + y
        if made is not None:
            x += made

    def _written(self, write: Write) -> Iterator[tuple[_Group, Tensor, Tensor]]:
        """What is written, position by position: rows (m,) of the group's streams and vectors (m, ...)."""
        ends = torch.searchsorted(write.nodes, write.nodes.new_tensor(self.table.starts)).tolist()
        for group, low, high in zip(self._groups, ends, ends[1:], strict=False):
            if low < high:
                first = self.table.starts[group.begin]
                yield group, group.row[write.nodes[low:high] - first], write.vectors[low:high]

    def _by_head(self, layer: int, values: Tensor) -> Tensor:
        """Values (n, S', K x E) as every head sees them, (n, S', H, E)."""
        attention = self.linear.attention[layer]
        n_kv = len(attention.weights.w_v)
        return values.view(*values.shape[:2], n_kv, -1).repeat_interleave(attention.n_heads // n_kv, dim=2)


def _from_values(attention: FrozenAttention, values: Tensor, places: slice) -> Tensor:
    """What heads write to the stream at `places`, (n, S', D), of values (n, X, H, E) that stand at the first X."""
    keys = slice(places.start, places.start + values.shape[1])
    moved = torch.einsum("hps,nshe->nphe", attention.pattern[:, places, keys], values)
    return attention.write(moved.flatten(2), places)


def _useful(linear: LinearizedModel, table: NodeTable) -> np.ndarray:
    """Which nodes write below the last attention."""
    useful: np.ndarray = table.depth < linear.n_depths - 2
    return useful
