"""One sweep from the top: influence, scores and the ledger, without ever holding the matrix (DESIGN.md section 4).

Influence flows down the rows, `influence(i) = sum_t (influence(t) + start(t)) |w_ti| / sum_j |w_tj|`. Targets are
expanded from the top layer down, so the influence of each is final when its turn comes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from circuits.graph.tables import ERROR_KINDS
from circuits.linearize import LinearizedModel
from circuits.nodes import NodeTable
from circuits.readers import feature_targets
from circuits.rows import RowBlock, Rows, Targets
from circuits.targets import Readers, stack

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TargetList:
    """All targets of a sweep. Output targets are numbered after the nodes: n, n + 1, ...

    `outputs` are the readers of the output targets in that order; `start` (n + outputs,) is the starting influence.
    """

    outputs: Sequence[Readers]
    start: np.ndarray

    @property
    def n_outputs(self) -> int:
        return sum(len(readers.positions) for readers in self.outputs)


@dataclass(frozen=True)
class Swept:
    """What a sweep finds, over the n nodes and the output targets after them.

    `influence` is what flows in from targets above, without the starting influence. `pre_activation` and `bias` are
    of the targets that were expanded, NaN elsewhere. `left_out` is the influence of the targets that were not,
    `search` how they were chosen.
    """

    influence: np.ndarray
    pre_activation: np.ndarray
    bias: np.ndarray
    expanded: np.ndarray
    replacement_score: float
    completeness_score: float
    max_relative_gap: float
    left_out: float
    search: str = "top down"


class Sweep:
    """Expands targets of one prompt, a layer at a time, from the top down."""

    def __init__(self, linear: LinearizedModel, table: NodeTable, targets: TargetList) -> None:
        self.linear, self.table, self.targets = linear, table, targets
        self.rows = Rows(linear, table)
        self.device = table.constants[0].device
        self.is_error = torch.from_numpy(np.isin(table.kind, ERROR_KINDS)).float().to(self.device)

    def run(
        self,
        left_out: float,
        *,
        max_targets: int | None = None,
        on_rows: Callable[[RowBlock], None] | None = None,
        progress: Progress | None = None,
    ) -> Swept:
        """Sweep all targets but those whose summed influence stays within `left_out`; 0 expands every target.

        max_targets
            Expand at most so many features, whatever that leaves out: each group gets an equal part of what those above
            it have left over. Keeps no rows, unlike `circuits.best_first`.
        on_rows
            Called with every block of rows, for those who want to keep them.
        progress
            Called with (targets done, targets in all).
        """
        n = len(self.table)
        total = n + self.targets.n_outputs
        influence, complete = np.zeros(total), np.ones(total)
        pre_activation, bias = np.full(total, np.nan), np.full(total, np.nan)
        expanded = np.zeros(total, dtype=bool)
        worst, spent, done, rows = 0.0, 0.0, 0, 0
        groups = self.groups
        in_all = sum(len(nodes) for nodes, _ in groups)
        for place, (nodes, build) in enumerate(groups):
            mass = influence[nodes] + self.targets.start[nodes]
            kept = _worth_expanding(mass, (left_out - spent) / (len(groups) - place)) if left_out else nodes == nodes
            if max_targets is not None and nodes[0] < n:
                kept &= _strongest(mass, self.targets.start[nodes] > 0, (max_targets - rows) // (len(groups) - place))
                rows += int(kept.sum())
            spent += float(mass[~kept].sum())
            complete[nodes[~kept]] = 0.0
            if kept.any():
                for block in self.rows.blocks(build(np.flatnonzero(kept))):
                    at = block.targets.nodes.cpu().numpy()
                    sizes, totals = block.sizes()
                    errors = sizes @ self.is_error[block.sources] / totals
                    complete[at] = 1.0 - errors.cpu().numpy()
                    flow = torch.from_numpy(influence[at] + self.targets.start[at]).to(totals) / totals
                    influence[block.sources.cpu().numpy()] += (flow @ sizes).cpu().numpy()
                    pre_activation[at] = block.targets.values.cpu().numpy()
                    bias[at] = block.bias.cpu().numpy()
                    expanded[at] = True
                    worst = max(worst, float(block.gaps().max()))
                    if on_rows is not None:
                        on_rows(block)
            done += len(nodes)
            if progress is not None:
                progress(done, in_all)
        replacement_score, completeness_score = self.scores(influence, complete)
        return Swept(
            influence=influence,
            pre_activation=pre_activation,
            bias=bias,
            expanded=expanded,
            replacement_score=replacement_score,
            completeness_score=completeness_score,
            max_relative_gap=worst,
            left_out=spent,
        )

    def scores(self, influence: np.ndarray, complete: np.ndarray) -> tuple[float, float]:
        """Replacement and completeness score, from influences and the share of each target's input that is no error."""
        outflow = influence + self.targets.start
        sources = influence[: len(self.table)]
        tokens = float(sources[self.table.kind == "embedding"].sum())
        errors = float(sources[np.isin(self.table.kind, ERROR_KINDS)].sum())
        completeness = float((complete * outflow).sum() / max(outflow.sum(), 1e-30))
        return tokens / max(tokens + errors, 1e-30), completeness

    def rows_of(self, wanted: np.ndarray) -> Iterator[RowBlock]:
        """Rows of some targets only: `wanted` is a mask over nodes and output targets."""
        for nodes, build in self.groups:
            kept = np.flatnonzero(wanted[nodes])
            if len(kept):
                yield from self.rows.blocks(build(kept))

    @cached_property
    def groups(self) -> list[tuple[np.ndarray, Callable[[np.ndarray], Targets]]]:
        """All targets from the top down: ascending numbers of a group, and a function from places in it to readers."""
        return [*self._output_groups(), *self._feature_groups()]

    def _output_groups(self) -> list[tuple[np.ndarray, Callable[[np.ndarray], Targets]]]:
        groups = []
        first = len(self.table)
        for readers in self.targets.outputs:
            nodes = np.arange(first, first + len(readers.positions))
            groups.append((nodes, self._output_builder(readers, nodes)))
            first += len(nodes)
        return groups

    def _output_builder(self, readers: Readers, nodes: np.ndarray) -> Callable[[np.ndarray], Targets]:
        positions, covectors, constants = stack(readers, self.device)
        values = torch.tensor(readers.values, device=self.device)
        whole = Targets(readers.depth, torch.from_numpy(nodes).to(self.device), positions, values, constants, covectors)
        device = self.device  # the function must not hold the sweep
        return lambda index: whole.take(torch.from_numpy(index).to(device))

    def _feature_groups(self) -> list[tuple[np.ndarray, Callable[[np.ndarray], Targets]]]:
        """Feature nodes by dictionary and kind, from the top down: in a layer readers at `resid_mid`, then query-side
        nodes, then key-side ones. In a parallel block the first do not read what the others write."""
        groups = []
        table = self.table
        found = {
            (index, kind)
            for index in range(len(self.linear.dictionaries))
            for kind in np.unique(table.kind[table.dictionary == index]).tolist()
        }
        for index, kind in sorted(found):
            nodes = np.flatnonzero((table.dictionary == index) & (table.kind == kind))
            read = self.linear.dictionaries[index].read.site
            is_key_side = kind in ("mtc_key", "value_feature")
            groups.append((-self.linear.read_depth(read.name, read.layer), is_key_side, index, nodes))
        groups.sort(key=lambda group: group[:3])
        return [(nodes, _feature_builder(self.linear, table, index, nodes)) for _, _, index, nodes in groups]


def _feature_builder(
    linear: LinearizedModel, table: NodeTable, index: int, nodes: np.ndarray
) -> Callable[[np.ndarray], Targets]:
    """What makes targets of some of a dictionary's nodes. It does not hold the sweep, for the sweep holds it: neither
    would be freed before Python looks for such circles."""
    return lambda chosen: feature_targets(linear, table, index, nodes[chosen])


def _worth_expanding(mass: np.ndarray, allowance: float) -> np.ndarray:
    """All but the weakest targets whose masses add up to at most `allowance`."""
    order = np.argsort(mass, kind="stable")
    skipped = order[np.cumsum(mass[order]) <= allowance]
    kept = np.ones(len(mass), dtype=bool)
    kept[skipped] = False
    return kept


def _strongest(mass: np.ndarray, always: np.ndarray, count: int) -> np.ndarray:
    """The `count` targets of the largest mass, one at least, and those that are always wanted."""
    kept = always.copy()
    kept[np.argsort(-mass, kind="stable")[: max(1, count)]] = True
    return kept
