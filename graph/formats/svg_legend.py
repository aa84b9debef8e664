"""The words of the SVG: the title above the picture and the legend below it."""

from __future__ import annotations

from typing import Any

from circuits.graph.formats.svg_edges import Curve
from circuits.graph.formats.svg_parts import shape, text
from circuits.graph.formats.svg_style import shortened, text_width
from circuits.graph.formats.text import model_name, visible
from circuits.graph.graph import Graph
from circuits.graph.tables import IDENTITY_HEAD, OWN_HEAD, head_name

_GAP = 20.0
_LINE = 17.0
# Room that a sign takes in front of its words; shapes take less than strokes, see `_entry`.
_SIGN_WIDTHS = {"": 0.0, "positive": 28.0, "negative": 28.0, "frozen": 28.0, "widths": 34.0}
_KIND_NAMES = {
    "mlp_feature": "MLP feature",
    "attention_feature": "attention feature",
    "mtc_key": "MTC feature, key side",
    "mtc_query": "MTC feature, query side",
    "value_feature": "value feature",
    "mlp_error": "MLP error",
    "attention_error": "attention error",
    "value_error": "value error",
    "block_error": "block error",
}
_HEAD_WORDS = {IDENTITY_HEAD: "the identity of an MTC", OWN_HEAD: "the feature's own pattern"}


def title(graph: Graph, width: float) -> list[str]:
    """The prompt, and under it the model and how far the graph can be trusted."""
    prompt = shortened(visible(graph.prompt), width - 90.0, 13.0)
    parts = [text(16, 26, f"“{prompt}”", "title")]
    return parts + [text(16, 43 + 13 * number, line, "quiet") for number, line in enumerate(_facts(graph, width - 32))]


def title_height(graph: Graph, width: float) -> float:
    """How much room the title takes."""
    return 40.0 + 13.0 * len(_facts(graph, width - 32))


def _facts(graph: Graph, width: float) -> list[str]:
    """Model, scores, ledger and sizes, then the evidence, in as many lines as the width asks."""
    known = graph.metadata
    facts = [model_name(graph)]
    scores: dict[str, Any] = known.get("scores") or {}
    facts += [f"{name} {scores[name]:.3f}" for name in ("replacement", "completeness") if _is_number(scores.get(name))]
    gap = (known.get("ledger") or {}).get("max_relative_gap")
    if _is_number(gap):
        facts.append(f"ledger gap {gap:.1e}")
    left_out = known.get("left_out_influence")
    if _is_number(left_out):
        facts.append(f"influence left out {left_out:.2g}")
    settings: dict[str, Any] = known.get("settings") or {}
    if _is_number(settings.get("node_threshold")) and _is_number(settings.get("edge_threshold")):
        facts.append(f"pruned at {settings['node_threshold']:g} / {settings['edge_threshold']:g}")
    return [line for told in (facts, _evidence(known)) for line in _lines(told, width)]


def _lines(facts: list[str], width: float) -> list[str]:
    """Facts with dots between them, in as many lines as the width asks."""
    lines: list[str] = []
    for fact in facts:
        longer = f"{lines[-1]} · {fact}" if lines else fact
        lines = [*lines[:-1], longer] if text_width(longer) < width or not lines else [*lines, fact]
    return lines


def _evidence(known: dict[str, Any]) -> list[str]:
    """What interventions and explained scores say about the graph; nothing where nobody has looked."""
    tested: dict[str, Any] = known.get("verification") or {}
    facts = []
    if nodes := tested.get("nodes"):
        facts += [f"{nodes.get('tested', 0)} nodes ablated ({tested.get('mode', 'real')})", *_agreement(nodes)]
        if effect := _with_interval(nodes, "median_effect", "median effect"):
            random = _with_interval(tested.get("random") or {}, "median_effect", "of random nodes")
            facts.append(f"{effect}, {random}" if random else effect)
    if patterns := tested.get("patterns"):
        facts.append(" ".join([f"{patterns.get('tested', 0)} patterns of heads changed:", *_agreement(patterns)[:1]]))
    facts += [f"{name} {tested[name]:.2f}" for name in ("sufficiency", "necessity") if _is_number(tested.get(name))]
    qk: dict[str, Any] = known.get("qk") or {}
    if _is_number(qk.get("max_relative_gap")):
        scores = f"{qk['scores']:,} scores explained, " if _is_number(qk.get("scores")) else ""
        facts.append(f"{scores}QK gap {qk['max_relative_gap']:.1e}")
    return facts


def _agreement(figures: dict[str, Any]) -> list[str]:
    """Rank correlation and slope with their intervals, those that are there."""
    told = (_with_interval(figures, "spearman", "Spearman"), _with_interval(figures, "slope", "slope"))
    return [words for words in told if words]


def _with_interval(figures: dict[str, Any], key: str, name: str) -> str:
    """A figure and, in brackets, its interval; "" where it is not there."""
    if not _is_number(figures.get(key)):
        return ""
    ends = figures.get(f"{key}_interval")
    interval = f" [{ends[0]:.2f}, {ends[1]:.2f}]" if ends and all(_is_number(end) for end in ends) else ""
    return f"{name} {figures[key]:.2f}{interval}"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def legend(graph: Graph, drawn: list[Curve], top: float, width: float) -> tuple[list[str], float]:
    """What shapes, colours and widths mean, and how much of the graph is drawn.

    Returns:
        The lines, and the lower end of the legend.
    """
    parts = [f'<line class="rule" x1="16" x2="{width - 16:.1f}" y1="{top:.1f}" y2="{top:.1f}"/>']
    x, y = 16.0, top + 18.0
    for sign, words in _entries(graph, drawn):
        room = _SIGN_WIDTHS.get(sign, 17.0) + text_width(words)
        if x > 16.0 and x + room > width - 16.0:
            x, y = 16.0, y + _LINE
        parts += _entry(sign, words, x, y)
        x += room + _GAP
    return parts, y + 14.0


def _entries(graph: Graph, drawn: list[Curve]) -> list[tuple[str, str]]:
    kinds = set(graph.nodes.kind.tolist())
    entries = [("embedding", "token")]
    entries += [(kind, name) for kind, name in _KIND_NAMES.items() if kind in kinds]
    entries += [("positive", "raises the target"), ("negative", "lowers the target")]
    entries.append(("widths", "width: share of the target's input"))
    if any(curve.heads and curve.crosses for curve in drawn):
        entries.append(("", "L2H5: strongest head on an edge through attention"))
    heads = {row[1] for curve in drawn for row in curve.heads}
    entries += [("", f"{head_name(head)}: {words}") for head, words in _HEAD_WORDS.items() if head in heads]
    if any(curve.crosses and not curve.heads for curve in drawn):
        hops = ", hops in its tooltip" if any(curve.first_hops for curve in drawn) else ""
        entries.append(("frozen", f"through frozen attention{hops}"))
    count = f"{len(graph.edges):,} edges drawn"
    if len(drawn) < len(graph.edges):
        count = f"{len(drawn):,} of {len(graph.edges):,} edges drawn, the strongest"
    entries.append(("", f"{len(graph.nodes):,} nodes, {count}"))
    return entries


def _entry(sign: str, words: str, x: float, y: float) -> list[str]:
    if not sign:
        return [text(x, y + 3.5, words, "quiet")]
    words_part = text(x + _SIGN_WIDTHS.get(sign, 17.0), y + 3.5, words, "quiet")
    if sign in ("positive", "negative", "frozen"):
        classes = "positive frozen" if sign == "frozen" else sign
        return [_stroke(classes, x, y, 22.0, 2.0), words_part]
    if sign == "widths":
        return [*(_stroke("swatch", x + 10.0 * i, y, 8.0, 0.6 + 1.3 * i) for i in range(3)), words_part]
    radius = 2.3 if sign.endswith("error") else 4.5
    return [shape(sign, x + 6.0, y, radius), words_part]


def _stroke(classes: str, x: float, y: float, length: float, width: float) -> str:
    ends = f'x1="{x:.1f}" x2="{x + length:.1f}" y1="{y:.1f}" y2="{y:.1f}"'
    return f'<line class="{classes}" {ends} style="stroke-width:{width:.1f}"/>'
