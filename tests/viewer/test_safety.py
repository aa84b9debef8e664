"""Nothing that a prompt, a token, a label or a name says is executed; nothing is fetched; everybody can use it."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import HOSTILE, hostile, mixed, page, small

from circuits.graph import Edges, Graph, GraphError, Heads
from circuits.graph.formats import html_file


def axe() -> str:
    """The script of axe-core, from the package that carries it."""
    package = pytest.importorskip("axe_playwright_python", reason="axe-core is missing; install the extra 'dev'")
    return (Path(package.__file__).parent / "axe.min.js").read_text(encoding="utf-8")


def test_hostile_strings_are_text(show: Any, tmp_path: Path) -> None:
    """In every panel, the table, the subgraph, the search, tooltips and files: shown as they are, and nothing runs."""
    graph = hostile()
    feature = int(np.argmax(graph.nodes.is_feature))
    key = (str(graph.nodes.dictionary[feature]), int(graph.nodes.feature[feature]))
    tokens = [HOSTILE, "b"]
    bad = page(
        *key, label=HOSTILE, label_by=HOSTILE, top_outputs=[[HOSTILE, 1.0]], near_by_decoder=[[HOSTILE, 3, 0.5]],
        examples=[{"group": HOSTILE, "tokens": tokens, "activations": [1, 2], "query_activations": [1, 2],
                   "moves": [[0, 1, 1]]}],
    )  # fmt: skip
    opened = show(graph, {key: bad}, name="a & b <i>.html")
    assert opened.run("circuits.state.groups.length") == 2
    names = graph.node_ids()
    for name in (names[0], names[feature], names[-1], *names[10:20]):
        opened.state({"clicked": name, "edge": ""})
    for edge in range(0, len(graph.edges), max(1, len(graph.edges) // 30)):
        ends = names[graph.edges.source[edge]], names[graph.edges.target[edge]]
        opened.state({"edge": "->".join(ends)})
    opened.page.get_by_role("button", name="Table").click()
    opened.page.get_by_role("button", name="Picture").click()
    opened.page.locator("#search").fill("script")
    assert opened.page.locator("#nodes .hit").count() > 0
    opened.node(names[feature]).dispatch_event("pointermove")
    opened.run("(name) => circuits.state.rename(circuits.model.nodes[5].id, name)", HOSTILE)
    opened.page.wait_for_timeout(100)
    assert opened.page.locator("img, iframe, object, embed, link, form[action]").count() == 0
    assert opened.page.locator("script").count() == 3
    assert opened.run("document.title").startswith("</script><img")
    with opened.page.expect_download() as waiting:
        opened.page.get_by_role("button", name="JSON", exact=True).click()
    assert re.fullmatch(r"[a-z0-9-]+\.json", waiting.value.suggested_filename)
    waiting.value.save_as(tmp_path / "saved.json")
    back = Graph.load(tmp_path / "saved.json")
    assert back.prompt == graph.prompt
    assert back.tokens == graph.tokens


def test_nothing_but_the_file_itself_can_be_asked_for(show: Any) -> None:
    """The page's own policy stops every kind of request and every script but the one that it came with."""
    opened = show(small())
    tried = opened.run(
        """async () => {
            const stopped = [];
            document.addEventListener("securitypolicyviolation", (event) => stopped.push(event.effectiveDirective));
            await fetch("https://example.org/").catch(() => {});
            const add = (tag, set) => document.body.append(Object.assign(document.createElement(tag), set));
            add("img", { src: "https://example.org/x.png" });
            add("script", { textContent: "window.ran = true" });
            add("script", { src: "https://example.org/x.js" });
            add("link", { rel: "stylesheet", href: "https://example.org/x.css" });
            add("iframe", { src: "https://example.org/" });
            document.body.insertAdjacentHTML("beforeend", "<b onclick='window.ran = true'>x</b>");
            document.body.lastChild.click();
            await new Promise((done) => setTimeout(done, 200));
            return [[...new Set(stopped)].sort(), window.ran === undefined];
        }"""
    )
    kinds = ["connect-src", "frame-src", "img-src", "script-src-attr", "script-src-elem", "style-src-elem"]
    assert tried == [kinds, True]
    assert all("Content Security Policy" in complaint for complaint in opened.complaints)
    opened.complaints.clear()
    assert [url for url in opened.requests if not url.startswith("file:")] == []


def test_the_file_is_one_and_the_same() -> None:
    """The same graph gives the same bytes; no asset is forgotten; no data can end its script element."""
    graph = hostile()
    text = html_file.to_html(graph)
    assert text == html_file.to_html(graph)
    assert not re.search(r"\b(?:src|href)=", re.sub("<title>.*?</title>", "", text).partition("<script type=")[0])
    data = re.findall(r'<script type="application/json" id="[a-z-]+">(.*?)</script>', text, re.DOTALL)
    assert len(data) == 2
    assert all("<" not in part for part in data)
    assert text.count("</script>") == 3
    folder = Path(html_file.__file__).parent / "viewer"
    assert {path.name for path in folder.iterdir()} == {"page.html", *html_file.MODULES, *html_file.STYLES}
    assert all(len(path.read_text(encoding="utf-8").splitlines()) <= 350 for path in folder.iterdir())


def test_modules_stand_below_what_they_import() -> None:
    """The order in which they are inlined is one in which each finds what it needs, and imports what is exported."""
    folder = Path(html_file.__file__).parent / "viewer"
    exported: dict[str, set[str]] = {}
    for name in html_file.MODULES:
        text = (folder / name).read_text(encoding="utf-8")
        imports = re.findall(r'^import \{([^}]*)\} from "\./([a-z_]+\.js)";$', text, re.MULTILINE)
        assert text.count("\nimport ") + text.startswith("import ") == len(imports)
        for wanted, source in imports:
            names = {word.strip() for word in wanted.split(",") if word.strip()}
            assert names <= exported[source], (name, source)
            body = text.replace(f"import {{{wanted}}}", "")
            assert [word for word in names if not re.search(rf"\b{word}\b", body)] == [], name
        exported[name] = set(re.findall(r"^export (?:function|class|const) (\w+)", text, re.MULTILINE))


def test_an_empty_prompt_is_refused_and_a_graph_without_edges_is_not(show: Any) -> None:
    """Without tokens there is nothing to show; without edges there are nodes."""
    graph = small()
    keep = graph.nodes.kind == "embedding"
    alone = replace(
        graph, nodes=graph.nodes.take(keep), edges=Edges.empty(), heads=Heads.empty(), patterns={}, metadata={}
    )
    opened = show(alone)
    assert opened.page.locator("#nodes .node").count() == len(graph.tokens)
    with pytest.raises(GraphError, match="no tokens"):
        html_file.to_html(replace(alone, tokens=(), token_ids=(), nodes=alone.nodes.take(alone.nodes.layer > 0)))


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("dark", 400)])
def test_axe_has_no_serious_finding(show: Any, scheme: str, width: int) -> None:
    """With everything open that can be: a node with a page, an edge with its heads, the subgraph, the table."""
    graph = mixed().prune(0.97, 0.98)
    order = np.argsort(-np.where(graph.nodes.kind == "mtc_query", graph.nodes.influence, 0.0))
    index = int(order[0])
    key = (str(graph.nodes.dictionary[index]), int(graph.nodes.feature[index]))
    opened = show(graph, {key: page(*key)}, scheme=scheme, width=width)
    opened.run(axe())
    names = graph.node_ids()
    carried = int(graph.heads.edge[0])
    edge = f"{names[graph.edges.source[carried]]}->{names[graph.edges.target[carried]]}"
    opened.run("(ids) => { circuits.state.group('pair', ids.slice(0, 2)); circuits.state.pin(ids[2]); }",
               [names[i] for i in order[1:4].tolist()])  # fmt: skip
    for changes in ({"clicked": names[index]}, {"edge": edge}, {"clicked": "", "edge": ""}):
        opened.state(changes)
        if not changes.get("clicked", "x"):
            opened.page.get_by_role("button", name="Table").click()
            opened.page.locator("#legend summary").evaluate("(summary) => summary.parentElement.open = true")
        found = opened.run("axe.run(document, { resultTypes: ['violations'] })")["violations"]
        serious = [
            (one["id"], node["html"][:200], node["any"][0]["message"] if node["any"] else "")
            for one in found if one["impact"] in ("serious", "critical") for node in one["nodes"]
        ]  # fmt: skip
        assert serious == []


@pytest.mark.parametrize("make", [small, mixed])
def test_no_sideways_scrolling_on_a_narrow_screen(show: Any, make: Any) -> None:
    """At 400 pixels everything stands within the width, whatever is open."""
    graph = make()
    opened = show(graph, width=400, height=800)
    for name in graph.node_ids()[:: max(1, len(graph.nodes) // 4)]:
        opened.state({"clicked": name})
        assert opened.run("document.documentElement.scrollWidth") <= 400
