"""Text for files that people look at: names, slugs and tokens that may hold any character."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from circuits.graph.graph import Graph
from circuits.graph.tables import head_name

_VISIBLE = {0x09: "⇥", 0x0A: "⏎", 0x0D: "␍", 0x7F: "␡"}


def visible(text: str) -> str:
    r"""The text with everything that XML forbids or a line cannot show made visible.

    Line breaks become "⏎", tabs "⇥", other control characters their control pictures, and what is no character at
    all the replacement character.

    Example:
        >>> visible("a\\nb\\x00")
        'a⏎b␀'
    """
    return "".join(_visible(letter) for letter in text)


def _visible(letter: str) -> str:
    code = ord(letter)
    if code in _VISIBLE:
        return _VISIBLE[code]
    if code < 0x20:
        return chr(0x2400 + code)
    if 0x80 <= code <= 0x9F or 0xD800 <= code <= 0xDFFF or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069:
        return "\ufffd"
    return "\ufffd" if code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF else letter


def slug(graph: Graph) -> str:
    """A name for the graph that is safe in file names and addresses.

    `metadata["slug"]` if there is one, else the first words of the prompt in lower case, with hyphens.
    """
    given = graph.metadata.get("slug")
    text = given if isinstance(given, str) and given else graph.prompt
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii").lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:60].rstrip("-") or "graph"


def model_name(graph: Graph) -> str:
    """The name of the model that was traced, "unknown" if the metadata does not say."""
    model: Any = graph.metadata.get("scan", graph.metadata.get("model"))
    if isinstance(model, dict):
        model = next((model[key] for key in ("name", "id", "path") if model.get(key)), None)
    return str(model) if model else "unknown"


def heads_text(rows: list[list[Any]], limit: int | None = None) -> str:
    """Head loadings in words, strongest first.

    Example:
        >>> heads_text([[2, 5, 1, 7, 0.25], [2, 0, 1, 7, -0.5], [2, -1, 7, 7, 0.1]])
        'L2H0 1→7 -0.5, L2H5 1→7 +0.25, L2 id 7→7 +0.1'

    Args:
        rows: Rows of [layer, head, key position, query position, weight].
        limit: Give at most so many, then how many more there are.
    """
    strongest = sorted(rows, key=lambda row: -abs(row[4]))
    shown = strongest[:limit]
    words = [f"{head_name(head, layer=layer)} {key}→{query} {weight:+.3g}" for layer, head, key, query, weight in shown]
    return ", ".join(words) + (f", and {len(rows) - len(shown)} more" if len(shown) < len(rows) else "")


def hops_text(first: list[list[Any]], last: list[list[Any]], limit: int | None = None) -> str:
    """The hops of an edge through frozen attention in words, "" without any; see `heads_text`."""
    parts = [f"{name} {heads_text(rows, limit)}" for name, rows in (("first hops", first), ("last hops", last)) if rows]
    return " · ".join(parts)


def strongest_head(rows: list[list[Any]]) -> str:
    """The name of the head with the largest loading on an edge, summed over key and query positions."""
    sums: dict[tuple[int, int], float] = {}
    for layer, head, _, _, weight in rows:
        sums[layer, head] = sums.get((layer, head), 0.0) + weight
    layer, head = max(sums, key=lambda name: (abs(sums[name]), -name[0], -name[1]))
    return head_name(head, layer=layer)
