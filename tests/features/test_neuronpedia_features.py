"""Feature pages in Neuronpedia's format: its own features are read, ours come back whole, bad files are refused."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from shelves import HOSTILE, hostile_page, tiny_store
from test_building import SETTINGS, some_documents
from tiny_models import CASES, build

from circuits.errors import CircuitsError
from circuits.feature_building import build_features, empty_store
from circuits.feature_store import FeatureStore
from circuits.neuronpedia_features import export_features, import_features
from circuits.text import DocumentSource

# As https://www.neuronpedia.org/api/feature/MODEL/SOURCE/INDEX answers, cut to the fields of schema.prisma that matter.
THEIRS: dict[str, Any] = {
    "modelId": "gpt2-small",
    "layer": "6-res-jb",
    "index": "4",
    "sourceSetName": "res-jb",
    "frac_nonzero": 0.00123,
    "maxActApprox": 12.345678,
    "pos_str": [" cats", " dogs"],
    "pos_values": [1.23456789, 1.1],
    "neg_str": ["xyz"],
    "neg_values": [-0.75],
    "freq_hist_data_bar_heights": [10, 5, 1],
    "freq_hist_data_bar_values": [1.0, 3.0, 5.0],
    "logits_hist_data_bar_heights": [1],
    "logits_hist_data_bar_values": [0.5],
    "correlated_features_indices": [7],
    "correlated_features_pearson": [0.5],
    "topkCosSimIndices": [8, 9],
    "topkCosSimValues": [0.9, 0.8],
    "decoder_weights_dist": [0.25, 0.75],
    "activations": [
        {
            "tokens": [" the", " cat", " sat"],
            "values": [0, 12.345678, 0.1],
            "maxValue": 12.345678,
            "maxValueTokenIndex": 1,
            "minValue": 0,
            "binMin": -1,
            "binMax": -1,
            "binContains": -1,
        },
        {"tokens": ["a", "b"], "values": [1, 0], "binMin": 0.5, "binMax": 1.5, "binContains": 0.25},
    ],
    "explanations": [
        {"description": "cats and <b>dogs</b>", "typeName": "oai_token-act-pair", "explanationModelName": "gpt-4o"}
    ],
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "tiny.sqlite"
    tiny_store(path)
    return path


@pytest.fixture
def store(built: Path, tmp_path: Path) -> FeatureStore:
    path = tmp_path / "copy.sqlite"
    path.write_bytes(built.read_bytes())
    return FeatureStore(path)


def test_their_features_become_pages(store: FeatureStore, tmp_path: Path) -> None:
    """Every number as it was, examples by their bins, the explanation as its model's label."""
    file = tmp_path / "feature.json"
    file.write_text(json.dumps(THEIRS))
    other = store.page("clt.0", 5)
    assert import_features(store, "clt.0", file) == 1
    page = store.page("clt.0", 4)
    assert page == {
        "dictionary": "clt.0",
        "feature": 4,
        "kind": "clt",
        "label": "cats and <b>dogs</b>",
        "label_by": "gpt-4o",
        "tokens_seen": 0,
        "density": 0.00123,
        "largest": 12.345678,
        "histogram": {"edges": [0.0, 2.0, 4.0, 6.0], "counts": [10, 5, 1]},
        "examples": [
            {
                "group": "top",
                "tokens": [" the", " cat", " sat"],
                "activations": [0.0, 12.345678, 0.1],
                "document": page["examples"][0]["document"],
                "start": 0,
            },
            {
                "group": "0.5 to 1.5",
                "tokens": ["a", "b"],
                "activations": [1.0, 0.0],
                "document": page["examples"][1]["document"],
                "start": 0,
            },
        ],
        "top_outputs": [[" cats", 1.23456789], [" dogs", 1.1]],
        "bottom_outputs": [["xyz", -0.75]],
        "head_loading": [[0, 0.25], [1, 0.75]],
        "near_by_decoder": [["6-res-jb", 8, 0.9], ["6-res-jb", 9, 0.8]],
        "near_by_coactivation": [["6-res-jb", 7, 0.5]],
    }
    assert store.page("clt.0", 5) == other


def without_places(page: dict[str, Any]) -> dict[str, Any]:
    """A page without the places of its examples, which are another store's own."""
    examples = [{**example, "document": 0, "start": 0} for example in page["examples"]]
    return {**page, "examples": examples}


@pytest.mark.parametrize("name", ["clt.0", "mtc.1"])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_our_pages_come_back_whole(store: FeatureStore, built: Path, tmp_path: Path, name: str, suffix: str) -> None:
    """All of a dictionary, out and into another store whose pages were others."""
    hostile_page(store)
    store.set_label(name, 2, "mine")
    store.set_label(name, 5, "a model's", "gpt")
    file = tmp_path / f"pages{suffix}"
    assert export_features(store, name, file) == 12
    fresh = FeatureStore(tmp_path / "fresh.sqlite") if (tmp_path / "fresh.sqlite").exists() else None
    assert fresh is None
    (tmp_path / "fresh.sqlite").write_bytes(built.read_bytes())
    fresh = FeatureStore(tmp_path / "fresh.sqlite")
    theirs = [{**page, "index": (page["index"] + 1) % 12} for page in lines(file)]
    shifted = tmp_path / "shifted.json"
    shifted.write_text(json.dumps({"features": theirs}))
    assert import_features(fresh, name, shifted) == 12  # every page is another now
    fresh.set_label(name, 3, "")
    fresh.set_label(name, 6, "", "gpt")
    assert import_features(fresh, name, file) == 12
    for feature in range(12):
        assert without_places(fresh.page(name, feature)) == without_places(store.page(name, feature)), feature


def lines(file: Path) -> list[dict[str, Any]]:
    """The features of a file, their index a number."""
    text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return [{**(one := json.loads(line)), "index": int(one["index"])} for line in text.splitlines()]


def test_what_is_written_is_what_they_have(store: FeatureStore, tmp_path: Path) -> None:
    """Parallel lists of one length, strings and finite numbers, each activation's largest value at its place."""
    hostile_page(store)
    file = tmp_path / "out.jsonl"
    export_features(store, "mtc.1", file, model="gpt2-small", source="1-mtc")
    for one in lines(file):
        assert one.keys() >= THEIRS.keys() - {"sourceSetName"}
        assert (one["modelId"], one["layer"]) == ("gpt2-small", "1-mtc")
        for a, b in (
            ("pos_str", "pos_values"),
            ("neg_str", "neg_values"),
            ("freq_hist_data_bar_heights", "freq_hist_data_bar_values"),
            ("topkCosSimIndices", "topkCosSimValues"),
            ("correlated_features_indices", "correlated_features_pearson"),
        ):
            assert len(one[a]) == len(one[b])
        assert len(one["decoder_weights_dist"]) == 4
        for shown in one["activations"]:
            assert len(shown["tokens"]) == len(shown["values"]) == len(shown["dfaValues"])
            assert shown["values"][shown["maxValueTokenIndex"]] == shown["maxValue"] == max(shown["values"])
            assert 0 <= shown["dfaTargetIndex"] < len(shown["tokens"])
    file.read_bytes().decode("ascii")  # Neuronpedia's loader sees escapes alone
    export_features(store, "clt.0", file, [3])
    assert [shown["tokens"] for shown in lines(file)[0]["activations"]] == [[t.replace("\ud800", "?") for t in HOSTILE]]


def test_pages_of_a_model_that_has_none(tmp_path: Path) -> None:
    """A new store for its dictionaries; building fills in what was not imported, and is not taken for done."""
    model = build(CASES["gpt2_mtc"])
    store = empty_store(model, tmp_path / "new.sqlite")
    file = tmp_path / "feature.json"
    file.write_text(json.dumps(THEIRS))
    import_features(store, "clt.0", file)
    assert store.page("clt.0", 4)["label"] == "cats and <b>dogs</b>"
    with pytest.raises(CircuitsError, match="no page of feature 5"):
        store.page("clt.0", 5)
    assert empty_store(model, store.path).page("clt.0", 4)["density"] == 0.00123
    build_features(model, DocumentSource.of(some_documents()), store.path, SETTINGS)
    assert store.page("clt.0", 5)["tokens_seen"] > 0
    assert store.page("clt.0", 4)["density"] != 0.00123
    assert store.page("clt.0", 4)["label_by"] == "gpt-4o"


def test_a_persons_label_is_not_overwritten(store: FeatureStore, tmp_path: Path) -> None:
    """By one that comes from a file."""
    store.set_label("clt.0", 1, "theirs")
    file = tmp_path / "out.jsonl"
    export_features(store, "clt.0", file, [1])
    store.set_label("clt.0", 1, "mine")
    import_features(store, "clt.0", file)
    assert store.page("clt.0", 1)["label"] == "mine"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"index": None}, "no feature"),
        ({"index": "12"}, "has 12"),
        ({"index": "-1"}, "has 12"),
        ({"pos_values": [1.0]}, "shorter"),
        ({"pos_str": [1, 2]}, "expected text"),
        ({"maxActApprox": "much"}, "no finite number"),
        ({"maxActApprox": float("nan")}, "no finite number"),
        ({"activations": [{"tokens": ["a"], "values": [1, 2]}]}, "1 tokens and 2 values"),
        ({"activations": "none"}, "expected a list"),
        ({"activations": [{"values": []}]}, "tokens"),
        ({"circuits": {"near_by_decoder": [[1, 2]]}}, "not enough values"),
        ({"explanations": [3]}, "no attribute"),
        ({"freq_hist_data_bar_heights": [float("inf")]}, "infinity"),
    ],
)
def test_bad_entries_are_refused_whole(store: FeatureStore, tmp_path: Path, change: Any, said: str) -> None:
    """With the file, the entry and the reason; nothing of the file is taken over."""
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps(THEIRS) + "\n" + json.dumps({**THEIRS, "index": "5", **change}) + "\n")
    before = store.path.read_bytes()
    with pytest.raises(CircuitsError, match=f"bad.jsonl: entry 2.*{said}"):
        import_features(store, "clt.0", file)
    assert store.path.read_bytes() == before


def test_bad_files_are_refused(store: FeatureStore, tmp_path: Path) -> None:
    """No JSON, nothing in it, not there, half a gzip; a dictionary that the store does not have."""
    file = tmp_path / "bad.json"
    for content, said in (("{", "could not be read"), ("[]", "no features"), ("[3]", "entry 1"), ("\xff", "read")):
        file.write_text(content, encoding="latin-1")
        with pytest.raises(CircuitsError, match=said):
            import_features(store, "clt.0", file)
    with pytest.raises(CircuitsError, match="could not be read"):
        import_features(store, "clt.0", tmp_path / "nothing")
    half = tmp_path / "half.gz"
    half.write_bytes(gzip.compress(json.dumps(THEIRS).encode())[:40])
    with pytest.raises(CircuitsError, match="could not be read"):
        import_features(store, "clt.0", half)
    with pytest.raises(CircuitsError, match="no dictionary 'clt"):
        import_features(store, "clt.7", file)
    with pytest.raises(CircuitsError, match="no pages of 'clt"):
        export_features(store, "clt.7", file)
    with pytest.raises(CircuitsError, match="no page of feature 99"):
        export_features(store, "clt.0", file, [1, 99])
