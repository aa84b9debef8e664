"""Dictionaries that were trained under TransformerLens's processing, against what TransformerLens itself computes.

`tests/data/transformer_lens` has a tiny random GPT-2 and the activations of TransformerLens 3.2.1 on it; `make.py`
there made both. SAEs in SAELens's layout must have the features on Hugging Face's activations that they have on these.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import circuits
from circuits.base_models import load_base_model
from circuits.errors import CircuitsError
from circuits.model import BaseModel
from circuits.processing import undo
from circuits.recording import Recording, record
from circuits.replacements import Dictionary, load_replacement

DATA = Path(__file__).resolve().parents[1] / "data" / "transformer_lens"
# SAELens's `model_from_pretrained_kwargs`: what is not named was not done.
STEPS = {
    "default": dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), True),
    "not_centred": {"fold_ln": True, "center_unembed": True, "fold_value_biases": True},
    "values_only": {"fold_value_biases": True},
    "plain": {},
}
D, F = 12, 20


@pytest.fixture(scope="module")
def lens() -> dict[str, np.ndarray]:
    """TransformerLens's activations by processing, layer and hook."""
    with np.load(DATA / "activations.npz", allow_pickle=False) as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def base() -> BaseModel:
    """The model as Hugging Face has it."""
    return load_base_model(DATA / "model")


def write(folder: Path, hook: str, processing: str, out: str | None = None) -> dict[str, Tensor]:
    """An SAE or a skip transcoder of random weights in SAELens's layout; its tensors."""
    torch.manual_seed(len(hook))
    tensors = {"W_enc": torch.randn(D, F), "b_enc": torch.randn(F), "W_dec": torch.randn(F, D), "b_dec": torch.randn(D)}
    tensors |= {"W_skip": torch.randn(D, D)} if out else {}
    metadata = {"hook_name": hook, "model_name": "tiny", "model_from_pretrained_kwargs": STEPS[processing]}
    config = {"architecture": "standard" if out is None else "skip_transcoder", "apply_b_dec_to_input": out is None}
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(
        json.dumps(config | {"metadata": metadata | ({"hook_name_out": out} if out else {})})
    )
    save_file(tensors, folder / "sae_weights.safetensors")
    return tensors


def read(recording: Recording, dictionary: Dictionary) -> Tensor:
    """What a dictionary reads of Hugging Face's model."""
    site = dictionary.read.site
    return recording.resid_post(site.layer) if site.name == "resid_post" else recording.read(dictionary.read)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    "hook", ["hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_z"]
)
@pytest.mark.parametrize("processing", list(STEPS))
def test_features_are_those_on_transformer_lens(
    processing: str, hook: str, layer: int, lens: dict[str, np.ndarray], base: BaseModel, tmp_path: Path
) -> None:
    """Pre-activations from both models' activations agree, and so does what is left of z unexplained."""
    tensors = write(tmp_path / "sae", f"blocks.{layer}.{hook}", processing)
    there = torch.from_numpy(lens[f"{processing}/{layer}/{hook}"])
    expected = (there - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    (dictionary,) = undo(base, load_replacement(tmp_path / "sae")).dictionaries
    here = read(record(base, torch.from_numpy(lens["ids"])), dictionary)
    torch.testing.assert_close(here @ dictionary.W_enc.T + dictionary.b_enc, expected, rtol=1e-4, atol=1e-4)
    active = dictionary.encode(here)
    assert len(active) == int((expected > 0).sum()) > 10
    if hook == "attn.hook_z":
        found = here - dictionary.output_biases[dictionary.writes[0]]
        torch.testing.assert_close(found, there - tensors["b_dec"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("hook", ["hook_resid_mid", "ln2.hook_normalized"])
@pytest.mark.parametrize("processing", list(STEPS))
def test_transcoders_read_what_transformer_lens_normalises(
    processing: str, hook: str, layer: int, lens: dict[str, np.ndarray], base: BaseModel, tmp_path: Path
) -> None:
    """Pre-activations and what a skip connection adds; where a norm is folded, `hook_normalized` has no gain."""
    tensors = write(tmp_path / "t", f"blocks.{layer}.{hook}", processing, out=f"blocks.{layer}.hook_mlp_out")
    if hook == "ln2.hook_normalized" and "fold_ln" not in STEPS[processing]:
        with pytest.raises(CircuitsError, match="does not say whether"):  # TransformerLens 2 and 3 differ
            undo(base, load_replacement(tmp_path / "t"))
        return
    there = torch.from_numpy(lens[f"{processing}/{layer}/{hook}"])
    (dictionary,) = undo(base, load_replacement(tmp_path / "t")).dictionaries
    here = read(record(base, torch.from_numpy(lens["ids"])), dictionary)
    expected = there @ tensors["W_enc"] + tensors["b_enc"]
    torch.testing.assert_close(here @ dictionary.W_enc.T + dictionary.b_enc, expected, rtol=1e-4, atol=1e-4)
    assert dictionary.skip is not None
    torch.testing.assert_close(here @ dictionary.skip.T, there @ tensors["W_skip"].T, rtol=1e-4, atol=1e-4)


def test_processing_matters(lens: dict[str, np.ndarray], base: BaseModel, tmp_path: Path) -> None:
    """Without undoing it z and the stream are others, so the tests above could fail."""
    recording = record(base, torch.from_numpy(lens["ids"]))
    for hook, value in (("attn.hook_z", recording.z[1]), ("hook_resid_mid", recording.resid_mid[1])):
        assert np.abs(lens[f"default/1/{hook}"] - value.numpy()).max() > 0.1


@pytest.mark.parametrize(("processing", "hook"), [("default", "ln2.hook_normalized"), ("plain", "hook_resid_mid")])
def test_a_trace(processing: str, hook: str, lens: dict[str, np.ndarray], base: BaseModel, tmp_path: Path) -> None:
    """Attention SAEs on `hook_z` and transcoders, as `circuits.load` reads them: ledger closed, the same features."""
    expected = {}
    for layer in range(2):
        write(tmp_path / "z" / f"{layer}", f"blocks.{layer}.attn.hook_z", processing)
        out = f"blocks.{layer}.hook_mlp_out"
        tensors = write(tmp_path / "mlp" / f"{layer}", f"blocks.{layer}.{hook}", processing, out=out)
        pre = torch.from_numpy(lens[f"{processing}/{layer}/{hook}"]) @ tensors["W_enc"] + tensors["b_enc"]
        expected[layer] = (pre[1:] > 0).sum()
    model = circuits.load(DATA / "model", [tmp_path / "z", tmp_path / "mlp"])
    settings = circuits.TraceSettings(unpruned=True)
    graph = circuits.trace(model, lens["ids"].tolist(), settings=settings)
    assert graph.metadata["ledger"]["max_relative_gap"] < 1e-5
    for layer, count in expected.items():
        assert ((graph.nodes.kind == "mlp_feature") & (graph.nodes.layer == layer)).sum() == count
    assert (graph.nodes.kind == "attention_feature").sum() > 20
