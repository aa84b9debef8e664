"""How the SVG looks: colours, type, and the width that a text will have.

Sign colours are blue and vermilion of the palette of Okabe and Ito, which colour-blind readers can tell apart;
attention features are its green: filled where they write, an outline on the key side. The dark scheme takes the
lighter tones of the same palette.
"""

from __future__ import annotations

import unicodedata
from xml.sax.saxutils import escape

from circuits.graph.formats.text import visible

FONT = "Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"

LIGHT = {
    "paper": "#ffffff",
    "ink": "#1f2328",
    "quiet": "#6a7179",
    "faint": "#d4d8dd",
    "band": "#f5f6f8",
    "stream": "#e6e9ed",
    "positive": "#0072b2",
    "negative": "#d55e00",
    "mlp": "#ffffff",
    "attention": "#009e73",
    "token": "#e3e6ea",
    "error": "#a4abb3",
}
DARK = {
    "paper": "#15181c",
    "ink": "#e4e7eb",
    "quiet": "#99a1aa",
    "faint": "#3a4048",
    "band": "#1b1f24",
    "stream": "#282d33",
    "positive": "#56b4e9",
    "negative": "#f0894a",
    "mlp": "#15181c",
    "attention": "#2fbf94",
    "token": "#363c44",
    "error": "#737b85",
}


def _colours(colour: dict[str, str], prefix: str) -> str:
    rules = {
        ".paper": f"fill:{colour['paper']}",
        ".band": f"fill:{colour['band']}",
        ".stream": f"stroke:{colour['stream']}",
        ".rule": f"stroke:{colour['faint']}",
        "text": f"fill:{colour['ink']}",
        ".quiet": f"fill:{colour['quiet']}",
        ".halo": f"stroke:{colour['paper']}",
        ".positive": f"stroke:{colour['positive']}",
        ".negative": f"stroke:{colour['negative']}",
        ".swatch": f"stroke:{colour['quiet']}",
        "text.positive": f"fill:{colour['positive']};stroke:{colour['paper']}",
        "text.negative": f"fill:{colour['negative']};stroke:{colour['paper']}",
        ".mlp_feature": f"fill:{colour['mlp']};stroke:{colour['ink']}",
        ".attention_feature,.circuits .mtc_query": f"fill:{colour['attention']};stroke:{colour['paper']}",
        ".mtc_key,.circuits .value_feature": f"fill:{colour['paper']};stroke:{colour['attention']}",
        ".embedding,.circuits .logit": f"fill:{colour['token']};stroke:{colour['ink']}",
        ".mlp_error,.circuits .attention_error,.circuits .block_error": (
            f"fill:{colour['paper']};stroke:{colour['error']}"
        ),
        ".value_error": f"fill:{colour['error']};stroke:{colour['error']}",
    }
    return "\n".join(f"{prefix}.circuits {selector} {{ {rule} }}" for selector, rule in rules.items())


def style_sheet() -> str:
    """The CSS of the picture: light by itself, dark where the reader prefers that."""
    shapes = f"""\
.circuits text {{ font-family: {FONT}; font-size: 10px; }}
.circuits .title {{ font-size: 13px; font-weight: 600; }}
.circuits .small {{ font-size: 8.5px; }}
.circuits .tiny {{ font-size: 7.5px; }}
.circuits .halo, .circuits text.positive, .circuits text.negative {{
  paint-order: stroke; stroke-width: 2.5px; stroke-linejoin: round; }}
.circuits text.positive, .circuits text.negative {{ stroke-width: 3.5px; }}
.circuits .end {{ text-anchor: end; }}
.circuits .middle {{ text-anchor: middle; }}
.circuits .stream, .circuits .rule {{ stroke-width: 0.75; fill: none; }}
.circuits .edge {{ fill: none; stroke-linecap: round; }}
.circuits .frozen {{ stroke-dasharray: 3 2.5; stroke-linecap: butt; }}
.circuits .node {{ stroke-width: 0.9; }}
.circuits .mtc_key, .circuits .value_feature {{ stroke-width: 1.4; stroke-linejoin: round; }}
.circuits .edge:hover {{ stroke-opacity: 1; stroke-width: 4; }}
.circuits .node:hover {{ stroke-width: 2.5; }}"""
    dark = _colours(DARK, "  ")
    return f"{shapes}\n{_colours(LIGHT, '')}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}"


def text_width(text: str, size: float = 10.0) -> float:
    """About how wide a text is in a Helvetica-like face, a little generous.

    Args:
        text: The text, without line breaks.
        size: Size of the type in pixels.

    Returns:
        Its width in pixels.
    """
    return sum(_advance(letter) for letter in text) * size


def _advance(letter: str) -> float:
    """The width of a letter in units of the type's size."""
    if letter in "iljtfrI.,:;'|![]() `":
        return 0.32
    if letter in "mwMW@%":
        return 0.9
    if unicodedata.east_asian_width(letter) in "WF":
        return 1.05
    if unicodedata.combining(letter):
        return 0.0
    if letter.isupper():
        return 0.7
    return 0.57 if ord(letter) < 0x250 else 0.75


def shortened(text: str, width: float, size: float = 10.0) -> str:
    """The text, or as much of it as fits into a width, with an ellipsis."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "…", size) > width:
        text = text[:-1]
    return text + "…"


def shown(token: str) -> str:
    """A token for the reader: without the space that most tokens begin with, and nothing invisible."""
    text = visible(token)
    return text.strip() or "␣" * len(text) or "∅"


def escaped(text: str) -> str:
    """Any text as the content of an XML element or of a quoted attribute."""
    return escape(visible(text), {'"': "&quot;"})
