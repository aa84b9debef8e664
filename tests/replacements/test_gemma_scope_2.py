"""Gemma Scope 2's safetensors: the formula in float64, and traces of a tiny Gemma 3 whose ledgers close."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import circuits
from circuits.replacements import ReplacementError, load_replacement

D, Z, F, LAYERS = 16, 24, 20, 2
READS = {
    "resid_post": "output",
    "attn_out": "self_attn.o_proj.input",
    "mlp_out": "post_feedforward_layernorm.output",
    "transcoder": "pre_feedforward_layernorm.output",
}


def write(folder: Path, layer: int, width: int = D, *, skip: bool = False, **config: Any) -> dict[str, Tensor]:
    """A dictionary as the release has it; its tensors in float64. Without `config` there is no config.json."""
    torch.manual_seed(layer)
    tensors = {"w_enc": torch.randn(width, F), "w_dec": torch.randn(F, width), "b_enc": torch.randn(F)}
    tensors |= {"b_dec": torch.randn(width), "threshold": torch.randn(F)}
    tensors |= {"affine_skip_connection": torch.randn(width, width)} if skip else {}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "params.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu", **config}))
    return {name: tensor.double() for name, tensor in tensors.items()}


def hooks(site: str, layer: int) -> dict[str, str]:
    """What config.json says of a site."""
    found = {"hf_hook_point_in": f"model.layers.{layer}.{READS[site]}", "model_name": "google/gemma-3-1b-pt"}
    if site == "transcoder":
        found["hf_hook_point_out"] = f"model.layers.{layer}.post_feedforward_layernorm.output"
    return found


def outcome(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Dense activations (T, F) and outputs (T, D') of what `load_replacement` reads."""
    (dictionary,) = load_replacement(folder).dictionaries
    active = dictionary.encode(x)
    dense = torch.zeros(len(x), F)
    dense[active.positions, active.features] = active.activations
    site = dictionary.writes[0]
    y = dense @ dictionary.decoder_rows(torch.arange(F), site) + dictionary.output_biases[site]
    return dense, y if dictionary.skip is None else y + x @ dictionary.skip.T


@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize(
    ("site", "read"),
    [
        ("resid_post", "resid_post.1:none"),
        ("attn_out", "z.1:none"),
        ("mlp_out", "mlp_out.1:none"),
        ("transcoder", "resid_mid.1:full"),
    ],
)
def test_formula(site: str, read: str, configured: bool, tmp_path: Path) -> None:
    """Activations and outputs; the place stands in the configuration, or in the folder's name. A skip is added."""
    folder = tmp_path / f"{site}_all" / "layer_1_width_16k_l0_small"
    w = write(folder, 1, skip=site == "transcoder", **(hooks(site, 1) if configured else {}))
    x = torch.randn(7, D)
    pre = x.double() @ w["w_enc"] + w["b_enc"]
    a = (pre > w["threshold"]) * pre.relu()
    y = a @ w["w_dec"] + w["b_dec"]
    if site == "transcoder":
        y = y + x.double() @ w["affine_skip_connection"]
    for path in (folder, folder.parent):
        replacement = load_replacement(path)
        assert (replacement.format, str(replacement.dictionaries[0].read)) == ("gemma-scope-2", read)
        found, output = outcome(path, x)
        torch.testing.assert_close(found.double(), a, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.double(), y, rtol=1e-5, atol=1e-5)
    assert 10 < int((a > 0).sum()) < a.numel()


def test_the_decoder_bias_is_taken_off_where_the_configuration_says_so(tmp_path: Path) -> None:
    """The setting `apply_b_dec_to_input`."""
    w = write(tmp_path / "sae", 0, apply_b_dec_to_input=True, **hooks("mlp_out", 0))
    x = torch.randn(7, D)
    pre = (x.double() - w["b_dec"]) @ w["w_enc"] + w["b_enc"]
    torch.testing.assert_close(
        outcome(tmp_path / "sae", x)[0].double(), (pre > w["threshold"]) * pre.relu(), rtol=1e-5, atol=1e-5
    )


def tiny_gemma(folder: Path) -> None:
    """A random Gemma 3 of two layers, saved."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "head_dim": 6}
    config = Gemma3TextConfig(**sizes, num_key_value_heads=2, intermediate_size=24, pad_token_id=0)
    Gemma3ForCausalLM(config).save_pretrained(folder)


def test_a_trace_with_attention_and_transcoders(tmp_path: Path) -> None:
    """Attention SAEs and transcoders with a skip connection in every layer: the ledger closes."""
    tiny_gemma(tmp_path / "model")
    for layer in range(LAYERS):
        write(tmp_path / "attn_out" / f"layer_{layer}_width_16k_l0_small", layer, Z)
        write(tmp_path / "transcoder" / f"layer_{layer}_width_16k_l0_small_affine", layer, skip=True)
    model = circuits.load(tmp_path / "model", [tmp_path / "attn_out", tmp_path / "transcoder"])
    graph = circuits.trace(model, [2, 5, 3, 9], settings=circuits.TraceSettings(unpruned=True))
    assert graph.metadata["ledger"]["max_relative_gap"] < 1e-5
    assert set(graph.metadata["attention"]) == {"replaced"}
    assert {"mlp_feature", "attention_feature"} <= set(graph.nodes.kind.tolist())


@pytest.mark.parametrize("skip", [False, True])
def test_a_clt(skip: bool, tmp_path: Path) -> None:
    """One file a layer, a decoder column a layer; what it writes to layers below its own is not used."""
    tiny_gemma(tmp_path / "model")
    folder = tmp_path / "clt" / "width_262k_l0_big"
    folder.mkdir(parents=True)
    w = []
    for layer in range(LAYERS):
        tensors = {"w_enc": torch.randn(D, F), "w_dec": torch.randn(F, LAYERS, D), "b_enc": torch.randn(F)}
        tensors |= {"b_dec": torch.randn(D), "threshold": torch.rand(F)}
        tensors |= {"affine_skip_connection": torch.randn(D, D)} if skip else {}
        save_file(tensors, folder / f"params_layer_{layer}.safetensors")
        w.append(tensors)
    replacement = load_replacement(folder)
    assert [str(site) for d in replacement.dictionaries for site in d.writes] == ["mlp_out.0", "mlp_out.1", "mlp_out.1"]
    for layer, dictionary in enumerate(replacement.dictionaries):
        assert str(dictionary.read) == f"resid_mid.{layer}:full"
        torch.testing.assert_close(dictionary.W_enc, w[layer]["w_enc"].T)
        if skip:
            torch.testing.assert_close(dictionary.skip, w[layer]["affine_skip_connection"].T)
        for site in dictionary.writes:
            rows = dictionary.decoder_rows(torch.arange(F), site)
            torch.testing.assert_close(rows, w[layer]["w_dec"][:, site.layer])
    graph = circuits.trace(
        circuits.load(tmp_path / "model", folder), [2, 5, 3, 9], settings=circuits.TraceSettings(unpruned=True)
    )
    assert graph.metadata["ledger"]["max_relative_gap"] < 1e-5
    (folder / "params_layer_0.safetensors").unlink()
    with pytest.raises(ReplacementError, match=r"files of layers \[1\]"):
        load_replacement(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "topk"}, "architecture is 'topk', expected jump_relu"),
        ({"hf_hook_point_in": "model.layers.3.mlp.input"}, r"hook point 'model\.layers\.3\.mlp\.input' is not known"),
        ({"type": "crosscoder"}, "a crosscoder reads several layers"),
        ({"l0": 20}, "nothing says what it reads"),
    ],
)
def test_what_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    """With the file and what to do."""
    write(tmp_path / "layer_3_width_16k", 3, **config)
    with pytest.raises(ReplacementError, match=message) as raised:
        load_replacement(tmp_path / "layer_3_width_16k")
    assert str(tmp_path) in str(raised.value)


def test_several_variants_and_broken_files(tmp_path: Path) -> None:
    """Two for a layer are listed; a tensor of another shape, and JSON that is none."""
    for variant in ("l0_small", "l0_big"):
        write(tmp_path / "mlp_out" / f"layer_1_width_16k_{variant}", 1)
    with pytest.raises(ReplacementError, match=r"layer 1 has 2 dictionaries: .*l0_big.*l0_small"):
        load_replacement(tmp_path / "mlp_out")
    folder = tmp_path / "transcoder" / "layer_0_width_16k"
    write(folder, 0)
    (folder / "config.json").write_text("{")
    with pytest.raises(ReplacementError, match="no valid JSON"):
        load_replacement(folder)
    (folder / "config.json").unlink()
    save_file({"w_enc": torch.randn(D, F), "w_dec": torch.randn(F, D), "b_enc": torch.randn(F + 1),
               "b_dec": torch.randn(D), "threshold": torch.rand(F)}, folder / "params.safetensors")  # fmt: skip
    with pytest.raises(ReplacementError, match="'b_enc'"):
        load_replacement(folder)
