"""Attention made visible: heads of an edge, their patterns, why they looked, and both sides of multitoken features."""

from typing import Any

import pytest
from graphs import explained, mixed, small

from circuits.graph import IDENTITY_HEAD, Graph


def strongest_crossing(graph: Graph) -> int:
    """The edge with the largest weight among those that heads carry between two positions."""
    nodes, edges = graph.nodes, graph.edges
    carried = set(graph.heads.edge.tolist())
    crossing = [e for e in carried if nodes.position[edges.source[e]] != nodes.position[edges.target[e]]]
    return max(crossing, key=lambda e: abs(edges.weight[e]))


def edge_name(graph: Graph, edge: int) -> str:
    """SOURCE->TARGET."""
    names = graph.node_ids()
    return f"{names[graph.edges.source[edge]]}->{names[graph.edges.target[edge]]}"


def test_click_on_an_edge_shows_its_heads(show: Any) -> None:
    """A click on the line opens it: bars of its heads that add up, the pattern of the strongest, the step marked."""
    graph = small()
    edge = strongest_crossing(graph)
    opened = show(graph)
    opened.state({"edgeThreshold": 0.6})
    name = edge_name(graph, edge)
    opened.until("circuits.viewport.scene.model.edges.length < 400")
    for at in (0.5, 0.4, 0.6, 0.35, 0.65):
        opened.page.mouse.click(*opened.edge_point(name, at))
        if opened.run("circuits.state.edge") == name:
            break
    assert opened.run("circuits.state.edge") == name
    bars = opened.inspector.locator(".bars .row")
    rows = graph.heads.take(graph.heads.edge == edge)
    assert bars.count() == len(rows)
    shown = [float(text.replace("−", "-")) for text in bars.locator(".value").all_text_contents()]
    assert sum(shown) == pytest.approx(float(graph.edges.weight[edge]), rel=0.02)
    assert shown == sorted(shown, key=lambda weight: -abs(weight))
    strongest = max(range(len(rows)), key=lambda row: abs(rows.weight[row]))
    layer, head, key, query = (int(getattr(rows, column)[strongest]) for column in ("layer", "head", "key", "query"))
    assert bars.nth(0).get_attribute("aria-pressed") == "true"
    assert f"L{layer}H{head}" in bars.nth(0).text_content()
    picture = opened.inspector.locator(".heat")
    assert picture.locator(".mark").count() == 1
    attention = graph.patterns[layer, head][query, key]
    told = picture.get_attribute("aria-label")
    assert told.startswith(f"Attention pattern of L{layer}H{head}")
    assert float(told.rsplit(": ", 1)[1]) == pytest.approx(float(attention), rel=0.01)
    marked = opened.inspector.locator(".token-line .marked")
    assert marked.count() == 1
    assert marked.get_attribute("title").startswith(f"{key} ")
    bars.nth(1).click()
    assert opened.inspector.locator(".bars .row").nth(1).get_attribute("aria-pressed") == "true"
    assert "L" in opened.inspector.locator(".heat").get_attribute("aria-label")


def test_heat_map_cells_are_the_pattern(show: Any) -> None:
    """The canvas is strongest where the head looks most, and pointing at a cell tells its number."""
    graph = small()
    edge = strongest_crossing(graph)
    opened = show(graph, hash=f"#clickedEdge={edge_name(graph, edge)}")
    opened.inspector.locator(".heat canvas").scroll_into_view_if_needed()
    rows = graph.heads.take(graph.heads.edge == edge)
    strongest = max(range(len(rows)), key=lambda row: abs(rows.weight[row]))
    pattern = graph.patterns[int(rows.layer[strongest]), int(rows.head[strongest])]
    box = opened.inspector.locator(".heat canvas").bounding_box()
    cell = box["width"] / len(graph.tokens)
    for query, key in ((5, 2), (11, 0), (7, 7)):
        opened.page.mouse.move(box["x"] + (key + 0.5) * cell, box["y"] + (query + 0.5) * cell)
        told = opened.inspector.locator(".heat-value").text_content()
        assert float(told.rsplit(": ", 1)[1]) == pytest.approx(float(pattern[query, key]), rel=0.01)
    alpha = opened.run(
        """([cell, cells]) => {
            const canvas = document.querySelector('.heat canvas');
            const { data, width } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
            const pixel = (position) => Math.floor(2 * (position + .4) * cell);
            const at = ([query, key]) => 4 * (pixel(query) * width + pixel(key));
            return cells.map((place) => [...data.slice(at(place), at(place) + 4)]);
        }""",
        [cell, [[5, 2], [5, 3], [2, 5]]],
    )
    assert alpha[2][3] == 0  # nothing above the diagonal
    stronger, weaker = (0, 1) if pattern[5, 2] > pattern[5, 3] else (1, 0)
    assert alpha[stronger][0] < alpha[weaker][0]  # less red is more blue


def test_hops_of_an_edge_through_frozen_attention(show: Any) -> None:
    """Both splits are there, each adds up to the edge, and what is no head cannot be opened."""
    opened = show(explained())
    opened.state({"nodeThreshold": 1, "edgeThreshold": 1, "edge": "q1_7_1->2_9_1"})
    blocks = opened.inspector.locator(".block:has(.bars)")
    assert blocks.locator("h3").all_text_contents()[:1] == ["First hop"]
    first = blocks.nth(0).locator(".bars .row .value").all_text_contents()
    assert [float(text.replace("−", "-")) for text in first] == [0.75, 0.25]
    assert "rest" in blocks.nth(0).locator(".bars").first.text_content()
    assert blocks.nth(0).locator(".bars button").count() == 1
    last = opened.inspector.locator('.bars[aria-label="Last hop"] .row .value').all_text_contents()
    assert sum(float(text.replace("−", "-")) for text in last) == pytest.approx(1.0)
    opened.state({"edge": "2_9_1->3_22_1"})
    assert "never leaves its position" in opened.inspector.text_content()


def test_why_a_head_looked(show: Any) -> None:
    """Pairs with their names, over the other keys and in full, both sides' sums and trained QK features."""
    opened = show(explained())
    opened.state({"nodeThreshold": 1, "edgeThreshold": 1, "edge": "k1_7_0->q1_7_1"})
    panel = opened.inspector.locator(".qk")
    assert "L1H0 looks from 1 “ a” at 0 “ a” with attention 0.750" in panel.text_content()
    assert panel.locator(".pairs > li").count() == 2
    first = panel.locator(".pairs > li").nth(0).text_content()
    assert first == "token “ a”×value L0 #5+0.750"
    assert "at key 1" in panel.locator(".pairs > li").nth(1).text_content()
    panel.get_by_role("button", name="In full").click()
    texts = panel.locator(".pairs > li").all_text_contents()
    assert texts == ["token “ a”×value L0 #5+3.00", "token “ a”×token “ a”+2.00", "biases×value L0 #5−0.500"]
    panel.get_by_role("button", name="By side").click()
    assert panel.locator(".bars").count() == 2
    panel.get_by_role("button", name="QK features").click()
    assert "qk.1/37" in panel.text_content()
    panel.get_by_role("button", name="In full").click()
    panel.locator(".pairs > li").nth(0).get_by_role("button", name="value L0 #5").click()
    assert opened.run("circuits.state.clicked") == "v0_5_0"


def test_own_pattern_is_explained_for_its_own_feature(show: Any) -> None:
    """The score of a feature's own pattern is found by its owner; the pattern itself is not in the file."""
    opened = show(explained())
    opened.state({"nodeThreshold": 1, "edgeThreshold": 1, "edge": "E_10_0->a2_8_1"})
    text = opened.inspector.text_content()
    assert "The pattern of L2 own is not kept in the file." in text
    assert "L2 own looks from 1 “ a” at 0 “ a” with attention 0.100" in text


def test_multitoken_feature_shows_both_sides_and_what_moves_it(show: Any) -> None:
    """Key side, query side, the weight of each head, and the pattern that the weighted heads make."""
    graph = explained()
    opened = show(graph)
    opened.state({"nodeThreshold": 1, "edgeThreshold": 1, "clicked": "q1_7_1"})
    titles = opened.inspector.locator("h3").all_text_contents()
    assert titles[:4] == ["Key side: where it is read", "Query side: where it writes", "Head loadings", "What moves it"]
    assert opened.inspector.locator(".block").nth(0).locator(".link").all_text_contents() == ["at 0 “ a”", "at 1 “ a”"]
    # From the drawing: activation 1.5; A is 0.5 from token 1 to both; edges 1.5 and -0.5 (key 0), identity 2, 1 (key
    # 1). Head 0 gives 1.5 / (0.5 * 1.5) = 2 at key 0, its first and equally strong step; head 1 -0.5 / 0.75; the
    # identity 2 / 1.5.
    values = opened.inspector.locator('.bars[aria-label="Head loadings"] .value').all_text_contents()
    assert values == ["+2.00", "+1.33", "−0.667"]
    assert IDENTITY_HEAD == -1
    told = opened.inspector.locator(".heat").first.get_attribute("aria-label")
    # P[1, 0] = 2 * 0.5 - 0.667 * 0.5; P[1, 1] has the identity's 1.33 too.
    assert "from query 1 “ a” to key 0 “ a”: 0.667" in told
    assert "from query 1 “ a” to key 1 “ a”: 2.00" in told


def test_every_node_and_edge_opens(show: Any) -> None:
    """Of a graph with every kind: no panel fails, whatever it is about."""
    graph = mixed()
    opened = show(graph)
    opened.state({"nodeThreshold": 1, "edgeThreshold": 1})
    seen = opened.run(
        """() => {
            const seen = new Set();
            for (const node of circuits.model.nodes) {
                circuits.state.set({ clicked: node.id, edge: "" });
                if (document.querySelector('#inspector code').textContent === node.id) seen.add(node.kind);
            }
            let edges = 0;
            for (const edge of [...circuits.model.edges].slice(-120)) {
                circuits.state.set({ edge: circuits.model.graph.edgeName(edge) });
                edges += document.querySelector('#inspector .ends') ? 1 : 0;
            }
            return [seen.size, edges];
        }"""
    )
    assert seen == [len(set(graph.prune(1.0, 1.0).nodes.kind.tolist())), 120]
