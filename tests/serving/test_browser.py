"""The server as a process of its own, asked by a real browser; and how it stops."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from asking import PROMPT
from browsers import chromium

import circuits
from circuits.graph import Graph

Serving = Callable[..., tuple[subprocess.Popen[str], str]]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    yield from chromium()


def asked(url: str, content: Any = None) -> Any:
    """The JSON of an address; `content` is sent as JSON."""
    data = None if content is None else json.dumps(content).encode()
    with urlopen(Request(url, data, {"content-type": "application/json"}), timeout=30) as answer:
        return json.load(answer)


def test_from_a_prompt_to_a_changed_model(browser: Any, serving: Serving, tmp_path: Path) -> None:
    """Type, see progress, read the graph, ablate a supernode, see logits and both graphs; label; save; rename; delete.

    No complaint in the console, no request that leaves the machine, and a prompt with markup in it is text.
    """
    process, url = serving()
    page = browser.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.set_default_timeout(30000)
    page.goto(url)
    page.locator("#prompt-text").fill("")
    page.get_by_text("Options").click()
    page.locator("#targets").fill("nosuchtoken")
    page.locator("#prompt-text").fill(PROMPT)
    page.get_by_role("button", name="Trace").click()
    page.get_by_role("alert").filter(has_text="is not one token").wait_for()
    page.locator("#targets").fill("")
    page.evaluate(
        """() => {
            const seen = [];
            const look = new MutationObserver(() => seen.push(document.querySelector(".progress").innerText));
            look.observe(document.body, { subtree: true, childList: true, characterData: true });
            addEventListener("pagehide", () => sessionStorage.setItem("seen", seen.join("|")));
        }"""
    )
    page.get_by_role("button", name="Trace").click()
    page.wait_for_url("**/graphs/when-mary*")
    assert "tracing" in page.evaluate("() => sessionStorage.getItem('seen')")

    # The viewer stands in a frame with an origin of its own.
    viewer = page.frame_locator("iframe")
    viewer.locator("#nodes .node").first.wait_for()
    frame = page.frames[1]
    assert frame.evaluate("origin") == "null"
    frame.evaluate("circuits.open('a1_1360_14')")
    page.locator(".bench .target").filter(has_text="attention L1 #1360 at 14").wait_for()
    assert page.get_by_role("link", name="Feature page").get_attribute("href") == "/features/attention-sae.1/1360"
    frame.evaluate("circuits.state.group('<i>names</i>', ['a1_1360_14', 'a1_1055_14']); circuits.state.click('')")
    page.get_by_role("button", name="Save annotations").click()
    page.get_by_text("saved", exact=True).wait_for()
    name = page.url.rpartition("/")[2]
    kept = Graph.load(tmp_path / "graphs" / f"{name}.json").metadata["qParams"]
    assert kept["supernodes"] == [["<i>names</i>", "a1_1360_14", "a1_1055_14"]]

    # Ablate the supernode.
    page.get_by_label("Supernode").select_option("0")
    page.get_by_role("button", name="Ablate").click()
    assert "ablate <i>names</i>" in page.locator(".chips").inner_text()
    page.get_by_role("button", name="Run changed").click()
    page.locator(".logits tbody tr").first.wait_for()
    first = page.locator(".logits tbody tr").first.inner_text().split("\t")
    assert first[0] == "“ Mary”"
    assert float(first[2]) < 0.6 < 0.8 < float(first[1])
    for title in ("Graph before the change", "Attribution graph"):
        page.frame_locator(f'iframe[title="{title}"]').locator("#nodes .node").first.wait_for()
    after = page.frame_locator('iframe[title="Attribution graph"]')
    assert after.locator('[data-id="a1_1360_14"]').count() == 0
    page.get_by_role("button", name="After", exact=True).click()
    assert page.locator('iframe[title="Graph before the change"]').is_hidden()

    # A feature's label, and the list.
    page.goto(f"{url}/features/attention-sae.1/1360")
    page.get_by_label("Label of the feature").fill("<b>names</b> to come")
    page.get_by_role("button", name="Save label").click()
    page.get_by_role("heading", name="<b>names</b> to come").wait_for()
    page.goto(url)
    page.locator("#prompt-text").fill("<img src=x onerror='window.ran = true'><script>window.ran = true</script>")
    page.get_by_role("button", name="Trace").click()
    page.wait_for_url("**/graphs/img-src*")
    page.frame_locator("iframe").locator("#nodes .node").first.wait_for()
    page.goto(url)
    assert page.locator(".graphs li").count() == 3
    assert page.evaluate("window.ran === undefined")
    page.get_by_role("button", name="Rename").first.click()
    page.get_by_label("New name of the graph").fill("../hostile")
    page.get_by_role("button", name="Save").click()
    page.locator("code", has_text="hostile").wait_for()
    page.get_by_role("button", name="Delete").first.click()
    page.get_by_role("button", name="Delete for good").click()
    page.locator("code", has_text="hostile").wait_for(state="detached")
    assert sorted(path.stem for path in (tmp_path / "graphs").iterdir())[0].startswith("when-mary")
    page.close()
    assert complaints == []
    assert [address for address in requests if not address.startswith((url, "blob:"))] == []
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_at_once_while_a_trace_runs(serving: Serving, tmp_path: Path, sent: signal.Signals) -> None:
    """With a stream of progress open: it exits with 0 within seconds, and leaves no half of a graph."""
    process, url = serving("--max-tokens", "250")
    job = asked(f"{url}/api/traces", {"prompt": PROMPT * 15, "node_threshold": 1.0})["job"]
    with urlopen(f"{url}/api/jobs/{job}/events", timeout=30) as events:
        while asked(f"{url}/api/jobs/{job}")["state"] == "waiting":
            time.sleep(0.01)
        process.send_signal(sent)
        begun = time.monotonic()
        assert process.wait(30) == 0
        assert time.monotonic() - begun < 10
        said = events.read().decode()
    assert '"state": "done"' not in said
    assert "stopping" in said
    assert list((tmp_path / "graphs").iterdir()) == []
    assert process.stdout is not None
    assert process.stdout.read().strip() == "stopped"


def test_a_graph_displays_itself_in_a_notebook(browser: Any, tmp_path: Path, model: Any) -> None:
    """Without IPython: one element, a frame cut off from the page around it, in which the viewer works."""
    graph = circuits.trace(model, PROMPT)
    hostile = replace(graph, prompt='"></iframe><script>window.ran = true</script>')
    shown = hostile._repr_html_()
    assert shown is not None
    assert "IPython" not in sys.modules
    assert shown.count("<") == 2  # the element and its end
    (tmp_path / "notebook.html").write_text(f"<!doctype html><title>notebook</title>{shown}", encoding="utf-8")
    page = browser.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto((tmp_path / "notebook.html").as_uri())
    page.frame_locator("iframe").locator("#nodes .node").first.wait_for()
    page.frames[1].evaluate("circuits.open('a1_1360_14')")
    page.frame_locator("iframe").locator("#inspector h2").first.wait_for()
    page.wait_for_timeout(200)
    assert page.frames[1].evaluate("origin") == "null"
    assert page.evaluate("window.ran === undefined")
    page.close()
    assert complaints == []
    assert replace(graph.select(graph.nodes.layer > 99), tokens=(), token_ids=())._repr_html_() is None
