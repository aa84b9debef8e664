"""From what a sweep found to a `Graph`: node columns, edges, head loadings, hop splits, patterns and metadata."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from typing import Any

import numpy as np

from circuits import __version__
from circuits.changes import Change
from circuits.graph import KINDS, Edges, Graph, Heads, Nodes, cumulative_influence, edge_scores
from circuits.hop_work import worth_splitting
from circuits.hops import hop_splits
from circuits.linearize import LinearizedModel
from circuits.loading import Model
from circuits.loadings import Loadings, head_loadings
from circuits.nodes import NodeTable
from circuits.prompt import Prompt, token_texts
from circuits.rounding import Rounding
from circuits.settings import TraceSettings
from circuits.sweep import Sweep, Swept, TargetList

PATTERN_BYTES = 2**28  # of attention patterns in a graph
_SORTED_KINDS = np.array(sorted(KINDS))


@dataclass(frozen=True)
class Traced:
    """One prompt after its sweep."""

    linear: LinearizedModel
    table: NodeTable
    prompt: Prompt
    targets: TargetList
    swept: Swept
    rounding: Rounding | None = None


def build_graph(
    traced: Traced,
    kept: np.ndarray,
    source: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray,
    *,
    metadata: dict[str, Any],
) -> Graph:
    """The graph of the kept nodes, sorted by layer, kind, position and feature, without head loadings yet.

    kept
        Mask over the table's nodes and the output targets after them.
    source, target, weight
        Edges between kept nodes, numbered as in the mask.
    """
    chosen = np.flatnonzero(kept)
    columns = node_columns(traced, chosen)
    kind = np.array([KINDS.index(kind) for kind in columns["kind"].tolist()])
    order = np.lexsort((columns["feature"], columns["position"], kind, columns["layer"]))
    number = np.full(len(kept), -1)
    number[chosen[order]] = np.arange(len(chosen))
    source, target = number[source], number[target]
    edge_order = np.lexsort((source, target))
    none = np.zeros(0, dtype=np.int32)
    return Graph(
        prompt=traced.prompt.text,
        tokens=traced.prompt.tokens,
        token_ids=traced.prompt.token_ids,
        n_layers=traced.linear.model.shape.n_layers,
        nodes=Nodes(**{name: values[order] for name, values in columns.items()}),
        edges=Edges(source=source[edge_order], target=target[edge_order], weight=weight[edge_order]),
        heads=Heads(edge=none, layer=none, head=none, key=none, query=none, weight=none.astype(np.float32)),
        metadata=metadata,
    )


def node_columns(traced: Traced, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """The graph's node columns of `chosen` (k,), ascending, among the table's nodes and the output targets after."""
    linear, table, swept, targets = traced.linear, traced.table, traced.swept, traced.targets
    nodes, outputs = chosen[chosen < len(table)], chosen[chosen >= len(table)] - len(table)
    kind = table.kind[nodes]
    is_token = kind == "embedding"
    labels = [""] * len(nodes)
    for i, text in zip(np.flatnonzero(is_token), token_texts(linear.model, table.feature[nodes[is_token]].tolist())):
        labels[i] = text
    names = np.array([dictionary.name for dictionary in linear.dictionaries] + [""])

    def joined(column: np.ndarray, of_outputs: Sequence[Any]) -> np.ndarray:
        return np.concatenate([column, np.array(of_outputs, dtype=column.dtype)])

    def of_outputs(field: str) -> list[Any]:
        values = list(chain.from_iterable(getattr(readers, field) for readers in targets.outputs))
        return [values[i] for i in outputs.tolist()]

    nothing = [np.nan] * len(outputs)
    known = joined(table.pre_activation[nodes], nothing)
    unknown = np.full(len(chosen), np.nan, dtype=np.float32)
    return {
        "kind": np.concatenate([kind, np.full(len(outputs), "logit")]),
        "dictionary": np.concatenate([names[table.dictionary[nodes]], np.full(len(outputs), "")]),
        "layer": joined(table.layer[nodes], [linear.model.shape.n_layers] * len(outputs)),
        "position": joined(table.position[nodes], of_outputs("positions")),
        "feature": joined(table.feature[nodes], of_outputs("token_ids")),
        "activation": joined(table.activation[nodes], nothing),
        "pre_activation": np.where(swept.expanded[chosen], swept.pre_activation[chosen], known).astype(np.float32),
        "bias": swept.bias[chosen].astype(np.float32),
        "influence": swept.influence[chosen],
        "cumulative_influence": cumulative_influence(swept.influence)[chosen],
        "target_weight": targets.start[chosen],
        "probability": joined(unknown[: len(nodes)], of_outputs("probabilities")),
        "predicted": unknown,
        "measured": unknown.copy(),
        "label": np.array(labels + of_outputs("labels"), dtype=np.str_),
    }


def table_numbers(graph: Graph, sweep: Sweep) -> np.ndarray:
    """(nodes of the graph,) where each stands in the sweep's table, or among the output targets after it; -1 where it
    does not."""
    nodes, table = graph.nodes, sweep.table
    names = [dictionary.name for dictionary in sweep.linear.dictionaries] + [""]
    of_name = {name: i for i, name in enumerate(names)}
    dictionary = np.array([of_name.get(name, len(names)) for name in nodes.dictionary.tolist()], dtype=np.int64)
    columns: list[tuple[np.ndarray, np.ndarray]] = [
        (np.searchsorted(_SORTED_KINDS, nodes.kind), np.searchsorted(_SORTED_KINDS, table.kind)),
        (dictionary, table.dictionary % len(names)),
        (nodes.layer + 1, table.layer + 1),
        (nodes.position, table.position),
        (nodes.feature + 1, table.feature + 1),
    ]
    theirs, ours = np.zeros(len(nodes), dtype=np.int64), np.zeros(len(table), dtype=np.int64)
    for graph_column, table_column in columns:
        size = 1 + max(int(np.max(graph_column, initial=0)), int(np.max(table_column, initial=0)))
        theirs, ours = theirs * size + graph_column, ours * size + table_column
    order = np.argsort(ours)
    at = order[np.searchsorted(ours[order], theirs).clip(max=len(ours) - 1)]
    found = np.where(ours[at] == theirs, at, -1)
    outputs = [
        (label, position, token)
        for readers in sweep.targets.outputs
        for position, token, label in zip(readers.positions, readers.token_ids, readers.labels, strict=True)
    ]
    place = {key: len(table) + i for i, key in enumerate(outputs)}
    for i in np.flatnonzero(nodes.kind == "logit").tolist():
        found[i] = place.get((str(nodes.label[i]), int(nodes.position[i]), int(nodes.feature[i])), -1)
    return found


def with_heads(graph: Graph, sweep: Sweep) -> Graph:
    """The graph with the head loadings of its edges, and the patterns of the heads that they name."""
    number = table_numbers(graph, sweep)
    loadings = head_loadings(sweep, number[graph.edges.source], number[graph.edges.target])
    return _with_patterns(replace(graph, heads=_heads(loadings)), sweep, loadings)


def with_hops(graph: Graph, sweep: Sweep) -> Graph:
    """The graph with the hop splits of its edges through frozen attention, and the patterns of their heads.

    On a long prompt only the strongest edges are split: `metadata["hops"]` then says how many of how many.
    """
    if not sweep.linear.frozen_attention:
        return graph
    number = table_numbers(graph, sweep)
    source, target = number[graph.edges.source], number[graph.edges.target]
    chosen = worth_splitting(sweep, source, target, edge_scores(graph.nodes, graph.edges))
    found = hop_splits(sweep, source[chosen], target[chosen])
    first, last = (replace(hops, edge=chosen[hops.edge]) for hops in found)
    if len(chosen) < len(graph.edges):
        about = {"edges": len(chosen), "of": len(graph.edges)}
        graph = replace(graph, metadata={**graph.metadata, "hops": about})
    return _with_patterns(replace(graph, first_hops=_heads(first), last_hops=_heads(last)), sweep, first, last)


def _heads(loadings: Loadings) -> Heads:
    return Heads(**{field.name: getattr(loadings, field.name) for field in fields(loadings)})


def _with_patterns(graph: Graph, sweep: Sweep, *tables: Loadings) -> Graph:
    """The graph with the patterns of the base layers' heads that some tables name, beside those that it has.

    Where they would take more than `PATTERN_BYTES`, those of the heads that carry most.
    """
    carried: dict[tuple[int, int], float] = {}
    for rows in tables:
        heads = np.stack([rows.layer, rows.head], axis=1)[rows.head >= 0]
        named, place = np.unique(heads, axis=0, return_inverse=True)
        sizes = np.bincount(place.ravel(), weights=np.abs(rows.weight[rows.head >= 0]), minlength=len(named))
        for at, size in zip(named.tolist(), sizes.tolist()):
            carried[at[0], at[1]] = carried.get((at[0], at[1]), 0.0) + size
    recorded = sweep.linear.recording.patterns
    room = max(0, PATTERN_BYTES // (4 * recorded.shape[-1] ** 2) - len(graph.patterns))
    wanted = sorted(carried.keys() - graph.patterns.keys(), key=lambda at: -carried[at])
    patterns = {at: recorded[at].cpu().numpy() for at in wanted[:room]}
    return replace(graph, patterns=dict(sorted({**graph.patterns, **patterns}.items())))


def describe(
    model: Model, traced: Traced, settings: TraceSettings, changes: Sequence[Change] = ()
) -> dict[str, Any]:
    """Metadata: versions, identities, settings, scores, the ledger, which layers' attention is replaced, changes."""
    import torch
    import transformers

    linear, swept, rounding = traced.linear, traced.swept, traced.rounding
    pruning = {"node_threshold": settings.node_threshold, "edge_threshold": settings.edge_threshold}
    if settings.max_feature_nodes is not None:
        pruning["max_feature_nodes"] = settings.max_feature_nodes
    search: dict[str, Any] = {"left_out": settings.left_out}
    if settings.max_targets is not None:
        search = {"max_targets": settings.max_targets, "search": swept.search}
    layers = range(linear.model.shape.n_layers)
    return {
        "scan": model.base.name,
        "versions": {"circuits": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "model": {"name": model.base.name, "family": model.base.family.model_type, "hash": model.base.identity},
        "replacements": [
            {"name": r.name, "format": r.format, "dictionaries": [d.name for d in r.dictionaries], "hash": r.identity}
            for r in model.replacements
        ],
        "attention": [_attention(linear, layer) for layer in layers],
        "mlp": ["replaced" if layer in linear.replaced_mlp | linear.replaced_blocks else "error" for layer in layers],
        "settings": {"left_out": 0.0, "unpruned": True} if settings.unpruned else {**search, **pruning},
        "scores": {"replacement": swept.replacement_score, "completeness": swept.completeness_score},
        "ledger": {
            "max_relative_gap": swept.max_relative_gap,
            "targets": int(swept.expanded.sum()) if rounding is None else rounding.rows,
        },
        "active_features": int(((traced.table.dictionary >= 0) & (traced.table.kind != "mtc_query")).sum()),
        "left_out_influence": swept.left_out,
        "influence_total": float(swept.influence.sum()),
        **({} if rounding is None else {"products": asdict(rounding)}),
        **({"changes": [asdict(change) for change in changes]} if changes else {}),
    }


def _attention(linear: LinearizedModel, layer: int) -> str:
    if layer in linear.replaced_blocks:
        return "block replaced"
    if layer in linear.replaced_attention:
        return "replaced"
    return "values replaced" if layer in linear.replaced_values else "frozen"
