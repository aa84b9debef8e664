"""Writing graphs: a page to read in a browser gets the pages of its features."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from circuits.feature_store import FeatureStore
    from circuits.graph import Graph


def save(graph: "Graph", path: Path, store: "FeatureStore | None") -> None:
    """Write a graph in the format of the path's suffix; HTML with the pages that the store has of its features."""
    if store is None or path.suffix.lower() != ".html":
        graph.save(path)
        return
    from circuits.graph.formats import html_file

    html_file.write(graph, path, store.pages(graph))
