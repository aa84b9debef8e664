"""The activations that a training learns from: computed from text as it goes, or cached on disk once."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuits.activation_cache import ActivationCache, CacheSettings, fill
from circuits.activations import Batch, ContextStream, TokenStream
from circuits.cached import CachedContexts, CachedTokens
from circuits.errors import CircuitsError
from circuits.model import BaseModel
from circuits.replacements.checkpoints import Resumable
from circuits.replacements.parallel import Processes
from circuits.replacements.sites import ReadSite, Site
from circuits.text import DocumentSource


@dataclass(frozen=True)
class StreamSettings:
    """How activations are had.

    batch_tokens
        Tokens of a batch of one process.
    cache
        A folder to cache activations in, or with cached ones; None: they are computed as they are needed.
    cache_tokens, cache_dtype
        How many tokens to cache at most, by all processes together, and as what.
    """

    batch_tokens: int = 4096
    seed: int = 0
    cache: Path | None = None
    cache_tokens: int = 0
    cache_dtype: str = "float16"


def sites_of(module: Any) -> tuple[ReadSite | Site | str, ...]:
    """All that a `Trainable` needs in its batches."""
    return tuple(dict.fromkeys([*module.reads, *module.writes, *getattr(module, "extra", ())]))


def open_stream(
    model: BaseModel,
    documents: DocumentSource,
    module: Any,
    settings: StreamSettings,
    processes: Processes,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Resumable[Batch]:
    """Batches for `module`, a `Trainable`, of this process's share of the documents.

    `progress` hears of the caching: tokens cached by this process, and those wanted.
    """
    sites, share = sites_of(module), documents.share(processes.rank, processes.count)
    whole = bool(getattr(module, "in_context", False))
    if settings.cache is None:
        stream = ContextStream if whole else TokenStream
        return stream(model, share, sites, settings.batch_tokens, seed=settings.seed)
    if settings.cache_tokens < 1:
        raise CircuitsError(f"{settings.cache}: cache_tokens is {settings.cache_tokens}, expected at least 1")
    caching = CacheSettings(
        settings.cache,
        settings.cache_tokens,
        settings.cache_dtype,
        process=processes.rank,
        processes=processes.count,
    )
    fill(model, share, sites, caching, progress)
    processes.wait()
    cached = CachedContexts if whole else CachedTokens
    return cached(
        ActivationCache.open(settings.cache),
        sites,
        settings.batch_tokens,
        settings.seed,
        model.device,
        processes.rank,
        processes.count,
    )
