"""Reads the graphs of other tools in Neuronpedia's schema: `metadata`, `qParams`, `nodes`, `links`.

The layout is that of circuit-tracer 0.5.0 (circuit_tracer/frontend/graph_models.py, utils/create_graph_files.py) and of
Neuronpedia's schema (apps/webapp/app/api/graph/graph-schema.json). What such a file does not have is nan or empty here:
pre-activations, biases, head loadings, patterns. What is read, and how:

- Links of weight zero are no edges; circuit-tracer writes them at an edge threshold of 1.
- `influence` is the share of the full graph's summed influence that a node and all stronger ones hold. Differences of
  it along the kept nodes are their own shares: `Nodes.influence`, with 1 as the sum. Where nodes in between were cut,
  the difference is too large; no node is then given more than the next stronger one. Logits have none. Without
  `influence`, both are computed from the links.
- circuit-tracer gives the error of layer L the id `0_L_position`, which is also that of feature L of layer 0. Links of
  one target are written in the order of their sources, which mostly tells the two apart; a link that may still be
  either is read as the error's, as Neuronpedia's viewer does, and listed in `metadata["ambiguous_links"]`.
- The logits' layer is the model's number of layers plus 1 in circuit-tracer; a layer that has no node but logits above
  it and is not told by that is not known to be there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from typing import Any

import numpy as np

from circuits.graph.errors import GraphError
from circuits.graph.graph import Graph
from circuits.graph.influence import depth, with_influence
from circuits.graph.tables import Edges, Float64, Heads, Nodes

KINDS = {
    "embedding": "embedding",
    "cross layer transcoder": "mlp_feature",
    "unexplored node": "mlp_feature",
    "mlp reconstruction error": "mlp_error",
    "lorsa": "attention_feature",
    "lorsa error": "attention_error",
    "logit": "logit",
}
_ID = re.compile(r"(\w+)_(\d+)_(\d+)")
_OUTPUT = re.compile(r'Output "(.*)" \(p ?=', re.DOTALL)


def is_neuronpedia(content: Any) -> bool:
    """Whether the content of a JSON file is a graph in Neuronpedia's schema that is not ours."""
    return (
        isinstance(content, dict)
        and not {"graph", "patterns"} & content.keys()
        and isinstance(content.get("metadata"), dict)
        and isinstance(content["metadata"].get("prompt_tokens"), list)
        and isinstance(content.get("nodes"), list)
        and isinstance(content.get("links"), list)
    )


def from_neuronpedia(content: dict[str, Any]) -> Graph:
    """The graph of a file's content.

    Raises:
        GraphError: A type of node is unknown, a link names no node, or a value is missing or of the wrong type.
    """
    metadata = dict(content["metadata"])
    tokens = tuple(str(token) for token in metadata["prompt_tokens"])
    rows, n_layers = content["nodes"], _n_layers(content["nodes"])
    nodes, known = _nodes(rows, tokens, n_layers)
    edges, ambiguous = _edges(rows, content["links"], nodes)
    metadata["settings"] = _settings(metadata)
    if content.get("qParams"):
        metadata["qParams"] = content["qParams"]
    if ambiguous:
        metadata["ambiguous_links"] = ambiguous
    graph = Graph(
        prompt=str(metadata.get("prompt", "".join(tokens))),
        tokens=tokens,
        token_ids=_token_ids(rows, len(tokens)),
        n_layers=n_layers,
        nodes=nodes,
        edges=edges,
        heads=Heads.empty(),
        metadata=metadata,
    )
    if not known:
        return with_influence(graph)
    return replace(graph, metadata={**metadata, "influence_total": 1.0})


def _kind(row: Mapping[str, Any]) -> str:
    found = KINDS.get(row["feature_type"])
    if found is None:
        raise GraphError(
            f"node {row['node_id']!r} is of type {row['feature_type']!r}; known are {', '.join(KINDS)}. Such a node "
            "has no place in a graph of circuits."
        )
    return found


def _n_layers(rows: Sequence[Mapping[str, Any]]) -> int:
    inside = [int(row["layer"]) for row in rows if _kind(row) not in ("embedding", "logit")]
    above = [int(row["layer"]) for row in rows if _kind(row) == "logit"]
    return max(1, *(layer + 1 for layer in inside), *(layer - 1 for layer in above))


def _nodes(rows: Sequence[Mapping[str, Any]], tokens: tuple[str, ...], n_layers: int) -> tuple[Nodes, bool]:
    """The nodes in the order of the file, and whether the file gives their influence."""
    kinds = [_kind(row) for row in rows]
    places = {"embedding": -1, "logit": n_layers}
    probability = [_number(row.get("token_prob")) if kind == "logit" else math.nan for row, kind in zip(rows, kinds)]
    cumulative = np.array([_number(row.get("influence")) for row in rows])
    inner = np.array([kind != "logit" for kind in kinds])
    cumulative[~inner], influence = 1.0, np.zeros(len(rows))
    known = bool(np.isfinite(cumulative).all())
    if known:
        influence[inner] = _own_shares(cumulative[inner])
    missing = np.full(len(rows), np.nan)
    nodes = Nodes(
        kind=np.array(kinds, dtype=np.str_),
        dictionary=np.full(len(rows), "", dtype=np.str_),
        layer=np.array([places.get(kind, row["layer"]) for row, kind in zip(rows, kinds)], dtype=np.int32),
        position=np.array([row["ctx_idx"] for row in rows], dtype=np.int32),
        feature=np.array([_feature(row, kind) for row, kind in zip(rows, kinds)], dtype=np.int64),
        activation=np.array([_number(row.get("activation")) for row in rows], dtype=np.float32),
        pre_activation=missing.astype(np.float32),
        bias=missing.astype(np.float32),
        influence=influence,
        cumulative_influence=cumulative if known else np.ones(len(rows)),
        target_weight=np.nan_to_num(np.array(probability, dtype=np.float64)),
        probability=np.array(probability, dtype=np.float32),
        predicted=missing.astype(np.float32),
        measured=missing.astype(np.float32),
        label=np.array([_label(row, kind, tokens) for row, kind in zip(rows, kinds)], dtype=np.str_),
    )
    return nodes, known


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _feature(row: Mapping[str, Any], kind: str) -> int:
    """Token id, or the feature's index in its layer: in the id, else as Cantor's pairing of layer and index."""
    if kind.endswith("_error"):
        return -1
    named = _ID.fullmatch(str(row["node_id"]))
    if named:
        return int(named[2])
    if kind in ("embedding", "logit"):
        return -1 if kind == "embedding" else int(row["feature"])
    paired = int(row["feature"])
    diagonal = (math.isqrt(8 * paired + 1) - 1) // 2
    index = paired - diagonal * (diagonal + 1) // 2
    return index if diagonal - index == int(row["layer"]) else paired


def _label(row: Mapping[str, Any], kind: str, tokens: tuple[str, ...]) -> str:
    text = str(row.get("clerp") or "")
    if kind == "embedding":
        return tokens[row["ctx_idx"]] if 0 <= row["ctx_idx"] < len(tokens) else ""
    if kind == "logit":
        found = _OUTPUT.match(text)
        return found[1] if found else text
    return "" if kind.endswith("_error") else text


def _token_ids(rows: Sequence[Mapping[str, Any]], n_tokens: int) -> tuple[int, ...]:
    """Ids of the prompt's tokens; -1 where no embedding node tells."""
    ids = [-1] * n_tokens
    for row in rows:
        if _kind(row) == "embedding" and 0 <= row["ctx_idx"] < n_tokens:
            ids[row["ctx_idx"]] = _feature(row, "embedding")
    return tuple(ids)


def _own_shares(cumulative: Float64) -> Float64:
    """(n,) each node's own share of the influence, from the shares up to and with it."""
    order = np.argsort(cumulative, kind="stable")
    ascending = cumulative[order]
    own = np.zeros_like(cumulative)
    own[order] = np.maximum(np.minimum.accumulate(np.diff(ascending, prepend=0.0)), 0.0)
    return own


def _settings(metadata: Mapping[str, Any]) -> dict[str, float]:
    """The thresholds that the graph was pruned with, where it was."""
    given = {"node_threshold": metadata.get("node_threshold"), **(metadata.get("pruning_settings") or {})}
    wanted = {name: given.get(name) for name in ("node_threshold", "edge_threshold")}
    return {name: float(value) for name, value in wanted.items() if value is not None and value < 1.0}


def _edges(
    rows: Sequence[Mapping[str, Any]], links: Sequence[Mapping[str, Any]], nodes: Nodes
) -> tuple[Edges, list[list[Any]]]:
    """The links of nonzero weight, and those whose source may be either of two nodes."""
    places: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        places.setdefault(str(row["node_id"]), []).append(index)
    heights, ambiguous, found = depth(nodes), [], []
    for name, run in groupby(links, key=lambda link: str(link["target"])):
        together = [link for link in run if link["weight"] != 0]
        target = _target(places, name, nodes)
        below = [[one for one in _of(places, link) if heights[one] < heights[target]] for link in together]
        sources, unsure = _in_order(below)
        for link, among, source, doubtful in zip(together, below, sources, unsure, strict=True):
            if not among:
                raise GraphError(f"link {link['source']!r} to {name!r} does not lead upwards through the layers.")
            found.append((source, target, float(link["weight"])))
            if doubtful:
                ambiguous.append([str(link["source"]), name, float(link["weight"])])
    columns = list(zip(*found, strict=True)) if found else [(), (), ()]
    source_, target_, weight = (np.array(column) for column in columns)
    return Edges(source_.astype(np.int32), target_.astype(np.int32), weight.astype(np.float32)), ambiguous


def _of(places: Mapping[str, list[int]], link: Mapping[str, Any]) -> list[int]:
    if str(link["source"]) not in places:
        raise GraphError(f"a link names {link['source']!r}, which is no node of the file.")
    return places[str(link["source"])]


def _target(places: Mapping[str, list[int]], name: str, nodes: Nodes) -> int:
    """The node of that name that reads: no error and no embedding does."""
    if name not in places:
        raise GraphError(f"a link names {name!r}, which is no node of the file.")
    reading = [one for one in places[name] if not nodes.is_error[one] and nodes.kind[one] != "embedding"]
    if len(reading) != 1:
        raise GraphError(f"a link leads to {name!r}, which stands for {len(reading)} nodes that can read.")
    return reading[0]


def _in_order(candidates: list[list[int]]) -> tuple[list[int], list[bool]]:
    """One of the candidates for each link of one target, so that sources ascend; and where that leaves a choice."""
    single = [among[0] for among in candidates if len(among) == 1]
    ascending = all(one < other for one, other in pairwise(single))
    latest, after = [], math.inf
    for among in reversed(candidates):  # the last place that each may have
        after = max((one for one in among if one < after), default=-1)
        latest.append(after)
    chosen, unsure, used, before = [], [], set[int](), -1
    for among, last in zip(candidates, reversed(latest), strict=True):
        fitting = [one for one in among if before < one <= last] if ascending else among
        before = ([one for one in fitting or among if one not in used] or among or [-1])[-1]
        used.add(before)
        chosen.append(before)
        unsure.append(len(among) > 1 and len(fitting) != 1)
    return chosen, unsure
