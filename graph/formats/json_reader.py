"""Reads `graph.json`; what stands in it is described in `circuits.graph.formats.json_file`.

A graph of another tool in Neuronpedia's schema is recognised by its content, and read by
`circuits.graph.formats.neuronpedia_reader`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from circuits.graph.errors import GraphError
from circuits.graph.formats.neuronpedia_reader import from_neuronpedia, is_neuronpedia
from circuits.graph.formats.qk import from_lists
from circuits.graph.formats.rows import HEAD_TABLES, LATER_COLUMNS
from circuits.graph.formats.whole_file import read_whole
from circuits.graph.graph import Graph
from circuits.graph.tables import NODE_COLUMNS, Edges, Float32, Heads, Nodes


def read(path: Path) -> Graph:
    """Read a graph from its JSON file, ours or one in Neuronpedia's schema.

    Raises:
        GraphError: The file is missing, truncated, no JSON, or no graph.
    """
    try:
        content = json.loads(read_whole(path))
    except (UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        raise GraphError(f"{path}: is no complete JSON file ({error}). Trace the prompt again.") from error
    if is_neuronpedia(content):
        return _foreign(path, content)
    for key, kind in (("graph", dict), ("metadata", dict), ("nodes", list), ("links", list), ("patterns", dict)):
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise GraphError(
                f"{path}: key {key!r} is missing or no {kind.__name__}; expected a graph.json that `circuits` has "
                "written, or a graph in Neuronpedia's schema with metadata.prompt_tokens, nodes and links."
            )
    try:
        return _graph(content)
    except GraphError as error:
        raise GraphError(f"{path}: {error}") from error
    except KeyError as error:
        raise GraphError(f"{path}: a graph, node, link or score lacks the key {error}. Trace again.") from error
    except (TypeError, ValueError, OverflowError, IndexError) as error:
        raise GraphError(f"{path}: has a value of the wrong type ({error}). Trace the prompt again.") from error


def _foreign(path: Path, content: dict[str, Any]) -> Graph:
    """A graph of another tool."""
    try:
        return from_neuronpedia(content)
    except GraphError as error:
        raise GraphError(f"{path}: {error}") from error
    except KeyError as error:
        raise GraphError(
            f"{path}: the metadata, a node or a link lacks the key {error} of Neuronpedia's schema."
        ) from error
    except (TypeError, ValueError, OverflowError, IndexError) as error:
        raise GraphError(f"{path}: has a value that Neuronpedia's schema does not allow ({error}).") from error


def _graph(content: dict[str, Any]) -> Graph:
    from circuits.graph.formats.json_file import FORMAT

    head, metadata = content["graph"], content["metadata"]
    if head["format"] != FORMAT:
        raise GraphError(f"is of format {head['format']}; this version reads {FORMAT}. Update circuits or trace again.")
    index = {node["node_id"]: number for number, node in enumerate(content["nodes"])}
    links = content["links"]
    for link in links:
        if (lost := next((link[end] for end in ("source", "target") if link[end] not in index), None)) is not None:
            raise GraphError(f"a link names {lost!r}, which is no node of the file. Trace the prompt again.")
    scores, pairs = from_lists(content.get("qk", []))
    kept = {**{key: metadata[key] for key in head["metadata_keys"]}, **head["metadata_replaced"]}
    return Graph(
        prompt=head["prompt"],
        tokens=tuple(head["tokens"]),
        token_ids=tuple(head["token_ids"]),
        n_layers=int(head["n_layers"]),
        nodes=_nodes(content["nodes"]),
        edges=Edges(
            source=np.array([index[link["source"]] for link in links], dtype=np.int32),
            target=np.array([index[link["target"]] for link in links], dtype=np.int32),
            weight=np.array([link["weight"] for link in links], dtype=np.float32),
        ),
        scores=scores,
        pairs=pairs,
        **{table: _heads(links, table) for table in HEAD_TABLES},
        patterns={_layer_and_head(name): _pattern(rows) for name, rows in content["patterns"].items()},
        metadata={**kept, **_annotations(content.get("qParams"), kept.get("qParams"))},
    )


def _annotations(shown: Any, known: Any) -> dict[str, Any]:
    """What a viewer has pinned, grouped and named since the graph was written: it changes `qParams` alone."""
    from circuits.graph.formats.json_file import view

    return {"qParams": shown} if isinstance(shown, dict) and shown != view(known) else {}


def _nodes(nodes: list[dict[str, Any]]) -> Nodes:
    from circuits.graph.formats.json_file import NODE_KEYS

    columns = {}
    for name, dtype in NODE_COLUMNS.items():
        key = NODE_KEYS.get(name, name)
        values = [node.get(key) if name in LATER_COLUMNS else node[key] for node in nodes]
        if issubclass(dtype, np.floating):
            values = [np.nan if value is None else value for value in values]
        if any(isinstance(value, str) != (dtype is np.str_) for value in values):
            raise GraphError(f"nodes have values of the wrong type under {name!r}; expected {dtype.__name__}.")
        columns[name] = np.array(values, dtype=dtype)
    return Nodes(**columns)


def _heads(links: list[dict[str, Any]], table: str) -> Heads:
    return Heads.from_rows([(edge, *row) for edge, link in enumerate(links) for row in link.get(table, ())])


def _layer_and_head(name: str) -> tuple[int, int]:
    layer, head = name.split(".")
    return int(layer), int(head)


def _pattern(rows: list[list[float]]) -> Float32:
    """The (T, T) pattern of rows that stop at the query's own position; what lies behind is zero."""
    pattern = np.zeros((len(rows), len(rows)), dtype=np.float32)
    for query, row in enumerate(rows):
        pattern[query, : query + 1] = row
    return pattern
