"""Small stores for tests: one of a tiny model, and one whose pages are written by hand."""

from pathlib import Path

from test_building import SETTINGS, some_documents
from tiny_models import CASES, build

from circuits.feature_building import build_features
from circuits.feature_records import Record, Words
from circuits.feature_store import FeatureStore
from circuits.text import DocumentSource

HOSTILE = [
    "<script>alert(1)</script>", "'; DROP TABLE labels; --", "a\u202eb", "\x1b[31mred", "[bold]x[/bold]", "\x00",
    "\ud800", "line\nbreak", "] [red", "{0.__class__}", "😀",
]  # fmt: skip


def tiny_store(path: Path, case: str = "gpt2_mtc") -> FeatureStore:
    """Pages of a tiny model."""
    return build_features(build(CASES[case]), DocumentSource.of(some_documents()), path, SETTINGS)


def hostile_page(store: FeatureStore, dictionary: str = "clt.0", feature: int = 3) -> None:
    """Give a feature a page all of whose tokens mean harm."""
    texts = dict(enumerate(HOSTILE))
    record: Record = {
        "density": 0.5,
        "largest": 2.0,
        "histogram": [0.0, 1.0, [1, 2]],
        "outputs": [[number, 1.0] for number in texts],
        "bottom": [[number, -1.0] for number in texts],
        "examples": [["top", 0, 0, len(texts), [part for n in texts for part in (n, 2.0)]]],
        "decoder": [["<b>", 1, 0.5]],
        "together": [],
        "tokens_seen": 7,
    }
    store.write_pages(dictionary, {feature: record}, Words(texts, {0: list(texts)}))
