"""Text for training: documents of token ids, in order or shuffled without end, and padded batches of them.

A `DocumentSource` reads its texts again and again. It holds `buffer` documents at a time, gives them in shuffled
order, and reads the next ones; a text that has no more than these is shuffled whole, anew in every epoch. Where it
stands is a few numbers, and what it held is read again from there.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.model import BaseModel
from circuits.prompt import prepare
from circuits.sources import Document, Listed, Mark, Raw, Source, source_of

TOGETHER = 256, 1 << 20  # raw documents, and letters, that are tokenized at once
Cut = Callable[[Sequence[Raw]], list[Document]]

__all__ = ["Document", "DocumentSource", "groups", "open_text", "pad", "read_documents"]


@dataclass(frozen=True)
class Place:
    """A place between two raw documents: which text, where in it, and how many documents were before."""

    text: int = 0
    mark: Mark = field(default_factory=Mark)
    documents: int = 0


@dataclass(frozen=True)
class Part:
    """Which of all documents: those held out or the rest of them, and of these every `of`th of the shuffled order."""

    every: int = 0
    held_out: bool = False
    number: int = 0
    of: int = 1

    def has(self, document: int) -> bool:
        return self.every == 0 or (document % self.every == 0) == self.held_out


class DocumentSource:
    """Documents without end, shuffled; an iterator whose place can be saved.

    Parameters
    ----------
    texts
        What is read, one after the other.
    cut
        Makes documents of raw ones.
    buffer
        Documents that are shuffled among one another.
    """

    def __init__(
        self, texts: Sequence[Source], cut: Cut, *, buffer: int = 20_000, seed: int = 0, part: Part | None = None
    ) -> None:
        self.texts, self.cut, self.buffer, self.seed = tuple(texts), cut, buffer, seed
        self.part = part or Part()
        self.documents_given = 0
        self._blocks = self._given = 0
        self._start = Place()
        self._after: Place | None = Place()
        self._whole: list[Document] | None = None
        self._block: list[Document] = []

    @staticmethod
    def of(documents: Sequence[Document], *, seed: int = 0) -> "DocumentSource":
        """Documents that are in memory."""
        return DocumentSource([Listed(documents)], _as_they_are, buffer=max(1, len(documents)), seed=seed)

    def split(self, every: int = 50) -> tuple["DocumentSource", "DocumentSource"]:
        """The source without every `every`th document, in order of the texts, and one of those that were held out."""
        first = sum(1 for _ in islice(self.in_order(), every))
        if first < every:
            raise CircuitsError(f"{first} documents are too few to hold some out; give --held-out")
        parts = (replace(self.part, every=every, held_out=held_out) for held_out in (False, True))
        rest, held = (self._with(part) for part in parts)
        return rest, held

    def share(self, number: int, of: int) -> "DocumentSource":
        """For process `number` of `of`: every `of`th document of the shuffled order, another one for each process."""
        if self.buffer < of:
            raise CircuitsError(f"a shuffle buffer of {self.buffer} documents is too small for {of} processes")
        return self._with(replace(self.part, number=number, of=of))

    def from_start(self) -> "DocumentSource":
        """The same documents, from the first on."""
        return self._with(self.part)

    def _with(self, part: Part) -> "DocumentSource":
        return DocumentSource(self.texts, self.cut, buffer=self.buffer, seed=self.seed, part=part)

    def in_order(self) -> Iterator[Document]:
        """Every document once, in the order of the texts; shares are not regarded."""
        for documents, _ in self._walk(Place()):
            yield from documents

    def describe(self) -> dict[str, Any]:
        """What tells these documents from others, as JSON values; shares and the shuffling are not regarded."""
        held_out = {"every": self.part.every, "held_out": self.part.held_out} if self.part.every else {}
        cut = {"window": self.cut.window} if isinstance(self.cut, Windows) else {}
        return {"texts": [text.describe() for text in self.texts]} | cut | held_out

    def __iter__(self) -> "DocumentSource":
        return self

    def __next__(self) -> Document:
        if not self.more():
            self._next_block()  # of the next epoch
            if not self.more():
                raise CircuitsError("the text has no document of at least two tokens for every process; give more text")
        self._given += 1
        self.documents_given += 1
        return self._block[self._given - 1]

    def more(self) -> bool:
        """Whether this epoch has another document."""
        while self._given >= len(self._block) and not (self._blocks and self._after is None):
            self._next_block()
        return self._given < len(self._block)

    def state_dict(self) -> dict[str, Any]:
        """Where the source stands, as JSON values."""
        start = [self._start.text, self._start.mark.offset, self._start.mark.items, self._start.documents]
        return {"start": start, "blocks": self._blocks, "given": self._given, "documents": self.documents_given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a source of the same texts stood."""
        text, offset, items, documents = (int(value) for value in state["start"])
        self._after, self._blocks = Place(text, Mark(offset, items), documents), int(state["blocks"])
        self._block = []
        if self._blocks:
            self._blocks -= 1
            self._next_block()
        self._given, self.documents_given = int(state["given"]), int(state["documents"])

    def _next_block(self) -> None:
        """Fill the buffer from where the last block ended, or from the start, and shuffle."""
        self._start = self._after or Place()
        if self._start != Place() or self._whole is None:
            self._whole, documents = None, []
            self._after = None
            for found, after in self._walk(self._start):
                documents += found
                self._after = after
                if len(documents) >= self.buffer:
                    break
            if self._start == Place() and self._after is None:
                self._whole = documents
        else:
            documents, self._after = self._whole, None
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self._blocks)
        order = torch.randperm(len(documents), generator=generator).tolist()
        self._block = [documents[i] for i in order[self.part.number :: self.part.of]]
        self._blocks += 1
        self._given = 0

    def _walk(self, place: Place) -> Iterator[tuple[list[Document], Place | None]]:
        """Documents of this part from `place` on, some at a time, with the place behind them; None behind the last."""
        found: list[Document] = []
        after: Place | None = None
        for raws, at in self._raws(place):
            if after is not None:
                yield found, after
            count = after.documents if after is not None else place.documents
            documents = [document for document in self.cut(raws) if len(document) > 1]
            found = [document for i, document in enumerate(documents, count) if self.part.has(i)]
            after = replace(at, documents=count + len(documents))
        yield found, None

    def _raws(self, place: Place) -> Iterator[tuple[list[Raw], Place]]:
        """Raw documents to tokenize together, with the place behind them."""
        for number in range(place.text, len(self.texts)):
            raws: list[Raw] = []
            mark, letters = place.mark if number == place.text else Mark(), 0
            for raw, behind in self.texts[number].read(mark):
                mark = behind
                raws.append(raw)
                letters += len(raw)
                if len(raws) >= min(self.buffer, TOGETHER[0]) or letters >= TOGETHER[1]:
                    yield raws, Place(number, mark)
                    raws, letters = [], 0
            if raws:
                yield raws, Place(number, mark)


def open_text(
    model: BaseModel, paths: Sequence[Path], window: int, *, field: str = "text", buffer: int = 20_000, seed: int = 0
) -> DocumentSource:
    """A source of documents at most `window` tokens long, each with the tokenizer's BOS in front.

    Parameters
    ----------
    paths
        `.jsonl` files, a list of token ids (taken as given) or an object with text a line; `.parquet` files; data sets
        of the hub, `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`; any other file is UTF-8 text with documents separated
        by `<|endoftext|>`. A long document gives several windows.
    field
        The field or column that has the text.
    """
    texts = [source_of(path, field, model.shape.vocabulary) for path in paths]
    return DocumentSource(texts, Windows(model, window), buffer=buffer, seed=seed)


def read_documents(model: BaseModel, paths: Sequence[Path], window: int, *, field: str = "text") -> list[Document]:
    """All documents of small texts, in order; see `open_text`."""
    documents = list(open_text(model, paths, window, field=field).in_order())
    if not documents:
        raise CircuitsError(f"{', '.join(map(str, paths))}: no document of at least two tokens")
    return documents


def _as_they_are(raws: Sequence[Raw]) -> list[Document]:
    return [raw for raw in raws if not isinstance(raw, str)]


@dataclass(frozen=True)
class Windows:
    """Cuts raw documents into documents at most `window` long."""

    model: BaseModel
    window: int

    def __call__(self, raws: Sequence[Raw]) -> list[Document]:
        texts = [raw for raw in raws if isinstance(raw, str) and raw]
        pieces = iter(self._pieces(texts) if texts else [])
        documents: list[Document] = []
        for raw in raws:
            if isinstance(raw, str):
                documents += next(pieces) if raw else []
            else:
                documents.append(raw[: self.window])
        return documents

    def _pieces(self, texts: list[str]) -> list[list[Document]]:
        """The windows of each text."""
        model = self.model
        if model.tokenizer is None:
            raise CircuitsError(f"{model.name} has no tokenizer; give token ids in a .jsonl file")
        first = prepare(model, texts[0][:1])
        front = first.token_ids[:1] if first.first_is_special else ()
        step, found = self.window - len(front), []
        for ids in model.tokenizer(texts, add_special_tokens=False)["input_ids"]:
            ids = tuple(ids[1:] if front and ids and ids[0] == front[0] else ids)
            found.append([front + ids[i : i + step] for i in range(0, len(ids), step)])
        return found


def pad(documents: Sequence[Document], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, S), padded on the right with zeros, and the mask (B, S) of real tokens."""
    width = max(map(len, documents))
    ids = torch.zeros(len(documents), width, dtype=torch.long)
    mask = torch.zeros(len(documents), width, dtype=torch.bool)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = torch.tensor(document)
        mask[row, : len(document)] = True
    return ids.to(device), mask.to(device)


def groups(documents: Sequence[Document], budget: int = 8192) -> Iterator[list[Document]]:
    """Documents of like length, at most `budget` padded tokens together."""
    group: list[Document] = []
    for document in documents:
        if group and (len(group) + 1) * len(document) > budget:
            yield group
            group = []
        group.append(document)
    yield group
