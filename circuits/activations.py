"""Activations for training, streamed from text: batches of what replacements read and write.

Documents are run through the model in chunks, in the shuffled order of their source. `TokenStream` shuffles the tokens
of a chunk among one another; `ContextStream` keeps documents whole, with attention patterns, for replacements that
move features between positions. A stream's state is a few numbers, and a chunk is computed again from them, so that
a training resumes exactly.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from circuits.capturing import capturing, joined
from circuits.errors import CircuitsError
from circuits.families import part
from circuits.model import BaseModel
from circuits.replacements.sites import ReadSite, Site
from circuits.text import Document, DocumentSource, groups, pad

Batch = dict[str, Tensor]


@dataclass
class ActivationStream(ABC):
    """Endless batches of activations.

    Parameters
    ----------
    documents
        Where the documents come from; with several processes each has a share of its own. A list is shuffled by `seed`.
    sites
        Read and write sites, and "pattern.l" for attention patterns.
    batch_tokens
        Tokens of a batch: exactly so many in a `TokenStream`, about so many in a `ContextStream`. Of one process:
        with N processes a step learns from N times as many.
    chunk
        Batches that are computed together and shuffled among one another.
    """

    model: BaseModel
    documents: DocumentSource | Sequence[Document]
    sites: tuple[ReadSite | Site | str, ...]
    batch_tokens: int = 4096
    chunk: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        given = self.documents
        self.source = given if isinstance(given, DocumentSource) else DocumentSource.of(given, seed=self.seed)
        missing = self.batch_tokens
        for document in self.source.in_order():
            missing -= len(document) - 1
            if missing <= 0:
                break
        else:
            raise CircuitsError(f"the text has fewer tokens than one batch of {self.batch_tokens}; give more text")
        self._chunk_start, self._place = self.source.state_dict(), 0
        self._held: list[Batch] = []

    def __iter__(self) -> "ActivationStream":
        return self

    def __next__(self) -> Batch:
        if self._place >= len(self._held):
            self._chunk_start, self._place = self.source.state_dict(), 0
            self._held = self._chunk()
        self._place += 1
        return self._held[self._place - 1]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands."""
        return {"chunk_start": self._chunk_start, "place": self._place, "filled": bool(self._held)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a stream of the same documents stood."""
        self._chunk_start = dict(state["chunk_start"])
        self.source.load_state_dict(self._chunk_start)
        self._place, self._held = int(state["place"]), self._chunk() if state["filled"] else []

    @torch.no_grad()
    def _chunk(self) -> list[Batch]:
        """The next documents, at least `chunk * batch_tokens` tokens of them, as batches."""
        wanted, chosen, count = self.chunk * self.batch_tokens, [], 0
        while count < wanted:
            chosen.append(next(self.source))
            count += len(chosen[-1]) - 1
        return self._batches(sorted(chosen, key=len))

    @abstractmethod
    def _batches(self, documents: list[Document]) -> list[Batch]:
        """The activations of documents sorted by length."""

    def _shuffled(self, count: int) -> Tensor:
        start = int(self._chunk_start["documents"])
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + 7919 * start + 1)
        return torch.randperm(count, generator=generator)

    def _run(self, documents: list[Document]) -> tuple[Batch, Tensor]:
        return run(self.model, documents, self.sites)


class TokenStream(ActivationStream):
    """Batches `{str(site): (batch_tokens, D)}` of shuffled tokens; first tokens of documents are left out."""

    def _batches(self, documents: list[Document]) -> list[Batch]:
        pieces: dict[str, list[Tensor]] = {str(site): [] for site in self.sites}
        for group in groups(documents):
            values, mask = self._run(group)
            mask[:, 0] = False
            for name, value in values.items():
                pieces[name].append(value[mask])
        order = self._shuffled(sum(len(document) - 1 for document in documents))[: self.chunk * self.batch_tokens]
        tokens = {name: torch.cat(values)[order.to(self.model.device)] for name, values in pieces.items()}
        size = self.batch_tokens
        return [{name: values[i * size : (i + 1) * size] for name, values in tokens.items()} for i in range(self.chunk)]


class ContextStream(ActivationStream):
    """Batches of whole documents of any lengths, padded on the right to S positions.

    Documents of like length together would waste less, but texts of one length are often of one kind, and a batch
    should have all kinds.

    `{str(site): (C, S, D)}`, "pattern.l" (C, H, S, S), and "mask" (C, S), true at real tokens, the first included.
    """

    def _batches(self, documents: list[Document]) -> list[Batch]:
        batches, group, count = [], [], 0
        for place in self._shuffled(len(documents)).tolist():
            group.append(documents[place])
            count += len(documents[place]) - 1
            if count >= self.batch_tokens:
                values, mask = self._run(group)
                batches.append(values | {"mask": mask})
                group, count = [], 0
        return batches


@torch.no_grad()
def run(
    model: BaseModel, documents: Sequence[Document], sites: Sequence[ReadSite | Site | str]
) -> tuple[Batch, Tensor]:
    """Activations `{str(site): (C, S, D)}` of documents, padded, and the mask (C, S) of their tokens."""
    ids, mask = pad(documents, model.device)
    kept: Batch = {}
    with capturing(model, sites, kept):
        part(model.lm, model.family.trunk)(input_ids=ids, use_cache=False)
    return {str(site): joined(kept, site) for site in sites}, mask
