"""`graph.svg`: a picture of the graph, drawn here without Graphviz.

A column for each token, up to three rows for each layer: key sides, attention, MLP. Each kind of node has its shape.
Every node and edge tells its numbers as a tooltip. The picture follows the reader's light or dark scheme.
"""

from __future__ import annotations

from pathlib import Path

from circuits.graph.errors import GraphError
from circuits.graph.formats import svg_parts
from circuits.graph.formats.svg_edges import around_nodes, curves
from circuits.graph.formats.svg_layout import Layout, columns_layout
from circuits.graph.formats.svg_legend import legend, title, title_height
from circuits.graph.formats.svg_style import escaped, style_sheet, text_width
from circuits.graph.formats.whole_file import write_whole
from circuits.graph.graph import Graph

MAX_EDGES = 600
_LEAST_WIDTH = 560.0


def write(graph: Graph, path: Path) -> None:
    """Draw the graph with columns and write it as SVG.

    Raises:
        GraphError: The file cannot be written.
    """
    write_whole(path, to_svg(graph).encode("utf-8"))


def to_svg(graph: Graph, layout: str = "columns", max_edges: int = MAX_EDGES) -> str:
    """Draw the graph.

    Args:
        graph: The graph, best pruned.
        layout: "columns" for a column a token and a row a layer; "dot" to let Graphviz place the nodes.
        max_edges: Draw at most so many edges, the strongest; the legend says so when there are more.

    Returns:
        The SVG document, the same for the same graph.

    Raises:
        GraphError: The layout is unknown, the graph has no tokens, or Graphviz is wanted and not there.
    """
    if not graph.tokens:
        raise GraphError("The graph has no tokens, so there is nothing to draw.")
    placed = _placed(graph, layout)
    drawn = curves(graph, placed, max_edges)
    taken = around_nodes(placed)
    width = _width(graph, placed)
    parts = [
        *svg_parts.frame(placed, width),
        *svg_parts.edges(graph, drawn),
        *svg_parts.nodes(graph, placed),
        *svg_parts.token_labels(graph, placed),
        *svg_parts.logit_labels(graph, placed),
        *svg_parts.head_names(drawn, taken),
        *svg_parts.feature_names(graph, placed, taken),
        *title(graph, width),
    ]
    legend_parts, height = legend(graph, drawn, placed.height + 6.0, width)
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    head = [
        '<?xml version="1.0" encoding="utf-8"?>',
        f'<svg xmlns="http://www.w3.org/2000/svg" class="circuits" {size} role="img">',
        f"<title>{escaped(f'Attribution graph of “{graph.prompt}”')}</title>",
        f"<style>\n{style_sheet()}\n</style>",
        f'<rect class="paper" width="{width:.0f}" height="{height:.0f}"/>',
    ]
    return "\n".join([*head, *parts, *legend_parts, "</svg>"]) + "\n"


def _placed(graph: Graph, layout: str) -> Layout:
    """Where the nodes stand, below the title and the slanted names of the logits."""
    captions = [text_width(caption) for _, caption in svg_parts.logit_captions(graph)]
    if layout not in ("columns", "dot"):
        raise GraphError(f"Layout is {layout!r}; expected 'columns' or 'dot'.")
    top = title_height(graph, _LEAST_WIDTH) + 0.71 * max(captions, default=0.0) + 4.0
    if layout == "columns":
        return columns_layout(graph, top)
    from circuits.graph.formats.svg_graphviz import graphviz_layout

    return graphviz_layout(graph, top)


def _width(graph: Graph, layout: Layout) -> float:
    """The picture's width: at least that of the nodes, of the logits' names, and of a readable legend."""
    reach = [
        float(layout.x[index]) + 0.75 * text_width(caption) + 18.0 for index, caption in svg_parts.logit_captions(graph)
    ]
    return max([_LEAST_WIDTH, layout.width, *reach])
