"""Batches for training from cached activations, as `TokenStream` and `ContextStream` give them from text.

Every epoch the shards are shuffled and taken some at a time, and the tokens, or documents, of these are shuffled among
one another. The state is two numbers.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from circuits.activation_cache import ActivationCache, Shard, Sites, name_of
from circuits.activations import Batch
from circuits.errors import CircuitsError

TOGETHER = 4  # shards whose tokens are mixed


@dataclass
class CachedStream(ABC):
    """Endless batches of cached activations, float32 on `device`.

    Parameters
    ----------
    sites
        Some or all of those in the cache.
    process, processes
        Which of how many processes this is; each takes other shards of the shuffled order.
    """

    cache: ActivationCache
    sites: Sites
    batch_tokens: int = 4096
    seed: int = 0
    device: str | torch.device = "cpu"
    process: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        self.cache.require(self.sites)
        self.names = list(dict.fromkeys(name_of(site) for site in self.sites))
        if len(self.cache.shards) < self.processes:
            raise CircuitsError(
                f"{self.cache.folder}: {len(self.cache.shards)} shards are too few for {self.processes} processes"
            )
        if self.cache.tokens < self.batch_tokens * self.processes:
            raise CircuitsError(
                f"{self.cache.folder}: the cache has {self.cache.tokens} tokens, fewer than one batch of "
                f"{self.batch_tokens} for {self.processes} processes; cache more text"
            )
        self._pool, self._place, self._count = -1, 0, 0

    def __iter__(self) -> "CachedStream":
        return self

    def __next__(self) -> Batch:
        empty = 0
        while self._place >= self._count:
            self._load(self._pool + 1)
            empty += 1
            if empty > len(self.cache.shards):
                raise CircuitsError(f"{self.cache.folder}: no shard has a whole batch; cache more text")
        self._place += 1
        batch = self._batch(self._place - 1)
        return {name: batch[name] for name in batch if name == "mask"} | {str(s): batch[name_of(s)] for s in self.sites}

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands."""
        return {"pool": self._pool, "place": self._place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a stream of the same cache stood."""
        if int(state["pool"]) >= 0:
            self._load(int(state["pool"]))
        self._place = int(state["place"])

    def _load(self, pool: int) -> None:
        """Read the shards of the pool of this number and shuffle what is in them."""
        shards = self.cache.shards
        together = max(1, min(TOGETHER, len(shards) // self.processes))
        pools = -(-len(shards) // together)
        epoch, number = divmod(pool, len(range(self.process, pools, self.processes)))
        order = self._shuffled(len(shards), epoch)
        first = (self.process + number * self.processes) * together
        self._pool, self._place = pool, 0
        self._shards = [self._read(shards[i]) for i in order[first : first + together].tolist()]
        self._count = self._arrange()

    def _shuffled(self, count: int, salt: int) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + salt) * 7919 + count)
        return torch.randperm(count, generator=generator)

    def _read(self, shard: Shard) -> Batch:
        try:
            with safe_open(shard.path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in [*self.names, "lengths"]}
        except Exception as error:  # safetensors has errors of several kinds
            raise CircuitsError(f"{shard.path}: the cached activations could not be read: {error}") from error

    @abstractmethod
    def _arrange(self) -> int:
        """Shuffle the shards that were read; how many batches they give."""

    @abstractmethod
    def _batch(self, place: int) -> Batch:
        """Batch `place` of the shards that were read."""


class CachedTokens(CachedStream):
    """Batches `{str(site): (batch_tokens, D)}`; first tokens of documents, and what is left of a pool, are left out."""

    def _arrange(self) -> int:
        usable = []
        for shard in self._shards:
            mask = torch.ones(int(shard["lengths"].sum()), dtype=torch.bool)
            mask[shard["lengths"].cumsum(0) - shard["lengths"]] = False
            usable.append(mask)
        rows = torch.cat(usable).nonzero().squeeze(1)
        self._rows = rows[self._shuffled(len(rows), self._pool)]
        self._values = {name: torch.cat([shard.pop(name) for shard in self._shards]) for name in self.names}
        return len(rows) // self.batch_tokens

    def _batch(self, place: int) -> Batch:
        rows = self._rows[place * self.batch_tokens : (place + 1) * self.batch_tokens]
        return {name: values[rows].to(self.device).float() for name, values in self._values.items()}


class CachedContexts(CachedStream):
    """Batches of whole documents of like length, padded with zeros: `(C, S, D)`, "pattern.l" `(C, H, S, S)`, "mask"."""

    def _arrange(self) -> int:
        documents = [(int(n), i, j) for i, shard in enumerate(self._shards) for j, n in enumerate(shard["lengths"])]
        mixed = [documents[i] for i in self._shuffled(len(documents), self._pool).tolist()]
        batches: list[list[tuple[int, int, int]]] = [[]]
        for document in sorted(mixed, key=lambda document: document[0]):
            if batches[-1] and (len(batches[-1]) + 1) * document[0] > self.batch_tokens:
                batches.append([])
            batches[-1].append(document)
        self._order = [batches[i] for i in self._shuffled(len(batches), self._pool).tolist()]
        self._starts = [_starts(shard["lengths"]) for shard in self._shards]
        self._squares = [_starts(shard["lengths"] ** 2) for shard in self._shards]
        return len(batches)

    def _batch(self, place: int) -> Batch:
        chosen = self._order[place]
        width = max(n for n, _, _ in chosen)
        mask = torch.arange(width) < torch.tensor([n for n, _, _ in chosen])[:, None]
        batch = {"mask": mask.to(self.device)}
        for name in self.names:
            of = self._pattern if name.startswith("pattern.") else self._activations
            held = [of(name, *document) for document in chosen]
            size = (held[0].shape[0], width, width) if name.startswith("pattern.") else (width, held[0].shape[1])
            padded = held[0].new_zeros(len(held), *size)
            for row, value in enumerate(held):
                padded[row][..., : value.shape[-2], : value.shape[-1]] = value
            batch[name] = padded.to(self.device).float()
        return batch

    def _activations(self, name: str, n: int, shard: int, document: int) -> Tensor:
        start = self._starts[shard][document]
        return self._shards[shard][name][start : start + n]

    def _pattern(self, name: str, n: int, shard: int, document: int) -> Tensor:
        flat, squares = self._shards[shard][name], self._squares[shard]
        heads = len(flat) // squares[-1]
        start = squares[document] * heads
        return flat[start : start + heads * n * n].view(heads, n, n)


def _starts(lengths: Tensor) -> list[int]:
    """Where each begins, and where the last ends."""
    starts: list[int] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).tolist()
    return starts
