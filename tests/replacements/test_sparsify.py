"""sparsify's folders: its formula in float64, and a trace of a tiny model whose ledger closes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import circuits
from circuits.replacements import ReplacementError, load_replacement

D, F, K, T = 12, 40, 5, 9


def write(folder: Path, **config: Any) -> dict[str, Tensor]:
    """A coder as `SparseCoder.save_to_disk` leaves it; its tensors in float64."""
    torch.manual_seed(len(folder.name))
    tensors = {"encoder.weight": torch.randn(F, D), "encoder.bias": torch.randn(F)}
    tensors |= {"W_dec": torch.randn(F, D), "b_dec": torch.randn(D)}
    tensors |= {"W_skip": torch.randn(D, D)} if config.get("skip_connection") else {}
    folder.mkdir(parents=True)
    settings = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "k": K, "d_in": D,
                "multi_topk": False, "skip_connection": False, "transcode": False}  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(settings | config))
    save_file(tensors, folder / "sae.safetensors")
    return {name: tensor.double() for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("hookpoint", "read", "settings"),
    [
        ("layers.3.mlp", "resid_mid.3:full", {"transcode": True}),
        ("h.3.mlp", "resid_mid.3:full", {"transcode": True, "skip_connection": True}),
        ("gpt_neox.layers.3.mlp", "mlp_out.3:none", {}),
        ("layers.3.self_attn", "attn_out.3:none", {}),
        ("h.3.attn", "attn_out.3:none", {"skip_connection": True}),
        ("layers.3", "resid_post.3:none", {}),
    ],
)
def test_formula(hookpoint: str, read: str, settings: dict[str, bool], tmp_path: Path) -> None:
    """The k largest positive pre-activations; only an SAE takes the decoder's bias off what it reads."""
    w = write(tmp_path / hookpoint, **settings)
    x = torch.randn(T, D)
    inner = x.double() if settings.get("transcode") else x.double() - w["b_dec"]
    pre = (inner @ w["encoder.weight"].T + w["encoder.bias"]).relu()
    a = torch.zeros_like(pre).scatter(1, pre.topk(K).indices, 1.0) * pre
    y = a @ w["W_dec"] + w["b_dec"]
    if settings.get("skip_connection"):
        y = y + x.double() @ w["W_skip"].T
    for path in (tmp_path, tmp_path / hookpoint):
        replacement = load_replacement(path)
        (dictionary,) = replacement.dictionaries
        assert (replacement.format, str(dictionary.read)) == ("sparsify", read)
        assert dictionary.before_post_norm == (hookpoint != "layers.3")
        active = dictionary.encode(x)
        dense = torch.zeros(T, F)
        dense[active.positions, active.features] = active.activations
        site = dictionary.writes[0]
        found = dense @ dictionary.decoder_rows(torch.arange(F), site) + dictionary.output_biases[site]
        found = found if dictionary.skip is None else found + x @ dictionary.skip.T
        torch.testing.assert_close(dense.double(), a, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.double(), y, rtol=1e-5, atol=1e-5)
    assert int((a > 0).sum()) == T * K


def test_a_trace(tmp_path: Path) -> None:
    """Skip transcoders and attention SAEs in every layer: the ledger closes."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "n_embd": D, "n_layer": 2, "n_head": 3, "n_positions": 16}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "model")
    for layer in range(2):
        write(tmp_path / "mlp" / f"h.{layer}.mlp", transcode=True, skip_connection=True)
        write(tmp_path / "attn" / f"h.{layer}.attn")
    model = circuits.load(tmp_path / "model", [tmp_path / "mlp", tmp_path / "attn"])
    graph = circuits.trace(model, [2, 5, 3, 9], settings=circuits.TraceSettings(unpruned=True))
    assert graph.metadata["ledger"]["max_relative_gap"] < 1e-5
    assert {"mlp_feature", "attention_feature"} <= set(graph.nodes.kind.tolist())


@pytest.mark.parametrize(
    ("hookpoint", "config", "message"),
    [
        ("layers.3.mlp", {"activation": "groupmax"}, "activation 'groupmax' cannot be expressed"),
        ("layers.3.mlp", {"signed": True}, "the setting signed = True"),
        ("layers.3.mlp", {"gram_lookup": True}, "the setting gram_lookup = True"),
        ("layers.3.mlp", {"k": None}, "k a whole number"),
        ("layers.3.self_attn", {"transcode": True}, r"a transcoder of layers\.3\.self_attn cannot be expressed"),
        ("my-sae", {}, "the folder's name should be the hookpoint"),
    ],
)
def test_what_is_refused(hookpoint: str, config: dict[str, Any], message: str, tmp_path: Path) -> None:
    """With the folder and what was expected."""
    write(tmp_path / hookpoint, **config)
    with pytest.raises(ReplacementError, match=message) as raised:
        load_replacement(tmp_path / hookpoint)
    assert hookpoint in str(raised.value)


def test_damaged_files(tmp_path: Path) -> None:
    """Two for the same place, JSON that is none, a tensor of another shape."""
    write(tmp_path / "all" / "h.1.attn")
    write(tmp_path / "all" / "transformer.h.1.attn")
    with pytest.raises(ReplacementError, match=r"are both for attn_out\.1"):
        load_replacement(tmp_path / "all")
    folder = tmp_path / "h.0.mlp"
    write(folder)
    tensors = {"encoder.weight": torch.randn(F, D), "encoder.bias": torch.randn(F + 1)}
    save_file(tensors | {"b_dec": torch.randn(D), "W_dec": torch.randn(F, D)}, folder / "sae.safetensors")
    with pytest.raises(ReplacementError, match=r"'encoder\.bias'"):
        load_replacement(folder)
    (folder / "cfg.json").write_text("[")
    with pytest.raises(ReplacementError, match="no valid JSON"):
        load_replacement(folder)
