"""Expand a number of features, those first that matter most as far as is known by then, and rank again as rows come in.

This is the search of circuit-tracer (Hanna et al. 2025; `attribute`, phase 4), step by step: the rows of the output
targets give each feature an influence; the strongest features that have no row yet get one, a batch at a time; with
the new rows all influences are taken again. What has no row in the end is not in the graph, and the shares of the
others are of what is left. The top-down sweep (`circuits.sweep`) has each influence final when it is needed and
promises what it leaves out; this one promises how many rows it computes.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from circuits.replacements.memory import free_memory
from circuits.rows import RowBlock
from circuits.sweep import Progress, Sweep, Swept

BATCH = 256  # features between two rankings, as circuit-tracer has it
ROWS_SHARE = 0.25  # of the free memory that the rows may take
GROWTH = 4  # or this part of those that have rows already


@dataclass(frozen=True)
class _Held:
    """Rows that are kept: `group` counts from the top, so no edge goes to the same group or up."""

    group: int
    block: RowBlock
    targets: np.ndarray
    sources: np.ndarray


class BestFirst:
    """The rows of one search, and what they say of every node. They are kept: see `fits`."""

    @staticmethod
    def fits(sweep: Sweep, n_targets: int) -> bool:
        """Whether so many rows leave room in memory for the rest."""
        return 4 * n_targets * len(sweep.table) <= ROWS_SHARE * free_memory(sweep.device)

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.groups = sweep.groups
        self.held: list[_Held] = []
        self._below: dict[int, Tensor] = {}
        total = len(sweep.table) + sweep.targets.n_outputs
        self.expanded = np.zeros(total, dtype=bool)

    def run(self, n_targets: int, progress: Progress | None = None) -> Swept:
        """Expand the output targets and `n_targets` features."""
        n, table = len(self.sweep.table), self.sweep.table
        wanted = self.sweep.targets.start > 0
        wanted[n:] = True
        self._expand(wanted)
        features = np.flatnonzero(table.dictionary >= 0)
        in_all = min(n_targets, len(features))
        while (done := int(self.expanded[:n].sum())) < in_all:
            influence, _ = self._influence()
            waiting = features[~self.expanded[features]]
            count = min(max(BATCH, done // GROWTH), in_all - done)
            wanted = np.zeros(len(self.expanded), dtype=bool)
            wanted[waiting[np.argsort(-influence[waiting], kind="stable")[:count]]] = True
            self._expand(wanted)
            if progress is not None:
                progress(int(self.expanded[:n].sum()), in_all)
        return self._swept()

    def rows_of(self, wanted: np.ndarray) -> list[RowBlock]:
        """The blocks that hold rows of some targets: `wanted` is a mask over nodes and output targets."""
        return [held.block for held in self.held if wanted[held.targets].any()]

    def _expand(self, wanted: np.ndarray) -> None:
        chosen = [np.flatnonzero(wanted[nodes] & ~self.expanded[nodes]) for nodes, _ in self.groups]
        there = [group for group, places in enumerate(chosen) if len(places)]
        readers = [self.groups[group][1](chosen[group]) for group in there]
        for number, block in self.sweep.rows.together(readers):
            block = self._slim(block)
            targets, sources = block.targets.nodes.cpu().numpy(), block.sources.cpu().numpy()
            self.held.append(_Held(there[number], block, targets, sources))
        self.expanded |= wanted

    def _slim(self, block: RowBlock) -> RowBlock:
        """A block without the columns of nodes that write at the targets' depth or above: these are zero."""
        depth, width = block.targets.depth, block.weights.shape[1]
        if depth not in self._below:
            self._below[depth] = torch.from_numpy(np.flatnonzero(self.sweep.table.depth < depth)).to(self.sweep.device)
        below = self._below[depth]
        if not width or int(block.sources[0]) or int(block.sources[-1]) != width - 1:
            return block.slim()
        below = below[: int(torch.searchsorted(below, width))]
        return replace(block.slim(), sources=below, weights=block.weights[:, below])

    def _influence(self, present: Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Influence of every node, and the share of each target's input that is no error, over the rows that are held.

        present
            (n,) one for sources that count and zero for others; all count without it.
        """
        start = self.sweep.targets.start
        influence, complete = np.zeros(len(start)), np.ones(len(start))
        for held in sorted(self.held, key=lambda held: held.group):
            sizes = held.block.weights.abs()
            if present is not None:
                sizes *= present[held.block.sources]
            totals = sizes.sum(1).clamp(min=1e-30)
            flow = torch.from_numpy(influence[held.targets] + start[held.targets]).to(totals) / totals
            influence[held.sources] += (flow @ sizes).cpu().numpy()
            if present is not None:
                errors = sizes @ self.sweep.is_error[held.block.sources] / totals
                complete[held.targets] = 1.0 - errors.cpu().numpy()
        return influence, complete

    def _swept(self) -> Swept:
        """What was found, over the graph of the output targets, the expanded features, tokens and errors."""
        n, table = len(self.sweep.table), self.sweep.table
        of_all, _ = self._influence()
        dropped = np.flatnonzero((table.dictionary >= 0) & ~self.expanded[:n])
        present = torch.ones(n, device=self.sweep.device)
        present[torch.from_numpy(dropped).to(self.sweep.device)] = 0.0
        influence, complete = self._influence(present)
        pre_activation, bias = np.full(len(influence), np.nan), np.full(len(influence), np.nan)
        worst = 0.0
        for held in self.held:
            pre_activation[held.targets] = held.block.targets.values.cpu().numpy()
            bias[held.targets] = held.block.bias.cpu().numpy()
            worst = max(worst, float(held.block.gaps().max()))
        replacement_score, completeness_score = self.sweep.scores(influence, complete)
        return Swept(
            influence=influence,
            pre_activation=pre_activation,
            bias=bias,
            expanded=self.expanded,
            replacement_score=replacement_score,
            completeness_score=completeness_score,
            max_relative_gap=worst,
            left_out=float(of_all[dropped].sum()),
            search="best first",
        )
