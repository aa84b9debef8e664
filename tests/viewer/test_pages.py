"""Feature pages in the file: their labels in the picture, and all that they tell in the panel."""

from typing import Any

import numpy as np
import pytest
from graphs import mixed, page, small

from circuits.graph import GraphError
from circuits.graph.formats.html_file import to_html


def strongest(graph: Any, kind: str) -> tuple[int, tuple[str, int]]:
    """The index of the strongest node of a kind, and its dictionary and feature."""
    index = int(np.argmax(np.where(graph.nodes.kind == kind, graph.nodes.influence, -1.0)))
    return index, (str(graph.nodes.dictionary[index]), int(graph.nodes.feature[index]))


def test_page_is_shown_with_its_node(show: Any) -> None:
    """Label, density, histogram, examples with tokens by activation, outputs, neighbours."""
    graph = small()
    index, key = strongest(graph, "mlp_feature")
    opened = show(graph, {key: page(*key), ("elsewhere", 1): page("elsewhere", 1)})
    name = graph.node_ids()[index]
    assert "kings and queens" in opened.page.locator(".names .label").all_text_contents()
    assert opened.node(name).get_attribute("aria-label").startswith("kings and queens · MLP")
    opened.node(name).click()
    assert opened.inspector.locator("h2").first.text_content() == "kings and queens"
    panel = opened.page.get_by_role("region", name="Feature page")
    text = panel.text_content()
    told = ("1.2%", "200,000", "Top examples", "Quantile 3 of 5", "document 7, from token 40", " crown", "+1.50")
    for words in (*told, "−0.750", "0.870"):
        assert words in text, words
    assert panel.locator(".histogram rect").count() == 3
    spans = panel.locator(".token-line").first.locator("span")
    words = [f"\u2009{word}" for word in ("the", "King", "of", "France", "is", "bald")]
    assert spans.all_text_contents() == words
    strengths = spans.evaluate_all("(spans) => spans.map((span) => parseInt(span.style.getPropertyValue('--part')))")
    assert strengths[0] == 0
    assert strengths[1] == max(strengths) == 62
    assert 0 < strengths[5] < strengths[3] < strengths[1]
    opened.page.keyboard.press("/")
    opened.page.keyboard.type("queens")
    assert opened.page.locator("#nodes .hit").count() == int(np.sum(
        (graph.nodes.dictionary == key[0]) & (graph.nodes.feature == key[1])))  # fmt: skip


def test_page_of_a_moving_feature(show: Any) -> None:
    """Key side, query side and the strongest moves of an example; the feature's own head loading."""
    graph = mixed().prune(0.99, 0.99)
    index, key = strongest(graph, "mtc_query")
    tokens = [" a", " b", " c"]
    example = {"group": "top", "tokens": tokens, "activations": [5, 0, 0], "query_activations": [0, 0, 4],
               "moves": [[0, 2, 0.8]], "document": 1, "start": 0}  # fmt: skip
    opened = show(graph, {key: page(*key, kind="mtc", examples=[example], head_loading=[[3, 0.9], ["id", -0.1]])})
    opened.state({"clicked": graph.node_ids()[index]})
    panel = opened.page.get_by_role("region", name="Feature page")
    assert panel.locator(".token-line").count() == 2
    assert " a →  c 0.800" in panel.locator(".moves").text_content()
    loading = panel.locator('.bars[aria-label="Head loading of the feature"]').text_content()
    assert "H3" in loading
    assert "id" in loading


def test_dense_features_can_be_left_out(show: Any) -> None:
    """With pages there is a slider for density, as `densityThreshold` in the address."""
    graph = small()
    index, key = strongest(graph, "mlp_feature")
    opened = show(graph, {key: page(*key, density=0.4)})
    name = graph.node_ids()[index]
    assert opened.node(name).count() == 1
    opened.page.locator("#density").fill("0.3")
    opened.until("circuits.state.density === 0.3")
    assert opened.node(name).count() == 0
    opened.until("location.hash.includes('densityThreshold=0.3')")
    assert show(graph).page.locator("#density").count() == 0


def test_only_pages_of_the_graph_are_in_the_file() -> None:
    """Other features' pages are left out; a page that JSON cannot hold is refused."""
    graph = small()
    _, key = strongest(graph, "mlp_feature")
    text = to_html(graph, {key: page(*key), ("elsewhere", 1): page("elsewhere", 1)})
    assert '"label": "kings and queens"' in text
    assert '"dictionary": "elsewhere"' not in text
    with pytest.raises(GraphError, match="feature page cannot be written as JSON"):
        to_html(graph, {key: page(*key, density=float("nan"))})
