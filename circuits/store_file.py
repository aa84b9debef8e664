"""The SQLite file of a feature store: its tables, how it is opened, and how a file that is none is refused.

    about         facts about the store as JSON: the base model's name and hash
    dictionaries  one row a dictionary: its replacement and hash, the text, and the automatic labels of its features
    chunks        pages of 64 features together, compressed JSON (`circuits.feature_records`)
    documents     the stretches of text that examples are from, as numbers of `texts`
    texts         token texts
    labels        what persons and models call features; no rebuild touches them
    work_*        only while a build is under way (`circuits.feature_building`)

While a build writes, the file is in WAL mode, and others may read; when it is done it is one plain file again.
"""

import json
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from circuits.errors import CircuitsError

APPLICATION, VERSION = 0x63697263, 1  # "circ"
LARGEST = 1 << 28  # bytes that a compressed value may unfold to
_TABLES = """
CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE dictionaries (
    name TEXT PRIMARY KEY, kind TEXT NOT NULL, features INTEGER NOT NULL, replacement TEXT NOT NULL,
    hash TEXT NOT NULL, tokens_seen INTEGER NOT NULL, build TEXT NOT NULL, labels BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE chunks (
    dictionary TEXT NOT NULL, first INTEGER NOT NULL, pages BLOB NOT NULL, PRIMARY KEY (dictionary, first)
) WITHOUT ROWID;
CREATE TABLE documents (number INTEGER PRIMARY KEY, tokens BLOB NOT NULL);
CREATE TABLE texts (number INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE);
CREATE TABLE labels (
    dictionary TEXT NOT NULL, feature INTEGER NOT NULL, author TEXT NOT NULL, label TEXT NOT NULL,
    written INTEGER NOT NULL,
    PRIMARY KEY (dictionary, feature, author)
) WITHOUT ROWID;
"""


@contextmanager
def opened(path: Path, mode: str = "ro") -> Iterator[sqlite3.Connection]:
    """The file's connection, in autocommit.

    mode
        `ro` to read, `rw` to change, `rwc` to make it if it is not there.

    Raises
    ------
    CircuitsError
        There is no such file, it is no feature store or of a later version, it is damaged, or somebody else writes.
    """
    if mode != "rwc" and not path.is_file():
        raise CircuitsError(f"{path}: no such feature store; build one with `circuits features build -o {path}`")
    if mode == "rwc" and not path.parent.is_dir():
        raise CircuitsError(f"{path}: its folder does not exist; make it first")
    try:
        db = sqlite3.connect(f"{path.resolve().as_uri()}?mode={mode}", uri=True, timeout=10, isolation_level=None)
        try:
            db.execute("PRAGMA trusted_schema = OFF")
            _check(db, path, make=mode == "rwc")
            yield db
        finally:
            db.close()
    except sqlite3.Error as error:
        raise CircuitsError(f"{path}: {_reason(error)}") from error


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All of what is written within, or nothing."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def packed(value: Any) -> bytes:
    """A JSON value, compressed."""
    return zlib.compress(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(), 9)


def unpacked(blob: Any, path: Path) -> Any:
    """The inverse of `packed`; a file that says otherwise is damaged."""
    try:
        unfolding = zlib.decompressobj()
        text = unfolding.decompress(blob, LARGEST)
        if unfolding.unconsumed_tail:
            raise ValueError("too large")
        return json.loads(text)
    except (zlib.error, ValueError, TypeError) as error:
        raise CircuitsError(f"{path}: the feature store is damaged ({error}); build it again") from error


def _check(db: sqlite3.Connection, path: Path, *, make: bool) -> None:
    application = db.execute("PRAGMA application_id").fetchone()[0]
    version = db.execute("PRAGMA user_version").fetchone()[0]
    tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if make and not tables and not application:
        db.executescript(
            f"BEGIN; {_TABLES} PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {VERSION}; COMMIT;"
        )
    elif application != APPLICATION:
        raise CircuitsError(f"{path}: is an SQLite file, but no feature store of circuits; name another file")
    elif version != VERSION:
        raise CircuitsError(
            f"{path}: is a feature store of version {version}, this is circuits for version {VERSION}; build it again"
        )


def _reason(error: sqlite3.Error) -> str:
    words = str(error)
    if "not a database" in words or "malformed" in words:
        return f"is no feature store, or a damaged one ({words}); name another file, or build it again"
    if "locked" in words:
        return "somebody else is writing to this feature store; try again when that is done"
    if "readonly" in words or "unable to open" in words:
        return f"cannot be opened or written ({words}); check the path, or copy the file to where you may write"
    return f"the feature store could not be used ({words})"
