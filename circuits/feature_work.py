"""A build of feature pages under way: the open store with the tables of the work, and what it is of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import Connection
from typing import Any

from circuits.feature_gathering import Settings
from circuits.feature_inputs import Documents, run_documents
from circuits.loading import Model
from circuits.replacements.dictionary import Dictionary
from circuits.store_file import packed, unpacked
from circuits.text import Document, DocumentSource

Progress = Callable[[int, int], None]
TABLES = """
CREATE TABLE IF NOT EXISTS work_progress (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS work_state (dictionary TEXT PRIMARY KEY, arrays BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS work_documents (number INTEGER PRIMARY KEY, tokens BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS work_sample (
    dictionary TEXT, batch INTEGER, entries BLOB NOT NULL, PRIMARY KEY (dictionary, batch)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS work_examples (
    dictionary TEXT, feature INTEGER, number INTEGER, example TEXT NOT NULL,
    PRIMARY KEY (dictionary, feature, number)) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Work:
    """A build under way: the open store, and what it is of.

    every
        Seconds between two times that the state of the first pass is written down.
    """

    db: Connection
    path: Path
    model: Model
    source: DocumentSource
    settings: Settings
    dictionaries: tuple[Dictionary, ...]
    every: float
    progress: Progress

    def kept(self, key: str) -> Any:
        """A fact about how far the work is; None if it is not that far."""
        row = self.db.execute("SELECT value FROM work_progress WHERE key = ?", (key,)).fetchone()
        return unpacked(row[0], self.path) if row else None

    def keep(self, key: str, value: Any) -> None:
        """Write such a fact down."""
        self.db.execute("INSERT OR REPLACE INTO work_progress VALUES (?, ?)", (key, packed(value)))

    def report(self, begin: float, end: float, share: float) -> None:
        """Say how far the work is, of which a part goes from `begin` to `end`; the whole is shown as tokens."""
        total = self.settings.tokens
        self.progress(round(total * (begin + (end - begin) * min(share, 1.0))), total)

    def run_of(self, documents: Sequence[Document]) -> Documents:
        """Documents run for the dictionaries of this build."""
        return run_documents(self.model.base, documents, self.dictionaries)
