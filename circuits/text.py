"""Text for training: files to documents of token ids, and documents to padded batches."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.model import BaseModel
from circuits.prompt import prepare

SEPARATOR = "<|endoftext|>"
Document = tuple[int, ...]


def read_documents(model: BaseModel, paths: Sequence[Path], window: int) -> list[Document]:
    """Documents as token ids, each at most `window` long and each with the tokenizer's BOS in front.

    A `.jsonl` file has a list of token ids a line, taken as given. Any other file is UTF-8 text with documents
    separated by `<|endoftext|>`; a long document gives several windows.
    """
    documents: list[Document] = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CircuitsError(f"{path}: the text could not be read: {error}") from error
        if path.suffix == ".jsonl":
            documents += _token_lines(model, path, text, window)
            continue
        for part_text in text.split(SEPARATOR):
            if part_text := part_text.strip():
                documents += _windows(model, part_text, window)
    documents = [document for document in documents if len(document) > 1]
    if not documents:
        raise CircuitsError(f"{', '.join(map(str, paths))}: no document of at least two tokens")
    return documents


def _token_lines(model: BaseModel, path: Path, text: str, window: int) -> list[Document]:
    documents = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            ids = json.loads(line)
            documents.append(tuple(int(i) for i in ids)[:window])
        except (ValueError, TypeError) as error:
            raise CircuitsError(f"{path}, line {number}: expected a JSON list of token ids: {error}") from error
        if not all(0 <= i < model.shape.vocabulary for i in documents[-1]):
            raise CircuitsError(f"{path}, line {number}: a token id is outside the vocabulary")
    return documents


def _windows(model: BaseModel, text: str, window: int) -> list[Document]:
    if model.tokenizer is None:
        raise CircuitsError(f"{model.name} has no tokenizer; give token ids in a .jsonl file")
    front = list(prepare(model, text[:1]).token_ids[:1])
    ids = [int(i) for i in model.tokenizer(text, add_special_tokens=False)["input_ids"]]
    step = window - 1
    return [tuple(front + ids[i : i + step]) for i in range(0, len(ids), step)]


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
