"""Gemma Scope's npz files: the tutorial's formula in float64, and a trace of a tiny Gemma 2."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

import circuits
from circuits.replacements import ReplacementError, load_replacement

D, Z, F, LAYERS = 16, 24, 20, 2


def write(folder: Path, layer: int, width: int, variant: str = "width_16k/average_l0_20") -> dict[str, np.ndarray]:
    """`params.npz` of one layer, as the release has it."""
    random = np.random.default_rng(layer)
    shapes = {"W_enc": (width, F), "W_dec": (F, width), "b_enc": (F,), "b_dec": (width,), "threshold": (F,)}
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    target = folder / f"layer_{layer}" / variant
    target.mkdir(parents=True)
    np.savez(target / "params.npz", allow_pickle=False, **arrays)
    return arrays


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("gemma-scope-2b-pt-transcoders", "resid_mid.1:scale"),
        ("gemma-scope-2b-pt-att", "z.1:none"),
        ("gemma-scope-9b-pt-mlp", "mlp_out.1:none"),
        ("models--google--gemma-scope-2b-pt-res/snapshots/0a1b", "resid_post.1:none"),
    ],
)
def test_formula(name: str, read: str, tmp_path: Path) -> None:
    """Activations and output; what is read stands in the folder's name. One file's folder will do as well."""
    folder = tmp_path / name
    w = {key: torch.from_numpy(value).double() for key, value in write(folder, 1, D).items()}
    x = torch.randn(7, D)
    pre = x.double() @ w["W_enc"] + w["b_enc"]
    a = (pre > w["threshold"]) * pre.relu()
    for path in (folder, folder / "layer_1" / "width_16k" / "average_l0_20"):
        replacement = load_replacement(path)
        (dictionary,) = replacement.dictionaries
        assert (replacement.format, str(dictionary.read)) == ("gemma-scope", read)
        active = dictionary.encode(x)
        dense = torch.zeros(7, F)
        dense[active.positions, active.features] = active.activations
        torch.testing.assert_close(dense.double(), a, rtol=1e-5, atol=1e-5)
        y = dense @ dictionary.decoder_rows(torch.arange(F), dictionary.writes[0])
        y = y + dictionary.output_biases[dictionary.writes[0]]
        torch.testing.assert_close(y.double(), a @ w["W_dec"] + w["b_dec"], rtol=1e-5, atol=1e-5)
    assert 10 < int((a > 0).sum()) < a.numel()


def test_a_trace_with_attention_and_transcoders(tmp_path: Path) -> None:
    """A tiny Gemma 2 with both replaced in every layer: the ledger closes."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "head_dim": 6}
    config = Gemma2Config(**sizes, num_key_value_heads=2, intermediate_size=24, pad_token_id=0)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "model")
    for layer in range(LAYERS):
        write(tmp_path / "gemma-scope-tiny-att", layer, 4 * 6)
        write(tmp_path / "gemma-scope-tiny-transcoders", layer, D)
    folders = [tmp_path / f"gemma-scope-tiny-{kind}" for kind in ("att", "transcoders")]
    settings = circuits.TraceSettings(unpruned=True)
    graph = circuits.trace(circuits.load(tmp_path / "model", folders), [2, 5, 3, 9], settings=settings)
    assert graph.metadata["ledger"]["max_relative_gap"] < 1e-5
    assert set(graph.metadata["attention"]) == {"replaced"}
    assert {"mlp_feature", "attention_feature"} <= set(graph.nodes.kind.tolist())


def test_what_is_refused(tmp_path: Path) -> None:
    """Several variants of a layer, a folder that does not say what it reads, and files that are none."""
    folder = tmp_path / "gemma-scope-2b-pt-att"
    write(folder, 0, Z)
    write(folder, 0, Z, "width_16k/average_l0_99")
    with pytest.raises(ReplacementError, match=r"layer 0 has 2 dictionaries: .*average_l0_20.*average_l0_99"):
        load_replacement(folder)
    write(tmp_path / "unnamed", 0, Z)
    with pytest.raises(ReplacementError, match="no folder's name says what these dictionaries read"):
        load_replacement(tmp_path / "unnamed")
    write(tmp_path / "att" / "mine", 0, Z)  # not a name of the release
    with pytest.raises(ReplacementError, match="no folder's name says what these dictionaries read"):
        load_replacement(tmp_path / "att" / "mine")
    embedding = tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_6"
    embedding.mkdir(parents=True)
    (embedding / "params.npz").write_bytes(b"nothing")
    with pytest.raises(ReplacementError, match="for the token embedding"):
        load_replacement(embedding)
    broken = tmp_path / "gemma-scope-x-transcoders" / "layer_0"
    broken.mkdir(parents=True)
    (broken / "params.npz").write_bytes(b"nothing")
    with pytest.raises(ReplacementError, match="no npz file of plain arrays"):
        load_replacement(tmp_path / "gemma-scope-x-transcoders")
    np.savez(broken / "params.npz", W_enc=np.zeros((D, F)))
    with pytest.raises(ReplacementError, match="array 'b_enc' is missing"):
        load_replacement(tmp_path / "gemma-scope-x-transcoders")
