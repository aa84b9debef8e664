"""From a prompt to a pruned attribution graph: record, encode, linearize, sweep, prune, and name the heads.

This module is the table of contents of the method; each step is a file of its own.
"""

from collections.abc import Sequence

import numpy as np
import torch

from circuits.assemble import Traced, build_graph, describe, with_heads, with_hops
from circuits.best_first import BestFirst
from circuits.changes import Change
from circuits.errors import CircuitsError
from circuits.graph import Graph, keep_nodes, prune_edges
from circuits.head_steps import with_scores
from circuits.held import hold
from circuits.kernels.backend import products_of
from circuits.linearize import LinearizedModel
from circuits.loading import Model
from circuits.nodes import NodeTable, build_nodes
from circuits.prompt import Prompt, prepare
from circuits.recording import record
from circuits.rounding import in_float32
from circuits.rows import RowBlock
from circuits.settings import TraceSettings
from circuits.sweep import Progress, Sweep, Swept, TargetList
from circuits.targets import Target, TopTokens, expand, feature_places, output_readers


@torch.no_grad()
def trace(
    model: Model,
    prompt: str | Sequence[int] | Prompt,
    targets: Sequence[Target] | None = None,
    settings: TraceSettings | None = None,
    progress: Progress | None = None,
    changes: Sequence[Change] = (),
) -> Graph:
    """Trace a prompt to its attribution graph.

    Parameters
    ----------
    model
        From `circuits.load`.
    prompt
        Text, token ids, or a prepared `Prompt`.
    targets
        What to explain; by default `TopTokens()`: those at the last position to 95 % of the probability, at most ten.
    settings
        See `TraceSettings`.
    progress
        Called with (targets expanded, targets in all) as the sweep goes.
    changes
        Nodes to ablate or to scale, all together, while the model runs: the graph explains what the changed model
        does (`circuits.held`). Its metadata has them as `changes`.

    Returns
    -------
    Graph
        Pruned, unless the settings say otherwise; `metadata["ledger"]["max_relative_gap"]` is its proof. Edges through
        frozen attention are split by their first and last hops (`circuits.hops`) in a pruned graph only.

    Example
    -------
    >>> graph = circuits.trace(circuits.load(), "When Mary and John went to the store, John gave a drink to")
    >>> graph.save("graph.svg")
    """
    settings = settings or TraceSettings()
    prepared = prompt if isinstance(prompt, Prompt) else prepare(model.base, prompt)
    if targets is not None and not targets:
        raise CircuitsError("no target was given; leave targets out for the top tokens")
    sweep = lay_out(model, prepared, [TopTokens()] if targets is None else targets, changes)
    linear, table, listed = sweep.linear, sweep.table, sweep.targets
    rounding = None
    if settings.unpruned:
        collected = _Edges()
        swept = sweep.run(0.0, on_rows=collected.add, progress=progress)
        kept = np.ones(len(swept.influence), dtype=bool)
    else:
        search, wanted, products = None, settings.max_targets, products_of(settings.products)
        linear.products = products
        if wanted is not None and BestFirst.fits(sweep, min(wanted, len(table))):
            search = BestFirst(sweep)
            swept = search.run(wanted, progress)
        else:
            swept = sweep.run(settings.left_out, max_targets=wanted, progress=progress)
        kept = _kept_nodes(table, swept, listed, settings)
        collected = _Edges(kept)
        if products == "float32":
            for block in (search or sweep).rows_of(kept & swept.expanded):
                collected.add(block)
        else:
            swept, rounding = in_float32(sweep, swept, kept & swept.expanded, products, collected.add)
    traced = Traced(linear, table, prepared, listed, swept, rounding)
    graph = build_graph(traced, kept, *collected.columns(), metadata=describe(model, traced, settings, changes))
    if not settings.unpruned:
        graph = prune_edges(graph, settings.edge_threshold)
    graph = with_heads(graph, sweep)
    if settings.hops and not settings.unpruned:
        graph = with_hops(graph, sweep)
    return with_scores(graph, sweep, model.qk, progress=progress) if settings.explain else graph


@torch.no_grad()
def lay_out(model: Model, prompt: Prompt, targets: Sequence[Target], changes: Sequence[Change] = ()) -> Sweep:
    """Everything that comes before the sweep: record, linearize, encode, choose targets (which may be none)."""
    recording = record(model.base, torch.tensor(prompt.token_ids, device=model.base.device))
    linear = LinearizedModel(model.base, model.replacements, recording)
    table = build_nodes(linear, first_is_special=prompt.first_is_special)
    if changes:
        linear, table = hold(model, linear, table, changes, first_is_special=prompt.first_is_special)
    return Sweep(linear, table, _target_list(linear, table, prompt, expand(linear, targets)))


class _Edges:
    """Gathers edges from row blocks: all of them, or those between kept nodes."""

    def __init__(self, kept: np.ndarray | None = None) -> None:
        self.kept = kept
        self.pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, block: RowBlock) -> None:
        columns, targets = block.sources.cpu().numpy(), block.targets.nodes.cpu().numpy()
        weights = block.weights
        if self.kept is not None:
            among, mine = np.flatnonzero(self.kept[columns]), np.flatnonzero(self.kept[targets])
            columns, targets = columns[among], targets[mine]
            weights = weights[torch.from_numpy(mine).to(weights.device)][:, torch.from_numpy(among).to(weights.device)]
        values = weights.cpu().numpy()
        row, column = np.nonzero(values)
        self.pieces.append((columns[column], targets[row], values[row, column]))

    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Source, target and weight of all edges."""
        if not self.pieces:
            none = np.zeros(0, dtype=np.int64)
            return none, none, np.zeros(0, dtype=np.float32)
        source, target, weight = (np.concatenate(parts) for parts in zip(*self.pieces, strict=True))
        return source, target, weight


def _target_list(linear: LinearizedModel, table: NodeTable, prompt: Prompt, targets: Sequence[Target]) -> TargetList:
    outputs = output_readers(linear, prompt, targets)
    weights = [weight for readers in outputs for weight in readers.weights]
    start = np.concatenate([np.zeros(len(table)), weights])
    for wanted in feature_places(targets, linear.recording):
        hit = (table.kind == wanted.kind) & (table.layer == wanted.layer) & (table.position == wanted.position)
        hit &= table.feature == wanted.feature
        if not hit.any():
            raise CircuitsError(
                f"feature {wanted.feature} of layer {wanted.layer} ({wanted.kind}) is not active at position "
                f"{wanted.position}, so there is nothing to explain"
            )
        start[np.flatnonzero(hit)] = 1.0
    return TargetList(outputs, start)


def _kept_nodes(table: NodeTable, swept: Swept, listed: TargetList, settings: TraceSettings) -> np.ndarray:
    always = listed.start > 0
    always[: len(table)] |= table.kind == "embedding"
    always[len(table) :] = True
    kept = keep_nodes(swept.influence, settings.node_threshold, always)
    if settings.max_targets is not None:
        kept[: len(table)] &= (table.dictionary < 0) | swept.expanded[: len(table)]
    if settings.max_feature_nodes is not None:
        features = np.flatnonzero(kept[: len(table)] & (table.dictionary >= 0) & (listed.start[: len(table)] == 0))
        strongest = features[np.argsort(-swept.influence[features], kind="stable")]
        kept[strongest[settings.max_feature_nodes :]] = False
    return kept
