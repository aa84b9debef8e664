"""`graph.json`: our own file, which the Neuronpedia and Anthropic viewers also read.

It is a superset of Neuronpedia's graph schema (`metadata`, `qParams`, `nodes`, `links`). What is ours beside it:

- `graph`: prompt, tokens, token ids, number of layers, names of the heads that the base model does not have, which
  keys of `metadata` are the graph's own, and the graph's own values of those that the schema takes.
- On a node: `kind`, `dictionary`, `model_layer`, `feature_index`, `pre_activation`, `bias`, `node_influence`,
  `target_weight`, `probability`, `label`. Neuronpedia's `influence` is our cumulative influence, its `feature` is
  layer and feature in one number (Cantor pairing, which its `schema_version` 1 stands for), its `lorsa` is any
  feature of attention: of an attention output, of values, or either side of a multitoken transcoder. Our
  `predicted` and `measured` are the change of the target on ablating the node.
- On a link through attention: `heads`, rows of [layer, head, key position, query position, weight]; head -1 is the
  identity of a multitoken transcoder, -2 a feature's own pattern. On a link through frozen attention `first_hops` and
  `last_hops`, rows alike; head -3 is the part that never leaves its position, -4 the sum of what is not listed.
- `qk`: explained attention scores, one a line: `layer`, `head`, `query`, `key`, `owner` (of a feature's own pattern),
  `score`, `attention`, `relative`, `lead`, `gap`; `pairs`, rows of [query node, key node, weight]; `lead_pairs`, rows
  of [query node, key node, key position, weight]; `query_side` and `key_side`, rows of [node, weight]; `qk_features`,
  rows of [name, weight]. Neuronpedia's `qk_tracing_results` on a node of attention is the first, third and fourth of
  these, summed over the scores that its loadings name.
- `patterns`: for "layer.head" one row for each query, up to and with the query's own position.

Numbers are written with as many digits as single precision has, so loading gives back the same arrays. A number
that is not there (nan) is null.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from circuits.graph.errors import GraphError
from circuits.graph.formats.qk import to_lists, tracing_results
from circuits.graph.formats.rows import HEAD_TABLES, loadings, plain
from circuits.graph.formats.text import model_name, slug
from circuits.graph.formats.whole_file import write_whole
from circuits.graph.graph import Graph
from circuits.graph.tables import ERROR_KINDS, FEATURE_KINDS, SPECIAL_HEADS

FORMAT = 1
# Keys of the metadata that the schema gives a meaning to, so that the graph's own value cannot stand there.
REQUIRED = ("slug", "scan", "prompt", "prompt_tokens", "schema_version")
# What is pinned and grouped in a viewer; a graph that was saved by one has its own as `metadata["qParams"]`.
VIEW: dict[str, Any] = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
# The schema has no other types. A block's error goes with the MLP's: both stand at the top of their layer.
FEATURE_TYPES = {
    "embedding": "embedding",
    "value_feature": "lorsa",
    "value_error": "lorsa error",
    "mtc_key": "lorsa",
    "attention_feature": "lorsa",
    "mtc_query": "lorsa",
    "attention_error": "lorsa error",
    "mlp_feature": "cross layer transcoder",
    "mlp_error": "mlp reconstruction error",
    "block_error": "mlp reconstruction error",
    "logit": "logit",
}
# Our column by its name in the file, where the two differ.
NODE_KEYS = {
    "layer": "model_layer",
    "position": "ctx_idx",
    "feature": "feature_index",
    "influence": "node_influence",
    "cumulative_influence": "influence",
}


def write(graph: Graph, path: Path) -> None:
    """Write the graph as JSON, one node and one link a line.

    Raises:
        GraphError: The metadata cannot be JSON, or the file cannot be written.
    """
    write_whole(path, dumps(graph).encode("ascii"))


def read(path: Path) -> Graph:
    """Read a graph that `write` has written, or another tool in Neuronpedia's schema.

    Raises:
        GraphError: The file is missing, truncated, no JSON, or no graph.
    """
    from circuits.graph.formats.json_reader import read as read_graph

    return read_graph(path)


def dumps(graph: Graph) -> str:
    """The text of the file, in ASCII.

    Raises:
        GraphError: The metadata holds what JSON cannot, or a column holds an infinity.
    """
    names = graph.node_ids()
    head = {
        "format": FORMAT,
        "prompt": graph.prompt,
        "tokens": graph.tokens,
        "token_ids": graph.token_ids,
        "n_layers": graph.n_layers,
        "head_names": {str(head): name for head, name in SPECIAL_HEADS.items()},
        "metadata_keys": sorted(graph.metadata),
        "metadata_replaced": {key: graph.metadata[key] for key in REQUIRED if key in graph.metadata},
    }
    parts = [
        f'"graph": {_text("graph", head)}',
        f'"metadata": {_text("metadata", _metadata(graph))}',
        f'"qParams": {_text("qParams", view(graph.metadata.get("qParams")))}',
        f'"nodes": {_lines("nodes", _nodes(graph, names))}',
        f'"links": {_lines("links", _links(graph, names))}',
        f'"qk": {_lines("qk", to_lists(graph))}',
        f'"patterns": {_text("patterns", _patterns(graph))}',
    ]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def cantor_pairing(layer: int, feature: int) -> int:
    """Layer and feature in one number, so that each can be had back from it."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def _text(name: str, value: object) -> str:
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise GraphError(
            f"{name} cannot be written as JSON ({error}). Keep only text, finite numbers, lists and dictionaries."
        ) from error


def view(annotations: Any) -> dict[str, Any]:
    """`qParams` as they are written: `VIEW` with a graph's own annotations, where it has any."""
    return {**VIEW, **(annotations if isinstance(annotations, dict) else {})}


def _lines(name: str, items: Iterable[dict[str, Any]]) -> str:
    lines = [_text(name, item) for item in items]
    return "[\n" + ",\n".join(lines) + "\n]" if lines else "[]"


def _metadata(graph: Graph) -> dict[str, Any]:
    """The graph's own metadata with what the schema asks for; the graph's own value wins where it may."""
    settings = graph.metadata.get("settings", {})
    pruning = {key: settings[key] for key in ("node_threshold", "edge_threshold") if settings.get(key) is not None}
    versions = graph.metadata.get("versions", {})
    generator = {
        "name": "circuits",
        "version": str(versions.get("circuits", "")),
        "url": "https://pypi.org/project/attention-circuits/",
    }
    ours: dict[str, Any] = {
        "info": {"generator": generator},
        "generation_settings": {key: value for key, value in settings.items() if key not in pruning},
        "pruning_settings": pruning,
        "feature_details": {},
    }
    if "node_threshold" in pruning:
        ours["node_threshold"] = pruning["node_threshold"]
    required = {
        "slug": slug(graph),
        "scan": model_name(graph),
        "prompt": graph.prompt,
        "prompt_tokens": graph.tokens,
        "schema_version": 1,
    }
    return {**ours, **graph.metadata, **required}


def _nodes(graph: Graph, names: list[str]) -> Iterable[dict[str, Any]]:
    columns = {NODE_KEYS.get(name, name): plain(values) for name, values in graph.nodes.columns().items()}
    logits = np.flatnonzero(graph.nodes.kind == "logit")
    top = int(logits[np.argmax(graph.nodes.target_weight[logits])]) if len(logits) else -1
    traced = tracing_results(graph)
    for index, name in enumerate(names):
        node = {key: values[index] for key, values in columns.items()}
        drawn = _for_viewers(node, name, is_top=index == top)
        if index in traced:
            drawn["qk_tracing_results"] = traced[index]
        yield {"node_id": name, **node, **drawn}


def _for_viewers(node: dict[str, Any], name: str, *, is_top: bool) -> dict[str, Any]:
    """What a viewer asks for beside our own columns."""
    kind, layer, feature = node["kind"], node["model_layer"], node["feature_index"]
    site, _, rest = name.partition("_")
    if kind in FEATURE_KINDS:
        drawn, viewer_id = cantor_pairing(layer, feature), f"{site}_{feature}-0"
    elif kind in ERROR_KINDS:
        drawn, viewer_id = None, f"{site}_error-{node['ctx_idx']}"
    else:
        drawn, viewer_id = feature, f"{'L' if kind == 'logit' else 'E'}_{rest.replace('_', '-')}"
    return {
        "feature": drawn,
        "layer": "E" if kind == "embedding" else str(layer),
        "feature_type": FEATURE_TYPES[kind],
        "jsNodeId": viewer_id,
        "clerp": _caption(node),
        "token_prob": node["probability"] or 0.0,
        "is_target_logit": is_top,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
    }


def _caption(node: dict[str, Any]) -> str:
    """The text that a viewer shows; it looks for the probability of a logit after "(p="."""
    if node["kind"] == "logit":
        label = node["label"].replace("(p=", "(p =")
        return f'Output "{label}" (p={node["probability"] or node["target_weight"]:.3f})'
    return f'Emb: "{node["label"]}"' if node["kind"] == "embedding" else str(node["label"])


def _links(graph: Graph, names: list[str]) -> Iterable[dict[str, Any]]:
    tables = {table: loadings(graph, table) for table in HEAD_TABLES}
    columns = zip(graph.edges.source.tolist(), graph.edges.target.tolist(), plain(graph.edges.weight), strict=True)
    for edge, (source, target, weight) in enumerate(columns):
        link = {"source": names[source], "target": names[target], "weight": weight}
        yield {**link, **{table: rows[edge] for table, rows in tables.items() if rows[edge]}}


def _patterns(graph: Graph) -> dict[str, list[list[float]]]:
    return {
        f"{layer}.{head}": [plain(row[: query + 1]) for query, row in enumerate(pattern.astype(np.float32))]
        for (layer, head), pattern in sorted(graph.patterns.items())
    }
