"""Activations for training, streamed from text: shuffled batches of what dictionaries read and write.

Documents are run through the model in chunks; the tokens of a chunk are shuffled among one another. The stream's
state is three numbers, and a chunk is computed again from them, so that a training resumes exactly.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from circuits.errors import CircuitsError
from circuits.families import part
from circuits.model import BaseModel
from circuits.prompt import prepare
from circuits.replacements.dictionary import ReadSite, Site

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


@contextmanager
def capturing(model: BaseModel, sites: Sequence[ReadSite | Site], kept: dict[str, Tensor]) -> Iterator[None]:
    """Within the context a forward pass leaves (batch, S, D) of every site in `kept`, under the site's name."""
    family, handles = model.family, []

    def keep_output(module: nn.Module, name: str) -> None:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            kept[name] = (output[0] if isinstance(output, tuple) else output).float()

        handles.append(module.register_forward_hook(hook))

    def keep_input(module: nn.Module, name: str) -> None:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            kept[name] = (args[0] if args else kwargs["hidden_states"]).float()

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    outputs = {"attn_out": family.attention, "mlp_out": family.mlp}
    inputs = {"resid_pre": family.attention_norm, "resid_mid": family.mlp_norm, "z": family.attention_output}
    for wanted in sites:
        site, norm = (wanted.site, wanted.norm) if isinstance(wanted, ReadSite) else (wanted, "none")
        block = model.blocks[site.layer]
        if norm == "full":
            keep_output(part(block, inputs[site.name]), str(wanted))
        elif norm == "scale":
            raise CircuitsError(f"training on {wanted} is not supported; use the norm 'full' or 'none'")
        elif site.name in outputs:
            keep_output(part(block, outputs[site.name]), str(wanted))
        else:
            keep_input(part(block, inputs[site.name]), str(wanted))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def pad(documents: Sequence[Document], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, S), padded on the right with zeros, and the mask (B, S) of real tokens."""
    width = max(map(len, documents))
    ids = torch.zeros(len(documents), width, dtype=torch.long)
    mask = torch.zeros(len(documents), width, dtype=torch.bool)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = torch.tensor(document)
        mask[row, : len(document)] = True
    return ids.to(device), mask.to(device)


@dataclass
class ActivationStream:
    """Endless shuffled batches `{str(site): (batch_tokens, D)}`; first tokens of documents are left out.

    Parameters
    ----------
    sites
        Read and write sites, see `Coder.reads` and `Coder.writes`.
    chunk
        Batches whose tokens are shuffled among one another.
    """

    model: BaseModel
    documents: list[Document]
    sites: tuple[ReadSite | Site, ...]
    batch_tokens: int = 4096
    chunk: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if sum(len(document) - 1 for document in self.documents) < self.batch_tokens:
            raise CircuitsError(f"the text has fewer tokens than one batch of {self.batch_tokens}; give more text")
        self._next_document, self._chunk_start, self._place = 0, 0, 0
        self._held: dict[str, Tensor] = {}
        self._order: tuple[int, list[int]] = (-1, [])

    def __iter__(self) -> "ActivationStream":
        return self

    def __next__(self) -> dict[str, Tensor]:
        if not self._held or (self._place + 1) * self.batch_tokens > len(next(iter(self._held.values()))):
            self._chunk_start = self._next_document
            self._fill()
            self._place = 0
        rows = slice(self._place * self.batch_tokens, (self._place + 1) * self.batch_tokens)
        self._place += 1
        return {name: values[rows] for name, values in self._held.items()}

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands."""
        return {"chunk_start": self._chunk_start, "place": self._place, "filled": bool(self._held)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a stream of the same documents stood."""
        self._chunk_start = self._next_document = int(state["chunk_start"])
        self._place, self._held = int(state["place"]), {}
        if state["filled"]:
            self._fill()

    def _document(self, number: int) -> Document:
        epoch, place = divmod(number, len(self.documents))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(len(self.documents), generator=generator).tolist()
        return self.documents[self._order[1][place]]

    @torch.no_grad()
    def _fill(self) -> None:
        wanted, chosen, count = self.chunk * self.batch_tokens, [], 0
        while count < wanted:
            chosen.append(self._document(self._next_document))
            self._next_document += 1
            count += len(chosen[-1]) - 1
        chosen.sort(key=len)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + 7919 * self._chunk_start + 1)
        shuffled = torch.randperm(count, generator=generator)[:wanted]
        pieces: dict[str, list[Tensor]] = {str(site): [] for site in self.sites}
        for documents in groups(chosen):
            ids, mask = pad(documents, self.model.device)
            mask[:, 0] = False
            kept: dict[str, Tensor] = {}
            with capturing(self.model, self.sites, kept):
                part(self.model.lm, self.model.family.trunk)(input_ids=ids, use_cache=False)
            for name, values in kept.items():
                pieces[name].append(values[mask])
        self._held = {name: torch.cat(values)[shuffled.to(values[0].device)] for name, values in pieces.items()}


def groups(documents: Sequence[Document], budget: int = 8192) -> Iterator[list[Document]]:
    """Documents of like length, at most `budget` padded tokens together."""
    group: list[Document] = []
    for document in documents:
        if group and (len(group) + 1) * len(document) > budget:
            yield group
            group = []
        group.append(document)
    yield group
