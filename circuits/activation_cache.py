"""Activations computed once, on disk, for any number of trainings.

    manifest.json            model, text, sites and dtype: what the cache is of
    part-<r>.json            what process r has written: its shards, their tokens, where it stood in the text
    shard-<r>-<n>.safetensors

A shard has every token of its documents, one document after the other: `lengths` (documents,), for every site
`(tokens, D)`, and for a pattern `(sum of H S S,)`, each document's `(H, S, S)` laid flat. So the same cache serves
replacements that learn from single tokens and those that learn from contexts. Shards are moved into place when they
are whole, then entered into the part's list; a caching that was stopped goes on behind the last one entered.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from circuits.activations import run
from circuits.errors import CircuitsError
from circuits.model import DTYPES, BaseModel
from circuits.replacements.sites import ReadSite, Site
from circuits.text import Document, DocumentSource, groups

MANIFEST = "manifest.json"
FORMAT = {"format": "circuits-activations", "version": 1}
Sites = Sequence[ReadSite | Site | str]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CacheSettings:
    """What to keep on disk.

    tokens
        How many to cache; fewer where the text has fewer.
    dtype
        float16, bfloat16 or float32.
    shard_bytes
        About the size of a shard.
    together
        Tokens that the model is run on at once.
    process, processes
        Which of how many processes this is; each caches its share of tokens from its share of the documents.
    """

    folder: Path
    tokens: int
    dtype: str = "float16"
    shard_bytes: int = 1 << 28
    together: int = 8192
    process: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise CircuitsError(f"activations cannot be cached as {self.dtype!r}; choose {', '.join(sorted(DTYPES))}")


@dataclass(frozen=True)
class Shard:
    """One file of the cache, and how many tokens and documents are in it."""

    path: Path
    tokens: int
    documents: int


@dataclass(frozen=True)
class ActivationCache:
    """A folder of cached activations; make one with `fill`, or find one with `open`."""

    folder: Path
    manifest: dict[str, Any]
    shards: tuple[Shard, ...]

    @property
    def tokens(self) -> int:
        """Tokens that can be learned from: first tokens of documents do not count."""
        return sum(shard.tokens - shard.documents for shard in self.shards)

    @staticmethod
    def open(folder: Path) -> "ActivationCache":
        """The cache in `folder`, as far as it has been written."""
        manifest = _read(folder / MANIFEST)
        if {name: manifest.get(name) for name in FORMAT} != FORMAT:
            raise CircuitsError(f"{folder / MANIFEST}: expected {FORMAT}; this is no cache of activations")
        shards = []
        for process in range(int(manifest["processes"])):
            for entry in _read_part(folder, process)["shards"]:
                shards.append(Shard(folder / entry["file"], int(entry["tokens"]), int(entry["documents"])))
        return ActivationCache(folder, manifest, tuple(shards))

    def require(self, sites: Sites) -> None:
        """Refuse a training that needs other sites."""
        missing = sorted({name_of(site) for site in sites} - set(self.manifest["sites"]))
        if missing:
            raise CircuitsError(
                f"{self.folder}: the cache has {', '.join(self.manifest['sites'])}, "
                f"but the training needs {', '.join(missing)}; give another folder"
            )


def name_of(site: ReadSite | Site | str) -> str:
    """The name under which a site is cached: a raw read site and the site itself are the same."""
    return str(site).removesuffix(":none")


def fill(
    model: BaseModel,
    documents: DocumentSource,
    sites: Sites,
    settings: CacheSettings,
    progress: Progress = lambda done, total: None,
) -> None:
    """Cache the activations of `documents` at `sites`, as far as they are not cached yet.

    A finished cache that has these sites, and more, is left as it is, by whichever number of processes it was made.

    Parameters
    ----------
    documents
        This process's share of the text.
    progress
        Called with the tokens cached so far and those wanted, of this process.

    Raises
    ------
    CircuitsError
        The folder has a cache of something else.
    """
    manifest = FORMAT | {
        "model": {"name": Path(model.name).name, "hash": model.identity},
        "text": documents.describe(),
        "sites": sorted({name_of(site) for site in sites}),
        "dtype": settings.dtype,
        "processes": settings.processes,
    }
    if not _enter(settings, manifest, sites):
        return
    part = _read_part(settings.folder, settings.process)
    if part["source"] is not None:
        documents.load_state_dict(part["source"])
    wanted = -(-settings.tokens // settings.processes)
    done = sum(entry["tokens"] - entry["documents"] for entry in part["shards"])
    while done < wanted and documents.more():
        name = f"shard-{settings.process}-{len(part['shards']):05d}.safetensors"
        tensors = _shard(model, documents, sites, settings, wanted - done)
        _check_finite(tensors, settings)
        _write(settings.folder / name, lambda path, tensors=tensors: save_file(tensors, path))  # type: ignore[misc]
        lengths = tensors["lengths"]
        part["shards"].append({"file": name, "tokens": int(lengths.sum()), "documents": len(lengths)})
        part["source"] = documents.state_dict()
        _write_json(settings.folder / f"part-{settings.process}.json", part)
        done += int(lengths.sum()) - len(lengths)
        progress(done, max(wanted, done))
    if not done:
        raise CircuitsError("the text has no document of at least two tokens for every process; give more text")
    _write_json(settings.folder / f"part-{settings.process}.json", part | {"ended": not documents.more()})


def _enter(settings: CacheSettings, manifest: dict[str, Any], sites: Sites) -> bool:
    """Whether there is something to cache; begins or checks the manifest."""
    path = settings.folder / MANIFEST
    if not path.is_file():
        _write_json(path, manifest)
        return True
    cache = ActivationCache.open(settings.folder)
    for name, what in (("model", "the model"), ("text", "the text, or its window"), ("dtype", "the dtype")):
        if cache.manifest[name] != manifest[name]:
            raise CircuitsError(
                f"{settings.folder}: the cache is of another training: {what} there is {cache.manifest[name]}, "
                f"here {manifest[name]}; give another folder, or remove this one"
            )
    cache.require(sites)
    parts = [_read_part(settings.folder, process) for process in range(int(cache.manifest["processes"]))]
    if cache.tokens >= settings.tokens or all(part["ended"] for part in parts):
        return False
    if manifest["sites"] != cache.manifest["sites"] or manifest["processes"] != cache.manifest["processes"]:
        raise CircuitsError(
            f"{settings.folder}: the cache has {cache.tokens} of {settings.tokens} tokens, and can only be gone on "
            f"with for all its sites ({', '.join(cache.manifest['sites'])}) and by "
            f"{cache.manifest['processes']} processes; do that, or give another folder"
        )
    return True


def _shard(
    model: BaseModel, documents: DocumentSource, sites: Sites, settings: CacheSettings, wanted: int
) -> dict[str, Tensor]:
    """The tensors of the next shard: documents until it has its size, or `wanted` tokens."""
    sites = list({name_of(site): site for site in sites}.values())
    dtype, pieces, lengths = DTYPES[settings.dtype], {name_of(site): list[Tensor]() for site in sites}, list[int]()
    size = 0
    while size < settings.shard_bytes and wanted > 0 and documents.more():
        chosen: list[Document] = []
        while sum(map(len, chosen)) < settings.together and wanted > 0 and documents.more():
            chosen.append(next(documents))
            wanted -= len(chosen[-1]) - 1
        for group in groups(sorted(chosen, key=len), settings.together):
            values, mask = run(model, group, sites)
            lengths += [len(document) for document in group]
            for name, value in ((name_of(site), value) for site, value in values.items()):
                if name.startswith("pattern."):
                    kept = [value[i, :, :n, :n].flatten() for i, n in enumerate(map(len, group))]
                else:
                    kept = [value[mask]]
                pieces[name] += [tensor.to("cpu", dtype) for tensor in kept]
                size += sum(tensor.numel() for tensor in kept) * dtype.itemsize
    return {name: torch.cat(tensors) for name, tensors in pieces.items()} | {"lengths": torch.tensor(lengths)}


def _check_finite(tensors: dict[str, Tensor], settings: CacheSettings) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CircuitsError(
                f"{settings.folder}: activations at {name} do not fit into {settings.dtype}; cache them as bfloat16"
            )


def _read_part(folder: Path, process: int) -> dict[str, Any]:
    path = folder / f"part-{process}.json"
    return _read(path) if path.is_file() else {"shards": [], "source": None, "ended": False}


def _read(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CircuitsError(f"{path}: no manifest of cached activations could be read: {error}") from error
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    _write(path, lambda unfinished: unfinished.write_text(json.dumps(value, indent=1), encoding="utf-8"))


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """A file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
