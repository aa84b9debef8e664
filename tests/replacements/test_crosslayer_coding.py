"""crosslayer-coding's checkpoints: `CrossLayerTranscoder` and its normalisation in float64, and traces that add up."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cross_layer import outcome, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import circuits
from circuits.replacements import ReplacementError, load_replacement

L, D, F, T = 3, 12, 20, 8
LN2 = "transformer.h.{}.ln_2.input"
SETTINGS = {"num_features": F, "num_layers": L, "d_model": D, "model_name": "gpt2", "normalization_method": "mean_std"}
SETTINGS |= {"activation_fn": "jumprelu", "jumprelu_threshold": 0.0, "batchtopk_k": None, "topk_k": None}
SETTINGS |= {"topk_mode": "global", "clt_dtype": None, "expected_input_dtype": "float32", "decoder_tying": "none"}
SETTINGS |= {"mlp_input_template": LN2, "mlp_output_template": "transformer.h.{}.mlp.output", "skip_connection": False}
SETTINGS |= {"tl_input_template": None, "tl_output_template": None, "enable_feature_scale": False}
Stats = dict[str, dict[str, dict[str, list[float]]]]


def write(folder: Path, name: str = "clt.safetensors", **config: Any) -> tuple[dict[str, Tensor], Stats]:
    """A checkpoint as training leaves it, with the statistics of its data; its tensors in float64."""
    torch.manual_seed(7)
    c = SETTINGS | config
    tying, skips = c["decoder_tying"], c["skip_connection"]
    pairs = [f"{l}->{m}" for l in range(L) for m in range(l, L)] if tying == "none" else [str(l) for l in range(L)]
    t: dict[str, Tensor] = {}
    for layer in range(L):
        t[f"encoder_module.encoders.{layer}.weight"] = torch.randn(F, D) * 0.5
        t[f"encoder_module.encoders.{layer}.bias_param"] = torch.randn(F) * 0.5
        if c["enable_feature_scale"]:
            t[f"decoder_module.feature_scale.{layer}"] = torch.rand(F) + 0.5
            t[f"decoder_module.feature_offset.{layer}"] = torch.zeros(F)
    for pair in pairs:
        t[f"decoder_module.decoders.{pair}.weight"] = torch.randn(D, F) * 0.3
        t[f"decoder_module.decoders.{pair}.bias_param"] = torch.randn(D)
        if skips:
            own = pair == "0" or pair.partition("->")[0] == pair.partition("->")[2]
            t[f"decoder_module.skip_weights.{pair}"] = torch.randn(D, D) * 0.3 if own else torch.zeros(D, D)
    if c["activation_fn"] != "relu":
        t["theta_manager.log_threshold"] = torch.randn(L, F) * 0.5
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(c, indent=2))
    save_file(t, folder / name)
    stats: Stats = {}
    for layer in range(L):
        drawn = {side: {"mean": torch.randn(D), "std": torch.rand(D) + 0.3} for side in ("inputs", "targets")}
        stats[str(layer)] = {side: {k: v.tolist() for k, v in of.items()} for side, of in drawn.items()}
    (folder.parent / "norm_stats.json").write_text(json.dumps(stats))
    return {key: tensor.double() for key, tensor in t.items()}, stats


def formula(w: dict[str, Tensor], stats: Stats, xs: list[Tensor], **config: Any) -> list[list[Tensor]]:
    """Activations and outputs of every layer: normalised as by the store, `encode`, `decode`, and undone."""
    c = SETTINGS | config

    def scale_of(layer: int, side: str) -> tuple[Tensor | float, Tensor | float]:
        if c["normalization_method"] == "none":
            return 0.0, 1.0
        mean, std = (torch.tensor(stats[str(layer)][side][name]).double() for name in ("mean", "std"))
        return mean, std + 1e-6

    inner, acts, outputs = [], [], []
    for l, x in enumerate(xs):
        mean, std = scale_of(l, "inputs")
        inner.append((x.double() - mean) / std)
        pre = inner[l] @ w[f"encoder_module.encoders.{l}.weight"].T + w[f"encoder_module.encoders.{l}.bias_param"]
        least = 0.0 if c["activation_fn"] == "relu" else w["theta_manager.log_threshold"][l].exp()
        acts.append((pre >= least) * pre)
    for m in range(L):
        y = torch.zeros(T, D).double()
        decoder = "decoder_module.decoders."
        scale = w.get(f"decoder_module.feature_scale.{m}", torch.ones(F).double())
        for l in range(m + 1):
            key = {"none": f"{l}->{m}", "per_source": str(l), "per_target": str(m)}[c["decoder_tying"]]
            y = y + (acts[l] * scale) @ w[f"{decoder}{key}.weight"].T
            if c["decoder_tying"] != "per_target" or l == m:
                y = y + w[f"{decoder}{key}.bias_param"]
            if c["skip_connection"]:
                key = f"{l}->{m}" if c["decoder_tying"] == "none" else str(m)
                y = y + inner[l] @ w[f"decoder_module.skip_weights.{key}"].T
        mean, std = scale_of(m, "targets")
        outputs.append(y * std + mean)
    return [acts, outputs]


CASES: dict[str, dict[str, Any]] = {
    "jumprelu": {},
    "relu": {"activation_fn": "relu", "normalization_method": "none"},
    "with a skip": {"skip_connection": True},
    "with a skip, not normalised": {"skip_connection": True, "normalization_method": "none"},
    "per source": {"decoder_tying": "per_source", "enable_feature_scale": True, "skip_connection": True},
    "per target": {"decoder_tying": "per_target", "enable_feature_scale": True, "skip_connection": True},
}


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("case", CASES)
def test_formula(case: str, memory: int | None, tmp_path: Path) -> None:
    """Every tying of decoders, with and without normalisation; encoders held, and read by blocks."""
    config = CASES[case]
    (w, stats), xs = write(tmp_path / "clt", **config), [torch.randn(T, D) for _ in range(L)]
    replacement = load_replacement(tmp_path / "clt", memory=memory)
    assert (replacement.format, replacement.model) == ("crosslayer-coding", {"name": "gpt2"})
    assert (tmp_path / "norm_stats.json" in replacement.files) == ("none" not in config.values())
    expected = formula(w, stats, xs, **config)
    for found, wanted in zip(outcome(replacement, xs), expected, strict=True):
        for layer in range(L):
            torch.testing.assert_close(found[layer].double(), wanted[layer], rtol=2e-5, atol=2e-5)
    assert 10 < int((torch.stack(expected[0]) > 0).sum()) < L * T * F * 0.7


def test_older_names(tmp_path: Path) -> None:
    """Files from before the modules: names without their first part, the statistics in the folder itself."""
    (w, stats), xs = write(tmp_path / "clt"), [torch.randn(T, D) for _ in range(L)]
    file = tmp_path / "clt" / "clt.safetensors"
    save_file({name.partition(".")[2]: tensor for name, tensor in load_file(file).items()}, file)
    (tmp_path / "norm_stats.json").rename(tmp_path / "clt" / "norm_stats.json")
    (tmp_path / "clt" / "cfg.json").write_text(json.dumps(SETTINGS | {"normalization_method": "auto"}))
    for found, wanted in zip(outcome(load_replacement(tmp_path / "clt"), xs), formula(w, stats, xs), strict=True):
        torch.testing.assert_close(torch.stack(found).double(), torch.stack(wanted), rtol=2e-5, atol=2e-5)


def test_an_entry_at_its_threshold_passes(tmp_path: Path) -> None:
    """`input >= threshold`, unlike other formats."""
    write(tmp_path / "clt", normalization_method="none")
    file = tmp_path / "clt" / "clt.safetensors"
    tensors = load_file(file)
    tensors["encoder_module.encoders.0.bias_param"] = tensors["theta_manager.log_threshold"][0].exp()
    save_file(tensors, file)
    first = load_replacement(tmp_path / "clt").dictionaries[0]
    active = first.encode(torch.zeros(1, D))
    assert active.features.tolist() == list(range(F))
    assert torch.equal(active.activations, tensors["encoder_module.encoders.0.bias_param"])
    assert first.threshold is not None
    assert (first.threshold < active.activations).all()


@pytest.mark.parametrize(
    ("templates", "read", "before_post_norm"),
    [
        ({}, "none", True),
        ({"mlp_input_template": "gpt_neox.layers.{}.mlp.input"}, "full", True),
        ({"mlp_input_template": "model.layers.{}.pre_feedforward_layernorm.output"}, "full", True),
        ({"mlp_output_template": "model.layers.{}.post_feedforward_layernorm.output"}, "none", False),
        ({"mlp_input_template": None, "tl_input_template": "blocks.{}.hook_resid_mid"}, "none", True),
        ({"mlp_input_template": None, "tl_input_template": "blocks.{}.ln2.hook_normalized"}, "full", True),
        ({"tl_input_template": "blocks.{}.ln2.hook_normalized"}, "none", True),
        ({"mlp_output_template": None, "tl_output_template": "blocks.{}.hook_mlp_out"}, "none", False),
        ({"mlp_output_template": None}, "none", True),
    ],
)
def test_places(templates: dict[str, str | None], read: str, before_post_norm: bool, tmp_path: Path) -> None:
    """What is read and written, by either template; the module goes before TransformerLens's hook."""
    write(tmp_path / "clt", **templates)
    for layer, dictionary in enumerate(load_replacement(tmp_path / "clt").dictionaries):
        assert (str(dictionary.read), dictionary.before_post_norm) == (f"resid_mid.{layer}:{read}", before_post_norm)


@pytest.mark.parametrize("case", ["jumprelu", "with a skip"])
def test_a_trace(case: str, tmp_path: Path) -> None:
    """The ledger of a tiny GPT-2 closes: means, deviations and skips have their places in it."""
    tiny_model(tmp_path / "model", "gpt2", L, D)
    write(tmp_path / "clt", **CASES[case])
    model = circuits.load(tmp_path / "model", tmp_path / "clt")
    graph = circuits.trace(model, [2, 5, 3, 9], settings=circuits.TraceSettings(unpruned=True))
    assert graph.metadata["ledger"]["max_relative_gap"] < 1e-5
    assert graph.nodes.kind.tolist().count("mlp_feature") > 20


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"activation_fn": "batchtopk"}, r"'batchtopk' ranks entries .*scripts/convert_batchtopk_to_jumprelu\.py"),
        ({"activation_fn": "topk"}, "'topk' ranks entries"),
        ({"activation_fn": "gelu"}, "activation_fn 'gelu' is not known; expected jumprelu or relu"),
        ({"decoder_tying": "all"}, "decoder_tying 'all' is not known; expected one of none, per_source, per_target"),
        ({"normalization_method": "sqrt_d_model"}, "'sqrt_d_model' cannot be expressed; expected none or mean_std"),
        ({"mlp_input_template": None}, r'nothing says what is read; .* such as "mlp_input_template": "trans'),
        ({"mlp_input_template": "transformer.h.{}.attn.input"}, r"input template 'transformer\.h\.\{\}\.attn\.input'"),
        ({"mlp_output_template": "blocks.{}.mlp.hook_post"}, r"output template 'blocks\.\{\}\.mlp\.hook_post'"),
        ({"mlp_input_template": "{}.ln2.hook_normalized", "model_name": "mine"}, "'mine' names no known model"),
        ({"num_features": 0}, "num_features, num_layers, d_model should be positive whole numbers"),
        ({"num_features": F + 1}, r"encoder_module\.encoders\.0"),
    ],
)
def test_settings_that_are_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    """With the file, what was found and what to do."""
    write(tmp_path / "clt", **config)
    with pytest.raises(ReplacementError, match=message) as raised:
        load_replacement(tmp_path / "clt")
    assert str(tmp_path / "clt") in str(raised.value)


@pytest.mark.parametrize(
    ("config", "tensor", "message"),
    [
        ({"skip_connection": True}, "skip_weights.0->2", "is not zero: a skip connection from a layer to others"),
        ({"skip_connection": True, "decoder_tying": "per_target"}, "skip_weights.1", "a skip connection from a layer"),
        ({"enable_feature_scale": True, "decoder_tying": "per_source"}, "feature_offset.1", "with an offset what"),
    ],
)
def test_tensors_that_are_refused(config: dict[str, Any], tensor: str, message: str, tmp_path: Path) -> None:
    """A single entry that is not zero."""
    write(tmp_path / "clt", **config)
    file = tmp_path / "clt" / "clt.safetensors"
    tensors = load_file(file)
    tensors[f"decoder_module.{tensor}"].view(-1)[0] = 0.5
    save_file(tensors, file)
    with pytest.raises(ReplacementError, match=message) as raised:
        load_replacement(tmp_path / "clt")
    assert f"{file}: tensor 'decoder_module.{tensor}' is not zero" in str(raised.value)


def test_files(tmp_path: Path) -> None:
    """The latest checkpoint of a training is taken; of others there should be one, and pickled ones are not read."""
    folder = tmp_path / "clt"
    write(folder, "clt_checkpoint_500.safetensors")
    (folder / "other.safetensors").write_bytes((folder / "clt_checkpoint_500.safetensors").read_bytes())
    with pytest.raises(ReplacementError, match=r"has clt_checkpoint_500\.safetensors, other\.safetensors; leave"):
        load_replacement(folder)
    (folder / "other.safetensors").rename(folder / "clt_checkpoint_latest.safetensors")
    assert load_replacement(folder).files[1].name == "clt_checkpoint_latest.safetensors"
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / "clt_500.pt").write_bytes(b"")
    with pytest.raises(ReplacementError, match=r"no safetensors file .*; clt_500\.pt is pickled and not read"):
        load_replacement(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, r"normalization_method is 'mean_std', and there is no norm_stats\.json here or in the folder above"),
        ({"2": None}, "should have a mean and a std of 12 numbers .* every layer below 3: TypeError"),
        ({"1": {"inputs": {"mean": [0.0] * D, "std": [1.0] * D}}}, r"KeyError\('targets'\)"),
        ({"1": {"inputs": {"mean": [0.0], "std": [1.0]}}}, r"shapes \(1,\) and \(1,\)"),
        ({"1": {"inputs": {"mean": [0.0] * D, "std": [-1.0] * D}}}, "a negative deviation"),
    ],
)
def test_statistics(change: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    """Missing ones, and ones that do not fit."""
    _, stats = write(tmp_path / "clt")
    (tmp_path / "norm_stats.json").unlink()
    if change is not None:
        (tmp_path / "norm_stats.json").write_text(json.dumps(stats | change))
    with pytest.raises(ReplacementError, match=message):
        load_replacement(tmp_path / "clt")
