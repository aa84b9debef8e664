"""Files and data sets as a stream of raw documents, text or token ids, that can be entered again at any place.

Nothing is held but the document at hand, so that a file may be as large as it likes.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from circuits.errors import CircuitsError

SEPARATOR = "<|endoftext|>"
HUB = "hf:"
PIECE = 1 << 20  # bytes; a longer document is cut into several
Document = tuple[int, ...]
Raw = str | Document


@dataclass(frozen=True)
class Mark:
    """Between two raw documents: what to skip (bytes of a file), and how many documents, lines or rows that are."""

    offset: int = 0
    items: int = 0


class Source(Protocol):
    """One text."""

    def read(self, mark: Mark) -> Iterator[tuple[Raw, Mark]]:
        """Raw documents from `mark` on, each with the mark behind it."""

    def describe(self) -> dict[str, Any]:
        """What tells this text from another, as JSON values."""


def source_of(path: Path, field: str, vocabulary: int) -> Source:
    """The source for a file, by its suffix, or for `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT` on the hub."""
    if str(path).startswith(HUB):
        return HubRows(str(path), field, vocabulary)
    if not path.is_file():
        raise CircuitsError(f"{path}: the text could not be read: no such file")
    if path.suffix == ".parquet":
        return ParquetRows(str(path), field, vocabulary)
    return JsonLines(path, field, vocabulary) if path.suffix == ".jsonl" else PlainText(path)


@dataclass(frozen=True)
class Listed:
    """Documents that are in memory already."""

    documents: Sequence[Document]

    def read(self, mark: Mark) -> Iterator[tuple[Raw, Mark]]:
        for number in range(mark.items, len(self.documents)):
            yield self.documents[number], Mark(items=number + 1)

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256(repr([list(document) for document in self.documents]).encode())
        return {"documents": len(self.documents), "sha256": digest.hexdigest()}


@dataclass(frozen=True)
class PlainText:
    """UTF-8 text with documents separated by `<|endoftext|>`; one longer than 1 MiB is cut at a line break or space."""

    path: Path

    def read(self, mark: Mark) -> Iterator[tuple[Raw, Mark]]:
        separator, offset, items = SEPARATOR.encode(), mark.offset, mark.items
        held, begin, ended = b"", 0, False  # what was read and not yet given is held[begin:]
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                while begin < len(held) or not ended:
                    end = held.find(separator, begin)
                    if end < 0 and not ended and len(held) - begin < 2 * PIECE:
                        ended = not (more := file.read(PIECE))
                        held, begin = held[begin:] + more, 0
                        continue
                    behind = len(separator) if 0 <= end - begin <= PIECE else 0
                    end = end if behind else begin + _cut(held[begin : begin + PIECE + 1])
                    text = held[begin:end].decode("utf-8").strip()
                    offset, begin = offset + end + behind - begin, end + behind
                    if text:
                        items += 1
                        yield text, Mark(offset, items)
        except (OSError, UnicodeDecodeError) as error:
            raise CircuitsError(f"{self.path}: the text could not be read: {error}") from error

    def describe(self) -> dict[str, Any]:
        return _describe(self.path)


def _cut(held: bytes) -> int:
    """Where the first piece of a document without separator ends."""
    if len(held) <= PIECE:
        return len(held)
    for sign in (b"\n", b" "):
        if (place := held.rfind(sign, PIECE // 2, PIECE)) > 0:
            return place + 1
    size = PIECE
    while size > PIECE - 4 and held[size] & 0xC0 == 0x80:  # inside a character
        size -= 1
    return size


@dataclass(frozen=True)
class JsonLines:
    """A JSON list of token ids a line, taken as given, or an object with text, or token ids, under `field`."""

    path: Path
    field: str
    vocabulary: int

    def read(self, mark: Mark) -> Iterator[tuple[Raw, Mark]]:
        offset, number = mark.offset, mark.items
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                for line in file:
                    offset, number = offset + len(line), number + 1
                    if line.strip():
                        yield self._raw(line, number), Mark(offset, number)
        except OSError as error:
            raise CircuitsError(f"{self.path}: the text could not be read: {error}") from error

    def _raw(self, line: bytes, number: int) -> Raw:
        where = f"{self.path}, line {number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise CircuitsError(
                f"{where}: expected a JSON list of token ids, or an object with text under {self.field!r}: {error}"
            ) from error
        return _raw(value, self.field, self.vocabulary, where)

    def describe(self) -> dict[str, Any]:
        return _describe(self.path) | {"field": self.field}


@dataclass(frozen=True)
class ParquetRows:
    """Rows of a `.parquet` file: text, or lists of token ids, in the column `field`; read through `datasets`."""

    name: str
    field: str
    vocabulary: int

    def read(self, mark: Mark) -> Iterator[tuple[Raw, Mark]]:
        number = mark.items
        try:
            rows = self._rows()
            for row in rows.skip(number) if number else rows:
                number += 1
                yield _raw(row, self.field, self.vocabulary, f"{self.name}, row {number}"), Mark(0, number)
        except CircuitsError:
            raise
        except (OSError, ValueError) as error:
            raise CircuitsError(f"{self.name}: the text could not be read: {error}") from error

    def _rows(self) -> Any:
        load = _datasets(self.name).load_dataset
        return load("parquet", data_files=self.name, split="train", streaming=True)

    def describe(self) -> dict[str, Any]:
        return _describe(Path(self.name)) | {"field": self.field}


class HubRows(ParquetRows):
    """`hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`: a data set of the Hugging Face hub, downloaded as it is read."""

    def _rows(self) -> Any:
        name, *config, split = self.name.removeprefix(HUB).split(":")
        if not name or len(config) > 1:
            raise CircuitsError(f"{self.name}: expected hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
        return _datasets(self.name).load_dataset(name, *config, split=split, streaming=True)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "field": self.field}


def _datasets(name: str) -> Any:
    try:
        return import_module("datasets")
    except ImportError as error:
        raise CircuitsError(
            f"{name}: reading this needs the package datasets: pip install 'attention-circuits[data]'"
        ) from error


def _raw(value: Any, field: str, vocabulary: int, where: str) -> Raw:
    """The text or the token ids of one line or row."""
    if isinstance(value, dict):
        if field not in value:
            raise CircuitsError(f"{where}: no field {field!r}; there are {', '.join(sorted(value))}")
        value = value[field]
        if isinstance(value, str):
            return value
    if not isinstance(value, list) or not all(isinstance(i, int) for i in value):
        raise CircuitsError(f"{where}: expected text or a list of token ids, found {type(value).__name__}")
    outside = [i for i in value if not 0 <= i < vocabulary]
    if outside:
        raise CircuitsError(f"{where}: token id {outside[0]} is outside the vocabulary of {vocabulary}")
    return tuple(value)


def _describe(path: Path) -> dict[str, Any]:
    """Name, size, and a digest of the first MiB: enough to notice another file, and quick for a large one."""
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(PIECE)).hexdigest()
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}
