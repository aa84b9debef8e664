"""Documents from files: in order, shuffled through a buffer, held out, shared, and gone on with at any place."""

import importlib.util
import json
import random
import sys
from itertools import islice
from pathlib import Path

import pytest

from circuits.errors import CircuitsError
from circuits.loading import load
from circuits.model import BaseModel
from circuits.sources import PIECE, Mark, PlainText
from circuits.text import DocumentSource, open_text, read_documents

WORDS = ["dog", "cat", "über", "moon\n", "ran"]


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load().base


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    rng = random.Random(0)
    texts = [" ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 60))) for _ in range(900)]
    path = tmp_path / "stories.txt"
    path.write_text("<|endoftext|>".join(texts), encoding="utf-8")
    return path


def one_epoch(source: DocumentSource) -> list[tuple[int, ...]]:
    found = []
    while source.more():
        found.append(next(source))
    return found


def test_long_texts_are_read_in_pieces_and_from_any_place(tmp_path: Path) -> None:
    """Nothing is lost or read twice, in documents longer than what is held of them, and behind every mark."""
    texts = ["one", "word " * (PIECE // 2), "ü" * PIECE, "", "two\nthree", "x" * (PIECE + 1), "end"]
    path = tmp_path / "long.txt"
    path.write_text("<|endoftext|>".join(texts), encoding="utf-8")
    found = list(PlainText(path).read(Mark()))
    assert "".join(text for text, _ in found).replace(" ", "") == "".join(texts).replace(" ", "")
    assert all(len(text.encode()) <= PIECE for text, _ in found)
    assert [text for text, _ in found if len(text) < 20] == ["one", "two\nthree", "x", "end"]
    for i, (_, mark) in enumerate(found):
        assert list(PlainText(path).read(mark)) == found[i + 1 :]


@pytest.mark.parametrize("buffer", [100, 10_000])
def test_shuffled_source_gives_every_document_once_an_epoch(base: BaseModel, stories: Path, buffer: int) -> None:
    """With a buffer that holds a part of the text and one that holds it all; epochs differ, the seed decides."""
    source = open_text(base, [stories], 32, buffer=buffer)
    documents = list(source.in_order())
    assert len(documents) > 1000
    first, second = ([next(source) for _ in documents] for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(documents)
    assert first != documents
    assert first != second
    moved = [abs(first.index(document) - i) for i, document in enumerate(documents) if documents.count(document) == 1]
    assert (max(moved) > 600) == (buffer > len(documents))
    assert first == list(islice(open_text(base, [stories], 32, buffer=buffer), len(first)))
    assert first != list(islice(open_text(base, [stories], 32, buffer=buffer, seed=1), len(first)))


def test_source_goes_on_exactly(base: BaseModel, stories: Path) -> None:
    """From the state taken before, within and at the end of a buffer, and in the second epoch."""
    whole = open_text(base, [stories], 32, buffer=200)
    n = len(list(whole.in_order()))
    documents = list(islice(whole, 3 * n))
    for given in (0, 1, 199, 450, n - 1, n, n + 1, 2 * n - 5):
        stopped, again = (open_text(base, [stories], 32, buffer=200) for _ in range(2))
        for _ in range(given):
            next(stopped)
        again.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
        assert list(islice(again, 300)) == documents[given : given + 300], given
        assert again.documents_given == given + 300


def test_held_out_documents_and_shares(base: BaseModel, stories: Path) -> None:
    """Every fiftieth document in order of the text is held out; the shares of processes are disjoint and complete."""
    documents = read_documents(base, [stories], 32)
    rest, held = open_text(base, [stories], 32, buffer=300).split(50)
    assert list(held.in_order()) == documents[::50]
    left = [document for i, document in enumerate(documents) if i % 50]
    assert list(rest.in_order()) == left
    shares = [one_epoch(rest.share(number, 3)) for number in range(3)]
    assert max(map(len, shares)) - min(map(len, shares)) < 10
    assert sorted(document for share in shares for document in share) == sorted(left)
    with pytest.raises(CircuitsError, match="20 documents are too few"):
        DocumentSource.of(documents[:20]).split(50)
    with pytest.raises(CircuitsError, match="for every process"):
        next(DocumentSource.of([(1, 2)] * 3).share(2, 3).split(2)[1])


def test_lists_in_memory_are_a_source() -> None:
    documents = [(i, i + 1) for i in range(120)]
    source = DocumentSource.of(documents, seed=3)
    assert list(source.in_order()) == documents
    assert sorted(islice(source, 120)) == documents


def test_objects_in_json_lines(base: BaseModel, tmp_path: Path) -> None:
    """Text under a field, token ids under it, and the message where the field is missing."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "A dog ran."}) + "\n\n" + json.dumps({"text": [0, 5, 7]}) + "\n")
    first, second = read_documents(base, [path], 64)
    assert base.tokenizer.decode(first[1:]) == "A dog ran."
    assert second == (0, 5, 7)
    with pytest.raises(CircuitsError, match="line 1: no field 'story'; there are text"):
        read_documents(base, [path], 64, field="story")
    path.write_text(json.dumps({"text": 5}))
    with pytest.raises(CircuitsError, match="expected text or a list of token ids, found int"):
        read_documents(base, [path], 64)


@pytest.mark.skipif(not importlib.util.find_spec("datasets"), reason="the extra 'data' is not installed")
@pytest.mark.filterwarnings("default")
def test_parquet(base: BaseModel, tmp_path: Path) -> None:
    """Rows of a Parquet file, in order and from a place within."""
    parquet, table = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow").table
    texts = [f"A dog ran {i} times." for i in range(500)]
    parquet.write_table(table({"story": texts}), tmp_path / "a.parquet", row_group_size=100)
    source = open_text(base, [tmp_path / "a.parquet"], 64, field="story", buffer=100)
    assert [base.tokenizer.decode(document[1:]) for document in source.in_order()] == texts
    documents = list(islice(source, 900))
    assert sorted(documents[:500]) == sorted(source.in_order())
    stopped, again = (open_text(base, [tmp_path / "a.parquet"], 64, field="story", buffer=100) for _ in range(2))
    for _ in range(333):
        next(stopped)
    again.load_state_dict(stopped.state_dict())
    assert list(islice(again, 400)) == documents[333:733]
    with pytest.raises(CircuitsError, match="no field 'text'; there are story"):
        read_documents(base, [tmp_path / "a.parquet"], 64)
    named = read_documents(base, [Path(f"hf:{tmp_path}:train")], 64, field="story")  # a folder for a name of the hub
    assert named == list(source.in_order())
    with pytest.raises(CircuitsError, match="expected hf:NAME:SPLIT"):
        read_documents(base, [Path("hf:one:two:three:four")], 64)


def test_without_datasets_the_extra_is_named(base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for path in (tmp_path / "a.parquet", Path("hf:roneneldan/TinyStories:train")):
        with pytest.raises(CircuitsError, match=r"attention-circuits\[data\]"):
            read_documents(base, [path], 64)
