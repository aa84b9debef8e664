"""Node positions from Graphviz, for those who have it and prefer its layout."""

from __future__ import annotations

import shlex
import shutil

import numpy as np

from circuits.graph.errors import GraphError
from circuits.graph.formats.dot_file import to_pydot
from circuits.graph.formats.svg_layout import LEFT, RIGHT, Layout, node_radius
from circuits.graph.graph import Graph

_PIXELS_PER_INCH = 72.0


def graphviz_layout(graph: Graph, top: float) -> Layout:
    """Place all nodes with Graphviz's `dot`; there are no rows and columns then.

    Args:
        graph: The graph to draw.
        top: Where the picture begins, under its title.

    Raises:
        GraphError: The program `dot` is not installed, or fails.
    """
    if shutil.which("dot") is None:
        raise GraphError("Layout 'dot' needs Graphviz: the program `dot` is not on PATH. Install it or use 'columns'.")
    try:
        output = to_pydot(graph).create(format="plain", encoding="utf-8")
    except (OSError, AssertionError, UnicodeDecodeError) as error:
        raise GraphError(f"Graphviz could not place the nodes ({error}). Use layout 'columns'.") from error
    plain = output.decode("utf-8") if isinstance(output, bytes) else output
    number = {name: index for index, name in enumerate(graph.node_ids())}
    x, y, size = np.zeros(len(number)), np.zeros(len(number)), (0.0, 0.0)
    for line in plain.splitlines():
        words = shlex.split(line) if line.startswith(("graph ", "node ")) else []
        if words and words[0] == "graph":
            size = float(words[2]) * _PIXELS_PER_INCH, float(words[3]) * _PIXELS_PER_INCH
        elif words and words[1] in number:
            x[number[words[1]]] = LEFT + float(words[2]) * _PIXELS_PER_INCH
            y[number[words[1]]] = top + size[1] - float(words[3]) * _PIXELS_PER_INCH
    return Layout(
        x=x,
        y=y,
        radius=node_radius(graph),
        rows=(),
        columns=(),
        width=LEFT + size[0] + RIGHT,
        height=top + size[1] + 20.0,
        slanted=False,
        slot=20.0,
    )
