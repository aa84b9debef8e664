"""clt-training's folders: `SparseCoder` and `CrossLayerRunner` written out in float64, and traces that add up."""

import json
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from cross_layer import outcome, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import circuits
from circuits.replacements import ReplacementError, load_replacement

L, D, F, K, T = 3, 12, 30, 4, 8
SETTINGS = {"dtype": "none", "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": F}
SETTINGS |= {"k": K, "multi_topk": False, "skip_connection": False, "transcode": True, "tp_output": True}
SETTINGS |= {"n_targets": 0, "n_sources": 0, "normalize_io": False, "divide_cross_layer": False, "use_fp8": False}
SETTINGS |= {"train_post_encoder": True, "post_encoder_scale": False, "per_source_tied": False, "matryoshka": False}
SETTINGS |= {"secondary_target_tied": False, "coalesce_topk": "none", "topk_coalesced": False, "d_in": D}


def reach(position: int, cross_layer: int) -> int:
    """`n_targets` of a coder, as the trainer sets it."""
    return min(cross_layer, L - position)


def write(folder: Path, hookpoints: Sequence[str], cross_layer: int = 0, **config: Any) -> list[dict[str, Tensor]]:
    """Coders as `SparseCoder.save_to_disk` leaves them, in a folder for each hookpoint; their tensors in float64."""
    torch.manual_seed(5)
    every: list[dict[str, Tensor]] = []
    ends: list[int] = []
    for position, hookpoint in enumerate(hookpoints):
        n_targets = reach(position, cross_layer)
        ends = [end for end in [*ends, position + n_targets] if end >= position]  # the trainer's count: one too many
        n_sources = len(ends) if cross_layer else 0
        c = SETTINGS | {"n_targets": n_targets, "n_sources": n_sources} | config
        apart, multi = c["coalesce_topk"] == "none", n_targets > 0
        n_decoded = F * max(1, n_sources) if c["coalesce_topk"] == "per-layer" else F
        t = {"encoder.weight": torch.randn(F, D), "encoder.bias": torch.randn(F)}
        names = {"W_dec": (n_decoded, D), "b_dec": (D,)} | ({"W_skip": (D, D)} if c["skip_connection"] else {})
        for name, shape in names.items():
            t[name] = torch.randn(shape) * 0.3
            if multi and apart and not (name == "W_dec" and c["per_source_tied"]):
                t |= {f"{name}s.{i}": torch.randn(shape) * 0.3 for i in range(n_targets)}
                t[name] = t[f"{name}s.0"].clone()
            if name == "W_skip":
                t |= {f"W_skips.{i}": torch.zeros(shape) for i in range(1, n_targets if apart else 0)}
        t |= {f"post_encs.{i}": torch.zeros(F) for i in range(n_targets)} if multi else {"post_enc": torch.zeros(F)}
        if c["post_encoder_scale"]:
            scales = [f"post_enc_scales.{i}" for i in range(n_targets)] if multi else ["post_enc_scale"]
            t |= {name: torch.rand(F) + 0.5 for name in scales}
        t |= {"in_norm": torch.tensor([2.7]), "out_norm": torch.tensor([1.3 + position])} if c["normalize_io"] else {}
        (folder / hookpoint).mkdir(parents=True)
        (folder / hookpoint / "cfg.json").write_text(json.dumps(c))
        save_file(t, folder / hookpoint / "sae.safetensors")
        every.append({name: tensor.double() for name, tensor in t.items()})
    return every


def formula(w: list[dict[str, Tensor]], xs: list[Tensor], cross_layer: int, **config: Any) -> list[list[Tensor]]:
    """Activations and outputs of every layer: encode, then `CrossLayerRunner.decode` as the layers come."""
    c = SETTINGS | config
    inner = [x.double() * (sqrt(D) / t["in_norm"] if c["normalize_io"] else 1.0) for x, t in zip(xs, w, strict=True)]
    acts = []
    for x, t in zip(inner, w, strict=True):
        pre = (x @ t["encoder.weight"].T + t["encoder.bias"]).relu()
        acts.append(torch.zeros_like(pre).scatter(1, pre.topk(K).indices, 1.0) * pre)
    outputs: list[Tensor] = []
    there: dict[int, int] = {}  # layers whose coders are not done, and their next target
    for m, t in enumerate(w):
        there[m] = 0
        seen = [acts[l] * w[l].get(f"post_enc_scales.{i}", torch.ones(F).double()) for l, i in there.items()]
        own = inner[m] @ t["W_skip"].T if c["skip_connection"] else torch.zeros(T, D)
        if c["coalesce_topk"] == "concat":
            y = sum(seen) @ t["W_dec"] + t["b_dec"] + own
        elif c["coalesce_topk"] == "per-layer":
            y = torch.cat(seen, dim=1) @ t["W_dec"][: F * len(seen)] + t["b_dec"] + own
        else:
            rows = [w[l]["W_dec" if c["per_source_tied"] else f"W_decs.{i}"] for l, i in there.items()]
            parts = [a @ r + w[l][f"b_decs.{i}"] for a, r, (l, i) in zip(seen, rows, there.items(), strict=True)]
            divide = max(1, len(there) - 1) if c["divide_cross_layer"] else 1
            y = parts[-1] + own + sum(parts[:-1]) / divide
        outputs.append(y * (t["out_norm"] / sqrt(D)) if c["normalize_io"] else y)
        there = {l: i + 1 for l, i in there.items() if i + 1 < reach(l, cross_layer)}
    return [acts, outputs]


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "untied": (L, {}),
    "two targets": (2, {"normalize_io": True, "post_encoder_scale": True}),
    "divided": (L, {"divide_cross_layer": True, "skip_connection": True, "normalize_io": True}),
    "per source": (L, {"per_source_tied": True, "post_encoder_scale": True}),
    "per target": (L, {"coalesce_topk": "concat", "post_encoder_scale": True, "skip_connection": True}),
    "per target, normalised": (2, {"coalesce_topk": "concat", "normalize_io": True, "skip_connection": True}),
    "per layer": (L, {"coalesce_topk": "per-layer", "divide_cross_layer": True, "normalize_io": True}),
    "per layer, two targets": (2, {"coalesce_topk": "per-layer", "post_encoder_scale": True}),
}
HOOKPOINTS = [f"h.{layer}.mlp" for layer in range(L)]


@pytest.mark.parametrize("case", CASES)
def test_cross_layer(case: str, tmp_path: Path) -> None:
    """Every way to share decoders, and to normalise."""
    cross_layer, config = CASES[case]
    w, xs = write(tmp_path, HOOKPOINTS, cross_layer, **config), [torch.randn(T, D) for _ in range(L)]
    (tmp_path / "config.json").write_text(json.dumps({"model": "openai-community/gpt2", "hookpoints_in": []}))
    replacement = load_replacement(tmp_path)
    assert (replacement.format, replacement.model) == ("clt-training", {"name": "openai-community/gpt2"})
    for layer, dictionary in enumerate(replacement.dictionaries):
        assert (str(dictionary.read), dictionary.before_post_norm) == (f"resid_mid.{layer}:full", True)
        reached = range(layer, layer + reach(layer, cross_layer))
        assert [str(site) for site in dictionary.writes] == [f"mlp_out.{target}" for target in reached]
    for found, expected in zip(outcome(replacement, xs), formula(w, xs, cross_layer, **config), strict=True):
        for layer in range(L):
            torch.testing.assert_close(found[layer].double(), expected[layer], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("hookpoint", "read", "config"),
    [
        ("layers.1.mlp", "resid_mid.1:full", {"skip_connection": True}),
        ("layers.1.mlp", "resid_mid.1:full", {"coalesce_topk": "per-layer"}),
        ("layers.1.mlp", "mlp_out.1:none", {"transcode": False}),
        ("layers.1.self_attn", "attn_out.1:none", {"transcode": False, "coalesce_topk": "concat"}),
        ("layers.1", "resid_post.1:none", {"transcode": False, "skip_connection": True}),
    ],
)
def test_single_layers(hookpoint: str, read: str, config: dict[str, Any], tmp_path: Path) -> None:
    """Transcoders and SAEs with norms and scales; an SAE takes the decoder's bias off what it has normalised."""
    (w,) = write(tmp_path, [hookpoint], normalize_io=True, post_encoder_scale=True, **config)
    x = torch.randn(T, D)
    inner = x.double() * sqrt(D) / w["in_norm"]
    pre = inner if config.get("transcode", True) else inner - w["b_dec"]
    pre = (pre @ w["encoder.weight"].T + w["encoder.bias"]).relu()
    a = torch.zeros_like(pre).scatter(1, pre.topk(K).indices, 1.0) * pre
    y = (a * w["post_enc_scale"]) @ w["W_dec"] + w["b_dec"]
    y = (y + inner @ w["W_skip"].T if config.get("skip_connection") else y) * w["out_norm"] / sqrt(D)
    for path in (tmp_path, tmp_path / hookpoint):
        replacement = load_replacement(path)
        (dictionary,) = replacement.dictionaries
        assert (replacement.format, str(dictionary.read)) == ("clt-training", read)
        assert dictionary.before_post_norm == (hookpoint != "layers.1")
        for found, expected in zip(outcome(replacement, [x]), (a, y), strict=True):
            torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-5)
    assert int((a > 0).sum()) == T * K


@pytest.mark.parametrize("norm", ["post_attention_layernorm", "pre_feedforward_layernorm"])
def test_inputs_before_the_norm(norm: str, tmp_path: Path) -> None:
    """The run's configuration may say that coders read what the norm before the MLP gets; other places are refused."""
    hookpoints = [f"layers.{layer}.mlp" for layer in range(L)]
    write(tmp_path, hookpoints, L)
    run = {"hookpoints": hookpoints, "hookpoints_in": [f"layers.{layer}.{norm}" for layer in range(L)]}
    (tmp_path / "config.json").write_text(json.dumps(run))
    reads = [str(dictionary.read) for dictionary in load_replacement(tmp_path).dictionaries]
    assert reads == [f"resid_mid.{layer}:none" for layer in range(L)]
    run["hookpoints_in"][1] = "layers.0.self_attn"
    (tmp_path / "config.json").write_text(json.dumps(run))
    with pytest.raises(ReplacementError, match=r"layers\.1\.mlp reads what 'layers\.0\.self_attn' gets"):
        load_replacement(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"hookpoints_in": run["hookpoints_in"]}))
    with pytest.raises(ReplacementError, match=r"should be lists, with layers\.0\.mlp among them"):
        load_replacement(tmp_path)


@pytest.mark.parametrize("case", ["divided", "per target, normalised", "single"])
def test_a_trace(case: str, tmp_path: Path) -> None:
    """The ledger of a tiny GPT-2 closes, skip connections and all."""
    tiny_model(tmp_path / "model", "gpt2", L, D)
    cross_layer, config = CASES.get(case, (0, {"normalize_io": True, "skip_connection": True}))
    write(tmp_path / "coders", HOOKPOINTS, cross_layer, **config)
    model = circuits.load(tmp_path / "model", tmp_path / "coders")
    graph = circuits.trace(model, [2, 5, 3, 9], settings=circuits.TraceSettings(unpruned=True))
    assert graph.metadata["ledger"]["max_relative_gap"] < 1e-5
    assert graph.nodes.kind.tolist().count("mlp_feature") > 20


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"activation": "batchtopk"}, "activation 'batchtopk' cannot be expressed; expected topk"),
        ({"matryoshka": True}, "the setting matryoshka = True cannot be expressed"),
        ({"secondary_target_tied": True}, "the setting secondary_target_tied = True cannot be expressed"),
        ({"coalesce_topk": "group"}, "the setting coalesce_topk = 'group' cannot be expressed"),
        ({"coalesce_topk": "concat", "topk_coalesced": True}, "the setting topk_coalesced = True cannot be expressed"),
        ({"transcode": False}, "the setting n_targets = 3 cannot be expressed"),
        ({"k": 0}, "k a whole number"),
    ],
)
def test_settings_that_are_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    """With the file."""
    write(tmp_path, HOOKPOINTS, L, **config)
    with pytest.raises(ReplacementError, match=message) as raised:
        load_replacement(tmp_path)
    assert str(tmp_path / "h.0.mlp" / "cfg.json") in str(raised.value)


@pytest.mark.parametrize(
    ("config", "tensor", "message"),
    [
        ({}, "post_encs.1", "'post_encs.1' is not zero: with a bias behind the encoder .* train_post_encoder=False"),
        ({"skip_connection": True}, "W_skips.2", "'W_skips.2' is not zero: a skip connection to another layer"),
        ({"coalesce_topk": "concat"}, "post_encs.0", "'post_encs.0' is not zero"),
    ],
)
def test_tensors_that_are_refused(config: dict[str, Any], tensor: str, message: str, tmp_path: Path) -> None:
    """A single entry that is not zero."""
    write(tmp_path, HOOKPOINTS, L, **config)
    file = tmp_path / "h.0.mlp" / "sae.safetensors"
    tensors = load_file(file)
    tensors[tensor].view(-1)[-1] = 0.5
    save_file(tensors, file)
    with pytest.raises(ReplacementError, match=message) as raised:
        load_replacement(tmp_path)
    assert str(file) in str(raised.value)


def test_incomplete_folders(tmp_path: Path) -> None:
    """A single folder of several, decoders of too few sources, two for a site, a missing tensor."""
    write(tmp_path / "all", HOOKPOINTS, L, coalesce_topk="per-layer")
    with pytest.raises(ReplacementError, match=r"to 3 hookpoints from its own on, and 1 are in .*; give the folder"):
        load_replacement(tmp_path / "all" / "h.0.mlp")
    file = tmp_path / "all" / "h.2.mlp" / "sae.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"W_dec": tensors["W_dec"][: 2 * F]}, file)
    with pytest.raises(ReplacementError, match=r"'W_dec' has 60 rows; expected 3 blocks of 30, one .* mlp_out\.2"):
        load_replacement(tmp_path / "all")
    (tmp_path / "all" / "h.2.mlp").rename(tmp_path / "all" / "transformer.h.1.mlp")
    with pytest.raises(ReplacementError, match=r"are both for mlp_out\.1"):
        load_replacement(tmp_path / "all")
    (tmp_path / "all" / "transformer.h.1.mlp").rename(tmp_path / "all" / "h.2.mlp")
    save_file({name: t for name, t in tensors.items() if name != "b_dec"}, file)
    with pytest.raises(ReplacementError, match="tensor 'b_dec' is missing"):
        load_replacement(tmp_path / "all")
