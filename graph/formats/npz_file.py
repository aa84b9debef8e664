"""`graph.npz`: the columns as arrays, for numbers.

One array a node column under its own name, the edges as `source`, `target`, `weight`, the loadings as `head_edge`,
`head_layer`, `head` (-1 the identity, -2 a feature's own pattern), `head_key`, `head_query`, `head_weight`, the hops
alike as `first_hop_edge`, `first_hop` (also -3 what stays, -4 the rest) and so on, explained scores as `score_layer`
and so on, their pairs as `pair_score` and so on, a pattern as `pattern_{layer}_{head}`, and the rest as JSON in the
one string of `graph`. No pickles, so reading a file runs nothing; no timestamps, so the same graph gives the same
bytes.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from circuits.graph.errors import GraphError
from circuits.graph.explained import PAIR_COLUMNS, SCORE_COLUMNS, Pairs, Scores
from circuits.graph.formats.rows import LATER_COLUMNS
from circuits.graph.formats.whole_file import read_whole, write_whole
from circuits.graph.graph import Graph
from circuits.graph.tables import EDGE_COLUMNS, HEAD_COLUMNS, NODE_COLUMNS, Edges, Heads, Nodes

_EPOCH = (1980, 1, 1, 0, 0, 0)


def write(graph: Graph, path: Path) -> None:
    """Write the graph as a compressed npz archive.

    Raises:
        GraphError: The metadata cannot be JSON, or the file cannot be written.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, values in _arrays(graph).items():
            member = zipfile.ZipInfo(f"{name}.npy", date_time=_EPOCH)
            member.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(member, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, values, version=(1, 0), allow_pickle=False)
    write_whole(path, buffer.getvalue())


def read(path: Path) -> Graph:
    """Read a graph that `write` has written.

    Raises:
        GraphError: The file is missing, truncated, no npz archive, or no graph of ours.
    """
    content = read_whole(path)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise GraphError(f"{path}: is no complete npz file ({error}). Trace the prompt again.") from error
    try:
        return _graph(arrays)
    except GraphError as error:
        raise GraphError(f"{path}: {error}") from error
    except KeyError as error:
        raise GraphError(f"{path}: has no array {error}; expected a graph.npz that `circuits` has written.") from error
    except (TypeError, ValueError, IndexError) as error:
        raise GraphError(f"{path}: array 'graph' is not what it should be ({error}). Trace again.") from error


_HEAD_ARRAYS = {"heads": "head", "first_hops": "first_hop", "last_hops": "last_hop"}


def _head_array(column: str, table: str) -> str:
    """The name in the archive of a column of the loadings or of the hops."""
    name = _HEAD_ARRAYS[table]
    return name if column == "head" else f"{name}_{column}"


def _arrays(graph: Graph) -> dict[str, npt.NDArray[Any]]:
    head = {
        "prompt": graph.prompt,
        "tokens": graph.tokens,
        "token_ids": graph.token_ids,
        "n_layers": graph.n_layers,
        "metadata": graph.metadata,
    }
    try:
        text = json.dumps(head, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise GraphError(
            f"metadata cannot be written as JSON ({error}). Keep only text, finite numbers, lists and dictionaries."
        ) from error
    arrays = {"graph": np.array(text)}
    arrays |= {name: _narrow(values) for name, values in graph.nodes.columns().items()}
    arrays |= graph.edges.columns()
    for table in _HEAD_ARRAYS:
        rows: Heads = getattr(graph, table)
        arrays |= {_head_array(name, table): values for name, values in rows.columns().items()}
    arrays |= {f"score_{name}": _narrow(values) for name, values in graph.scores.columns().items()}
    arrays |= {f"pair_{name}": _narrow(values) for name, values in graph.pairs.columns().items()}
    for (layer, head_index), pattern in sorted(graph.patterns.items()):
        arrays[f"pattern_{layer}_{head_index}"] = pattern.astype(np.float32)
    return arrays


def _narrow(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Text in the narrowest type that holds it, so that equal columns have equal bytes."""
    return np.array(values.tolist(), dtype=np.str_) if values.dtype.kind == "U" else values


def _graph(arrays: dict[str, npt.NDArray[Any]]) -> Graph:
    head = json.loads(str(arrays["graph"]))
    patterns = {}
    for name in sorted(arrays):
        if name.startswith("pattern_"):
            layer, head_index = name.removeprefix("pattern_").split("_")
            patterns[int(layer), int(head_index)] = arrays[name]
    nothing = np.full(len(arrays["kind"]), np.nan, np.float32)
    explained = "score_layer" in arrays
    later = {name: arrays.get(name, nothing) for name in LATER_COLUMNS}
    return Graph(
        prompt=head["prompt"],
        tokens=tuple(head["tokens"]),
        token_ids=tuple(head["token_ids"]),
        n_layers=head["n_layers"],
        nodes=Nodes(**{name: arrays[name] for name in NODE_COLUMNS if name not in later}, **later),
        edges=Edges(**{name: arrays[name] for name in EDGE_COLUMNS}),
        patterns=patterns,
        metadata=head["metadata"],
        **{table: _heads(arrays, table) for table in _HEAD_ARRAYS},
        scores=Scores(**{name: arrays[f"score_{name}"] for name in SCORE_COLUMNS}) if explained else Scores.empty(),
        pairs=Pairs(**{name: arrays[f"pair_{name}"] for name in PAIR_COLUMNS}) if explained else Pairs.empty(),
    )


def _heads(arrays: dict[str, npt.NDArray[Any]], table: str) -> Heads:
    """The loadings or the hops; files of earlier versions have no hops."""
    if table != "heads" and _head_array("head", table) not in arrays:
        return Heads.empty()
    return Heads(**{name: arrays[_head_array(name, table)] for name in HEAD_COLUMNS})
