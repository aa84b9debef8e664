"""The folder of saved graphs: one `graph.json` each, under a name of small letters, digits and hyphens.

A name is all that a request can say about a file. It is matched whole before it meets the folder's path, and a file
that is a link is not touched, so nothing outside the folder is read or written.
"""

import json
import os
import re
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from circuits.errors import CircuitsError
from circuits.graph import Graph
from circuits.graph.formats import json_file
from circuits.graph.formats.whole_file import read_whole, write_whole

NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,78}[a-z0-9])?")


class Missing(CircuitsError):
    """There is no graph of this name."""


@dataclass(frozen=True)
class Entry:
    """What the list says about a graph."""

    name: str
    prompt: str
    saved: float
    nodes: int
    edges: int
    target: str
    changes: tuple[dict[str, Any], ...]
    of: str

    def as_json(self) -> dict[str, Any]:
        return {**self.__dict__, "changes": list(self.changes)}


class Shelf:
    """The graphs in a folder, which is made if it is not there.

    Raises
    ------
    CircuitsError
        The folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CircuitsError(f"{folder}: the folder for graphs cannot be made ({error.strerror})") from error
        self._known: dict[str, tuple[tuple[int, int], Entry | None]] = {}
        self._lock = threading.RLock()

    def names(self) -> list[str]:
        """All names, the newest first."""
        found = []
        for item in os.scandir(self.folder):
            name = item.name.removesuffix(".json")
            if name != item.name and NAME.fullmatch(name) and item.is_file(follow_symlinks=False):
                found.append((item.stat(follow_symlinks=False).st_mtime_ns, name))
        return [name for _, name in sorted(found, reverse=True)]

    def entries(self) -> list[Entry]:
        """What is known about each graph, the newest first; files that are no graphs are left out."""
        with self._lock:
            names = self.names()
            found = [entry for name in names if (entry := self._entry(name)) is not None]
            self._known = {name: known for name, known in self._known.items() if name in names}
        return found

    def open(self, name: str) -> Graph:
        """A graph.

        Raises
        ------
        Missing, GraphError
            There is none of this name, or the file is damaged.
        """
        return json_file.read(self.path(name))

    def text(self, name: str) -> bytes:
        """The file itself."""
        return read_whole(self.path(name))

    def keep(self, graph: Graph, wish: str) -> str:
        """Save a graph under a name like the one that is wished for; returns its name."""
        with self._lock:
            name = self._free(wish)
            slugged = replace(graph, metadata={**graph.metadata, "slug": name})
            write_whole(self.folder / f"{name}.json", json_file.dumps(slugged).encode("ascii"))
        return name

    def annotate(self, name: str, annotations: dict[str, Any]) -> None:
        """Put what a viewer has pinned, grouped and named into the file, and leave all else as it is."""
        with self._lock:
            graph = self.open(name)
            kept = replace(graph, metadata={**graph.metadata, "qParams": annotations})
            write_whole(self.path(name), json_file.dumps(kept).encode("ascii"))

    def rename(self, name: str, wish: str) -> str:
        """Give a graph another name; returns the one that it has now."""
        with self._lock:
            path = self.path(name)
            if named(wish) == name:
                return name
            new = self._free(wish)
            graph = self.open(name)
            kept = replace(graph, metadata={**graph.metadata, "slug": new})
            write_whole(self.folder / f"{new}.json", json_file.dumps(kept).encode("ascii"))
            path.unlink()
        return new

    def delete(self, name: str) -> None:
        with self._lock:
            self.path(name).unlink()

    def path(self, name: str) -> Path:
        """Where a graph is.

        Raises
        ------
        Missing
            The name is none, or there is no file of it here.
        """
        path = self.folder / f"{name}.json"
        if NAME.fullmatch(name) is None or path.is_symlink() or not path.is_file():
            raise Missing(f"there is no graph named {name[:80]!r}")
        return path

    def _free(self, wish: str) -> str:
        base, number = named(wish), 2
        name = base
        while os.path.lexists(self.folder / f"{name}.json"):
            name, number = f"{base[:72].rstrip('-')}-{number}", number + 1
        return name

    def _entry(self, name: str) -> Entry | None:
        """Read once as long as the file does not change; None for a file that is no graph."""
        try:
            stat = (self.folder / f"{name}.json").stat()
            key = stat.st_mtime_ns, stat.st_size
            if name not in self._known or self._known[name][0] != key:
                self._known[name] = key, _about(name, json.loads(self.text(name)), stat.st_mtime)
        except (OSError, ValueError, AttributeError, TypeError, KeyError):
            return None
        return self._known[name][1]


def named(wish: str) -> str:
    """Any text as a name: its letters and digits in small letters, joined by hyphens."""
    words = re.sub(r"[^a-z0-9]+", "-", wish.lower())[:64].strip("-")
    return words or f"graph-{time.strftime('%Y%m%d-%H%M%S')}"


def _about(name: str, content: dict[str, Any], saved: float) -> Entry:
    own, metadata = content.get("graph") or {}, content["metadata"]
    prompt = own.get("prompt") or metadata.get("prompt") or ""
    outputs = [node for node in content["nodes"] if node.get("feature_type") == "logit"]
    likely = sorted(outputs, key=lambda node: -(node.get("probability") or node.get("token_prob") or 0.0))
    best: dict[str, Any] = likely[0] if likely else {}
    made = metadata.get("intervention") or {}
    return Entry(
        name, str(prompt), saved, len(content["nodes"]), len(content["links"]), str(best.get("label") or ""),
        tuple(metadata.get("changes") or ()), str(made.get("of") or ""),
    )  # fmt: skip
