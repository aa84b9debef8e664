"""From what a sweep found to a `Graph`: node columns, edges, head loadings, hop splits, patterns and metadata."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any

import numpy as np

from circuits import __version__
from circuits.graph import KINDS, Edges, Graph, Heads, Nodes, cumulative_influence
from circuits.hops import hop_splits
from circuits.linearize import LinearizedModel
from circuits.loading import Model
from circuits.loadings import Loadings, head_loadings
from circuits.nodes import NodeTable
from circuits.prompt import Prompt, token_texts
from circuits.settings import TraceSettings
from circuits.sweep import Sweep, Swept, TargetList


@dataclass(frozen=True)
class Traced:
    """One prompt after its sweep."""

    linear: LinearizedModel
    table: NodeTable
    prompt: Prompt
    targets: TargetList
    swept: Swept


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
    columns = node_columns(traced)
    kind = np.array([KINDS.index(kind) for kind in columns["kind"].tolist()])
    chosen = np.flatnonzero(kept)
    order = np.lexsort([column[chosen] for column in (columns["feature"], columns["position"], kind, columns["layer"])])
    chosen = chosen[order]
    number = np.full(len(kept), -1)
    number[chosen] = np.arange(len(chosen))
    source, target = number[source], number[target]
    edge_order = np.lexsort((source, target))
    none = np.zeros(0, dtype=np.int32)
    return Graph(
        prompt=traced.prompt.text,
        tokens=traced.prompt.tokens,
        token_ids=traced.prompt.token_ids,
        n_layers=traced.linear.model.shape.n_layers,
        nodes=Nodes(**{name: values[chosen] for name, values in columns.items()}),
        edges=Edges(source=source[edge_order], target=target[edge_order], weight=weight[edge_order]),
        heads=Heads(edge=none, layer=none, head=none, key=none, query=none, weight=none.astype(np.float32)),
        metadata=metadata,
    )


def node_columns(traced: Traced) -> dict[str, np.ndarray]:
    """The graph's node columns over the table's nodes and the output targets after them."""
    linear, table, swept, targets = traced.linear, traced.table, traced.swept, traced.targets
    n_outputs = targets.n_outputs
    is_token = table.kind == "embedding"
    labels = [""] * len(table)
    for i, text in zip(np.flatnonzero(is_token), token_texts(linear.model, table.feature[is_token].tolist())):
        labels[i] = text
    names = np.array([dictionary.name for dictionary in linear.dictionaries] + [""])

    def joined(nodes: np.ndarray, outputs: Sequence[Any]) -> np.ndarray:
        return np.concatenate([nodes, np.array(outputs, dtype=nodes.dtype)])

    def of_outputs(field: str) -> list[Any]:
        return list(chain.from_iterable(getattr(readers, field) for readers in targets.outputs))

    nothing = [np.nan] * n_outputs
    known = joined(table.pre_activation, nothing)
    return {
        "kind": np.concatenate([table.kind, np.full(n_outputs, "logit")]),
        "dictionary": np.concatenate([names[table.dictionary], np.full(n_outputs, "")]),
        "layer": joined(table.layer, [linear.model.shape.n_layers] * n_outputs),
        "position": joined(table.position, of_outputs("positions")),
        "feature": joined(table.feature, of_outputs("token_ids")),
        "activation": joined(table.activation, nothing),
        "pre_activation": np.where(swept.expanded, swept.pre_activation, known).astype(np.float32),
        "bias": swept.bias.astype(np.float32),
        "influence": swept.influence,
        "cumulative_influence": cumulative_influence(swept.influence),
        "target_weight": targets.start,
        "probability": joined(np.full(len(table), np.nan, dtype=np.float32), of_outputs("probabilities")),
        "predicted": np.full(len(known), np.nan, dtype=np.float32),
        "measured": np.full(len(known), np.nan, dtype=np.float32),
        "label": np.array(labels + of_outputs("labels"), dtype=np.str_),
    }


def table_numbers(graph: Graph, sweep: Sweep) -> np.ndarray:
    """(nodes of the graph,) where each stands in the sweep's table, or among the output targets after it; -1 where it
    does not."""
    nodes, table, linear = graph.nodes, sweep.table, sweep.linear
    names = [dictionary.name for dictionary in linear.dictionaries] + [""]
    sources = zip(table.kind, (names[i] for i in table.dictionary), table.layer, table.position, table.feature)
    outputs = [
        ("logit", label, position, token)
        for readers in sweep.targets.outputs
        for position, token, label in zip(readers.positions, readers.token_ids, readers.labels, strict=True)
    ]
    place = {key: i for i, key in enumerate([*sources, *outputs])}
    columns = (nodes.kind, nodes.dictionary.tolist(), nodes.layer, nodes.position, nodes.feature)
    keys = [
        ("logit", label, key[3], key[4]) if key[0] == "logit" else key
        for label, *key in zip(nodes.label.tolist(), *columns)
    ]
    return np.array([place.get(tuple(key), -1) for key in keys], dtype=np.int64)


def with_heads(graph: Graph, sweep: Sweep) -> Graph:
    """The graph with the head loadings of its edges, and the patterns of the heads that they name."""
    number = table_numbers(graph, sweep)
    loadings = head_loadings(sweep, number[graph.edges.source], number[graph.edges.target])
    return _with_patterns(replace(graph, heads=_heads(loadings)), sweep, loadings)


def with_hops(graph: Graph, sweep: Sweep) -> Graph:
    """The graph with the hop splits of its edges through frozen attention, and the patterns of their heads."""
    if not sweep.linear.frozen_attention:
        return graph
    number = table_numbers(graph, sweep)
    first, last = hop_splits(sweep, number[graph.edges.source], number[graph.edges.target])
    return _with_patterns(replace(graph, first_hops=_heads(first), last_hops=_heads(last)), sweep, first, last)


def _heads(loadings: Loadings) -> Heads:
    return Heads(**{field.name: getattr(loadings, field.name) for field in fields(loadings)})


def _with_patterns(graph: Graph, sweep: Sweep, *tables: Loadings) -> Graph:
    """The graph with the patterns of the base layers' heads that some tables name, beside those that it has."""
    named = {at for rows in tables for at in zip(rows.layer.tolist(), rows.head.tolist()) if at[1] >= 0}
    recorded = sweep.linear.recording.patterns
    patterns = {at: recorded[at].cpu().numpy() for at in named - set(graph.patterns)}
    return replace(graph, patterns=dict(sorted({**graph.patterns, **patterns}.items())))


def describe(model: Model, traced: Traced, settings: TraceSettings) -> dict[str, Any]:
    """Metadata: versions, identities, settings, scores, the ledger, and which layers' attention is replaced."""
    import torch
    import transformers

    linear, swept = traced.linear, traced.swept
    pruning = {"node_threshold": settings.node_threshold, "edge_threshold": settings.edge_threshold}
    if settings.max_feature_nodes is not None:
        pruning["max_feature_nodes"] = settings.max_feature_nodes
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
        "settings": {"left_out": 0.0, "unpruned": True}
        if settings.unpruned
        else {"left_out": settings.left_out, **pruning},
        "scores": {"replacement": swept.replacement_score, "completeness": swept.completeness_score},
        "ledger": {"max_relative_gap": swept.max_relative_gap, "targets": int(swept.expanded.sum())},
        "active_features": int(((traced.table.dictionary >= 0) & (traced.table.kind != "mtc_query")).sum()),
        "left_out_influence": swept.left_out,
        "influence_total": float(swept.influence.sum()),
    }


def _attention(linear: LinearizedModel, layer: int) -> str:
    if layer in linear.replaced_blocks:
        return "block replaced"
    if layer in linear.replaced_attention:
        return "replaced"
    return "values replaced" if layer in linear.replaced_values else "frozen"
