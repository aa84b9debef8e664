"""Estimates: the formulas against tensors that traces really make, what is read for them, and what they advise."""

import json
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_models import CASES, PROMPT, FamilyName, build, random_lm
from torch import Tensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, LlamaConfig

import circuits
from circuits import estimating
from circuits.base_models import load_base_model, load_shapes
from circuits.estimating import Estimate, estimate_headers, l0_of
from circuits.estimating_costs import DictionarySize, Speeds, Work, held_encoders, memory, peak, seconds
from circuits.headers import load_headers
from circuits.prompt import prepare
from circuits.replacements.dictionary import Dictionary, Replacement
from circuits.targets import TokenTarget, TopTokens
from circuits.tracing import lay_out

CASE = next((Path(__file__).parents[1] / "data" / "golden").iterdir())
IDS = list(range(1, 9))
CLT = DictionarySize("clt.0", "clt", n_features=1000, rank=1, d_read=10, d_write=10, n_writes=3, l0=20.0, basis="top-k")
WORK = Work(
    circuits.TraceSettings(),
    n=5, positions=4, n_layers=3, d_model=10, n_heads=4, n_kv_heads=2, d_head=6, vocabulary=50, parameters=7000,
    weight_size=4, live=3, errors=3, outputs=10, dictionaries=((CLT,),), file_bytes=10**6, resident=10**6, free=10**9,
)  # fmt: skip


def asking(work: Work = WORK, **settings: Any) -> Work:
    """The same trace with other settings."""
    return replace(work, settings=circuits.TraceSettings(**settings))


def of_bytes(tensors: list[Tensor]) -> int:
    """Bytes that some tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_nodes_and_bytes_by_hand() -> None:
    """A CLT of three write sites with 20 active features on 4 of 5 positions, over three layers of frozen attention."""
    assert (WORK.features, WORK.nodes, WORK.targets) == (80.0, 80 + 5 + 12, 90.0)
    found = memory(WORK)
    assert found["base model"] == 28000
    assert found["encoders"] == 40000
    assert found["attention weights"] == 4 * 3 * 2 * 6 * 10
    assert found["recording"] == 4 * 3 * 5 * (6 * 10 + 5 * 4 + 6 * (4 + 4 + 2))
    assert found["writers"] == 4 * 10 * (80 * 3 + 5 + 12)
    assert found["decoder files"] == 4 * 1000 * 3 * 10  # few enough for the system to map all of it
    assert "logits" not in found
    assert found["rows"] == 4 * 3 * 90 * 97
    kept = 0.12 * 80 + 5 + 10
    assert found["graph"] == pytest.approx(40 * kept**2 / 2)
    assert found["hop splits"] == pytest.approx(3300 * 0.13 * kept**2)
    late = found["rows"] + found["graph"] + found["hop splits"]
    others = 10**6 + 28000 + 40000 + found["attention weights"] + found["recording"] + found["writers"]
    assert peak(WORK) == pytest.approx(others + max(late, 120000))


def test_the_usual_graph_by_hand() -> None:
    """Its features grow as the root of those that are active, and are never more than those of the largest graph."""
    large = replace(WORK, dictionaries=((replace(CLT, n_features=10**6, l0=2500.0),),))
    assert large.features == 10_000
    assert (large.kept, replace(large, largest=True).kept) == (250 + 15, 1200 + 15)
    assert asking(large, node_threshold=0.9).kept == 500 + 15
    assert asking(large, max_targets=200).kept == 160 + 15
    assert asking(large, max_feature_nodes=70).kept == 70 + 15
    assert asking(large, unpruned=True).kept == large.nodes + 10
    assert peak(large) < peak(replace(large, largest=True))


def test_half_precision_by_hand() -> None:
    """Weights take half; attention weights and the unembedding stand in float32 beside them."""
    found = memory(replace(WORK, weight_size=2))
    assert found["base model"] == 14000
    assert found["attention weights"] == 4 * 3 * (2 + 4 + 2) * 6 * 10
    assert found["logits"] == 4 * 50 * 10


def test_features_that_move_by_hand() -> None:
    """A feature that is seen stands on the query side at its position and each after it: at (n + 1) / 2 of n. The most
    that a context may have bounds them. Nothing else crosses positions, so pairs are those of one position."""
    moving = replace(CLT, n_writes=1, n_features=10**9, moves=True)
    assert moving.nodes(4) == pytest.approx(4 * 20 + 80 * 2.5, rel=1e-6)
    assert replace(moving, moving=30).nodes(4) == 4 * 20 + 30 * 2.5
    all_replaced = replace(WORK, live=0, errors=6, dictionaries=((moving,),))
    assert all_replaced.split == 0
    assert all_replaced.pairs == all_replaced.kept**2 / 2 / 5
    assert memory(all_replaced)["rows"] > 8 * all_replaced.nodes * 10


def test_what_settings_change() -> None:
    """Fewer rows, no hops, a smaller graph, and a bound on its features; an unpruned graph keeps all."""
    bounded = asking(max_targets=40)
    assert (bounded.targets, bounded.expanded, bounded.bounded) == (50, 50, True)
    assert WORK.expanded == pytest.approx(0.8 * 90)
    assert asking(left_out=0.0).expanded == 90
    assert "hop splits" not in memory(asking(hops=False))
    assert asking(max_feature_nodes=3).kept == 3 + 5 + 10
    assert asking(node_threshold=0.9).kept == pytest.approx(2 * 0.12 * 80 + 15)
    assert asking(node_threshold=1.0).kept == 80 + 15
    unpruned = asking(unpruned=True)
    assert (unpruned.kept, unpruned.split) == (97 + 10, 0)
    assert asking(unpruned=True, max_targets=40).targets == 90  # which an unpruned trace computes all the same
    assert memory(unpruned)["graph"] == 40 * 107**2 / 2
    long = replace(WORK, n=100_000, positions=99_999)
    assert 0 < long.split < 0.13 * long.kept**2  # hop splits have a bound of their own


def test_encoders_that_do_not_fit_stay_in_their_files() -> None:
    """One after another within half of what weights leave; those of formats that hold them anyway are always there."""
    three = replace(WORK, dictionaries=((CLT, CLT), (CLT,)))
    assert held_encoders(three) == 120_000
    assert held_encoders(replace(three, free=28_000 + 2 * 40_000)) == 40_000
    assert held_encoders(replace(three, free=0)) == 0
    assert held_encoders(replace(three, free=0, dictionaries=((CLT, replace(CLT, encoder_held=True)),))) == 40_000
    mapped = replace(WORK, dictionaries=((replace(CLT, encoder_mapped=True), CLT),))
    assert held_encoders(mapped) == 40_000
    assert memory(mapped)["encoder files"] == 40_000
    on_card = replace(mapped, on_cpu=False)
    assert held_encoders(on_card) == 80_000
    assert not {"encoder files", "decoder files"} & set(memory(on_card))
    assert memory(replace(on_card, dictionaries=((replace(CLT, decoder_held=True),),)))["decoder files"] == 120_000


def test_time_by_hand() -> None:
    """Each step is its work over the speed of this machine."""
    work = asking(hops=False)
    found = seconds(work, Speeds(matrix=1e6, search=2e6, hashing=1e9))
    products = 3 / 2 * 2 * 3 * 10 * (4 + 2) * 6 + 2 * 10 * 97 / 4  # a row's: through the heads, then with the writers
    assert found["rows"] == pytest.approx((72 + work.kept) * products / 2e6)
    assert found["record and encode"] == pytest.approx((2 * 5 * 7000 + 2 * 5 * 1000 * 10) / 1e6, rel=1e-3)
    assert found["read and hash files"] == pytest.approx(10**6 / 8e8 + 10**6 / 1e9)
    assert "hop splits" not in found


@pytest.mark.parametrize("name", CASES)
def test_of_every_kind_of_graph(name: str) -> None:
    """Live layers, errors and recording are those of a trace; and so are nodes and writers, with the l0 that it has,
    where features do not move. Where they do there are at most as many."""
    model = build(CASES[name])
    work = estimate_headers(model, CASES[name].token_ids).work
    sweep = lay_out(model, prepare(model.base, CASES[name].token_ids), [TopTokens()])
    linear, table = sweep.linear, sweep.table
    assert work.live == len(linear.frozen_attention)
    assert work.n == int((table.kind == "embedding").sum())
    assert work.errors * work.positions == int(sweep.is_error.sum())
    assert [size.name for size in work.every] == [dictionary.name for dictionary in linear.dictionaries]
    columns = [getattr(linear.recording, column.name) for column in fields(linear.recording)]
    recorded = of_bytes([column for column in columns if isinstance(column, Tensor)])
    own = sum(4 * size.patterns for size in work.every) * work.n**2
    assert memory(work)["recording"] - own == pytest.approx(recorded, rel=0.2)
    key_sides = table.kind != "mtc_query"
    counts = [int(((table.dictionary == i) & key_sides).sum()) for i in range(len(linear.dictionaries))]
    sizes = [replace(size, l0=count / work.positions) for size, count in zip(work.every, counts, strict=True)]
    exact = replace(work, dictionaries=(tuple(sizes),))
    if not any(size.moves for size in sizes):
        assert exact.nodes == pytest.approx(len(table))
        written = of_bytes([write.vectors for write in (*table.writes.values(), *table.value_writes.values())])
        if all(site.layer not in linear.replaced_blocks for d in linear.dictionaries for site in d.writes):
            assert memory(exact)["writers"] == pytest.approx(written, rel=0.25)
    else:
        assert exact.nodes >= 0.8 * len(table)


def test_of_a_model_as_it_is_loaded() -> None:
    """From headers the same as from the loaded model: parameters, encoders, and where they are held."""
    loaded = circuits.load(CASE / "model", CASE / "transcoders")
    works = [estimate_headers(m, IDS).work for m in (load_headers(CASE / "model", CASE / "transcoders"), loaded)]
    held = [tuple(replace(size, encoder_held=False) for size in work.every) for work in works]
    assert held[0] == held[1]
    same = [replace(work, dictionaries=(), free=0, resident=0) for work in works]
    assert same[0] == same[1]
    assert memory(works[0])["base model"] == of_bytes(list(loaded.base.lm.parameters()))
    held_now = [d.W_enc for r in loaded.replacements for d in r.dictionaries if d.is_held]
    assert held_encoders(works[0]) == of_bytes(held_now)
    assert works[0].file_bytes == sum(f.stat().st_size for f in (CASE / "model").glob("*.safetensors")) + sum(
        f.stat().st_size for f in (CASE / "transcoders").iterdir()
    )


@pytest.mark.parametrize("name", get_args(FamilyName))
def test_shapes_are_those_of_the_loaded_model(name: FamilyName, tmp_path: Path) -> None:
    """Every parameter by name, shape and type, of every family, in the type that is stored and in one asked for."""
    lm = random_lm(name, torch.Generator().manual_seed(12)).to(torch.bfloat16)
    lm.save_pretrained(tmp_path)  # type: ignore[operator]
    for dtype in (None, "float32"):
        loaded, shapes = load_base_model(tmp_path, dtype=dtype), load_shapes(tmp_path, dtype=dtype)
        found = [{n: (p.shape, p.dtype) for n, p in m.lm.named_parameters()} for m in (loaded, shapes)]
        assert found[0] == found[1]
        assert all(parameter.is_meta for parameter in shapes.lm.parameters())
        assert (shapes.shape, shapes.files, shapes.name) == (loaded.shape, loaded.files, loaded.name)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "dtype" not in k}))
    assert next(load_shapes(tmp_path).lm.parameters()).dtype == next(load_base_model(tmp_path).lm.parameters()).dtype


def test_shapes_of_a_model_with_vision(tmp_path: Path) -> None:
    """Of a Gemma 3 with a vision tower the text model is estimated, as it alone is traced."""
    text = random_lm("gemma3", torch.Generator().manual_seed(1)).config.to_dict()  # type: ignore[operator, union-attr]
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
              "image_size": 8, "patch_size": 4}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=9)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    loaded, shapes = load_base_model(tmp_path), load_shapes(tmp_path)
    of_each = [{n: p.shape for n, p in model.lm.named_parameters()} for model in (loaded, shapes)]
    assert of_each[0] == of_each[1]


def test_no_weight_is_read(tmp_path: Path) -> None:
    """With NaN in place of every weight of model and replacement, which loading refuses, the estimate is the same."""
    for part in ("model", "transcoders"):
        (tmp_path / part).mkdir()
        for file in (CASE / part).iterdir():
            if file.suffix == ".safetensors":
                poisoned = {name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(file).items()}
                save_file(poisoned, tmp_path / part / file.name, metadata={"format": "pt"})
            else:
                (tmp_path / part / file.name).write_bytes(file.read_bytes())
    with pytest.raises(circuits.CircuitsError, match="NaN"):
        circuits.load(tmp_path / "model")
    with pytest.raises(circuits.ReplacementError, match="NaN"):
        circuits.load(CASE / "model", tmp_path / "transcoders")
    of = [circuits.estimate(f / "model", IDS, replacement=f / "transcoders") for f in (tmp_path, CASE)]
    sizes = [[replace(size, name="") for size in found.work.every] for found in of]
    assert sizes[0] == sizes[1]
    assert of[0].work.nodes == of[1].work.nodes


def test_a_model_larger_than_this_machine(tmp_path: Path) -> None:
    """Two billion parameters and 750 GB of CLT, all holes behind headers: told at once that the graph does not fit, and
    what each change would leave of it."""
    layers, width, n_features = 8, 4096, 1 << 20
    (tmp_path / "model").mkdir()
    LlamaConfig(hidden_size=width, num_hidden_layers=layers, dtype="float32").save_pretrained(tmp_path / "model")
    clt = tmp_path / "clt"
    clt.mkdir()
    config = {"model_kind": "cross_layer_transcoder", "feature_input_hook": "hook_resid_mid"}
    (clt / "config.yaml").write_text(yaml.safe_dump(config | {"feature_output_hook": "hook_mlp_out"}))
    for layer in range(layers):
        vectors = {f"b_enc_{layer}": (n_features,), f"b_dec_{layer}": (width,)}
        _with_hole(clt / f"W_enc_{layer}.safetensors", {f"W_enc_{layer}": (n_features, width), **vectors})
        _with_hole(clt / f"W_dec_{layer}.safetensors", {f"W_dec_{layer}": (n_features, layers - layer, width)})
    start = time.perf_counter()
    settings = circuits.TraceSettings(unpruned=True)
    found = circuits.estimate(tmp_path / "model", [*range(1, 200)], None, settings, replacement=clt)
    assert time.perf_counter() - start < 60
    assert not found.fits
    assert found.work.file_bytes > 6e11
    assert not found.should_fit
    assert found.usual.memory["base model"] > 7e9
    assert found.usual.memory["graph"] > found.work.free
    texts, sizes = zip(*found.advice, strict=True)
    assert texts[0] == "a pruned graph (without --unpruned)"
    assert sizes[0] < 0.1 * found.usual.peak
    assert list(sizes) == sorted(sizes, reverse=True)
    assert min(sizes[:-1], default=found.room + 1) > found.room  # no more than is needed


def _with_hole(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file whose tensors are a hole: a header, and a length."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def test_advice_only_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options that change nothing here are not advised; what is already asked for neither."""
    settings = circuits.TraceSettings(hops=False, max_targets=64)
    model = load_headers(CASE / "model", CASE / "transcoders")
    assert estimate_headers(model, IDS, settings=settings).advice == ()
    monkeypatch.setattr(estimating, "free_memory", lambda device: 1000)
    monkeypatch.setattr(estimating, "_resident", lambda: 0)
    tight = estimate_headers(model, IDS, settings=settings)
    assert (tight.room, tight.fits, tight.should_fit) == (1000, False, False)
    assert tight.advice
    assert not any("hops" in text or "max-targets" in text or "unpruned" in text for text, _ in tight.advice)
    need, without = peak(asking(tight.work)), peak(asking(tight.work, hops=False))
    monkeypatch.setattr(estimating, "free_memory", lambda device: int((need + without) / 2))
    no_hops = estimate_headers(model, IDS)
    assert no_hops.advice == (("no hop splits (--no-hops)", without),)
    assert not no_hops.should_fit


def test_what_fits_only_if_the_graph_is_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    """Advice is then for the largest graph, so that it is sure to fit."""
    work = replace(WORK, dictionaries=((replace(CLT, n_features=10**6, l0=2500.0),),))
    monkeypatch.setattr(estimating, "_work", lambda *_: replace(work, free=int(peak(work)) - work.resident + 1))
    found = estimate_headers(load_headers(CASE / "model"), IDS)
    assert (found.fits, found.should_fit) == (False, True)
    assert found.usual.peak == peak(work)
    assert found.most.peak == peak(replace(work, largest=True))
    assert found.usual.memory["writers"] == found.most.memory["writers"]
    assert found.usual.total_seconds < found.most.total_seconds
    assert found.advice[-1][1] <= found.room < found.most.peak


def test_where_l0_is_from() -> None:
    """The gate's k, figures of the training, the folder's name; else it is assumed, and never more than there are."""

    def of(kind: str, k: int | None, source: str = "memory", figure: float | None = None) -> tuple[float, str]:
        dictionary: Dictionary = build(CASES["gpt2_clt_frozen"]).replacements[0].dictionaries[0]
        gate = replace(dictionary.activation, kind=kind, k=k)  # type: ignore[arg-type]
        made = replace(dictionary, activation=gate, source=source)
        training = {} if figure is None else {"dictionaries": {made.name: {"l0": figure}}}
        return l0_of(made, Replacement("r", Path("r"), "memory", (made,), training=training))

    assert of("topk", 5, figure=4.5) == (5.0, "top-k")
    assert of("topk", 500) == (12.0, "top-k")
    assert of("batch_topk", 5, figure=4.5) == (4.5, "its training")
    assert of("batch_topk", 5) == (5.0, "batch_topk k")
    assert of("jump_relu", None, "layer_3/width_16k/average_l0_7/params.npz") == (7.0, "folder's name")
    assert of("jump_relu", None) == (12.0, "assumed")


def test_of_the_embedded_default() -> None:
    """Near what a trace of it has; targets are counted as they are named."""
    prompt = "When Mary and John went to the store, John gave a drink to"
    found = circuits.estimate(None, prompt)
    assert isinstance(found, Estimate)
    assert {size.basis for size in found.work.every} == {"its training"}
    model = circuits.load()
    table = lay_out(model, prepare(model.base, prompt), [TopTokens()]).table
    assert found.work.nodes == pytest.approx(len(table), rel=0.15)
    assert found.fits
    assert found.advice == ()
    assert found.usual.total_seconds == sum(found.usual.seconds.values()) > 0
    assert found.work.outputs == 10
    two = circuits.estimate(None, prompt, [TokenTarget(5), TokenTarget(6)])
    assert two.work.outputs == 2
    with pytest.raises(circuits.CircuitsError, match="no target was given"):
        circuits.estimate(None, prompt, [])


def test_what_is_refused(tmp_path: Path) -> None:
    """As loading refuses it, and before anything is read."""
    with pytest.raises(circuits.CircuitsError, match="no model could be read"):
        circuits.estimate(tmp_path, IDS)
    with pytest.raises(circuits.CircuitsError, match="dtype 'int8'"):
        circuits.estimate(CASE / "model", IDS, dtype="int8")
    with pytest.raises(circuits.ReplacementError, match="no replacement of a known format"):
        circuits.estimate(CASE / "model", IDS, replacement=tmp_path)
    with pytest.raises(circuits.ReplacementError, match="replacement for another model"):
        circuits.estimate(None, "a", replacement=CASE / "transcoders")
    with pytest.raises(circuits.CircuitsError, match="the prompt is empty"):
        circuits.estimate(CASE / "model", "")
    if not torch.cuda.is_available():
        with pytest.raises(circuits.CircuitsError, match="torch sees no CUDA device"):
            circuits.estimate(CASE / "model", IDS, device="cuda")
    assert circuits.estimate(CASE / "model", PROMPT).work.features == 0
