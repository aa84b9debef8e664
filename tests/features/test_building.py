"""Pages of tiny models and texts, against an account that computes everything again with loops; stops and restarts."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plain_pages
import pytest
from tiny_models import BOS, CASES, VOCABULARY, build

from circuits.errors import CircuitsError
from circuits.feature_building import build_features
from circuits.feature_gathering import Settings
from circuits.feature_store import FeatureStore
from circuits.loading import Model
from circuits.replacements.dictionary import Dictionary
from circuits.replacements.movement import HeadLoading, OwnAttention
from circuits.text import DocumentSource

SETTINGS = Settings(
    tokens=10_000, window=14, context=6, top=3, per_quantile=1, outputs=4, near=3, sample=10_000, batch_tokens=60
)
LOOKED_AT = [
    "gpt2_clt_attn_out", "gpt2_clt_frozen", "llama_weakly_causal_mlp", "gpt2_mtc", "llama_mtc_top4", "gpt2_mtc_ranks",
    "llama_lorsa_published", "gpt2_own", "gpt2_value", "gpt2_residual_middle", "gemma2_before_post_norm", "gemma2_mtc",
    "neox_parallel_skip_z",
]  # fmt: skip


def some_documents(count: int = 40, seed: int = 0) -> plain_pages.Documents:
    """Documents of any length, some with BOS in front."""
    rng = random.Random(seed)
    return [
        (*((BOS,) if rng.random() < 0.6 else ()), *(rng.randrange(1, VOCABULARY) for _ in range(rng.randint(2, 13))))
        for _ in range(count)
    ]


def in_order(documents: plain_pages.Documents) -> plain_pages.Documents:
    """The documents as a source gives them."""
    source, found = DocumentSource.of(documents), []
    while source.more():
        found.append(next(source))
    return found


@pytest.mark.parametrize("name", LOOKED_AT)
def test_pages_are_those_of_the_plain_account(name: str, tmp_path: Path) -> None:
    """Density, histogram, examples with their activations and moves, outputs and head loadings of every feature."""
    model = build(CASES[name])
    documents = some_documents()
    store = build_features(model, DocumentSource.of(documents), tmp_path / "store", SETTINGS)
    documents = in_order(documents)
    active = moving = 0
    for dictionary in (d for r in model.replacements for d in r.dictionaries):
        seen = plain_pages.see(model, dictionary, documents)
        for feature in range(dictionary.n_features):
            page, events = store.page(dictionary.name, feature), seen.events.get(feature, [])
            assert page["tokens_seen"] == plain_pages.counted(documents)
            assert page["density"] == pytest.approx(len(events) / page["tokens_seen"], rel=1e-3)
            check_outputs(model, dictionary, page)
            if not events:
                assert page["largest"] == 0.0
                assert page["examples"] == page["histogram"]["counts"] == []
                continue
            active += 1
            largest = max((event[2] for event in events), key=abs)
            assert page["largest"] == pytest.approx(largest, rel=1e-3)
            assert page["histogram"] == plain_pages.histogram([event[2] for event in events])
            wanted = plain_pages.chosen(events, feature, SETTINGS)
            assert [example["group"] for example in page["examples"]] == [group for group, _, _ in wanted]
            for example, (_, number, position) in zip(page["examples"], wanted, strict=True):
                moving += check_example(dictionary, seen, example, (number, position, feature), documents[number])
    assert active > 20
    assert (moving > 20) == any(d.moved_by is not None for r in model.replacements for d in r.dictionaries)


def check_outputs(model: Model, dictionary: Dictionary, page: dict[str, Any]) -> None:
    """Top and bottom tokens; of a feature of higher rank the sizes alone, without a bottom."""
    written = [site for r in model.replacements for d in r.dictionaries for site in d.writes]
    cut = {site.layer for site in written if site.name == "resid_post"}
    if dictionary.layer in cut and dictionary.read.site.name != "resid_pre":
        assert page["top_outputs"] == []  # it takes no part
        return
    if dictionary.rank > 1:
        assert page["bottom_outputs"] == []
        assert len(page["top_outputs"]) == SETTINGS.outputs
        return
    if any(site.layer in cut and site.name != "resid_post" for site in dictionary.writes):
        return  # some of its writes take no part
    effects = plain_pages.effect(model, dictionary, page["feature"])
    for side, sign in (("top_outputs", 1), ("bottom_outputs", -1)):
        values, tokens = (sign * effects).sort(descending=True)
        expected = [(f"<{t}>", sign * v) for t, v in zip(tokens.tolist(), values.tolist()) if v > 0]
        expected = expected[: SETTINGS.outputs]
        assert [token for token, _ in page[side]] == [token for token, _ in expected]
        scale = abs(expected[0][1])
        assert np.allclose([w for _, w in page[side]], [w for _, w in expected], atol=half(scale), rtol=0)


def check_example(
    dictionary: Dictionary,
    seen: plain_pages.Seen,
    example: dict[str, Any],
    place: tuple[int, int, int],
    document: tuple[int, ...],
) -> int:
    """The window holds the place, tokens are the document's, and activations and moves are right; counts moves."""
    number, position, feature = place
    start, width = example["start"], len(example["tokens"])
    assert example["document"] == number
    assert width == min(SETTINGS.context, len(document))
    assert start <= position < start + width
    assert example["tokens"] == [f"<{token}>" for token in document[start : start + width]]
    active, recording = seen.active[number], seen.recordings[number]
    mine = (active.features == feature).nonzero().flatten().tolist()
    values = {int(active.positions[i]): float(active.activations[i]) for i in mine}
    if dictionary.moved_by is None:
        values = {p: a for p, a in values.items() if p > 0 or document[0] != BOS}
        assert "moves" not in example
        close(example["activations"], [values.get(start + i, 0.0) for i in range(width)])
        return 0
    if isinstance(dictionary.moved_by, HeadLoading):
        close(example["activations"], [values.get(start + i, 0.0) for i in range(width)])
        parts = plain_pages.carried(dictionary, recording, active, feature)
        zero = 0.0 * next(iter(parts.values()))
        arrived = [sum((v for (_, p), v in parts.items() if p == start + i), zero) for i in range(width)]
        if dictionary.rank == 1:
            close(example["query_activations"], told([float(v[0]) for v in arrived]))
        else:
            close(example["query_activations"], told([float(v.norm()) for v in arrived]))
        bias = 0.0
    else:
        close(example["query_activations"], told([values.get(start + i, 0.0) for i in range(width)]))
        if dictionary.rank > 1:
            return len(example["moves"])
        bias = float(dictionary.b_enc[feature])
        pre = {int(active.positions[i]): float(active.pre_activations[i]) for i in mine}
    strongest = 1.01 * max(map(abs, example["query_activations"]))  # it is rounded
    keys = len(document)
    for query, value in enumerate(example["query_activations"]):
        moved = [weight for _, q, weight in example["moves"] if q == query]
        if not value:
            assert moved == []
        else:
            expected = value if isinstance(dictionary.moved_by, HeadLoading) else pre[start + query] - bias
            assert sum(moved) == pytest.approx(expected, abs=half(strongest) * (keys + 1))
    if isinstance(dictionary.moved_by, HeadLoading) and dictionary.rank == 1:
        for key, query, weight in example["moves"]:
            others = sum(float(v[0]) for (_, p), v in parts.items() if p == start + query)
            told_keys = [k for k, q, _ in example["moves"] if q == query and k >= 0]
            others -= sum(float(parts[start + k, start + query][0]) for k in told_keys)
            one = others if key < 0 else float(parts[start + key, start + query][0])
            assert key < 0 or abs(one) >= 0.049 * strongest / 1.01
            assert weight == pytest.approx(one, abs=half(strongest))
    return len(example["moves"])


def told(values: list[float]) -> list[float]:
    """The query side from a fifth of the strongest on."""
    strongest = max(map(abs, values))
    return [value if abs(value) >= 0.2 * strongest else 0.0 for value in values]


def close(found: list[float], expected: list[float]) -> None:
    """To the third digit of the largest."""
    scale = max(map(abs, expected), default=0.0)
    assert np.allclose(found, expected, atol=half(scale), rtol=0), (found, expected)


def test_neighbours_and_head_loadings(tmp_path: Path) -> None:
    """Cosines of summed decoders, correlations over all tokens, and each head's share of what a feature reads."""
    model = build(CASES["gpt2_clt_attn_out"])
    documents = some_documents()
    settings = replace(SETTINGS, near=72 - 1)
    store = build_features(model, DocumentSource.of(documents), tmp_path / "store", settings)
    documents = in_order(documents)
    dictionaries = [d for r in model.replacements for d in r.dictionaries]
    rows, columns, names, n = [], [], [], plain_pages.counted(documents)
    places = {place: i for i, place in enumerate(
        (c, p) for c, document in enumerate(documents) for p in range(len(document)) if p or document[0] != BOS
    )}  # fmt: skip
    for dictionary in dictionaries:
        seen = plain_pages.see(model, dictionary, documents)
        for feature in range(dictionary.n_features):
            decoders = [dictionary.decoder_rows(np_index(feature), site)[0] for site in dictionary.writes]
            rows.append(sum(decoders[1:], decoders[0]).double().numpy())
            column = np.zeros(n)
            for number, position, value in seen.events.get(feature, []):
                column[places[number, position]] = value
            columns.append(column)
            names.append((dictionary.name, feature))
            check_heads(model, dictionary, feature, seen, store)
    unit = np.array(rows) / np.linalg.norm(rows, axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.nan_to_num(np.corrcoef(np.array(columns)))
    for i, (name, feature) in enumerate(names):
        page = store.page(name, feature)
        for key, table in (("near_by_decoder", unit @ unit.T), ("near_by_coactivation", correlation)):
            found = {(of, other): value for of, other, value in page[key]}
            expected = {names[j]: table[i, j] for j in range(len(names)) if j != i}
            assert all(value == pytest.approx(expected[other], abs=6e-4) for other, value in found.items())
            assert {other for other, value in expected.items() if value > 2e-3} <= found.keys()
            assert list(found.values()) == sorted(found.values(), reverse=True)


def half(scale: float) -> float:
    """By how much rounding to the third digit of the largest may change a number, and what float32 leaves."""
    return (0.5 * 10.0 ** (np.ceil(np.log10(scale)) - 3) if scale else 0.0) + 2e-5


def np_index(feature: int) -> Any:
    import torch

    return torch.tensor([feature])


def check_heads(
    model: Model, dictionary: Dictionary, feature: int, seen: plain_pages.Seen, store: FeatureStore
) -> None:
    """The shares of an attention feature's heads, of every place where it is active."""
    page = store.page(dictionary.name, feature)
    if dictionary.read.site.name != "attn_out" or feature not in seen.events:
        assert "head_loading" not in page
        return
    w_o, reader = model.base.attention_weights(dictionary.layer).w_o, dictionary.W_enc[feature]
    shares = np.zeros(len(w_o))
    for number, position, _ in seen.events[feature]:
        z = seen.recordings[number].z[dictionary.layer, position].view(len(w_o), -1)
        for head in range(len(w_o)):
            shares[head] += float(z[head] @ w_o[head] @ reader)
    found = [weight for _, weight in page["head_loading"]]
    assert np.allclose(found, shares / np.abs(shares).sum(), atol=6e-3)
    assert [head for head, _ in page["head_loading"]] == list(range(len(w_o)))


def content(path: Path) -> dict[str, Any]:
    """Everything in a store, by table."""
    db = sqlite3.connect(path)
    tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
    found = {name: db.execute(f"SELECT * FROM {name} ORDER BY 1, 2").fetchall() for name in tables}
    db.close()
    return found


KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from pathlib import Path
from test_building import SETTINGS, some_documents
from tiny_models import CASES, build
from circuits.feature_building import build_features
from circuits.text import DocumentSource
left = int(sys.argv[2])
def progress(done, total):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
build_features(build(CASES["gpt2_mtc"]), DocumentSource.of(some_documents()), Path(sys.argv[1]), SETTINGS,
               every=float(sys.argv[3]), progress=progress)
"""


@pytest.mark.parametrize(("calls", "every"), [((3, 2), 0.0), ((4, 4), 1000.0), ((9, 2), 0.0)])
def test_killed_and_gone_on_with_it_ends_the_same(calls: tuple[int, ...], every: float, tmp_path: Path) -> None:
    """SIGKILL in the first pass, before anything was written down, and in the second; then once more to the end."""
    once, killed = tmp_path / "once.sqlite", tmp_path / "killed.sqlite"
    model, documents = build(CASES["gpt2_mtc"]), some_documents()
    steps = []
    build_features(model, DocumentSource.of(documents), once, SETTINGS, progress=lambda done, _: steps.append(done))
    assert len(steps) > 10
    here = Path(__file__).parent
    script = KILLED.format(paths=[str(here.parents[1]), str(here), str(here.parent / "engine")])
    for count in calls:  # the second one is stopped too, further on
        command = [sys.executable, "-c", script, str(killed), str(count), str(every)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert "work_progress" in content(killed)
    resumed = []
    source = DocumentSource.of(documents)
    build_features(model, source, killed, SETTINGS, progress=lambda done, _: resumed.append(done))
    if every == 0.0:
        assert len(resumed) < len(steps)  # it did go on, and did not begin again
    assert content(once) == content(killed)
    assert json.dumps(FeatureStore(once).page("mtc.1", 3)) == json.dumps(FeatureStore(killed).page("mtc.1", 3))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["killed.sqlite", "once.sqlite"]


def test_building_again_keeps_what_persons_wrote(tmp_path: Path) -> None:
    """Other text, other pages, the same labels; without `again` nothing is built that is there."""
    model, path = build(CASES["gpt2_mtc"]), tmp_path / "store"
    store = build_features(model, DocumentSource.of(some_documents()), path, SETTINGS)
    before, automatic = content(path), store.label("mtc.1", 3)
    store.set_label("mtc.1", 3, "mine")
    build_features(model, DocumentSource.of(some_documents(seed=1)), path, SETTINGS)
    assert content(path)["chunks"] == before["chunks"]
    build_features(model, DocumentSource.of(some_documents(seed=1)), path, SETTINGS, again=True)
    fresh = build_features(model, DocumentSource.of(some_documents(seed=1)), tmp_path / "fresh", SETTINGS)
    assert content(path)["chunks"] != before["chunks"]
    assert store.label("mtc.1", 3) == "mine"
    page, expected = store.page("mtc.1", 3), fresh.page("mtc.1", 3)
    assert (page["label"], page["label_by"]) == ("mine", "person")
    assert expected["label_by"] == "automatic"
    assert expected["label"] == fresh.label("mtc.1", 3) != automatic
    for one in (page, expected):
        for example in one["examples"]:
            example.pop("document")
    assert page | {"label": "", "label_by": ""} == expected | {"label": "", "label_by": ""}
    assert len(content(path)["documents"]) == len(content(tmp_path / "fresh")["documents"])  # the old ones are gone


def test_a_store_of_something_else_is_refused(tmp_path: Path) -> None:
    """Of another model, of other dictionaries, or begun with other settings."""
    model, path = build(CASES["gpt2_mtc"]), tmp_path / "store"
    source = DocumentSource.of(some_documents())
    build_features(model, source, path, SETTINGS)
    with pytest.raises(CircuitsError, match="another model"):
        build_features(build(CASES["llama_lorsa"]), source, path, SETTINGS)
    other = build(CASES["gpt2_mtc"])
    for replacement in other.replacements:
        replacement.__dict__["identity"] = "0" * 64
    with pytest.raises(CircuitsError, match="another replacement"):
        build_features(other, source, path, SETTINGS)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_features(model, source, tmp_path / "begun", SETTINGS, progress=stop)
    with pytest.raises(CircuitsError, match="another settings"):
        build_features(model, source, tmp_path / "begun", replace(SETTINGS, top=2))
    with pytest.raises(CircuitsError, match="no replacement"):
        build_features(Model(model.base, ()), source, tmp_path / "none", SETTINGS)
    for wrong in ({"window": 17}, {"window": 1}, {"per_quantile": 5}, {"top": 0}):
        with pytest.raises(CircuitsError, match=next(iter(wrong))):
            build_features(model, source, tmp_path / "wrong", replace(SETTINGS, **wrong))


def test_own_attention_is_told_too() -> None:
    """The cases above have patterns of a feature's own, features that heads move, and such that stay."""
    kinds = {type(d.moved_by) for name in LOOKED_AT for r in build(CASES[name]).replacements for d in r.dictionaries}
    assert {HeadLoading, OwnAttention, type(None)} <= kinds
