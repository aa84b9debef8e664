"""Feature stores: who is refused, whose labels are shown, what harm text can do, and labels in graphs."""

import json
import os
import sqlite3
import threading
from pathlib import Path

import numpy as np
import pytest
from shelves import HOSTILE, hostile_page, tiny_store
from tiny_models import CASES, build

import circuits
from circuits.errors import CircuitsError
from circuits.feature_records import automatic_label, tidy
from circuits.feature_store import FeatureStore, default_store, own_path, store_of, writable
from circuits.graph import Graph
from circuits.labels import label
from circuits.store_file import opened, packed, unpacked
from circuits.tracing import trace


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "tiny.sqlite"
    tiny_store(path)
    return path


@pytest.fixture
def store(built: Path, tmp_path: Path) -> FeatureStore:
    """A copy that may be changed."""
    path = tmp_path / "copy.sqlite"
    path.write_bytes(built.read_bytes())
    return FeatureStore(path)


@pytest.fixture(scope="module")
def graph() -> Graph:
    case = CASES["gpt2_mtc"]
    return trace(build(case), case.token_ids)


def test_files_that_are_no_store_are_refused(built: Path, tmp_path: Path) -> None:
    """Nothing there, a text, another SQLite file, a later version, half a file: always said, never repaired."""
    with pytest.raises(CircuitsError, match="no such feature store"):
        FeatureStore(tmp_path / "nothing.sqlite")
    assert not (tmp_path / "nothing.sqlite").exists()
    text = tmp_path / "text"
    text.write_text("no database " * 1000)
    with pytest.raises(CircuitsError, match="no feature store"):
        FeatureStore(text)
    db = sqlite3.connect(tmp_path / "other")
    db.execute("CREATE TABLE things (x)")
    db.commit()
    db.close()
    with pytest.raises(CircuitsError, match="no feature store of circuits"):
        FeatureStore(tmp_path / "other")
    later = tmp_path / "later"
    later.write_bytes(built.read_bytes())
    db = sqlite3.connect(later)
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(CircuitsError, match="version 99"):
        FeatureStore(later)
    half = tmp_path / "half"
    half.write_bytes(built.read_bytes()[: len(built.read_bytes()) // 2])
    wanted = [(name, feature) for name in ("clt.0", "clt.1", "clt.2", "mtc.0", "mtc.1") for feature in range(12)]
    with pytest.raises(CircuitsError, match="damaged"):
        FeatureStore(half).pages(wanted)


@pytest.mark.parametrize("blob", [b"", b"no zlib", packed("a text"), packed([{"examples": 3}] * 12), packed([5] * 12)])
def test_a_damaged_page_is_said_to_be_one(store: FeatureStore, blob: bytes) -> None:
    """Bytes that are no pages, or pages of another shape."""
    with opened(store.path, "rw") as db:
        db.execute("UPDATE chunks SET pages = ? WHERE dictionary = 'mtc.1'", (blob,))
    with pytest.raises(CircuitsError, match="damaged"):
        store.page("mtc.1", 3)


def test_nothing_unfolds_without_end(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that is compressed very well is not unfolded."""
    monkeypatch.setattr("circuits.store_file.LARGEST", 1000)
    assert unpacked(packed("x" * 900), store.path) == "x" * 900
    with pytest.raises(CircuitsError, match="too large"):
        unpacked(packed("x" * 10_000), store.path)


def test_a_missing_page_is_said_to_be_missing(store: FeatureStore) -> None:
    """With what there is."""
    with pytest.raises(CircuitsError, match=r"no pages of 'clt.9'.*clt.0"):
        store.page("clt.9", 0)
    for feature in (12, -1):
        with pytest.raises(CircuitsError, match="has 12 features"):
            store.page("clt.0", feature)
    assert store.pages([("clt.0", 99), ("clt.9", 1), ("clt.0", 1)]).keys() == {("clt.0", 1)}


def test_labels_by_rank_of_their_authors(store: FeatureStore) -> None:
    """A person's before any model's, the later model's before the earlier one's, the automatic one last."""
    automatic = store.page("mtc.1", 3)
    assert automatic["label_by"] == "automatic"
    assert automatic["label"]
    store.set_label("mtc.1", 3, "one", "model a")
    store.set_label("mtc.1", 3, "two", "model b")
    assert store.label("mtc.1", 3) == "two"
    store.set_label("mtc.1", 3, "one again", "model a")
    assert store.label("mtc.1", 3) == "one again"
    store.set_label("mtc.1", 3, "mine")
    store.set_label("mtc.1", 3, "three", "model c")
    page = store.page("mtc.1", 3)
    assert (page["label"], page["label_by"]) == ("mine", "person")
    store.set_label("mtc.1", 3, "  ")
    assert store.page("mtc.1", 3)["label_by"] == "model c"
    assert store.label("mtc.1", 4) == store.page("mtc.1", 4)["label"] != "mine"
    with pytest.raises(CircuitsError, match="no feature 12"):
        store.set_labels([("mtc.1", 3, "half"), ("mtc.1", 12, "no")])
    assert store.label("mtc.1", 3) == "three"
    with pytest.raises(CircuitsError, match="nobody wrote"):
        store.set_label("mtc.1", 3, "x", "automatic")


def test_an_automatic_label_is_its_strongest_tokens_and_outputs() -> None:
    """By sums of activations of the top examples; nothing for a feature that does nothing."""
    from circuits.feature_records import Words

    words = Words({0: " cat", 1: " dog", 2: ".", 3: " said", 4: "\n", 5: "Cat"}, {0: [0, 1, 2, 0]})
    record = {
        "examples": [["top", 0, 0, 4, [0, 1.0, 1, 1.5, 3, 1.0]], ["quantile 1 of 5", 0, 1, 2, [1, 9.0]]],
        "outputs": [[3, 0.5], [4, 0.2], [2, -0.1]],
    }
    assert automatic_label(record, words) == r"cat, dog → said, '\n'"
    assert automatic_label({"examples": [], "outputs": []}, words) == ""
    assert automatic_label({"examples": [], "outputs": [[3, 0.1]]}, words) == "→ said"


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_labels_are_one_printable_line(store: FeatureStore, text: str) -> None:
    """As labels and as authors: nothing executes, nothing escapes its line, and the tables stand."""
    store.set_label("mtc.1", 3, text * 50, text or "x")
    kept = store.label("mtc.1", 3)
    assert kept.isprintable()
    assert len(kept) <= 200
    assert store.page("mtc.1", 3)["label_by"].isprintable()
    assert store.label("mtc.1", 4)
    assert tidy(kept) == kept
    json.dumps(store.page("mtc.1", 3)).encode("ascii")


def test_hostile_tokens_stay_text(store: FeatureStore) -> None:
    """What stands in the text comes back as it was, but for what no file can hold."""
    hostile_page(store)
    page = store.page("clt.0", 3)
    assert page["examples"][0]["tokens"] == [text.replace("\ud800", "?") for text in HOSTILE]
    assert page["tokens_seen"] == 7
    assert page["label"].isprintable()
    assert store.page("clt.0", 4)["label_by"] == "automatic"  # its neighbours in the chunk are as they were


def test_graphs_get_labels_and_pages(store: FeatureStore, graph: Graph) -> None:
    """The label of every feature node, both sides of one that moves; tokens keep theirs."""
    store.set_label("mtc.1", int(graph.nodes.feature[graph.nodes.dictionary == "mtc.1"][0]), "mine")
    done = label(graph, store)
    nodes = done.graph.nodes
    expected = {key: store.label(*key) for key in {*zip(nodes.dictionary.tolist(), nodes.feature.tolist())} if key[0]}
    assert len(expected) > 10
    for node in np.flatnonzero(nodes.is_feature).tolist():
        assert nodes.label[node] == expected[str(nodes.dictionary[node]), int(nodes.feature[node])]
    assert "mine" in nodes.label.tolist()
    assert (nodes.label[~nodes.is_feature] == graph.nodes.label[~nodes.is_feature]).all()
    assert done.features == int(nodes.is_feature.sum())
    pages = store.pages(graph)
    assert pages.keys() == expected.keys()
    assert all(page["label"] == expected[key] for key, page in pages.items())


def test_graphs_of_something_else_are_refused(store: FeatureStore, graph: Graph) -> None:
    """Another model, or other dictionaries of the same name; a graph without any is labelled as far as it goes."""
    other = CASES["llama_lorsa"]
    with pytest.raises(CircuitsError, match="traced with tiny-llama"):
        label(trace(build(other), other.token_ids), store)
    model = build(CASES["gpt2_mtc"])
    for replacement in model.replacements:
        replacement.__dict__["identity"] = "1" * 64
    with pytest.raises(CircuitsError, match=r"of the replacement (mlp|moved)"):
        label(trace(model, CASES["gpt2_mtc"].token_ids), store)


def test_many_read_and_write_at_once(store: FeatureStore) -> None:
    """Threads, as a server has them."""
    failed = []

    def work(number: int) -> None:
        try:
            for i in range(12):
                store.set_label("clt.1", i, f"label {number}", f"author {number}")
                assert store.page("clt.1", i)["label"].startswith("label")
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_a_file_that_may_not_be_written_is_read(store: FeatureStore) -> None:
    """Pages come from a read-only file; a label does not go there, and it is said why."""
    if os.geteuid() == 0:
        with opened(store.path) as db, pytest.raises(sqlite3.OperationalError, match="readonly"):
            db.execute("DELETE FROM labels")
        return
    store.path.chmod(0o444)
    store.path.parent.chmod(0o555)
    try:
        assert store.page("clt.0", 1)
        with pytest.raises(CircuitsError, match="cannot be opened or written"):
            store.set_label("clt.0", 1, "x")
    finally:
        store.path.parent.chmod(0o755)


def test_the_default_has_a_store_and_the_user_one_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What came with the package is read; what is written goes to a copy in the user's folder, which is then read."""
    shipped = default_store()
    assert shipped is not None
    before = shipped.path.read_bytes()
    assert not own_path().exists()
    mine = FeatureStore(writable(None))
    assert mine.path == own_path()
    mine.set_label("clt.0", 123, "mine")
    found = default_store()
    assert found is not None
    assert found.page("clt.0", 123)["label"] == "mine"
    assert shipped.path.read_bytes() == before
    assert shipped.label("clt.0", 123) != "mine"


def test_every_feature_of_the_default_has_a_page() -> None:
    """All dictionaries of `attention-sae` and `mtc`, of these very replacements; nearly all features with examples."""
    store = default_store()
    assert store is not None
    stored = store.dictionaries()
    for name in ("attention-sae", "mtc"):
        model = circuits.load(None, name)
        assert store.model()["hash"] == model.base.identity
        for replacement in model.replacements:
            for dictionary in replacement.dictionaries:
                one = stored[dictionary.name]
                assert (one.hash, one.features) == (replacement.identity, dictionary.n_features)
                pages = store.pages([(dictionary.name, feature) for feature in range(dictionary.n_features)])
                assert len(pages) == dictionary.n_features
                shown = sum(bool(page["examples"]) for page in pages.values()) / len(pages)
                assert shown > 0.75, (dictionary.name, shown)
                assert all(page["top_outputs"] for page in pages.values())


def test_traces_of_the_default_find_their_store() -> None:
    """By its hash; a graph of another model has none unless it is named."""
    model = circuits.load()
    graph = circuits.trace(model, "Tom was very happy because")
    store = store_of(graph)
    assert store is not None
    assert label(graph, store).found > 0.9 * int(graph.nodes.is_feature.sum())
    case = CASES["gpt2_mtc"]
    assert store_of(trace(build(case), case.token_ids)) is None
