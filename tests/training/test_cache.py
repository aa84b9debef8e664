"""Activations on disk: what the model computes, written once, gone on with, and given out as batches."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import circuits.activation_cache as activation_cache
from circuits.activation_cache import ActivationCache, CacheSettings, fill
from circuits.activations import run
from circuits.base_models import load_base_model
from circuits.cached import CachedContexts, CachedTokens
from circuits.errors import CircuitsError
from circuits.model import BaseModel
from circuits.replacements.sites import ReadSite, Site
from circuits.text import Document, DocumentSource

MODEL = next((Path(__file__).parents[1] / "data" / "golden").iterdir()) / "model"
READ, WRITE = ReadSite(Site("resid_mid", 1), "full"), Site("attn_out", 1)
SITES = (READ, WRITE, ReadSite(Site("attn_out", 1), "none"), "pattern.1")


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load_base_model(MODEL)


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    rng = random.Random(0)  # no two begin alike, so that no two tokens have the same activations
    return [(0, i, *(rng.randrange(2, 200) for _ in range(rng.randint(2, 40)))) for i in range(2, 200)]


def _settings(folder: Path, **more: Any) -> CacheSettings:
    return CacheSettings(
        folder, **{"tokens": 10**6, "dtype": "float32", "shard_bytes": 150_000, "together": 300} | more
    )


@pytest.fixture(scope="module")
def cache(base: BaseModel, documents: list[Document], tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    folder = tmp_path_factory.mktemp("cache")
    fill(base, DocumentSource.of(documents), SITES, _settings(folder))
    return ActivationCache.open(folder)


def _rows(base: BaseModel, documents: list[Document]) -> Tensor:
    """Both sites of every token that is learned from, by one forward pass a document."""
    found = []
    for document in documents:
        values, _ = run(base, [document], SITES)
        found.append(torch.cat([values[str(READ)], values[str(WRITE)]], 2)[0, 1:])
    return torch.cat(found)


def _nearest(rows: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cdist(rows, known, compute_mode="donot_use_mm_for_euclid_dist").min(1)


def test_token_batches_hold_what_the_model_computes(
    base: BaseModel, documents: list[Document], cache: ActivationCache
) -> None:
    """Every token once an epoch but for what is left over; a raw read site and its site are stored once."""
    assert cache.manifest["sites"] == ["attn_out.1", "pattern.1", "resid_mid.1:full"]
    assert len(cache.shards) > 6
    assert cache.tokens == sum(len(document) - 1 for document in documents)
    stream = CachedTokens(cache, SITES[:3], batch_tokens=50)
    rows = []
    while stream.state_dict()["pool"] < 2:  # the shards are read in pools of four
        batch = next(stream)
        assert torch.equal(batch["attn_out.1"], batch["attn_out.1:none"])
        assert batch["attn_out.1"].shape == (50, base.shape.d_model)
        rows.append(torch.cat([batch[str(READ)], batch[str(WRITE)]], 1))
    distance, which = _nearest(torch.cat(rows[:-1]), _rows(base, documents))
    assert float(distance.max()) < 1e-4
    assert len(which.unique()) == len(which) > 0.8 * cache.tokens * 8 / len(cache.shards)


def test_context_batches_hold_what_the_model_computes(
    base: BaseModel, documents: list[Document], cache: ActivationCache
) -> None:
    """Whole documents with their patterns, each once an epoch, zero where they are padded."""
    stream = CachedContexts(cache, (READ, WRITE, "pattern.1"), batch_tokens=100)
    by_length: dict[int, list[Document]] = {}
    for document in documents:
        by_length.setdefault(len(document), []).append(document)
    seen, n = set(), 0
    for _ in range(12):
        batch = next(stream)
        assert batch["mask"].numel() <= 100 or len(batch["mask"]) == 1
        for row, mask in enumerate(batch["mask"]):
            length = int(mask.sum())
            assert bool(mask[:length].all())
            values, _ = run(base, by_length[length], SITES)
            gaps = (values[str(WRITE)] - batch[str(WRITE)][row, :length]).abs().amax((1, 2))
            assert float(gaps.min()) < 1e-4
            expected = values["pattern.1"][int(gaps.argmin())]
            assert torch.allclose(batch["pattern.1"][row, :, :length, :length], expected, atol=1e-5)
            assert float(batch["pattern.1"][row, :, length:].abs().sum()) == 0
            assert float(batch[str(READ)][row, length:].abs().sum()) == 0
            seen.add((length, int(gaps.argmin())))
            n += 1
    assert len(seen) == n


@pytest.mark.parametrize("kind", [CachedTokens, CachedContexts])
def test_cached_stream_goes_on_exactly(cache: ActivationCache, kind: Any) -> None:
    """Across pools and epochs; another seed gives another order."""
    whole = kind(cache, SITES, batch_tokens=200)
    batches = [next(whole)["attn_out.1"] for _ in range(60)]
    for given in (0, 7, 33):
        stopped, again = (kind(cache, SITES, batch_tokens=200) for _ in range(2))
        for _ in range(given):
            next(stopped)
        again.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
        assert all(torch.equal(next(again)["attn_out.1"], expected) for expected in batches[given:])
    other = next(kind(cache, SITES, batch_tokens=200, seed=1))["attn_out.1"]
    assert other.shape != batches[0].shape or not torch.equal(other, batches[0])


def test_processes_cache_and_read_shares(
    base: BaseModel, documents: list[Document], tmp_path: Path, cache: ActivationCache
) -> None:
    """Two processes cache disjoint halves; one process, or two with disjoint shards, learn from them."""
    source = DocumentSource.of(documents)
    for process in range(2):
        fill(base, source.share(process, 2), SITES, _settings(tmp_path, process=process, processes=2))
    both = ActivationCache.open(tmp_path)
    assert both.tokens == cache.tokens
    fill(base, source, SITES[:1], _settings(tmp_path))  # finished: by one process, and with fewer sites
    known = _rows(base, documents)
    halves = []
    for process in range(2):
        stream = CachedTokens(both, SITES[:2], 50, process=process, processes=2)
        rows = []
        while stream.state_dict()["pool"] < 1:
            batch = next(stream)
            rows.append(torch.cat([batch[str(READ)], batch[str(WRITE)]], 1))
        halves.append(set(_nearest(torch.cat(rows[:-1]), known)[1].tolist()))
    assert min(map(len, halves)) > 500
    assert not halves[0] & halves[1]
    with pytest.raises(CircuitsError, match="too few for 99 processes"):
        CachedTokens(cache, SITES, 50, process=0, processes=99)


def test_interrupted_caching_goes_on(
    base: BaseModel, documents: list[Document], tmp_path: Path, cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while a shard is written, and again before it is entered, the shards are those of one go."""
    written: Iterator[bool] = iter([False, False, True, False, True])

    def breaking(tensors: dict[str, Tensor], path: Path) -> None:
        torch_save(tensors, path)
        if next(written, False):
            raise KeyboardInterrupt

    torch_save = activation_cache.save_file
    monkeypatch.setattr(activation_cache, "save_file", breaking)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fill(base, DocumentSource.of(documents), SITES, _settings(tmp_path))
    assert 0 < ActivationCache.open(tmp_path).tokens < cache.tokens
    heard: list[tuple[int, int]] = []
    fill(base, DocumentSource.of(documents), SITES, _settings(tmp_path), lambda *place: heard.append(place))
    again = ActivationCache.open(tmp_path)
    assert [shard.path.name for shard in again.shards] == [shard.path.name for shard in cache.shards]
    for one, other in zip(again.shards, cache.shards, strict=True):
        assert one.path.read_bytes() == other.path.read_bytes()
    assert not list(tmp_path.glob(".*"))
    assert heard[-1][0] == again.tokens


def test_cache_grows_and_is_limited(base: BaseModel, documents: list[Document], tmp_path: Path) -> None:
    """About as many tokens as are asked for; a longer training caches more of the same text behind them."""
    fill(base, DocumentSource.of(documents), SITES[:1], _settings(tmp_path, tokens=1000))
    first = ActivationCache.open(tmp_path)
    assert 1000 <= first.tokens < 1031
    fill(base, DocumentSource.of(documents), SITES[:1], _settings(tmp_path, tokens=2000))
    second = ActivationCache.open(tmp_path)
    assert second.shards[: len(first.shards)] == first.shards
    assert 2000 <= second.tokens < 2062


def test_cache_of_something_else_is_refused(base: BaseModel, documents: list[Document], tmp_path: Path) -> None:
    """Each message names what is there and what was expected."""
    source = DocumentSource.of(documents)
    fill(base, source, SITES[:1], _settings(tmp_path, tokens=500))
    for refused, match in [
        ((DocumentSource.of(documents[:99]), SITES[:1], _settings(tmp_path)), "the text, or its window there is"),
        ((source, SITES[:1], _settings(tmp_path, dtype="float16")), "the dtype there is float32, here float16"),
        ((source, SITES, _settings(tmp_path)), "has resid_mid.1:full, but the training needs attn_out.1, pattern.1"),
        ((source, SITES[:1], _settings(tmp_path, processes=2)), "by 1 processes"),
    ]:
        with pytest.raises(CircuitsError, match=match):
            fill(base, *refused)
    with pytest.raises(CircuitsError, match="choose bfloat16, float16, float32"):
        _settings(tmp_path, dtype="float8")
    with pytest.raises(CircuitsError, match="fewer than one batch of 9999"):
        CachedTokens(ActivationCache.open(tmp_path), SITES[:1], 9999)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(CircuitsError, match="this is no cache of activations"):
        ActivationCache.open(tmp_path)


def test_half_precision(base: BaseModel, documents: list[Document], tmp_path: Path, cache: ActivationCache) -> None:
    """Rounded once; batches are float32; what does not fit into float16 is refused."""
    fill(base, DocumentSource.of(documents), SITES, _settings(tmp_path, dtype="bfloat16", shard_bytes=75_000))
    half = ActivationCache.open(tmp_path)
    ours, theirs = (next(CachedTokens(each, SITES[:1], 50))[str(READ)] for each in (half, cache))
    assert ours.dtype == torch.float32
    assert torch.equal(ours, ours.bfloat16().float())
    assert len(half.shards) == len(cache.shards)
    assert torch.equal(ours, theirs.bfloat16().float())
    with pytest.raises(CircuitsError, match="do not fit into float16"):
        activation_cache._check_finite({"x": torch.tensor([1e6]).half()}, _settings(tmp_path, dtype="float16"))
