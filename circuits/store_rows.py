"""The rows of a feature store: dictionaries, records in their chunks, the words that they speak of, and labels.

Functions of an open connection (`circuits.store_file`); what is handed out is put together in `circuits.feature_store`.
"""

import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuits.errors import CircuitsError
from circuits.feature_records import AUTOMATIC, PERSON, Record, Words, automatic_label
from circuits.store_file import packed, unpacked

if TYPE_CHECKING:
    from circuits.model import BaseModel
    from circuits.replacements.dictionary import Dictionary, Replacement

BROKEN = (AttributeError, IndexError, KeyError, TypeError, ValueError)  # what a record of another shape leads to
CHUNK = 64  # pages that are compressed together


@dataclass(frozen=True)
class Stored:
    """One dictionary of a store: the replacement that it is of, and what its pages were built from."""

    name: str
    kind: str
    features: int
    replacement: str
    hash: str
    tokens_seen: int
    build: dict[str, Any]


def about(db: sqlite3.Connection, path: Path, key: str) -> dict[str, Any]:
    """A fact about the store; nothing if it is not written down."""
    row = db.execute("SELECT value FROM about WHERE key = ?", (key,)).fetchone()
    found = unpacked(row[0], path) if row else {}
    return found if isinstance(found, dict) else {}


def write_model(db: sqlite3.Connection, model: "BaseModel") -> None:
    """Say which base model the pages are of, if nothing says so yet."""
    name = packed({"name": model.name, "hash": model.identity})
    db.execute("INSERT OR IGNORE INTO about VALUES ('model', ?)", (name,))


def write_dictionary(
    db: sqlite3.Connection,
    dictionary: "Dictionary",
    replacement: "Replacement",
    tokens: int = 0,
    build: dict[str, Any] | None = None,
) -> None:
    """A dictionary without pages, in the place of the one of its name; its labels stay."""
    name, count = dictionary.name, dictionary.n_features
    db.execute("DELETE FROM chunks WHERE dictionary = ?", (name,))
    about_it = (name, dictionary.kind, count, replacement.name, replacement.identity, tokens)
    labels = packed([""] * count)
    row = (*about_it, packed(build or {}), labels)
    db.execute("INSERT OR REPLACE INTO dictionaries VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)


def read_records(
    db: sqlite3.Connection, path: Path, wanted: Iterable[tuple[str, int]]
) -> dict[tuple[str, int], Record]:
    """Records of some features; those that there are."""
    chunks: dict[tuple[str, int], list[int]] = {}
    for name, feature in sorted(set(wanted)):
        chunks.setdefault((name, feature // CHUNK * CHUNK), []).append(feature)
    found = {}
    for (name, first), features in chunks.items():
        records = _chunk(db, path, name, first)
        for feature in features:
            if 0 <= feature - first < len(records) and records[feature - first]:
                found[name, feature] = records[feature - first]
    return found


def write_records(db: sqlite3.Connection, path: Path, records: Mapping[tuple[str, int], Record]) -> None:
    """Put records in their chunks, and the automatic labels in their dictionaries; inside a transaction."""
    words = words_of(db, path, records)
    chunks: dict[tuple[str, int], dict[int, Record]] = {}
    for (name, feature), record in records.items():
        chunks.setdefault((name, feature // CHUNK * CHUNK), {})[feature] = record
    for (name, first), given in chunks.items():
        held = _chunk(db, path, name, first)
        held += [None] * (max(given) - first + 1 - len(held))
        for feature, record in given.items():
            held[feature - first] = record
        db.execute("INSERT OR REPLACE INTO chunks VALUES (?, ?, ?)", (name, first, packed(held)))
    for name in {name for name, _ in records}:
        row = db.execute("SELECT features, labels FROM dictionaries WHERE name = ?", (name,)).fetchone()
        labels = unpacked(row[1], path) or [""] * row[0]
        for (of, feature), record in records.items():
            if of == name:
                labels[feature] = automatic_label(record, words)
        db.execute("UPDATE dictionaries SET labels = ? WHERE name = ?", (packed(labels), name))


def words_of(db: sqlite3.Connection, path: Path, records: Mapping[tuple[str, int], Record]) -> Words:
    """The texts that records speak of."""
    documents: dict[int, list[int]] = {}
    numbers: set[int] = set()
    for key, record in records.items():
        try:
            for example in record["examples"]:
                if example[1] not in documents:
                    row = db.execute("SELECT tokens FROM documents WHERE number = ?", (example[1],)).fetchone()
                    documents[example[1]] = unpacked(row[0], path) if row else []
                    numbers.update(documents[example[1]])
            numbers.update(number for number, _ in (*record["outputs"], *record["bottom"]))
        except BROKEN as error:
            raise damaged(path, *key) from error
    texts = {}
    for number in numbers:
        row = db.execute("SELECT text FROM texts WHERE number = ?", (number,)).fetchone()
        texts[number] = str(row[0]) if row else "�"
    return Words(texts, documents)


def add_texts(db: sqlite3.Connection, texts: Mapping[int, str]) -> dict[str, int]:
    """The numbers of texts, of which some may be new."""
    clean = {text: text.encode("utf-8", "replace").decode() for text in texts.values()}
    db.executemany("INSERT OR IGNORE INTO texts (text) VALUES (?)", [(one,) for one in dict.fromkeys(clean.values())])
    found = {}
    for text, one in clean.items():
        found[text] = int(db.execute("SELECT number FROM texts WHERE text = ?", (one,)).fetchone()[0])
    return found


def next_document(db: sqlite3.Connection) -> int:
    """The first free number of a document."""
    return int(db.execute("SELECT coalesce(max(number) + 1, 0) FROM documents").fetchone()[0])


def forget_unused(db: sqlite3.Connection, path: Path) -> None:
    """Drop documents that no example is from."""
    used = set()
    for (blob,) in db.execute("SELECT pages FROM chunks").fetchall():
        used |= {example[1] for record in unpacked(blob, path) if record for example in record["examples"]}
    unused = [row for row in db.execute("SELECT number FROM documents").fetchall() if row[0] not in used]
    db.executemany("DELETE FROM documents WHERE number = ?", unused)


def _chunk(db: sqlite3.Connection, path: Path, name: str, first: int) -> list[Any]:
    row = db.execute("SELECT pages FROM chunks WHERE (dictionary, first) = (?, ?)", (name, first)).fetchone()
    found = unpacked(row[0], path) if row else []
    if not isinstance(found, list):
        raise damaged(path, name, first)
    return found


def stored_dictionaries(db: sqlite3.Connection, path: Path) -> dict[str, Stored]:
    columns = "name, kind, features, replacement, hash, tokens_seen, build"
    found = {}
    for row in db.execute(f"SELECT {columns} FROM dictionaries ORDER BY name").fetchall():
        name, kind, features, replacement, digest, tokens, build = row
        found[name] = Stored(name, kind, features, replacement, digest, tokens, unpacked(build, path))
    return found


def labels_of(
    db: sqlite3.Connection, path: Path, wanted: Iterable[tuple[str, int]]
) -> dict[tuple[str, int], tuple[str, str]]:
    """Label and author of some features: a person's first, then the last that was written, then the automatic one."""
    automatic: dict[str, list[str]] = {}
    found = {}
    for name, feature in wanted:
        if name not in automatic:
            row = db.execute("SELECT labels FROM dictionaries WHERE name = ?", (name,)).fetchone()
            automatic[name] = unpacked(row[0], path) if row else []
        written = db.execute(
            "SELECT label, author FROM labels WHERE (dictionary, feature) = (?, ?) ORDER BY author != ?, written DESC",
            (name, feature, PERSON),
        ).fetchone()
        own = automatic[name][feature] if 0 <= feature < len(automatic[name]) else ""
        found[name, feature] = (str(written[0]), str(written[1])) if written else (str(own), AUTOMATIC)
    return found


def damaged(path: Path, name: str, feature: int) -> CircuitsError:
    return CircuitsError(f"{path}: the page of feature {feature} of {name} is damaged; build the store again")
