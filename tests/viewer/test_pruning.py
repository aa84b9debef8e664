"""The sliders keep what `Graph.prune` keeps: the same nodes and the same edges, to the last one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import large, mixed, small

from circuits.graph import Graph, threshold
from circuits.graph.formats import html_file

FULL = [(0.2, 0.98), (0.5, 0.5), (0.8, 0.98), (0.95, 0.9), (0.99, 1.0), (1.0, 1.0), (0.8, 0.0), (0.0, 0.98)]
TIGHTER = [(0.9, 0.97), (0.85, 0.98), (0.7, 0.9), (0.33, 0.6), (0.9, 0.5), (0.0, 0.0)]
KEPT = """() => [circuits.model.nodes.map((node) => node.id).sort(),
               [...circuits.model.edges].map((edge) => circuits.model.graph.edgeName(edge)).sort()]"""


def kept(graph: Graph) -> list[list[str]]:
    """Names of the nodes and edges of a graph."""
    names = graph.node_ids()
    ends = zip(graph.edges.source.tolist(), graph.edges.target.tolist(), strict=True)
    return [sorted(names), sorted(f"{names[source]}->{names[target]}" for source, target in ends)]


@pytest.mark.parametrize(("make", "thresholds"), [(mixed, FULL), (large, FULL), (small, TIGHTER)])
def test_same_sets_as_python(show: Any, make: Any, thresholds: list[tuple[float, float]]) -> None:
    """Full graphs and one that was pruned before, at thresholds that keep nothing, something, and all."""
    graph = make()
    opened = show(graph)
    sizes = set()
    for node_threshold, edge_threshold in thresholds:
        opened.state({"nodeThreshold": node_threshold, "edgeThreshold": edge_threshold})
        expected = kept(graph.prune(node_threshold, edge_threshold))
        assert opened.run(KEPT) == expected
        sizes.add(len(expected[1]))
    assert len(sizes) > 4


def test_the_same_with_target_features_and_odd_weights(show: Any) -> None:
    """Weights over many orders of magnitude, and ties: sums are added in numpy's order, so no threshold tips over."""
    from dataclasses import replace

    from circuits.graph import with_influence

    rng = np.random.default_rng(0)
    graph = mixed()
    weight = graph.edges.weight * np.float32(10.0) ** rng.integers(-6, 6, len(graph.edges)).astype(np.float32)
    weight[rng.random(len(weight)) < 0.3] = 1.0
    no_heads = graph.heads.take(np.zeros(len(graph.heads), np.bool_))
    graph = with_influence(replace(graph, edges=replace(graph.edges, weight=weight), heads=no_heads, patterns={}))
    opened = show(graph)
    for share in np.linspace(0.05, 1.0, 20).tolist():
        opened.state({"nodeThreshold": share, "edgeThreshold": share})
        assert opened.run(KEPT) == kept(graph.prune(share, share))


def test_a_graph_of_another_tool(show: Any) -> None:
    """A graph that circuit-tracer wrote opens, and is pruned as Python prunes it, to its own thresholds and tighter."""
    graph = Graph.load(Path(__file__).parents[1] / "data" / "neuronpedia" / "full.json")
    opened = show(graph)
    for thresholds in ((0.8, 0.98), (0.5, 0.9)):
        opened.state(dict(zip(("nodeThreshold", "edgeThreshold"), thresholds, strict=True)))
        assert opened.run(KEPT) == kept(graph.prune(*thresholds))


def test_sliders_prune_live(show: Any) -> None:
    """A key on a slider redraws the picture, the counts and the address with what Python keeps."""
    graph = small()
    opened = show(graph)
    assert opened.page.locator("#counts").text_content().startswith(f"{len(graph.nodes)} of {len(graph.nodes)} nodes")
    slider = opened.page.get_by_label("Nodes: share of the influence")
    slider.focus()
    for _ in range(12):
        slider.press("ArrowLeft")
    opened.until("circuits.state.nodeThreshold === 0.78")
    expected = graph.prune(0.78, 0.98)
    assert 0 < len(expected.nodes) < len(graph.nodes)
    drawn = opened.page.locator("#nodes .node")
    assert drawn.count() == len(expected.nodes)
    names = drawn.evaluate_all("(nodes) => nodes.map((node) => node.dataset.id)")
    assert set(names) == set(expected.node_ids())
    assert opened.page.locator("#counts").text_content().startswith(f"{len(expected.nodes)} of")
    opened.until("location.hash.includes('pruningThreshold=0.78')")


def test_thresholds_to_the_last_bit(browser: Any) -> None:
    """Sums and thresholds of the page's own module are numpy's, bit by bit; at a share of 1 the last bit decides."""
    folder = Path(html_file.__file__).parent / "viewer"
    text = (folder / "pruning.js").read_text(encoding="utf-8").replace("export ", "")
    rng = np.random.default_rng(1)
    lists = [rng.lognormal(0, 3, count) for count in (1, 7, 8, 9, 64, 127, 128, 129, 136, 1000, 4099, 20011)]
    asked = [{"values": values.tolist(), "shares": [0.0, 0.3, 0.9, 0.999999, 1.0]} for values in lists]
    opened = browser.new_page()
    found = opened.evaluate(
        """([text, asked]) => {
            const { pairwiseSum, threshold } = new Function(`${text}; return { pairwiseSum, threshold };`)();
            return asked.map(({ values, shares }) => {
                const array = Float64Array.from(values);
                return [pairwiseSum(array), shares.map((share) => threshold(array, share))];
            });
        }""",
        [text, asked],
    )
    opened.close()
    for values, one, (total, thresholds) in zip(lists, asked, found, strict=True):
        assert total == float(values.sum())
        assert thresholds == [threshold(values, share) for share in one["shares"]]
    assert threshold(np.zeros(3), 0.5) == 0.0
