"""The file formats of a graph: one module each, looked up by the suffix of the path."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

from circuits.graph.errors import GraphError

if TYPE_CHECKING:
    from circuits.graph.graph import Graph

WRITERS = {
    ".dot": "circuits.graph.formats.dot_file",
    ".graphml": "circuits.graph.formats.graphml_file",
    ".html": "circuits.graph.formats.html_file",
    ".json": "circuits.graph.formats.json_file",
    ".npz": "circuits.graph.formats.npz_file",
    ".svg": "circuits.graph.formats.svg_file",
}
READERS = {
    ".json": "circuits.graph.formats.json_file",
    ".npz": "circuits.graph.formats.npz_file",
}

__all__ = ["READERS", "WRITERS", "reader", "writer"]


def writer(path: str | Path) -> Callable[[Graph, Path], None]:
    """The function that writes a graph to a path of this suffix.

    Raises:
        GraphError: No format has this suffix.
    """
    return cast("Callable[[Graph, Path], None]", import_module(_module(WRITERS, path, "written")).write)


def reader(path: str | Path) -> Callable[[Path], Graph]:
    """The function that reads a graph from a path of this suffix.

    Raises:
        GraphError: No format with this suffix can be read.
    """
    return cast("Callable[[Path], Graph]", import_module(_module(READERS, path, "read")).read)


def _module(table: dict[str, str], path: str | Path, done: str) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in table:
        raise GraphError(
            f"{path}: a graph cannot be {done} as {suffix or 'a file without suffix'}; use one of {', '.join(table)}."
        )
    return table[suffix]
