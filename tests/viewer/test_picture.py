"""The picture: drawn, searched, walked through with pointer and keys, and moved smoothly."""

from dataclasses import replace
from typing import Any

import pytest
from graphs import explained, large, mixed, small

from circuits.graph.influence import shares


def test_all_nodes_and_edges_are_there(show: Any) -> None:
    """Every node is an element with a name for a screen reader, in its token's column and above all that it reads."""
    graph = mixed().prune(0.99, 0.999)
    opened = show(graph)
    nodes = opened.page.locator("#nodes .node")
    assert nodes.count() == len(graph.nodes)
    assert opened.run("circuits.model.edges.length") == len(graph.edges)
    assert opened.page.locator("#prompt").text_content() == graph.prompt
    x, y = opened.run("[circuits.viewport.layout.x, circuits.viewport.layout.y].map((places) => [...places])")
    columns = opened.run("circuits.viewport.layout.columns.map((column) => [column.left, column.width])")
    for index, position in enumerate(graph.nodes.position.tolist()):
        if graph.nodes.kind[index] != "logit":
            left, width = columns[position]
            assert left <= x[index] <= left + width
    for source, target in zip(graph.edges.source.tolist(), graph.edges.target.tolist(), strict=True):
        assert y[source] > y[target]
    label = nodes.nth(0).get_attribute("aria-label")
    assert label.startswith("token “<s>” position 0, influence ")


def test_search(show: Any) -> None:
    """The slash key leads to the search, which rings what it finds; Enter opens the strongest."""
    graph = small()
    opened = show(graph)
    opened.page.keyboard.press("/")
    opened.page.keyboard.type("attention L2")
    expected = [
        name for name, kind, layer in zip(graph.node_ids(), graph.nodes.kind, graph.nodes.layer)
        if kind in ("attention_feature", "attention_error") and layer == 2
    ]  # fmt: skip
    assert expected
    assert opened.page.locator("#nodes .hit").count() == len(expected)
    assert f"{len(expected)} found" in opened.page.locator("#found").text_content()
    opened.page.keyboard.press("Enter")
    assert opened.run("circuits.state.clicked") in expected
    assert "attention L2" in opened.inspector.text_content()
    opened.page.keyboard.press("/")
    opened.page.keyboard.press("Escape")
    assert opened.page.locator("#nodes .hit").count() == 0


def test_hover_lights_what_is_up_and_downstream(show: Any) -> None:
    """The parts are those of all paths: checked on the hand-made graph, where each node has one or two ways."""
    graph = explained()
    opened = show(graph)
    opened.state({"nodeThreshold": 1, "edgeThreshold": 1})
    opened.node("k1_7_1").hover()
    opened.page.wait_for_selector("#nodes.dimmed")
    lit = set(opened.page.locator("#nodes .node.lit").evaluate_all("(nodes) => nodes.map((node) => node.dataset.id)"))
    # k1_7_1 reads token 1 and value features; through q1_7_1 it reaches a2_8_1, 2_9_1 and the output.
    assert lit == {"E_10_0", "E_11_1", "v0_5_0", "v0_error_0", "k1_7_1", "q1_7_1", "a2_8_1", "2_9_1", "3_22_1"}
    part = shares(len(graph.nodes), graph.edges.target, graph.edges.weight)
    flow = opened.run("[...circuits.viewport.flowOf(circuits.model.graph.byId.get('k1_7_1').index).edges]")
    names = graph.node_ids()
    by_ends = {
        (names[source], names[target]): edge
        for edge, (source, target) in enumerate(zip(graph.edges.source.tolist(), graph.edges.target.tolist()))
    }
    into_query = by_ends["k1_7_1", "q1_7_1"]
    assert flow[into_query] == pytest.approx(float(part[into_query]), abs=1e-12)
    through = by_ends["q1_7_1", "2_9_1"]
    assert flow[through] == pytest.approx(float(part[into_query] * part[through]), abs=1e-12)
    from_value = by_ends["v0_5_0", "k1_7_1"]
    before = by_ends["E_10_0", "v0_5_0"]
    assert flow[before] == pytest.approx(float(part[from_value] * part[before]), abs=1e-12)
    assert flow[by_ends["r1_error_1", "2_9_1"]] == 0
    opened.page.mouse.move(5, 5)
    opened.page.wait_for_selector("#nodes:not(.dimmed)")


def test_click_opens_and_leaves_its_trace_in_the_address(show: Any) -> None:
    """A click opens a node; the address brings back what was open, pinned and pruned."""
    graph = small()
    opened = show(graph)
    name = graph.node_ids()[int(graph.nodes.is_feature.argmax())]
    opened.node(name).click()
    assert opened.inspector.locator("code").text_content() == name
    opened.page.keyboard.press("p")
    assert opened.node(name).get_attribute("aria-pressed") == "true"
    opened.state({"nodeThreshold": 0.6})
    opened.until("location.hash.includes('pruningThreshold=0.6')")
    address = opened.run("location.hash")
    again = show(graph, hash=address)
    assert again.run("[circuits.state.clicked, circuits.state.pinned]") == [name, [name]]
    assert again.run("circuits.state.nodeThreshold") == 0.6
    again.run("location.hash = '#clickedId=nobody&pruningThreshold=7&pinnedIds=x,y&supernodes=[1&linkType=up'")
    again.until("circuits.state.pinned.length === 0")
    assert again.run("[circuits.state.clicked, circuits.state.linkType]") == ["", "both"]
    assert again.run("circuits.state.nodeThreshold") == 0.9


def test_keyboard_alone(show: Any) -> None:
    """The picture is one tab stop; arrows walk, I and O follow the strongest edges, Enter opens, Escape closes."""
    graph = small()
    opened = show(graph)
    assert opened.page.locator("#nodes [tabindex='0']").count() == 1
    opened.page.locator("#nodes [tabindex='0']").focus()
    focused = "document.activeElement.dataset.id"
    output = opened.run(focused)
    assert opened.run(f"circuits.model.graph.byId.get({focused}).kind") == "logit"
    opened.page.keyboard.press("i")
    names = graph.node_ids()
    into = [edge for edge, target in enumerate(graph.edges.target.tolist()) if names[target] == output]
    strongest = max(into, key=lambda edge: abs(graph.edges.weight[edge]))
    assert opened.run(focused) == names[graph.edges.source[strongest]]
    before = opened.run(f"circuits.model.graph.byId.get({focused}).depth")
    opened.page.keyboard.press("ArrowDown")
    assert opened.run(f"circuits.model.graph.byId.get({focused}).depth") < before
    opened.page.keyboard.press("Enter")
    assert opened.inspector.locator("code").text_content() == opened.run(focused)
    assert opened.page.locator("#status").text_content().startswith("Opened ")
    opened.page.keyboard.press("Escape")
    assert opened.inspector.locator("code").count() == 0


def test_table(show: Any) -> None:
    """The table has every node and sorts; a row opens its node."""
    graph = small()
    opened = show(graph)
    opened.page.get_by_role("button", name="Table").click()
    rows = opened.page.locator("#table tbody tr")
    assert rows.count() == len(graph.nodes)
    opened.page.get_by_role("button", name="activation").click()
    shown = rows.evaluate_all("(rows) => rows.map((row) => row.children[4].textContent)")
    values = [float(text.replace("−", "-")) for text in shown if text != "–"]
    assert len(values) == int(graph.nodes.is_feature.sum())
    assert values == sorted(values, reverse=True)
    rows.nth(0).get_by_role("button").click()
    assert opened.run("circuits.model.graph.byId.get(circuits.state.clicked).isFeature")


def test_panning_a_large_graph_is_smooth(show: Any) -> None:
    """2,000 nodes and 20,000 edges, all shown, dragged for 60 frames: under 50 ms a frame, in the best of three drags.

    The best, because other programs of the machine only ever add to it.
    """
    graph = large()
    settings = {"node_threshold": 1.0, "edge_threshold": 1.0}  # as if it were what pruning has left
    opened = show(replace(graph, metadata={**graph.metadata, "settings": settings}))
    assert opened.page.locator("#nodes .node").count() >= 2000
    assert opened.run("circuits.model.edges.length") >= 20000
    opened.page.wait_for_timeout(300)
    drag = """() => new Promise((done) => {
            const { stage } = circuits.viewport;
            const box = stage.getBoundingClientRect();
            let [x, y, frame, last] = [box.left + 300, box.top + 120, 0, 0];
            const send = (type) => stage.dispatchEvent(new PointerEvent(type, { clientX: x, clientY: y, pointerId: 1,
                pointerType: "mouse", bubbles: true, button: type === "pointermove" ? -1 : 0, buttons: 1 }));
            stage.setPointerCapture = () => {};
            send("pointerdown");
            const times = [];
            const step = (now) => {
                if (last) times.push(now - last);
                last = now;
                [x, y] = [x + 4, y + 2];
                send("pointermove");
                if (++frame <= 60) requestAnimationFrame(step);
                else { send("pointerup"); done(times); }
            };
            requestAnimationFrame(step);
        })"""
    seen = []
    for _ in range(3):
        times = opened.run(drag)
        assert len(times) == 60
        seen.append((sum(times) / 60, sorted(times)[54]))  # the mean, and what 9 of 10 frames are below
        if max(seen[-1]) < 50:
            break
    assert opened.run("circuits.viewport.untouched") is False
    assert max(seen[-1]) < 50, seen


def test_zoom_keeps_what_is_under_the_pointer(show: Any) -> None:
    """The wheel zooms about the pointer; names keep their size and nodes grow; Show all brings everything back."""
    opened = show(small())
    start = opened.run("({...circuits.viewport.view})")
    opened.page.mouse.move(500, 400)
    for _ in range(6):
        opened.page.mouse.wheel(0, -60)
    opened.until(f"circuits.viewport.view.k > {1.5 * start['k']}")
    opened.until("circuits.viewport.nodes.drawn.k === circuits.viewport.view.k")
    box = opened.page.locator("#stage").bounding_box()
    now = opened.run("({...circuits.viewport.view})")
    for axis, at in (("x", 500 - box["x"]), ("y", 400 - box["y"])):
        assert (at - now[axis]) / now["k"] == pytest.approx((at - start[axis]) / start["k"], abs=0.01)
    size = opened.run("Number(document.querySelector('.names text').getAttribute('font-size'))") * now["k"]
    assert size == pytest.approx(10.5, abs=0.1)
    opened.page.get_by_role("button", name="Show all").click()
    assert opened.run("circuits.viewport.view.k") == pytest.approx(start["k"])
