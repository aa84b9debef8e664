"""`circuits features` as a user runs it: built, shown in 80 columns, labelled, exported, imported, in graphs."""

import json
import sys
import unicodedata
from pathlib import Path

import pytest
from shelves import hostile_page

from circuits.cli import main
from circuits.feature_store import FeatureStore
from circuits.graph import Graph

BUILD = ("--tokens", 1500, "--window", 48, "--top", 3, "--per-quantile", 1, "--sample", 1500)
STORY = "Tom and Mary went to the park. Mary said to Tom that the dog was very happy, and Tom gave the ball to Mary. "


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs `circuits ARGS` in 80 columns; returns (exit code, output, error output)."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["circuits", *map(str, args)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text("<|endoftext|>".join(STORY * (i % 3 + 1) for i in range(40)))
    return path


def width(line: str) -> int:
    """Columns of a terminal that a line takes."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in line)
    return len(line) + wide - sum(unicodedata.combining(letter) > 0 for letter in line)


def test_from_text_to_a_labelled_graph(run, text: Path, tmp_path: Path) -> None:
    """The whole way on the embedded model: build, show, label, trace and label a graph, export and import."""
    store, out = tmp_path / "store.sqlite", tmp_path / "out"
    code, printed, message = run("features", "build", "--replacement", "mtc", "--text", text, "-o", store, *BUILD)
    assert code == 0, message
    assert "mtc.0 (1,536)" in " ".join(printed.split())
    prompt = "Tom and Mary went to the park. Mary said to"
    arguments = ("trace", prompt, "--replacement", "mtc", "--features", store, "-o", out, "--format", "json,svg")
    code, printed, message = run(*arguments, "--max-feature-nodes", 40)
    assert code == 0, message
    graph = Graph.load(out / "graph.json")
    chosen = graph.nodes.is_feature
    key = str(graph.nodes.dictionary[chosen][0]), int(graph.nodes.feature[chosen][0])
    assert graph.nodes.label[chosen].tolist()[0] == FeatureStore(store).label(*key)
    code, printed, message = run("features", "label", *key, "my own words", "--features", store)
    assert code == 0, message
    assert "my own words" in printed
    assert run("label", out / "graph.json", "--features", store)[0] == 0
    graph = Graph.load(out / "graph.json")
    assert "my own words" in graph.nodes.label.tolist()
    assert run("render", out / "graph.json", "-o", out / "again.svg")[0] == 0
    assert "my own words" in (out / "again.svg").read_text()
    file = tmp_path / "pages.jsonl"
    code, printed, message = run("features", "export", *key, "--features", store, "-o", file)
    assert code == 0, message
    assert json.loads(file.read_text())["explanations"][0]["description"] == "my own words"
    code, printed, message = run("features", "import", file, key[0], "--features", store)
    assert code == 0, message
    code, printed, _ = run("features", "show", *key, "--features", store, "--json")
    assert code == 0
    assert json.loads(printed)["label"] == "my own words"


@pytest.mark.parametrize("key", [("clt.0", 123), ("attention-sae.1", 1360), ("mtc.2", 5)])
def test_a_page_in_80_columns(run, key: tuple[str, int]) -> None:
    """Title, histogram, outputs, examples and neighbours, nothing wider than the terminal, nothing cut off."""
    code, printed, message = run("features", "show", *key)
    assert code == 0, message
    assert max(map(width, printed.splitlines())) <= 80
    assert printed.startswith(f"{key[0]} #{key[1]}")
    for part in ("active at", "activation", "speaks for", "Top", "Quantile 5 of 5", "Near by decoder", "co-activation"):
        assert part in printed
    assert "█" in printed
    assert "«" in printed
    assert ("\nkey " in printed and "\nquery " in printed) == key[0].startswith("mtc")
    assert ("heads" in printed) == (not key[0].startswith("clt"))


def test_colours_and_hostile_tokens(run, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With colours tokens stand on grounds of their activation; no token brings a control character of its own."""
    store = tmp_path / "store.sqlite"
    assert run("features", "build", "--replacement", "clt", "--text", text, "-o", store, *BUILD)[0] == 0
    hostile_page(FeatureStore(store))
    code, printed, message = run("features", "show", "clt.0", 3, "--features", store)
    assert code == 0, message
    assert all(letter.isprintable() or letter == "\n" for letter in printed), printed
    assert "<script>alert(1)</script>" in printed.replace("\n", "")
    assert "[bold]x[/bold]" in printed.replace("\n", "")
    from rich.console import Console

    from circuits.cli.page import show_page

    console = Console(force_terminal=True, width=80, color_system="truecolor", highlight=False)
    with console.capture() as capture:
        show_page(console, FeatureStore(store).page("clt.0", 3), {})
    assert "\x1b[30;48;2;" in capture.get()
    assert "\x1b[31m" not in capture.get()


def test_what_is_wrong_is_said(run, text: Path, tmp_path: Path) -> None:
    """Exit code 2 and one line, without a traceback."""
    wrong = tmp_path / "wrong.sqlite"
    wrong.write_text("not a store")
    cases: list[tuple[tuple[object, ...], str]] = [
        (("features", "show", "clt.0", 1, "--features", wrong), "no feature store"),
        (("features", "show", "clt.0", 1, "--features", tmp_path / "no.sqlite"), "no such feature store"),
        (("features", "show", "clt.9", 1), "no pages of 'clt.9'"),
        (("features", "show", "clt.0", 99999), "clt.0 has 2560 features"),
        (("features", "label", "clt.0", 99999, "x"), "no feature 99999"),
        (("features", "build", "--text", tmp_path / "no.txt", "-o", tmp_path / "s"), "no such file"),
        (("features", "build", "--text", text, "-o", tmp_path / "no" / "s"), "folder does not exist"),
        (("features", "build", "--text", text, "-o", tmp_path / "s", "--window", 9999), "window is 9999"),
        (("features", "build", "--model", "x", "--text", text), "name the file with -o"),
        (("trace", "Tom", "--features", wrong), "no feature store"),
        (("label", tmp_path / "g.json", "--features", wrong, "--model-id", "x"), "not both"),
        (("features", "explain", "clt.0", 1, "--endpoint", "http://example.org", "--model", "m"), "https only"),
    ]
    for arguments, said in cases:
        code, printed, message = run(*arguments)
        assert code == 2, (arguments, message)
        assert said in " ".join(message.split()), (arguments, message)
        assert "Traceback" not in message + printed




def test_html_has_the_pages_of_its_graph(run, tmp_path: Path) -> None:
    """What `trace` and `render` write to be read in a browser holds the embedded store's page of each feature there."""
    assert run("trace", "Tom gave the ball to Mary", "-o", tmp_path, "--format", "json,html", "--quiet")[0] == 0
    assert run("render", tmp_path / "graph.json", "-o", tmp_path / "again.html")[0] == 0
    nodes = Graph.load(tmp_path / "graph.json").nodes
    features = {
        (dictionary, feature)
        for dictionary, feature, there in zip(
            nodes.dictionary.tolist(), nodes.feature.tolist(), nodes.is_feature.tolist(), strict=True
        )
        if there
    }
    for name in ("graph.html", "again.html"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        pages = json.loads(text.split('id="page-data">')[1].split("</script>")[0])
        assert len(features) == len(pages) > 0
