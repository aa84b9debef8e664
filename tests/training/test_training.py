"""Streaming activations, measuring replacements, and `circuits train` end to end, on the small golden model."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch

from circuits.activations import TokenStream
from circuits.base_models import load_base_model
from circuits.cli import main
from circuits.errors import CircuitsError
from circuits.evaluation import cross_entropy, dictionary_figures
from circuits.kernels.encode import Activation
from circuits.loading import load
from circuits.model import BaseModel
from circuits.recording import record
from circuits.replacements import Dictionary, ReadSite, Replacement, Site, load_replacement
from circuits.replacements.dictionary import Decoder
from circuits.replacements.weights import HeldTensor
from circuits.text import read_documents
from circuits.tracing import trace

MODEL = next((Path(__file__).parents[1] / "data" / "golden").iterdir()) / "model"


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load_base_model(MODEL)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rng = random.Random(0)
    lines = [json.dumps([0, *(rng.randrange(2, 200) for _ in range(rng.randint(3, 30)))]) for _ in range(200)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(lines))
    return path


def both_signs(layer: int, site: str, width: int, scale: float) -> Dictionary:
    """An SAE of 2 x width features, `relu(x)` and `relu(-x)`, that rebuilds `scale` times its input exactly."""
    place, eye = Site(site, layer), torch.eye(width)
    rows = torch.cat([eye, -eye])
    return Dictionary(
        name=f"attention-sae.{layer}",
        kind="attention-sae",
        read=ReadSite(place, "none"),
        writes=(place,),
        activation=Activation("relu"),
        W_enc=rows,
        b_enc=torch.zeros(2 * width),
        decoders={place: Decoder(HeldTensor("W_dec", scale * rows))},
    )


def of(*dictionaries: Dictionary) -> Replacement:
    return Replacement("by hand", Path("."), "circuits", dictionaries)


def test_batches_hold_what_the_model_computes(base: BaseModel, corpus: Path) -> None:
    documents = read_documents(base, [corpus], 32)
    read, write = ReadSite(Site("resid_mid", 1), "full"), Site("mlp_out", 1)
    stream = TokenStream(base, documents, (read, write), batch_tokens=64, chunk=2)
    batch = next(stream)
    assert batch["resid_mid.1:full"].shape == batch["mlp_out.1"].shape == (64, base.shape.d_model)
    known = []
    for document in documents:
        recording = record(base, torch.tensor(document))
        known.append(torch.cat([recording.read(read), recording.mlp_out[1]], 1)[1:])
    both = torch.cat([batch["resid_mid.1:full"], batch["mlp_out.1"]], 1)
    distance = torch.cdist(both, torch.cat(known), compute_mode="donot_use_mm_for_euclid_dist").min(1).values
    assert float(distance.max()) < 1e-4


def test_stream_resumes_exactly(base: BaseModel, corpus: Path) -> None:
    documents, site = read_documents(base, [corpus], 32), (Site("attn_out", 0),)
    whole = TokenStream(base, documents, site, batch_tokens=100, chunk=3)
    batches = [next(whole)["attn_out.0"] for _ in range(70)]
    stopped = TokenStream(base, documents, site, batch_tokens=100, chunk=3)
    for _ in range(40):
        next(stopped)
    again = TokenStream(base, documents, site, batch_tokens=100, chunk=3)
    again.load_state_dict(stopped.state_dict())
    for expected in batches[40:]:
        assert torch.equal(next(again)["attn_out.0"], expected)


def test_text_windows_and_bad_files(base: BaseModel, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("[0, 5]\n[0, 99999]\n")
    with pytest.raises(CircuitsError, match="line 2"):
        read_documents(base, [bad], 8)
    bad.write_text("[0, 5]\nnot json\n")
    with pytest.raises(CircuitsError, match="line 2"):
        read_documents(base, [bad], 8)
    with pytest.raises(CircuitsError, match="could not be read"):
        read_documents(base, [tmp_path / "none.txt"], 8)
    default = load().base
    text = tmp_path / "text.txt"
    text.write_text("One day a dog ran.<|endoftext|>\nThe cat sat on the mat and looked at the moon.\n")
    documents = read_documents(default, [text], 6)
    assert all(document[0] == default.tokenizer.bos_token_id and len(document) <= 6 for document in documents)
    assert default.tokenizer.decode([i for d in documents for i in d[1:]]).startswith("One day a dog ran.The cat sat")


@pytest.mark.parametrize("site", ["attn_out", "z"])
def test_perfect_dictionaries_keep_the_loss_and_empty_ones_lose_it(base: BaseModel, corpus: Path, site: str) -> None:
    documents = read_documents(base, [corpus], 32)[:40]
    width = base.shape.d_model if site == "attn_out" else base.shape.n_heads * base.shape.d_head
    layers = range(base.shape.n_layers)
    perfect = cross_entropy(base, [of(*(both_signs(layer, site, width, 1.0) for layer in layers))], documents)
    assert perfect.replaced == pytest.approx(perfect.base, abs=1e-5)
    assert perfect.kept == pytest.approx(1.0, abs=1e-4)
    nothing = cross_entropy(base, [of(*(both_signs(layer, site, width, 0.0) for layer in layers))], documents)
    assert nothing.base == pytest.approx(perfect.base, abs=1e-6)
    assert nothing.replaced == pytest.approx(nothing.ablated, abs=1e-5)
    half = dictionary_figures(base, [of(both_signs(0, site, width, 0.5))], documents)["attention-sae.0"]
    held = []
    for document in documents:
        recording = record(base, torch.tensor(document))
        held.append((recording.z if site == "z" else recording.attn_out)[0][1:])
    x = torch.cat(held)
    expected = 0.25 * x.pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    assert half["normalized_mse"] == pytest.approx(float(expected), rel=1e-4)
    assert half["l0"] == pytest.approx(width, abs=0.01)


def test_train_commands_end_to_end(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    common = ["--model", str(MODEL), "--text", str(corpus), "-o", str(out), "--features", "64", "--batch-tokens", "256"]

    def run(kind: str, *options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["circuits", "train", kind, *common, "--steps", "30", *options])
        main()
        return capsys.readouterr().out

    run("clt", "--k", "6", "--log-every", "10")
    assert "normalized_mse" in run("attention-sae", "--activation", "topk", "--k", "6")
    model = load(MODEL, [out / "clt", out / "attention-sae"])
    assert model.replacements[0].training["cross_entropy"]["base"] > 0
    graph = trace(model, [0, 5, 9, 5, 30, 9, 5])
    assert graph.metadata["ledger"]["max_relative_gap"] <= 1e-4
    assert graph.metadata["attention"] == ["replaced"] * model.base.shape.n_layers
    run("clt", "--k", "6", "--activation", "jump_relu", "-o", str(tmp_path / "jump"), "--dtype", "float32")
    jump = load_replacement(tmp_path / "jump" / "clt")
    assert {dictionary.activation.kind for dictionary in jump.dictionaries} == {"jump_relu"}
    assert jump.model["hash"] == model.base.identity
