"""Feature pages in one SQLite file: reading them, and the labels that persons and models give.

    store = FeatureStore("features.sqlite")
    store.page("clt.0", 123)            what is known about a feature, as JSON values
    store.set_label("clt.0", 123, "names of children")
    store.label("clt.0", 123)

`circuits.feature_building` makes the file, `circuits.store_file` says what is in it. A store knows which base model and
which replacements its pages are of, by their hashes, and labels only graphs that were traced with them.
"""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from circuits.errors import CircuitsError
from circuits.feature_records import AUTOMATIC, PERSON, Page, Record, Words, page_of, tidy
from circuits.graph import Graph
from circuits.labels import Found, Progress
from circuits.store_file import opened, packed, transaction
from circuits.store_rows import (
    BROKEN,
    Stored,
    about,
    add_texts,
    damaged,
    labels_of,
    next_document,
    read_records,
    stored_dictionaries,
    words_of,
    write_records,
)

SHIPPED = Path(__file__).resolve().parent / "default" / "features.sqlite"


class FeatureStore:
    """The pages of a file; each call opens it anew, so that it may be used from any thread.

    Raises
    ------
    CircuitsError
        There is no such file, or it is no feature store.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with opened(self.path):
            pass

    def __repr__(self) -> str:
        return f"FeatureStore({str(self.path)!r})"

    def dictionaries(self) -> dict[str, Stored]:
        """The dictionaries that have pages, by name."""
        with opened(self.path) as db:
            return stored_dictionaries(db, self.path)

    def model(self) -> dict[str, Any]:
        """Name and hash of the base model."""
        with opened(self.path) as db:
            return about(db, self.path, "model")

    def page(self, dictionary: str, feature: int) -> Page:
        """What is known about a feature; see docs/FEATURES.md for the fields.

        Raises
        ------
        CircuitsError
            The store has no page of it.
        """
        found = self.pages([(dictionary, feature)])
        if not found:
            with opened(self.path) as db:
                known = stored_dictionaries(db, self.path)
            if dictionary not in known:
                raise CircuitsError(f"{self.path}: no pages of {dictionary!r}; there are {', '.join(sorted(known))}")
            count = known[dictionary].features
            raise CircuitsError(f"{self.path}: no page of feature {feature}; {dictionary} has {count} features")
        return found[dictionary, feature]

    def pages(self, wanted: Iterable[tuple[str, int]] | Graph) -> dict[tuple[str, int], Page]:
        """The pages of several features, or of all of a graph's; those that there are."""
        if isinstance(wanted, Graph):
            self.check_graph(wanted)
            wanted = _features_of(wanted)
        with opened(self.path) as db:
            records = read_records(db, self.path, wanted)
            known, labels = stored_dictionaries(db, self.path), labels_of(db, self.path, records)
            words = words_of(db, self.path, records)
        pages = {}
        for (name, feature), record in records.items():
            text, author = labels[name, feature]
            head = {"dictionary": name, "feature": feature, "kind": known[name].kind, "label": text, "label_by": author}
            head["tokens_seen"] = known[name].tokens_seen
            try:
                pages[name, feature] = page_of(record, words, head)
            except BROKEN as error:
                raise damaged(self.path, name, feature) from error
        return pages

    def label(self, dictionary: str, feature: int) -> str:
        """The label of a feature: a person's, else a model's, else the automatic one; "" if there is none."""
        return self.labels([(dictionary, feature)])[dictionary, feature]

    def labels(self, wanted: Iterable[tuple[str, int]]) -> dict[tuple[str, int], str]:
        """The labels of several features."""
        with opened(self.path) as db:
            return {key: text for key, (text, _) in labels_of(db, self.path, wanted).items()}

    def set_label(self, dictionary: str, feature: int, label: str, author: str = PERSON) -> None:
        """Write a label down; an empty one takes the author's label away. Rebuilding the pages does not touch it.

        author
            `person`, or the name of the model that wrote it. A person's label is shown before any other, then the one
            that was written last.

        Raises
        ------
        CircuitsError
            The store has no such feature, or cannot be written.
        """
        self.set_labels([(dictionary, feature, label)], author)

    def set_labels(self, labels: Sequence[tuple[str, int, str]], author: str = PERSON) -> None:
        """Write several labels, (dictionary, feature, label), or none of them."""
        if author == AUTOMATIC:
            raise CircuitsError(f"the author {AUTOMATIC!r} is that of labels that nobody wrote; give another")
        with opened(self.path, "rw") as db:
            known = stored_dictionaries(db, self.path)
            with transaction(db):
                for name, feature, label in labels:
                    if name not in known or not 0 <= feature < known[name].features:
                        raise CircuitsError(f"{self.path}: there is no feature {feature} of {name!r} to be labelled")
                    key = (name, feature, tidy(author))
                    db.execute("DELETE FROM labels WHERE (dictionary, feature, author) = (?, ?, ?)", key)
                    if text := tidy(label):
                        place = db.execute("SELECT coalesce(max(written), 0) + 1 FROM labels").fetchone()[0]
                        db.execute("INSERT INTO labels VALUES (?, ?, ?, ?, ?)", (*key, text, place))

    def graph_labels(self, graph: Graph, progress: Progress | None = None) -> Found:
        """Labels of a graph's features, as `circuits.labels.label` asks for them.

        Raises
        ------
        CircuitsError
            The graph was traced with another model, or with other dictionaries of the same name.
        """
        self.check_graph(graph)
        names, features = graph.nodes.dictionary.tolist(), graph.nodes.feature.tolist()
        wanted = {node: (names[node], features[node]) for node in np.flatnonzero(graph.nodes.is_feature).tolist()}
        known = self.labels(set(wanted.values()))
        found = {node: known[key] for node, key in wanted.items() if known[key]}
        return Found(found, len(wanted))

    def check_graph(self, graph: Graph) -> None:
        """Refuse a graph of another model, or of other dictionaries of the same name; those that are not here may be.

        Raises
        ------
        CircuitsError
            With what the graph was traced with, and what the store is of.
        """
        traced = graph.metadata.get("model") or {}
        with opened(self.path) as db:
            own, known = about(db, self.path, "model"), stored_dictionaries(db, self.path)
        if traced.get("hash") != own.get("hash"):
            raise CircuitsError(
                f"{self.path}: has pages of the model {own.get('name')} (hash {str(own.get('hash'))[:12]}); the graph "
                f"was traced with {traced.get('name', '?')} (hash {str(traced.get('hash', '?'))[:12]})"
            )
        for replacement in graph.metadata.get("replacements", ()):
            for name in replacement.get("dictionaries", ()):
                if name in known and known[name].hash != replacement.get("hash"):
                    raise CircuitsError(
                        f"{self.path}: has pages of {name} of the replacement {known[name].replacement} (hash "
                        f"{known[name].hash[:12]}); the graph was traced with {replacement.get('name', '?')} (hash "
                        f"{str(replacement.get('hash', '?'))[:12]})"
                    )

    def write_pages(self, dictionary: str, records: Mapping[int, Record], words: Words) -> None:
        """Put pages from elsewhere in the place of those that the features have."""
        with opened(self.path, "rw") as db, transaction(db):
            given = {(dictionary, feature): record for feature, record in records.items()}
            numbers = add_texts(db, words.texts)
            place = next_document(db)
            moved = {document: place + i for i, document in enumerate(sorted(words.documents))}
            for document, at in moved.items():
                tokens = packed([numbers[words.texts[number]] for number in words.documents[document]])
                db.execute("INSERT INTO documents VALUES (?, ?)", (at, tokens))
            for record in given.values():
                for side in ("outputs", "bottom"):
                    record[side] = [[numbers[words.texts[number]], weight] for number, weight in record[side]]
                for example in record["examples"]:
                    example[1] = moved[example[1]]
            write_records(db, self.path, given)


def default_store() -> FeatureStore | None:
    """The store of the embedded default: the user's own, else the one that came with the package; None without."""
    for path in (own_path(), SHIPPED):
        if path.is_file():
            return FeatureStore(path)
    return None


def store_of(graph: Graph, path: Path | None = None) -> FeatureStore | None:
    """The store at `path`, else that of the embedded default if it has pages of the graph's dictionaries."""
    if path is not None:
        return FeatureStore(path)
    store = default_store()
    if store is None or not set(graph.nodes.dictionary[graph.nodes.is_feature].tolist()) & set(store.dictionaries()):
        return None
    try:
        store.check_graph(graph)
    except CircuitsError:
        return None
    return store


def own_path() -> Path:
    """Where the user's own store of the embedded default is: labels that were written, pages that were built."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "circuits" / "features.sqlite"


def writable(path: Path | None) -> Path:
    """A store that may be changed: `path`, or the user's own, made from the shipped one where there is none yet."""
    if path is not None:
        return path
    own = own_path()
    if not own.is_file() and SHIPPED.is_file():
        own.parent.mkdir(parents=True, exist_ok=True)
        part = own.with_suffix(".part")
        shutil.copyfile(SHIPPED, part)
        os.replace(part, own)
    return own


def _features_of(graph: Graph) -> list[tuple[str, int]]:
    nodes, chosen = graph.nodes, graph.nodes.is_feature
    return sorted(set(zip(nodes.dictionary[chosen].tolist(), nodes.feature[chosen].tolist(), strict=True)))
