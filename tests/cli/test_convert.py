"""`circuits convert`: what is written encodes and decodes as what was read."""

import sys
from pathlib import Path

import pytest
import test_clt_forge
import test_clt_training
import test_crosslayer_coding
import torch
import yaml
from safetensors.torch import load_file, save_file

import circuits
from circuits.cli import main
from circuits.replacements import Replacement, load_replacement
from circuits.replacements.processing import Processing

CASE = Path(__file__).parents[1] / "data" / "golden" / "gpt2_clt"
CLT = CASE / "transcoders"
F, D, L, T = 12, 5, 3, 7


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs `circuits convert ARGS`; returns (exit code, all that it says in one line)."""

    def call(*args: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["circuits", "convert", *map(str, args)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        said = " ".join((captured.out + captured.err).split())
        assert "Traceback" not in said
        return code, said

    return call


@pytest.fixture
def transcoders(tmp_path: Path) -> Path:
    """Per-layer transcoders in circuit-tracer's layout, with thresholds and skip connections."""
    torch.manual_seed(0)
    folder = tmp_path / "transcoders"
    folder.mkdir()
    shapes = {"W_enc": (F, D), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,), "W_skip": (D, D)}
    for layer in range(L):
        tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
        tensors["activation_function.threshold"] = torch.rand(F)
        save_file(tensors, folder / f"layer_{layer}.safetensors")
    config = {"model_kind": "transcoder_set", "feature_input_hook": "mlp.hook_in"}
    config |= {"feature_output_hook": "mlp.hook_out", "model_name": "tiny"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def assert_same(found: Replacement, expected: Replacement, atol: float = 0.0) -> None:
    """The same sites, active features, activations, and outputs of each of them."""
    torch.manual_seed(1)
    assert len(found.dictionaries) == len(expected.dictionaries) > 0
    for ours, theirs in zip(found.dictionaries, expected.dictionaries, strict=True):
        assert (ours.read, ours.writes, ours.activation) == (theirs.read, theirs.writes, theirs.activation)
        assert (ours.before_post_norm, ours.skip is None) == (theirs.before_post_norm, theirs.skip is None)
        x = torch.randn(T, theirs.d_read)
        a, b = ours.encode(x), theirs.encode(x)
        if atol == 0.0:
            assert torch.equal(a.features, b.features)
            assert torch.equal(a.positions, b.positions)
            torch.testing.assert_close(a.activations, b.activations, rtol=1e-6, atol=1e-6)
        everything = torch.arange(theirs.n_features)
        for site in theirs.writes:
            rows = (one.decoder_rows(everything, site) for one in (ours, theirs))
            torch.testing.assert_close(*rows, rtol=atol, atol=atol)
            biases = [one.output_bias(site) for one in (ours, theirs)]
            assert [bias is None or not bias.any() for bias in biases].count(True) in (0, 2)
            if biases[0] is not None and biases[1] is not None:
                assert torch.equal(*biases)
        if theirs.skip is not None:
            assert ours.skip is not None
            torch.testing.assert_close(ours.skip, theirs.skip, rtol=atol, atol=atol)


def test_circuit_tracers_become_ours(run, tmp_path: Path, transcoders: Path) -> None:
    """Cross-layer and per-layer, with thresholds, skip connections and writes before a post-norm; the model is traced
    with what was written as with what was read."""
    for source, name in ((CLT, "clt"), (transcoders, "plt")):
        code, said = run(source, "-o", tmp_path / name)
        assert code == 0, said
        assert "circuit-tracer to circuits, float32" in said
        assert_same(load_replacement(tmp_path / name), load_replacement(source))
    assert load_replacement(tmp_path / "plt").model == {"name": "tiny"}
    traced = [circuits.trace(circuits.load(CASE / "model", one), [0, 5, 9, 3]) for one in (CLT, tmp_path / "clt")]
    assert traced[0].node_ids() == traced[1].node_ids()
    torch.testing.assert_close(*(torch.tensor(graph.edges.weight) for graph in traced), rtol=1e-6, atol=1e-6)


def test_there_and_back(run, tmp_path: Path, transcoders: Path) -> None:
    """Ours becomes circuit-tracer's again, with the same tensors in its files."""
    for source, name in ((CLT, "clt"), (transcoders, "plt")):
        assert run(source, "-o", tmp_path / name)[0] == 0
        code, said = run(tmp_path / name, "-o", tmp_path / f"{name}-back", "--format", "circuit-tracer")
        assert code == 0, said
        back = load_replacement(tmp_path / f"{name}-back")
        assert back.format == "circuit-tracer"
        assert_same(back, load_replacement(source))
        for file in source.glob("*.safetensors"):
            ours = load_file(tmp_path / f"{name}-back" / file.name)
            for key, tensor in load_file(file).items():
                torch.testing.assert_close(ours[key], tensor, rtol=0, atol=0)


def test_other_cross_layer_formats(run, tmp_path: Path) -> None:
    """CLT-Forge's, clt-training's and crosslayer-coding's become ours; circuit-tracer's too, but for skips of a CLT."""
    test_clt_forge.write(tmp_path / "clt-forge", 2, decoder_type="lora")
    layers, config = test_clt_training.CASES["divided"]
    test_clt_training.write(tmp_path / "clt-training", test_clt_training.HOOKPOINTS, layers, **config)
    test_crosslayer_coding.write(tmp_path / "data" / "crosslayer-coding")
    for source in (tmp_path / "clt-forge", tmp_path / "clt-training", tmp_path / "data" / "crosslayer-coding"):
        expected = load_replacement(source)
        assert expected.format == source.name
        for format in ("circuits", "circuit-tracer"):
            out = tmp_path / f"{source.name}-{format}"
            code, said = run(source, "-o", out, "--format", format)
            if (source.name, format) == ("clt-training", "circuit-tracer"):
                assert (code, "has a skip connection beside" in said, out.exists()) == (2, True, False), said
                continue
            assert code == 0, said
            assert f"{source.name} to {format}, float32" in said
            assert_same(load_replacement(out), expected)


def test_what_circuit_tracer_cannot_say_is_refused(run, tmp_path: Path) -> None:
    """Attention SAEs have no place in its format; nothing is written."""
    source = Path(circuits.__file__).parent / "default" / "attention-sae"
    code, said = run(source, "-o", tmp_path / "out", "--format", "circuit-tracer")
    assert code == 2, said
    assert "circuit-tracer" in said
    assert list(tmp_path.iterdir()) == []


def test_precision(run, tmp_path: Path) -> None:
    """bfloat16 keeps eight bits of matrices and all of vectors; a value that does not fit leaves nothing behind."""
    assert run(CLT, "-o", tmp_path / "small", "--dtype", "bfloat16", "--model", CASE / "model")[0] == 0
    assert_same(load_replacement(tmp_path / "small"), load_replacement(CLT), atol=2**-8)
    stored = load_file(next((tmp_path / "small").glob("*.safetensors")))
    assert (stored["W_dec"].dtype, stored["b_enc"].dtype) == (torch.bfloat16, torch.float32)
    large = tmp_path / "large"
    large.mkdir()
    for file in CLT.iterdir():
        (large / file.name).write_bytes(file.read_bytes())
    tensors = load_file(large / "W_dec_1.safetensors")
    tensors["W_dec_1"][0, 0, 0] = 1e6
    save_file(tensors, large / "W_dec_1.safetensors")
    code, said = run(large, "-o", tmp_path / "half", "--dtype", "float16")
    assert code == 2
    assert "not finite as torch.float16" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "small"]


def test_what_is_refused(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another's directory, the source itself, no replacement, another model, processed weights without the model."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    code, said = run(CLT, "-o", tmp_path / "mine")
    assert (code, "exists and is no replacement" in said) == (2, True)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    assert run(CLT, "-o", CLT) == (2, f"error: {CLT}: is what is read; name another directory")
    assert run(tmp_path / "nothing", "-o", tmp_path / "out")[0] == 2
    assert run(CASE / "model", "-o", tmp_path / "out")[0] == 2
    default = Path(circuits.__file__).parent / "default"
    code, said = run(default / "qk", "-o", tmp_path / "out")
    assert (code, "QK diagonalization" in said) == (2, True)
    code, said = run(default / "clt", "-o", tmp_path / "out", "--model", CASE / "model")
    assert (code, "another model" in said) == (2, True)

    def processed(*args: object, **options: object) -> Replacement:
        found = load_replacement(CLT)
        found.processing = Processing(fold_value_biases=True, center_writing_weights=True)
        return found

    monkeypatch.setattr("circuits.replacements.loading.load_replacement", processed)
    code, said = run(CLT, "-o", tmp_path / "out")
    assert code == 2
    assert "center_writing_weights, fold_value_biases" in said
    assert "--model" in said
    assert not (tmp_path / "out").exists()
