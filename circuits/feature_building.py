"""`circuits features build`: a text through a model and its replacements, and a page for every feature.

The first pass (`feature_gathering`) counts and chooses places, the second (`feature_examples`) looks at what happens
around these, and at the end comes what hangs on weights alone (`feature_weights`) and on pairs (`coactivation`). All
that a pass has done is in the store, so a build that is stopped goes on where it last wrote that down, and ends with
the same pages: batches are the same ones, and what is kept of them hangs on places in the text, not on times.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from sqlite3 import Connection
from typing import Any

import numpy as np

from circuits.errors import CircuitsError
from circuits.feature_examples import documents_of, examples
from circuits.feature_finishing import finish
from circuits.feature_gathering import Chosen, Entries, Gathered, Settings, choose, sampled_tokens
from circuits.feature_store import FeatureStore
from circuits.feature_work import TABLES, Progress, Work
from circuits.loading import Model
from circuits.replacements.dictionary import Dictionary
from circuits.store_file import opened, transaction
from circuits.store_rows import about, stored_dictionaries, write_dictionary, write_model
from circuits.text import Document, DocumentSource

COUNTS = ("tokens", "counted", "documents", "batch", "sampled")


def build_features(
    model: Model,
    source: DocumentSource,
    path: str | Path,
    settings: Settings | None = None,
    *,
    again: bool = False,
    every: float = 20.0,
    progress: Progress = lambda done, total: None,
) -> FeatureStore:
    """Build the pages of all features of a model's dictionaries, or go on building them.

    Parameters
    ----------
    source
        The text, from `circuits.text.open_text`.
    path
        The store; made if it is not there. Dictionaries whose pages it has already are left alone.
    again
        Build the pages of those too; labels that were written stay.
    progress
        Called with (done, total).

    Raises
    ------
    CircuitsError
        The store is of another model or of other replacements, was begun with other settings, or the text is empty.
    """
    settings, path = settings or Settings(), Path(path)
    settings.check(model.base.shape.context)
    if not any(replacement.dictionaries for replacement in model.replacements):
        raise CircuitsError("the model has no replacement whose features could have pages; give one as --replacement")
    with opened(path, "rwc") as db:
        chosen = _dictionaries_to_build(db, path, model, again)
        if chosen:
            db.execute("PRAGMA journal_mode = WAL")
            work = Work(db, path, model, source.from_start(), settings, chosen, every, progress)
            _begin(work)
            _first_pass(work)
            gathered = _restored(work)
            _second_pass(work, [choose(one) for one in gathered])
            with transaction(db):
                finish(work, gathered)
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            db.execute("PRAGMA journal_mode = DELETE")
            db.execute("PRAGMA page_size = 1024")  # less is lost behind each chunk of pages
            db.execute("VACUUM")
    return FeatureStore(path)


def empty_store(model: Model, path: str | Path) -> FeatureStore:
    """A store for a model's dictionaries in which no feature has a page yet, for pages that come from elsewhere.

    Raises
    ------
    CircuitsError
        The store is there and of another model or of other replacements.
    """
    path = Path(path)
    with opened(path, "rwc") as db:
        known = stored_dictionaries(db, path)
        chosen = _dictionaries_to_build(db, path, model, again=False)
        with transaction(db):
            write_model(db, model.base)
            for replacement in model.replacements:
                for dictionary in replacement.dictionaries:
                    if dictionary in chosen and dictionary.name not in known:
                        write_dictionary(db, dictionary, replacement)
    return FeatureStore(path)


def _dictionaries_to_build(db: Connection, path: Path, model: Model, again: bool) -> tuple[Dictionary, ...]:
    """Those that have no pages yet, or all of them; none that are others of the same name."""
    own = about(db, path, "model")
    if own and own["hash"] != model.base.identity:
        raise CircuitsError(
            f"{path}: has pages of another model, {own['name']} (hash {own['hash'][:12]}), than {model.base.name} "
            f"(hash {model.base.identity[:12]}); name another file"
        )
    known, found = stored_dictionaries(db, path), []
    for replacement in model.replacements:
        for dictionary in replacement.dictionaries:
            stored = known.get(dictionary.name)
            if stored is not None and stored.hash != replacement.identity:
                raise CircuitsError(
                    f"{path}: has pages of {dictionary.name} of another replacement, {stored.replacement} (hash "
                    f"{stored.hash[:12]}), than {replacement.name} (hash {replacement.identity[:12]}); name another "
                    "file"
                )
            if stored is None or again or not stored.tokens_seen:
                found.append(dictionary)
    return tuple(found)


def _begin(work: Work) -> None:
    """Tables for the work, or those of a build that was stopped, which must have been of the same kind."""
    plan = {
        "model": work.model.base.identity,
        "dictionaries": [dictionary.name for dictionary in work.dictionaries],
        "replacements": [replacement.identity for replacement in work.model.replacements],
        "text": work.source.describe(),
        "settings": asdict(work.settings),
        "seed": work.source.seed,
        "buffer": work.source.buffer,
    }
    work.db.executescript(TABLES)
    with transaction(work.db):
        begun = work.kept("plan")
        if begun is not None and begun != plan:
            different = ", ".join(sorted(key for key in plan if begun.get(key) != plan[key]))
            raise CircuitsError(
                f"{work.path}: a build was begun there with another {different}; give the same again, or name another "
                "file"
            )
        work.keep("plan", plan)
        write_model(work.db, work.model.base)


def _first_pass(work: Work) -> None:
    """Stream the text; every so often all that was gathered is written down at once."""
    at = work.kept("first") or {**dict.fromkeys(COUNTS, 0), "source": None, "done": False}
    if at["done"]:
        return
    gathered = _restored(work)
    if at["source"] is not None:
        work.source.load_state_dict(at["source"])
    work.db.execute("BEGIN IMMEDIATE")
    written = time.monotonic()
    for documents in _batches(work.source, work.settings, at["tokens"]):
        ran = work.run_of(documents)
        for one in gathered:
            _keep_sample(work, one.dictionary.name, at["batch"], one.add(ran, at["documents"]))
        for number, document in enumerate(documents, at["documents"]):
            tokens = np.array(document, np.uint32).tobytes()
            work.db.execute("INSERT INTO work_documents VALUES (?, ?)", (number, tokens))
        at["tokens"] += sum(map(len, documents))
        at["counted"] += int(ran.counted.sum())
        at["sampled"] += sampled_tokens(ran, at["documents"], work.settings)
        at["documents"] += len(documents)
        at["batch"] += 1
        if time.monotonic() - written >= work.every:
            _write_down(work, at, gathered)
            work.db.execute("BEGIN IMMEDIATE")
            written = time.monotonic()
        work.report(0.0, 0.4, at["tokens"] / work.settings.tokens)
    if not at["documents"]:
        raise CircuitsError("the text has no document of at least two tokens; give more text")
    _write_down(work, {**at, "done": True}, gathered)


def _write_down(work: Work, at: dict[str, Any], gathered: Sequence[Gathered]) -> None:
    """End a transaction with the state at its end."""
    for one in gathered:
        work.db.execute("INSERT OR REPLACE INTO work_state VALUES (?, ?)", (one.dictionary.name, one.state()))
    work.keep("first", {**at, "source": work.source.state_dict()})
    work.db.execute("COMMIT")


def _batches(source: DocumentSource, settings: Settings, tokens: int) -> Iterator[list[Document]]:
    """Documents of about one batch, until there were enough tokens or the text ends."""
    while tokens < settings.tokens:
        batch: list[Document] = []
        count = 0
        while count < settings.batch_tokens and tokens + count < settings.tokens and source.more():
            batch.append(next(source))
            count += len(batch[-1])
        if not batch:
            return
        tokens += count
        yield batch


def _keep_sample(work: Work, name: str, batch: int, entries: Entries) -> None:
    tokens = entries.documents * work.settings.window + entries.positions
    columns = (tokens.astype("<i8"), entries.features.astype("<i4"), entries.values.astype("<f4"))
    blob = b"".join(column.tobytes() for column in columns)
    work.db.execute("INSERT INTO work_sample VALUES (?, ?, ?)", (name, batch, blob))


def _restored(work: Work) -> list[Gathered]:
    """What was gathered so far."""
    gathered = []
    for dictionary in work.dictionaries:
        one = Gathered(dictionary, work.settings, work.model.base.shape.n_heads)
        row = work.db.execute("SELECT arrays FROM work_state WHERE dictionary = ?", (dictionary.name,)).fetchone()
        if row:
            one.restore(row[0])
        gathered.append(one)
    return gathered


def _second_pass(work: Work, chosen: Sequence[Chosen]) -> None:
    """Run the documents that examples are from once more; each batch of them is written down by itself."""
    numbers = documents_of(chosen)
    each = max(1, work.settings.batch_tokens // work.settings.window)
    for begin in range(int(work.kept("second") or 0), len(numbers), each):
        some = numbers[begin : begin + each].tolist()
        ran = work.run_of([_document(work, number) for number in some])
        with transaction(work.db):
            for dictionary, one in zip(work.dictionaries, chosen, strict=True):
                found = examples(dictionary, one, ran, some, work.settings.context)
                rows = [(dictionary.name, feature, number, json.dumps(example)) for feature, number, example in found]
                work.db.executemany("INSERT INTO work_examples VALUES (?, ?, ?, ?)", rows)
            work.keep("second", begin + each)
        work.report(0.4, 0.8, (begin + each) / len(numbers))


def _document(work: Work, number: int) -> Document:
    row = work.db.execute("SELECT tokens FROM work_documents WHERE number = ?", (number,)).fetchone()
    return tuple(np.frombuffer(row[0], np.uint32).tolist())
