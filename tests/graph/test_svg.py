"""The picture: well-formed, nothing collides, nothing is left out silently."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hand_graph import hand_graph, mixed_hand_graph
from synthetic import Size, synthetic_graph

from circuits.graph import KINDS, Graph, GraphError
from circuits.graph.formats.svg_edges import Labels, around_nodes, curves
from circuits.graph.formats.svg_file import to_svg
from circuits.graph.formats.svg_graphviz import graphviz_layout
from circuits.graph.formats.svg_layout import columns_layout
from circuits.graph.formats.svg_parts import shape
from circuits.graph.formats.svg_style import shortened, shown, text_width

SVG = "{http://www.w3.org/2000/svg}"
SIZES = {
    "5": Size(5, n_features=25),
    "20": Size(20, n_features=130),
    "60": Size(60, n_features=650, inputs=12),
    "mixed 8": Size(8, n_features=40, mixed=True),
    "mixed 20": Size(20, n_features=130, mixed=True),
}


def graph_of(name: str) -> Graph:
    """A pruned graph of the size named."""
    return synthetic_graph(SIZES[name]).prune(0.93 if name in ("60", "mixed 8") else 0.8)


@pytest.mark.parametrize("name", SIZES)
def test_every_node_and_edge_is_drawn_or_counted(name: str) -> None:
    """One shape with a tooltip for each node, one curve for each edge up to the limit, and the legend says so."""
    graph = graph_of(name)
    root = ElementTree.fromstring(to_svg(graph))
    drawn = [e for e in root.iter() if e.get("class", "").startswith("edge ")]
    tooltips = [e for e in root.iter() if e.get("class", "").startswith("node ") and e.find(f"{SVG}title") is not None]
    assert len(drawn) == min(len(graph.edges), 600)
    assert len(tooltips) == len(graph.nodes)
    words = " ".join(e.text or "" for e in root.iter(f"{SVG}text"))
    expected = (
        f"{len(graph.edges)} edges drawn" if len(graph.edges) <= 600 else f"600 of {len(graph.edges):,} edges drawn"
    )
    assert expected in words


@pytest.mark.parametrize("name", SIZES)
def test_everything_lies_inside_and_nodes_do_not_touch(name: str) -> None:
    """Nodes lie within the picture, in their own column and row, and apart from each other."""
    graph = graph_of(name)
    root = ElementTree.fromstring(to_svg(graph))
    width, height = (float(root.attrib[name]) for name in ("width", "height"))
    layout = columns_layout(graph, 60.0)
    assert layout.x.min() > 0
    assert layout.x.max() < width
    assert layout.height < height + 60
    for x, position in zip(layout.x, graph.nodes.position, strict=True):
        column = layout.columns[position]
        assert column.left <= x <= column.left + column.width
    order = np.argsort(layout.x)
    x, y, r = layout.x[order], layout.y[order], layout.radius[order]
    for i in range(len(x) - 1):
        near = slice(i + 1, int(np.searchsorted(x, x[i] + 15.0)))
        assert np.all(np.hypot(x[near] - x[i], y[near] - y[i]) > r[near] + r[i])


@pytest.mark.parametrize("name", SIZES)
def test_head_and_feature_names_do_not_collide(name: str) -> None:
    """The rectangles of all placed names are apart from each other and from the nodes."""
    root = ElementTree.fromstring(to_svg(graph_of(name)))
    boxes = []
    for element in root.iter(f"{SVG}text"):
        classes = element.get("class", "").split()
        size = 8.5 if "small" in classes else 7.5
        if "middle" in classes and ({"positive", "negative"} & set(classes) or "halo" in classes):
            half = text_width(element.text or "", size) / 2
            boxes.append((float(element.attrib["x"]), float(element.attrib["y"]), half))
    assert sum(re.fullmatch(r"L\d+(H\d+| id| own)", e.text or "") is not None for e in root.iter(f"{SVG}text")) >= 3
    for i, (x, y, half) in enumerate(boxes):
        for other_x, other_y, other_half in boxes[:i]:
            assert abs(x - other_x) >= half + other_half or abs(y - other_y) >= 7.0


def test_hostile_tokens_are_text() -> None:
    """Nothing of a token becomes markup, and what XML forbids is shown."""
    bad = ("<script>alert(1)</script>", '"', "a\nb", "\x00\x1b", "🙂", "\ud800", "]]>", "--", "\u202e")
    graph = synthetic_graph(Size(len(bad), n_features=10))
    columns = {**graph.nodes.columns(), "label": np.array(["<b>&\n\x01"] * len(graph.nodes))}
    parts = {name: getattr(graph, name) for name in ("token_ids", "n_layers", "edges", "heads", "patterns", "metadata")}
    hostile = Graph(prompt="".join(bad), tokens=bad, nodes=type(graph.nodes)(**columns), **parts)
    svg = to_svg(hostile)
    svg.encode("utf-8")
    root = ElementTree.fromstring(svg)
    assert {e.tag.removeprefix(SVG) for e in root.iter()} <= {
        "svg",
        "title",
        "style",
        "rect",
        "line",
        "path",
        "circle",
        "text",
    }
    words = " ".join(e.text or "" for e in root.iter(f"{SVG}text"))
    assert "<script>" in words
    assert "a⏎b" in words


def test_tooltips_tell_heads_and_numbers() -> None:
    """The edge of the hand-written graph, with both of its heads."""
    svg = to_svg(hand_graph())
    assert "E_10_0 → a1_13_1 · weight +2 · 40.0% of the target's input · heads L1H1 0→1 +2.5, L1H3 0→1 -0.5" in svg
    assert ">L1H1</text>" in svg
    assert "prefers-color-scheme: dark" in svg


def test_a_graph_without_edges_is_drawn() -> None:
    """Tokens and logits only."""
    graph = hand_graph().select(np.array([True, True, False, False, True]), np.zeros(5, bool))
    root = ElementTree.fromstring(to_svg(graph))
    assert root.tag.endswith("svg")
    assert "3 nodes" in to_svg(graph)


def test_curves_begin_and_end_at_their_nodes() -> None:
    """The first and the last point of a curve touch source and target."""
    graph = graph_of("mixed 20")
    layout = columns_layout(graph, 60.0)
    for curve in curves(graph, layout, 40):
        source, target = graph.edges.source[curve.edge], graph.edges.target[curve.edge]
        assert curve.at(0.0) == pytest.approx((layout.x[source], layout.y[source] - layout.radius[source]))
        assert curve.at(1.0) == pytest.approx((layout.x[target], layout.y[target] + layout.radius[target]))


def test_each_kind_has_its_row() -> None:
    """Key sides below attention, attention below the MLP or what stands for its block, each row with its name."""
    graph = mixed_hand_graph()
    y = dict(zip(graph.node_ids(), columns_layout(graph, 60.0).y.tolist(), strict=True))
    below = ("E_10_0", "v0_5_0", "k1_7_0", "q1_7_1", "r1_error_1", "a2_8_1", "2_9_1", "3_22_1")
    assert all(y[lower] > y[upper] + 10 for lower, upper in pairwise(below))
    assert y["v0_5_0"] == y["v0_error_0"]
    assert y["k1_7_0"] == y["k1_7_1"]
    names = [e.text for e in ElementTree.fromstring(to_svg(graph)).iter(f"{SVG}text") if "end" in e.get("class", "")]
    assert names == ["output", "MLP", "attention", "block", "attention", "key side", "key side", "tokens"]
    assert "key side" not in to_svg(hand_graph())


def test_each_kind_has_its_sign() -> None:
    """No two kinds look alike, shape and colours together, and the legend explains all but the logits."""
    svg = to_svg(mixed_hand_graph())
    rules = {}
    for selectors, rule in re.findall(r"^(\.circuits \.[^{]+) \{ (.*) \}$", svg, re.MULTILINE):
        rules.update({name.removeprefix(".circuits ."): rule for name in selectors.split(",")})
    inner = [kind for kind in KINDS if kind not in ("embedding", "logit")]
    looks = {(re.sub(kind, "", shape(kind, 0.0, 0.0, 2.3)), rules[kind]) for kind in inner}
    assert len(looks) == len(inner)
    assert all(re.search(rf"^  \.circuits .*\.{kind}\b", svg, re.MULTILINE) for kind in KINDS)
    signs = [e for e in ElementTree.fromstring(svg).iter() if e.get("class", "").startswith("node ")]
    count = Counter(e.attrib["class"].removeprefix("node ") for e in signs if e.find(f"{SVG}title") is None)
    assert count == Counter(kind for kind in KINDS if kind != "logit")


def test_an_identity_is_drawn_and_named() -> None:
    """The edge from a key side to its query side at the same position bows out and carries the head's name."""
    graph = mixed_hand_graph()
    (curve,) = (c for c in curves(graph, columns_layout(graph, 60.0), 99) if c.edge == 6)
    assert curve.crosses
    assert abs(curve.at(0.5)[0] - curve.at(0.0)[0]) > 4
    words = [e.text for e in ElementTree.fromstring(to_svg(graph)).iter(f"{SVG}text")]
    assert {"L1 id", "L2 own", "L1H0", "id: the identity of an MTC", "own: the feature's own pattern"} <= set(words)
    assert "heads L1 id 1→1 +2, L1H0 1→1 +1" in to_svg(graph)
    assert "the identity of" not in to_svg(hand_graph())


def test_what_leaves_a_value_crosses_at_once() -> None:
    """Half way across it is still near the layer of its heads; what an attention feature reads is by then near it."""
    graph = mixed_hand_graph()
    drawn = {curve.edge: curve for curve in curves(graph, columns_layout(graph, 60.0), 99)}
    for edge, least, most in ((1, 0.0, 0.6), (7, 0.4, 1.0)):
        start, middle, end = (drawn[edge].at(t) for t in (0.0, 0.5, 1.0))
        assert middle[0] == pytest.approx((start[0] + end[0]) / 2)
        assert least < (start[1] - middle[1]) / (start[1] - end[1]) < most


def test_labels_refuse_what_is_taken() -> None:
    """A rectangle is given once, and never over a node."""
    labels = Labels()
    assert labels.place(10, 10, 8, 8)
    assert not labels.place(14, 14, 8, 8)
    assert labels.place(30, 10, 8, 8)
    layout = columns_layout(hand_graph(), 60.0)
    assert not around_nodes(layout).place(float(layout.x[0]), float(layout.y[0]), 4, 4)


def test_words_are_measured_and_shortened() -> None:
    """Generously, so that nothing runs over."""
    assert text_width("WW") > text_width("ii")
    assert shortened("a long token that does not fit", 40).endswith("…")
    assert text_width(shortened("x" * 99, 40)) <= 40
    assert [shown(" the"), shown("  "), shown("")] == ["the", "␣␣", "∅"]


def test_an_unknown_layout_is_an_error() -> None:
    """The message lists what there is."""
    with pytest.raises(GraphError, match="'columns' or 'dot'"):
        to_svg(hand_graph(), layout="spring")


def test_layout_dot_without_graphviz(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what is missing and what works without it."""
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(GraphError, match="needs Graphviz"):
        to_svg(hand_graph(), layout="dot")


def test_layout_dot_takes_the_positions_of_graphviz(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inches from below become pixels from above."""
    lines = [f'node "{name}" {index} 1 0.3 0.3 "x y" solid' for index, name in enumerate(hand_graph().node_ids())]
    answer = "\n".join(["graph 1 6 3", *lines, "stop"]).encode()
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/dot")
    monkeypatch.setattr("pydot.Dot.create", lambda *_, **__: answer)
    layout = graphviz_layout(hand_graph(), 50.0)
    assert np.diff(layout.x).tolist() == pytest.approx([72.0] * 4)
    assert layout.y.tolist() == pytest.approx([50.0 + 2 * 72.0] * 5)
    assert ElementTree.fromstring(to_svg(hand_graph(), layout="dot")).tag == f"{SVG}svg"
