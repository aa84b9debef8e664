"""Writers between two live sublayers, summed; and those below the lowest one, pushed up through it.

Between two live sublayers a covector does not change, so what nodes write there is added up first and multiplied once.
Below the lowest live sublayer there are only the tokens, as a rule: pushed up once, they spare every covector that way.
"""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from circuits.linearize import LinearizedModel
from circuits.nodes import NodeTable

PUSHED_BUDGET = 2**24  # numbers in the lowest writers after they were pushed up


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


class Stretches:
    """The stretches of one prompt, made when they are first asked for; the last ones are kept."""

    def __init__(self, linear: LinearizedModel, table: NodeTable) -> None:
        self.linear, self.table = linear, table
        self._stretches: OrderedDict[tuple[int, int], Stretch] = OrderedDict()
        self._values: dict[int, Stretch] = {}
        self._pushed: dict[int, Pushed | None] = {}

    def pushed(self, live: int) -> Pushed | None:
        """The writers below the lowest live depth of a reader, pushed up through it; None where they are too many, or
        the covectors of the sublayer itself are needed."""
        if live not in self._pushed:
            self._pushed[live] = self._push(live)
        return self._pushed[live]

    def _push(self, live: int) -> Pushed | None:
        stretch = self.between(self.linear.floor(live), live)
        n, d_model = stretch.constant.shape
        many = len(stretch.nodes) > 2 * n or len(stretch.nodes) * n * d_model > PUSHED_BUDGET
        if many or (live - 1) // 2 in self.linear.replaced_values:
            return None
        positions = torch.from_numpy(self.table.position).to(stretch.nodes.device)[stretch.nodes]
        vectors = self.linear.push_local_past(live, stretch.vectors, positions).flatten(1).T.contiguous()
        constant = self.linear.push_past(live, stretch.constant[None])[0]
        return Pushed(stretch.nodes, stretch.starts, vectors, constant)

    def between(self, low: int, high: int) -> Stretch:
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

    def values(self, layer: int) -> Stretch | None:
        """What writes to the values of a layer, where a dictionary rebuilds them."""
        if layer not in self.linear.replaced_values:
            return None
        if layer not in self._values:
            written = self.table.value_writes[layer]
            self._values[layer] = self._stretch_of(written.nodes, written.vectors, self.table.value_constants[layer])
        return self._values[layer]
