"""`graph.html`: the graph as one page to read in a browser, from disk, without a network or a server.

The page is `graph.json` (see `circuits.graph.formats.json_file`) with the viewer around it: the files of `viewer/`,
which are plain HTML, CSS and ES modules, inlined. Nothing in it is fetched and nothing of the graph is executed: data
stand in script elements that hold JSON, and the page's own policy (Content-Security-Policy) allows one script and one
style sheet, by their hashes, and no request.

Feature pages are embedded where they are given. A page is one JSON object: `dictionary`, `feature`, `kind`, `label`,
`label_by`, `tokens_seen`, `density`, `largest`, `histogram`, `examples`, `top_outputs`, `bottom_outputs`,
`head_loading`, `near_by_decoder`, `near_by_coactivation`; the viewer shows those that are there.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from circuits.graph.errors import GraphError
from circuits.graph.formats.json_file import dumps
from circuits.graph.formats.svg_style import DARK, LIGHT
from circuits.graph.formats.text import visible
from circuits.graph.formats.whole_file import write_whole
from circuits.graph.graph import Graph

# Pages of features by dictionary and feature.
Pages = Mapping[tuple[str, int], Mapping[str, Any]]
# Each module stands below those that it imports.
MODULES = (
    "dom.js",
    "graph_data.js",
    "pruning.js",
    "flow.js",
    "state.js",
    "model.js",
    "layout.js",
    "curves.js",
    "edge_canvas.js",
    "names.js",
    "node_layer.js",
    "axes.js",
    "viewport.js",
    "keyboard.js",
    "heat_map.js",
    "parts.js",
    "qk_panel.js",
    "edge_panel.js",
    "mtc_panel.js",
    "page_panel.js",
    "node_panel.js",
    "overview_panel.js",
    "group_panel.js",
    "subgraph_picture.js",
    "subgraph.js",
    "export.js",
    "search.js",
    "table.js",
    "legend.js",
    "toolbar.js",
    "outside.js",
    "main.js",
)
STYLES = ("base.css", "picture.css", "panels.css")
_IMPORT = re.compile(r"^import (\{[^}]*\}) from \"\./([a-z_]+)\.js\";$", re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:function|class|const) (\w+))", re.MULTILINE)
_PLACE = re.compile(r"\{\{([a-z]+)\}\}")


def write(graph: Graph, path: Path, pages: Pages | None = None) -> None:
    """Write the graph as one HTML file.

    Args:
        graph: The graph.
        path: The file to write.
        pages: Pages of features; those of the graph's own features are embedded.

    Raises:
        GraphError: The graph has no tokens, metadata or a page cannot be JSON, or the file cannot be written.
    """
    write_whole(path, to_html(graph, pages).encode("utf-8"))


def to_html(graph: Graph, pages: Pages | None = None) -> str:
    """The text of the file, the same for the same graph.

    Raises:
        GraphError: The graph has no tokens, or metadata or a page cannot be JSON.
    """
    if not graph.tokens:
        raise GraphError("The graph has no tokens, so there is nothing to show.")
    script, style = _script(), style_sheet()
    parts = {
        "policy": _policy(script, style),
        "title": html.escape(f"{visible(graph.prompt)[:80]} · circuits"),
        "style": style,
        "script": script,
        "graph": _inlined(dumps(graph)),
        "pages": _inlined(_pages(graph, pages or {})),
    }
    return _PLACE.sub(lambda place: parts[place[1]], _asset("page.html"))


def in_frame(graph: Graph, pages: Pages | None = None, height: int = 720) -> str:
    """The page inside another one, as an element that needs nothing beside it: what a notebook shows.

    It has an origin of its own, so nothing in it reaches the page around it.

    Args:
        graph: The graph.
        pages: Pages of features, as for `write`.
        height: Height of the frame in pixels.

    Raises:
        GraphError: As for `to_html`.
    """
    texts = to_html(graph, pages), f"Attribution graph of {visible(graph.prompt)[:80]}"
    # In ASCII, so that the script keeps its hash whatever encoding the page around it is read in.
    inside, title = (html.escape(text).encode("ascii", "xmlcharrefreplace").decode("ascii") for text in texts)
    style = f"width:100%;height:{height}px;border:0;border-radius:6px"
    return (
        f'<iframe title="{title}" sandbox="allow-scripts allow-downloads" style="{style}" srcdoc="{inside}"></iframe>'
    )


def _asset(name: str) -> str:
    return files("circuits.graph.formats").joinpath("viewer", name).read_text(encoding="utf-8")


def _script() -> str:
    """All modules as one script: each a function's scope that gives what it exports to those below it."""
    return "\n".join(_module(name.removesuffix(".js"), _asset(name)) for name in MODULES)


def _module(name: str, text: str) -> str:
    exported = ", ".join(found[1] for found in _EXPORT.finditer(text))
    body = _EXPORT.sub("", _IMPORT.sub(r"const \1 = module_\2;", text))
    return f"const module_{name} = (() => {{\n{body}\nreturn {{ {exported} }};\n}})();"


def style_sheet() -> str:
    """The style sheets, with the colours of the SVG as variables of the light and of the dark scheme."""
    light, dark = (
        "".join(f"--{name}:{colour};" for name, colour in scheme.items()) for scheme in (LIGHT, DARK)
    )
    schemes = (
        f":root{{color-scheme:light;{light}}}\n"
        f"@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{color-scheme:dark;{dark}}}}}\n"
        f":root[data-theme=dark]{{color-scheme:dark;{dark}}}\n"
    )
    return schemes + "\n".join(_asset(name) for name in STYLES)


def _policy(script: str, style: str) -> str:
    """Nothing but this script and this style sheet; pictures that the page itself draws; no request."""
    allowed = {
        "default-src": "'none'",
        "script-src": _hashed(script),
        "style-src": _hashed(style),
        "img-src": "blob:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in allowed.items())


def _hashed(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"


def _inlined(text: str) -> str:
    """JSON that cannot end its script element; it is ASCII, so no letter breaks a line either."""
    return text.replace("<", "\\u003c")


def _pages(graph: Graph, pages: Pages) -> str:
    """The pages of the graph's own features, in the order of dictionary and feature."""
    names = zip(graph.nodes.dictionary.tolist(), graph.nodes.feature.tolist(), strict=True)
    found = [dict(pages[name]) for name in sorted(set(names)) if name in pages]
    try:
        return json.dumps(found, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise GraphError(f"A feature page cannot be written as JSON ({error}).") from error
