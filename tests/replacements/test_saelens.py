"""SAELens's directories: activations and outputs are those of its formulas, written out in float64."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from circuits.replacements import ReplacementError, load_replacement
from circuits.replacements.processing import Processing

D, OUT, F, T = 10, 6, 24, 9


def write(folder: Path, config: dict[str, Any], **more: Tensor) -> dict[str, Tensor]:
    """A directory of random weights; its tensors in float64."""
    folder.mkdir(parents=True)
    out = OUT if "transcoder" in config["architecture"] else D
    tensors = {"W_enc": torch.randn(D, F), "b_enc": torch.randn(F), "W_dec": torch.randn(F, out), **more}
    tensors["b_dec"] = torch.randn(out)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(tensors, folder / "sae_weights.safetensors")
    return {name: tensor.double() for name, tensor in tensors.items()}


def outcome(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Dense activations (T, F) and outputs (T, D') of what `load_replacement` reads."""
    (dictionary,) = load_replacement(folder).dictionaries
    active = dictionary.encode(x)
    dense = torch.zeros(len(x), F)
    dense[active.positions, active.features] = active.activations
    site = dictionary.writes[0]
    y = dense @ dictionary.decoder_rows(torch.arange(F), site) + dictionary.output_biases[site]
    return dense, y if dictionary.skip is None else y + x @ dictionary.skip.T


FLAT = {"hook_name": "blocks.3.attn.hook_z", "hook_layer": 3, "model_name": "gpt2", "normalize_activations": "none"}


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("kind", ["standard", "jumprelu", "topk", "topk_rescaled", "topk_v5", "finetuned"])
def test_saes(kind: str, subtracts: bool, tmp_path: Path) -> None:
    """Every architecture, in the flat configuration of version 5 or with version 6's metadata."""
    torch.manual_seed(1)
    config: dict[str, Any] = {"architecture": kind.partition("_")[0], "apply_b_dec_to_input": subtracts} | FLAT
    more: dict[str, Tensor] = {}
    if kind == "jumprelu":
        more["threshold"] = torch.randn(F)
    elif kind == "finetuned":
        config |= {"architecture": "standard", "finetuning_scaling_factor": True}
        more["finetuning_scaling_factor"] = torch.rand(F) + 0.5
    elif kind == "topk_v5":
        config |= {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}
    elif kind.startswith("topk"):
        config |= {"k": 4, "rescale_acts_by_decoder_norm": kind == "topk_rescaled"}
        config["metadata"] = {name: config.pop(name) for name in ("hook_name", "model_name")}
    w = write(tmp_path / "sae", config, **more)
    x = torch.randn(T, D)
    pre = (x.double() - (w["b_dec"] if subtracts else 0)) @ w["W_enc"] + w["b_enc"]
    if kind == "jumprelu":
        a = pre.relu() * (pre > w["threshold"])
    elif kind.startswith("topk"):
        chosen = pre * (w["W_dec"].norm(dim=1) if kind == "topk_rescaled" else 1)
        a = torch.zeros_like(pre).scatter(1, chosen.topk(4).indices, 1.0) * chosen.relu()
    else:
        a = pre.relu()
    y = a @ w["W_dec"]
    if kind == "topk_rescaled":
        y = (a / w["W_dec"].norm(dim=1)) @ w["W_dec"]
    if kind == "finetuned":
        y = (a * w["finetuning_scaling_factor"]) @ w["W_dec"]
    found, output = outcome(tmp_path / "sae", x)
    torch.testing.assert_close(found.double(), a, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.double(), y + w["b_dec"], rtol=1e-5, atol=1e-5)
    assert (a > 0).sum() > 20
    replacement = load_replacement(tmp_path / "sae")
    assert (replacement.format, replacement.model) == ("saelens", {"name": "gpt2"})
    assert str(replacement.dictionaries[0].read) == "z.3:none"
    assert replacement.processing == Processing(True, True, True, True)


@pytest.mark.parametrize("architecture", ["transcoder", "skip_transcoder", "jumprelu_transcoder"])
def test_transcoders(architecture: str, tmp_path: Path) -> None:
    """Read one hook, write another of another width; nothing is subtracted unless it is said."""
    torch.manual_seed(2)
    hooks = {"hook_name": "blocks.1.ln2.hook_normalized", "hook_name_out": "blocks.1.hook_mlp_out"}
    more = {"W_skip": torch.randn(OUT, D)} if "skip" in architecture else {}
    more |= {"threshold": torch.rand(F)} if "jumprelu" in architecture else {}
    w = write(tmp_path / "t", {"architecture": architecture, "metadata": hooks}, **more)
    x = torch.randn(T, D)
    pre = x.double() @ w["W_enc"] + w["b_enc"]
    a = pre.relu() * (pre > w.get("threshold", torch.zeros(F)))
    y = a @ w["W_dec"] + w["b_dec"] + (x.double() @ w["W_skip"].T if "W_skip" in w else 0)
    found, output = outcome(tmp_path / "t", x)
    torch.testing.assert_close(found.double(), a, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.double(), y, rtol=1e-5, atol=1e-5)
    (dictionary,) = load_replacement(tmp_path / "t").dictionaries
    assert (str(dictionary.read), str(dictionary.writes[0])) == ("resid_mid.1:scale", "mlp_out.1")


def test_processing_as_the_configuration_says(tmp_path: Path) -> None:
    """Only steps that are switched on are taken, but for files from before SAELens could say which: all were."""
    key = "model_from_pretrained_kwargs"
    said: dict[str, tuple[dict[str, Any], Processing | None]] = {
        "old": ({}, Processing(True, True, True, True)),
        "plain": ({key: {}}, None),
        "null": ({key: None}, None),
        "off": ({key: {"center_writing_weights": False, "fold_ln": False, "dtype": "float32"}}, None),
        "centred": ({key: {"center_writing_weights": True}}, Processing(center_writing_weights=True)),
        "inner": ({"metadata": {key: {"fold_ln": True, "fold_value_biases": True}}}, Processing(True, False, True)),
        "other": ({"model_class_name": "AutoModelForCausalLM", key: {"fold_ln": True}}, None),
    }
    for name, (config, expected) in said.items():
        write(tmp_path / name, {"architecture": "standard", **FLAT, **config})
        assert load_replacement(tmp_path / name).processing == expected


@pytest.mark.parametrize("used", [None, True])
def test_the_old_name_of_the_scaling_factor(used: bool | None, tmp_path: Path) -> None:
    """Applied where the configuration says so, without effect where it is one, and refused where that is unclear."""
    torch.manual_seed(5)
    config = {"architecture": "standard", "finetuning_scaling_factor": used, **FLAT}
    write(tmp_path / "ones", config, scaling_factor=torch.ones(F))
    w = write(tmp_path / "other", config, scaling_factor=torch.rand(F))
    assert outcome(tmp_path / "ones", torch.randn(T, D))[1].shape == (T, D)
    if used:
        x = torch.randn(T, D)
        a = ((x.double() - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
        expected = (a * w["scaling_factor"]) @ w["W_dec"] + w["b_dec"]
        torch.testing.assert_close(outcome(tmp_path / "other", x)[1].double(), expected, rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(ReplacementError, match="'scaling_factor' is not one everywhere"):
            load_replacement(tmp_path / "other")


def test_a_folder_of_several(tmp_path: Path) -> None:
    """One for each place, sorted by layer; two for the same place, or of differently processed models, are refused."""
    for layer in (2, 0):
        write(
            tmp_path / "all" / f"blocks.{layer}",
            {"architecture": "standard", **FLAT, "hook_name": f"blocks.{layer}.attn.hook_z"},
        )
    assert [d.layer for d in load_replacement(tmp_path / "all").dictionaries] == [0, 2]
    write(tmp_path / "all" / "again", {"architecture": "standard", **FLAT, "hook_name": "blocks.2.attn.hook_z"})
    with pytest.raises(ReplacementError, match=r"both for z\.2"):
        load_replacement(tmp_path / "all")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "gated"}, "architecture 'gated' cannot be expressed"),
        ({"normalize_activations": "expected_average_only_in"}, "fold it with SAELens"),
        ({"normalize_activations": "layer_norm"}, "depends on the input"),
        ({"hook_head_index": 3}, "head 3 alone"),
        ({"hook_name": "blocks.1.attn.hook_q"}, "hook 'blocks.1.attn.hook_q' is not known"),
        ({"activation_fn_str": "tanh-relu"}, "activation function 'tanh-relu'"),
        ({"architecture": "topk", "k": None}, "whole number k"),
        ({"architecture": "jumprelu"}, "'threshold' is missing"),
        ({"architecture": "transcoder"}, "a transcoder needs hook_name_out"),
    ],
)
def test_what_cannot_be_expressed_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    """With what it is, and in which file."""
    write(tmp_path / "sae", {"architecture": "standard", **FLAT} | config)
    with pytest.raises(ReplacementError, match=message) as raised:
        load_replacement(tmp_path / "sae")
    assert str(tmp_path / "sae") in str(raised.value)


def test_damaged_files(tmp_path: Path) -> None:
    """JSON that is none, and a tensor of another shape."""
    write(tmp_path / "a", {"architecture": "standard", **FLAT}, b_enc=torch.randn(F + 1))
    with pytest.raises(ReplacementError, match="'b_enc'"):
        load_replacement(tmp_path / "a")
    (tmp_path / "a" / "cfg.json").write_text("{")
    with pytest.raises(ReplacementError, match="no valid JSON"):
        load_replacement(tmp_path / "a")
