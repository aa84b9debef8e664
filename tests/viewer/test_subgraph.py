"""Pinning, grouping and naming, and what is saved of it: in SVG, PNG and JSON, and back through Python."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from graphs import explained, small

from circuits.graph import Graph
from circuits.graph.influence import shares

SVG = "{http://www.w3.org/2000/svg}"


def annotated(opened: Any, graph: Graph) -> list[str]:
    """Pin four features and a token, and group the first two as `name movers`, as a reader would."""
    order = np.argsort(-np.where(graph.nodes.is_feature, graph.nodes.influence, 0.0))
    names = [graph.node_ids()[index] for index in [*order[:4].tolist(), 1]]
    for name in names:
        opened.node(name).focus()
        opened.page.keyboard.press("p")
    for name in names[:2]:
        opened.page.locator(f'#subgraph [data-item="{name}"]').focus()
        opened.page.keyboard.press(" ")
    opened.page.get_by_label("Name of the supernode").fill("name movers")
    opened.page.get_by_role("button", name="Group 2").click()
    return names


def saved(opened: Any, button: str, path: Path) -> Path:
    """What a save button downloads."""
    with opened.page.expect_download() as waiting:
        opened.page.locator("#subgraph").get_by_role("button", name=button, exact=True).click()
    waiting.value.save_as(path / waiting.value.suggested_filename)
    return path / str(waiting.value.suggested_filename)


def test_pin_group_rename_ungroup(show: Any) -> None:
    """A supernode holds its members; it is renamed and dissolved in its panel; unpinning leaves a group."""
    graph = small()
    opened = show(graph)
    names = annotated(opened, graph)
    cards = opened.page.locator("#subgraph .card")
    assert cards.count() == 4
    assert opened.run("circuits.state.groups") == [{"name": "name movers", "ids": names[:2]}]
    opened.page.locator('#subgraph [aria-label^="supernode of 2"]').press("Enter")
    assert "name movers" in opened.inspector.text_content()
    opened.inspector.get_by_label("Name of the supernode").fill("movers")
    opened.inspector.get_by_role("button", name="Rename").click()
    assert opened.run("circuits.state.groups[0].name") == "movers"
    opened.node(names[0]).click(modifiers=["Shift"])
    assert opened.run("circuits.state.groups") == [{"name": "movers", "ids": names[1:2]}]
    opened.page.locator('#subgraph [aria-label^="supernode of 1"]').press("Enter")
    opened.inspector.get_by_role("button", name="Ungroup").click()
    assert opened.run("[circuits.state.groups.length, circuits.state.pinned]") == [0, names[1:]]


def test_what_passes_between_cards(show: Any) -> None:
    """A supernode's input from another card is its members' shares, signed, weighted by their influence."""
    graph = explained()
    opened = show(graph)
    opened.state({"nodeThreshold": 1, "edgeThreshold": 1})
    opened.run("circuits.state.group('both', ['q1_7_1', 'a2_8_1'])")
    for name in ("E_10_0", "2_9_1"):
        opened.run("(name) => circuits.state.pin(name)", name)
    flows = opened.run(
        """() => {
            const texts = [...document.querySelectorAll('#subgraph .flow title')].map((title) => title.textContent);
            return texts.sort();
        }"""
    )
    part = shares(len(graph.nodes), graph.edges.target, graph.edges.weight)
    names, weight = graph.node_ids(), graph.nodes.influence + graph.nodes.target_weight
    members = [names.index("q1_7_1"), names.index("a2_8_1")]
    edge = next(e for e in range(len(graph.edges)) if names[graph.edges.source[e]] == "E_10_0"
                and names[graph.edges.target[e]] == "a2_8_1")  # fmt: skip
    into_group = part[edge] * weight[members[1]] / weight[members].sum()
    into_mlp = sum(part[e] for e in range(len(graph.edges)) if graph.edges.source[e] in members
                   and names[graph.edges.target[e]] == "2_9_1")  # fmt: skip
    assert len(flows) == 2
    assert flows[0] == f"a → both: {100 * into_group:.0f}% of the input, lowering it"
    assert flows[1].startswith("both → #9")
    assert f"{100 * into_mlp:.0f}% of the input" in flows[1]


def test_annotations_go_round(show: Any, tmp_path: Path) -> None:
    """Saved in the browser, read by Python, written again and opened again: the same pins, groups and names."""
    graph = small()
    opened = show(graph)
    names = annotated(opened, graph)
    opened.node(names[0]).focus()
    opened.page.keyboard.press("Enter")
    opened.inspector.get_by_role("button", name="Rename").click()
    opened.inspector.get_by_label("Name of the node").fill("looks back")
    opened.page.keyboard.press("Enter")
    file = saved(opened, "JSON", tmp_path)
    back = Graph.load(file)
    params = back.metadata["qParams"]
    assert params["pinnedIds"] == names
    assert params["supernodes"] == [["name movers", *names[:2]]]
    assert params["clerps"] == [[names[0], "looks back"]]
    assert params["clickedId"] == names[0]
    assert (params["linkType"], params["pruningThreshold"], params["sg_pos"]) == ("both", 0.9, "")
    graph.save(tmp_path / "plain.json")
    before, after = ((tmp_path / name).read_text().splitlines() for name in ("plain.json", file.name))
    changed = [line.split(":")[0] for line, other in zip(after, before, strict=True) if line != other]
    assert changed == ['"qParams"']
    again = show(back)
    assert again.run("circuits.state.qParams()") == params
    assert "looks back" in again.inspector.text_content()
    assert again.page.locator("#subgraph .card").count() == 4
    back.save(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text())["qParams"] == params
    fresh = show(graph)
    fresh.page.locator("input[type=file]").set_input_files(str(file))
    fresh.until("circuits.state.groups.length === 1")
    assert fresh.run("circuits.state.qParams()") == params


def test_picture_files(show: Any, tmp_path: Path) -> None:
    """The SVG stands alone and has the prompt, all cards and no control; the PNG is a picture of twice its size."""
    graph = small()
    opened = show(graph, scheme="dark")
    annotated(opened, graph)
    root = ElementTree.parse(saved(opened, "SVG", tmp_path)).getroot()
    assert root.tag == f"{SVG}svg"
    words = [text.text for text in root.iter(f"{SVG}text")]
    assert any(graph.prompt[:30] in str(word) for word in words)
    assert "name movers" in words
    assert sum(element.get("class") == "card" for element in root.iter()) == 4
    assert not [element for element in root.iter() if element.get("tabindex") or element.get("role") == "button"]
    assert not list(root.iter(f"{SVG}style"))
    png = saved(opened, "PNG", tmp_path).read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    size = [int.from_bytes(png[start : start + 4]) for start in (16, 20)]
    assert size == [2 * int(root.get("width", 0)), 2 * int(root.get("height", 0))]
    assert len(png) > 5000


def test_annotations_of_another_viewer(show: Any) -> None:
    """As Neuronpedia may write them: commas, unknown ids, nodes only in a supernode, keys that are not ours."""
    graph = small()
    names = graph.node_ids()
    params = {
        "pinnedIds": f"{names[0]},nobody,{names[3]}",
        "supernodes": [["group", names[4], "nobody"], ["empty"], "odd"],
        "linkType": "either",
        "clickedId": "nobody",
        "sg_pos": "1 2 3",
        "isShowAllLinks": "",
    }
    opened = show(replace(graph, metadata={**graph.metadata, "qParams": params}))
    assert opened.run("circuits.state.pinned") == [names[0], names[3], names[4]]
    assert opened.run("circuits.state.groups") == [{"name": "group", "ids": [names[4]]}]
    kept = opened.run("circuits.state.qParams()")
    assert (kept["sg_pos"], kept["isShowAllLinks"], kept["clickedId"], kept["linkType"]) == ("1 2 3", "", "", "both")


@pytest.mark.parametrize("params", [None, [], "text", {"pinnedIds": 3, "supernodes": {"a": 1}, "clerps": [[1, 2], 3]}])
def test_broken_annotations_are_no_obstacle(show: Any, params: Any) -> None:
    """The graph opens without annotations."""
    graph = small()
    opened = show(replace(graph, metadata={**graph.metadata, "qParams": params}))
    assert opened.run("[circuits.state.pinned, circuits.state.groups, circuits.state.names.size]") == [[], [], 0]
