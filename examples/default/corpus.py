"""Rows of packed documents for training the default model: every document begins with BOS and sees only itself."""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tasks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

BOS = "<|endoftext|>"


def train_tokenizer(shelves: dict[str, list[str]], vocabulary: int, seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the training text and on enough template prompts that names and number words are tokens."""
    rng = random.Random(seed)
    lines = [document for shelf in shelves.values() for document in shelf]
    for task in tasks.TEMPLATES:
        stream = tasks.prompts(task, rng, held_out=False)
        lines += [(prompt := next(stream)).text + prompt.answer for _ in range(20_000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[BOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS)


@dataclass
class Rows:
    """One batch, (rows, width) each; `weight` is the loss weight of the next token."""

    tokens: np.ndarray
    positions: np.ndarray
    document: np.ndarray
    weight: np.ndarray


class Corpus:
    """Draws packed rows with given shares of `stories`, `books`, `repeated` and `templates`, by tokens."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast, *, held_out: bool, seed: int) -> None:
        self.rng = random.Random(seed)
        self.tokenizer = tokenizer
        self.bos = int(tokenizer.bos_token_id)
        self.vocabulary = range(self.bos + 1, len(tokenizer))
        self.held_out = held_out
        self.shelves: dict[str, list[np.ndarray]] = {}
        for shelf, documents in tasks.documents(folder, held_out=held_out).items():
            # A book is cut at its paragraphs, so that a row begins where a reader would begin.
            parts = documents if shelf == "stories" else [part for book in documents for part in paragraphs(book)]
            encoded = tokenizer(parts, add_special_tokens=False)["input_ids"]
            self.shelves[shelf] = [np.array(ids, dtype=np.uint16) for ids in encoded if len(ids) > 8]
        self.streams = {task: tasks.prompts(task, self.rng, held_out=held_out) for task in tasks.TEMPLATES}

    def text(self, shelf: str, room: int) -> tuple[list[int], list[float]]:
        parts = self.shelves[shelf]
        i = self.rng.randrange(len(parts))
        ids = parts[i].tolist()
        ended = len(ids) <= room
        if not ended and self.rng.random() < 0.4:  # also learn the later parts of long documents
            start = self.rng.randrange(len(ids) - room + 1)
            ids, ended = ids[start:], start + room == len(ids)
        ids = [self.bos, *ids[:room]]
        return ids, [1.0] * (len(ids) - 1) + [float(ended and shelf == "stories")]

    def repeats(self, room: int) -> tuple[list[int], list[float]]:
        ids, known = tasks.repeated(
            self.rng, self.vocabulary, min(room, self.rng.choice((24, 32, 48, 64, 96, 128, 255)))
        )
        # What random tokens come first cannot be learned: only the repetition counts.
        return [self.bos, *ids], [*map(float, known), 0.0]

    def template(self) -> tuple[list[int], list[float]]:
        prompt = next(self.streams[self.rng.choice(list(self.streams))])
        ids = self.tokenizer(prompt.text + prompt.answer + prompt.ending, add_special_tokens=False)["input_ids"]
        answer = len(self.tokenizer(prompt.text, add_special_tokens=False)["input_ids"])
        weight = [0.3] * (len(ids) + 1)
        weight[answer] = 5.0
        return [self.bos, *ids], weight

    def rows(self, count: int, width: int, shares: dict[str, float]) -> Rows:
        shape = (count, width)
        batch = Rows(
            np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        )
        for row in range(count):
            filled, document = 0, 0
            while filled < width:
                kind = self.rng.choices(list(shares), list(shares.values()))[0]
                room = width - filled - 1
                if room < 12:
                    ids, weight = [self.bos] * (room + 1), [0.0] * (room + 1)
                elif kind == "repeated":
                    ids, weight = self.repeats(room)
                elif kind == "templates":
                    pairs = [self.template() for _ in range(4)]  # short: several at a draw keep the shares by tokens
                    for ids, weight in pairs[:-1]:
                        filled, document = self.place(batch, row, filled, document, ids, weight)
                    ids, weight = pairs[-1]
                else:
                    ids, weight = self.text(kind, room)
                filled, document = self.place(batch, row, filled, document, ids, weight)
        return batch

    def place(
        self, batch: Rows, row: int, filled: int, document: int, ids: list[int], weight: list[float]
    ) -> tuple[int, int]:
        n = min(len(ids), batch.tokens.shape[1] - filled)
        at = slice(filled, filled + n)
        batch.tokens[row, at] = ids[:n]
        batch.positions[row, at] = np.arange(n)
        batch.document[row, at] = document
        batch.weight[row, at] = weight[:n]
        return filled + n, document + 1


def paragraphs(book: str, least: int = 900) -> list[str]:
    """A book's paragraphs, joined until each part has at least `least` characters; headings are dropped."""
    parts, current = [], ""
    for paragraph in book.split("\n\n"):
        paragraph = " ".join(paragraph.split())
        if not paragraph or paragraph.startswith("#"):
            continue
        current = f"{current}\n{paragraph}" if current else paragraph
        if len(current) >= least:
            parts.append(current)
            current = ""
    return [*parts, current] if current else parts
