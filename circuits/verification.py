"""Is a graph true? Its nodes are ablated in the base model, and what changes is compared with what the graph predicts.

- *Nodes*: every feature and error of the graph, or the strongest, is ablated by itself; the change of the target is
  compared with `circuits.effects`, the signed sum over all paths of the unpruned graph.
- *Random nodes*: as many active nodes that are not in the graph, of the same kinds and layers.
- *Patterns*: of the strongest edges that a head carries, the source is ablated with and without the head's attention
  at that place; the difference is what went through it, and is compared with the head's loading.
- *Sufficiency, necessity*: the pruned graph kept alone, and removed alone (`circuits.faithfulness`).

The target is the probability-weighted sum of the graph's logits, each less the mean over the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuits.assemble import table_numbers
from circuits.effects import total_effects
from circuits.errors import CircuitsError
from circuits.faithfulness import faithfulness
from circuits.graph import Graph
from circuits.head_steps import part_names, strongest_heads
from circuits.interventions import Bench, Change, Mode, PatternChange
from circuits.loading import Model, check_fits
from circuits.prompt import prepare
from circuits.statistics import agreement
from circuits.sweep import Progress, Sweep
from circuits.targets import TokenTarget
from circuits.tracing import lay_out

PATTERN_EDGES = 20
DRAWS = 2000


@dataclass(frozen=True)
class LogitTarget:
    """The logits that are explained: token ids, positions and shares that add up to one, (t,) each."""

    token_ids: Tensor
    positions: tuple[int, ...]
    shares: Tensor

    def value(self, logits: Tensor) -> Tensor:
        """(B,) of logits (B, positions, V), the positions in their order."""
        logits = logits.cpu()
        centred = logits - logits.mean(-1, keepdim=True)
        places = torch.arange(len(self.positions))
        return (centred[:, places, self.token_ids].double() * self.shares).sum(1)


def verify(
    model: Model,
    graph: Graph,
    *,
    nodes: int | None = None,
    seed: int = 0,
    mode: Mode = "real",
    progress: Progress | None = None,
) -> Graph:
    """The graph with what its nodes' ablations predicted and did, and the figures in `metadata["verification"]`.

    Parameters
    ----------
    model
        The model that the graph was traced on (`circuits.loading.model_of` finds it).
    nodes
        Test so many of the graph's features and errors, those with the largest influence; None: all of them.
    seed
        Of the random nodes and of the bootstrap.
    mode
        `real`: the base model recomputes everything; `frozen`: direct effects alone, predicted and measured, which the
        linearized model gives exactly. Sufficiency and necessity are real runs in both.

    Raises
    ------
    CircuitsError
        The graph is of another model, or has no logit of a token among its targets.
    """
    check_fits(graph, model)
    target = target_of(graph)
    sweep = lay_out(
        model,
        prepare(model.base, graph.token_ids),
        [TokenTarget(i, p) for i, p in zip(target.token_ids.tolist(), target.positions, strict=True)],
    )
    predicted = -(target.shares.numpy() @ total_effects(sweep, direct=mode == "frozen"))
    number = table_numbers(graph, sweep)
    # A feature at its threshold may be active on one machine and not on another: what is not there is not tested.
    chosen = _strongest(graph, number >= 0, nodes)
    tested = number[chosen]
    random = _matched(sweep, tested, number, np.random.default_rng(seed))
    bench = Bench(model, graph.token_ids)
    measured = _measure(bench, sweep, target, np.concatenate([tested, random]), mode, progress)
    figures: dict[str, Any] = {
        "mode": mode,
        "seed": seed,
        "nodes": agreement(predicted[tested], measured[: len(tested)], seed=seed, draws=DRAWS),
        "random": agreement(predicted[random], measured[len(tested) :], seed=seed, draws=DRAWS),
        "patterns": agreement(*_patterns(bench, graph, sweep, number, mode), seed=seed, draws=DRAWS),
    }
    found = faithfulness(sweep, _mask(sweep, number), target.value)
    figures |= {"sufficiency": found.sufficiency, "necessity": found.necessity}
    figures["target"] = {name: getattr(found, name) for name in ("whole", "nothing", "kept", "without")}
    return replace(
        graph,
        nodes=replace(
            graph.nodes,
            predicted=_column(len(graph.nodes), chosen, predicted[tested]),
            measured=_column(len(graph.nodes), chosen, measured[: len(tested)]),
        ),
        metadata={**graph.metadata, "verification": figures},
    )


def target_of(graph: Graph) -> LogitTarget:
    """The graph's tokens as one target. Raises `CircuitsError` if it has none."""
    nodes = graph.nodes
    logits = np.flatnonzero((nodes.kind == "logit") & (nodes.target_weight > 0) & ~np.isnan(nodes.probability))
    if not len(logits):
        raise CircuitsError(
            "the graph has no logit of a token among its targets; differences, directions and features cannot be "
            "verified yet: trace with tokens as targets"
        )
    weights = torch.tensor(nodes.target_weight[logits], dtype=torch.float64)
    ids = torch.tensor(nodes.feature[logits])
    return LogitTarget(ids, tuple(nodes.position[logits].tolist()), weights / weights.sum())


def _strongest(graph: Graph, there: np.ndarray, count: int | None) -> np.ndarray:
    """Of the nodes that are there the graph's features and errors, the strongest first."""
    nodes = graph.nodes
    chosen = np.flatnonzero((nodes.is_feature | nodes.is_error) & there)
    return chosen[np.argsort(-nodes.influence[chosen], kind="stable")][:count]


def _matched(sweep: Sweep, tested: np.ndarray, kept: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each tested node another of its kind and layer that is not in the graph, while there are any."""
    table = sweep.table
    outside = np.ones(len(table), dtype=bool)
    outside[kept[(kept >= 0) & (kept < len(table))]] = False
    found: list[int] = []
    for kind, layer in sorted(set(zip(table.kind[tested].tolist(), table.layer[tested].tolist(), strict=True))):
        alike = (table.kind == kind) & (table.layer == layer)
        others = np.flatnonzero(alike & outside)
        count = min(len(others), int(alike[tested].sum()))
        found += rng.choice(others, count, replace=False).tolist()
    return np.array(found, dtype=np.int64)


def addresses(sweep: Sweep, numbers: np.ndarray) -> list[str]:
    """Addresses of table nodes for interventions, with the dictionary of a feature."""
    names = [dictionary.name for dictionary in sweep.linear.dictionaries]
    owners = sweep.table.dictionary[numbers].tolist()
    return [
        name if owner < 0 else f"{name}@{names[owner]}"
        for name, owner in zip(part_names(sweep.table, numbers).tolist(), owners, strict=True)
    ]


def _measure(
    bench: Bench, sweep: Sweep, target: LogitTarget, numbers: np.ndarray, mode: Mode, progress: Progress | None
) -> np.ndarray:
    """The change of the target when each node is ablated by itself, (n,)."""
    batch = [[Change(address, "ablate")] for address in addresses(sweep, numbers)]
    found, size = [], 32
    for start in range(0, len(batch), size):
        outcome = bench.run(batch[start : start + size], mode=mode, positions=target.positions, batch_size=size)
        found.append(target.value(outcome.logits) - target.value(outcome.baseline_logits[None]))
        if progress is not None:
            progress(min(start + size, len(batch)), len(batch))
    return torch.cat(found).numpy() if found else np.zeros(0)


def _patterns(
    bench: Bench, graph: Graph, sweep: Sweep, number: np.ndarray, mode: Mode
) -> tuple[np.ndarray, np.ndarray]:
    """Loadings of the strongest heads of the strongest edges between tokens, and what is measured through them.

    Where attention is frozen an edge's last hop is its loading: all that passes that entry arrives by it.
    An edge's source is ablated with the pattern as it is, and with the entry of the head set to zero; the target's
    pre-activation changes by what passes the head, and by what does not.
    """
    heads = strongest_heads(graph.heads if len(graph.heads) else graph.last_hops, 1)
    source, target = graph.edges.source[heads.edge], graph.edges.target[heads.edge]
    nodes = graph.nodes
    able = (heads.head >= 0) & (heads.key != heads.query) & nodes.is_feature[target]
    able &= (number[source] >= 0) & (number[target] >= 0)
    strength = np.abs(heads.weight) / np.maximum(np.abs(nodes.pre_activation[target]), 1e-6) * nodes.influence[target]
    order = np.flatnonzero(able)[np.argsort(-strength[able], kind="stable")][:PATTERN_EDGES]
    if not len(order):
        return np.zeros(0), np.zeros(0)
    sources, targets = (addresses(sweep, number[ends[order]]) for ends in (source, target))
    batch: list[Sequence[Change | PatternChange]] = []
    for row, ablated in zip(order.tolist(), sources, strict=True):
        place = (int(heads.layer[row]), int(heads.head[row]), int(heads.query[row]), int(heads.key[row]))
        shut = PatternChange(*place, "set", 0.0)
        batch += [[Change(ablated, "ablate")], [shut], [Change(ablated, "ablate"), shut]]
    outcome = bench.run(batch, mode=mode, features=targets)
    own = torch.arange(len(order))
    changed = outcome.features.view(len(order), 3, -1)[own, :, own].double()
    open_change = changed[:, 0] - outcome.baseline_features.double()
    shut_change = changed[:, 2] - changed[:, 1]
    return heads.weight[order].astype(np.float64), (shut_change - open_change).cpu().numpy()


def _mask(sweep: Sweep, number: np.ndarray) -> np.ndarray:
    """Which nodes of the table are in the graph."""
    kept = np.zeros(len(sweep.table), dtype=bool)
    kept[number[(number >= 0) & (number < len(kept))]] = True
    return kept


def _column(length: int, places: np.ndarray, values: np.ndarray) -> np.ndarray:
    column = np.full(length, np.nan, dtype=np.float32)
    column[places] = values
    return column
