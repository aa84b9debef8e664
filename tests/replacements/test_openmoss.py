"""What OpenMOSS publishes, against its own formulas: features, patterns and outputs, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import openmoss_files as of
import pytest
import torch
from openmoss_files import D, F, T
from safetensors.torch import save_file
from torch import Tensor

from circuits.replacements import Dictionary, Replacement, load_replacement
from circuits.replacements.errors import ReplacementError
from circuits.replacements.formats import native
from circuits.replacements.movement import OwnAttention

LN2, MLP = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
LN1, ATTN = "blocks.1.ln1.hook_normalized", "blocks.1.hook_attn_out"
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def inputs(seed: int = 5) -> Tensor:
    """What a site holds, (T, D)."""
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed)) * 1.5


def run(dictionary: Dictionary, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Activations (T, F), and what each write site gets (T, D), by the interface of `Dictionary` alone."""
    active = dictionary.encode(x)
    dense = torch.zeros(len(x), dictionary.n_features)
    dense[active.positions, active.features] = active.activations
    outputs = {}
    for site in dictionary.writes:
        y = torch.zeros(len(x), D).index_add_(
            0, active.positions, dictionary.decoder_rows(active.features, site) * active.activations[:, None]
        )
        outputs[str(site)] = y
    return dense, outputs


def rebuilt(dictionary: Dictionary, x: Tensor) -> Tensor:
    """The output at the one write site, with its bias."""
    (site,) = dictionary.writes
    bias = dictionary.output_bias(site)
    y = run(dictionary, x)[1][str(site)]
    return y if bias is None else y + bias


@pytest.mark.parametrize("norm", ["dataset-wise", "inference"])
@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk"])
def test_transcoder(tmp_path: Path, act_fn: str, include: bool, norm: str) -> None:
    """Features and outputs are those of `encode` and `decode`; with a top-k they are counted in decoder lengths."""
    values = of.common(LN2, MLP, sae_type="sae", act_fn=act_fn, norm_activation=norm)
    values["sparsity_include_decoder_norm"] = include
    tensors = of.sae(1, **values)
    replacement = load_replacement(of.write(tmp_path, values, tensors))
    (dictionary,) = replacement.dictionaries
    assert (dictionary.kind, str(dictionary.read)) == ("transcoder", "resid_mid.1:scale")
    assert (replacement.model, replacement.processing) == ({"name": "Qwen/Qwen3-tiny"}, None)
    a, y = of.sae_formula(values, tensors, inputs())
    if act_fn == "topk" and include:
        a = a * tensors["W_D"].double().norm(dim=1)
    torch.testing.assert_close(run(dictionary, inputs())[0].double(), a, **CLOSE)
    torch.testing.assert_close(rebuilt(dictionary, inputs()).double(), y, **CLOSE)
    assert 0 < (a != 0).float().mean() < 0.9


@pytest.mark.parametrize("container", [".safetensors", ".pt"])
def test_stays_in_its_file(tmp_path: Path, container: str) -> None:
    """With no memory for encoders they are read by blocks and rows from the file, and give the same; so does `.pt`."""
    values = of.common(LN2, MLP, sae_type="sae", act_fn="jumprelu", use_decoder_bias=False)
    tensors = of.sae(2, **values)
    folder = of.write(tmp_path, values, tensors, container=container)
    (dictionary,) = load_replacement(folder, memory=0).dictionaries
    assert not dictionary.is_held
    torch.testing.assert_close(
        rebuilt(dictionary, inputs()).double(), of.sae_formula(values, tensors, inputs())[1], **CLOSE
    )
    some = torch.tensor([5, 2, 23, 2])
    want = tensors["W_E"].T[some] * of.factors(values)[0]
    torch.testing.assert_close(dictionary.encoder_rows(some), want.float(), **CLOSE)
    torch.testing.assert_close(dictionary.encoder.rows(torch.arange(3, 9)), dictionary.W_enc[3:9], **CLOSE)


@pytest.mark.parametrize(
    ("hook", "kind"),
    [("hook_attn_out", "attention-sae"), ("attn.hook_z", "attention-sae"), ("hook_mlp_out", "mlp-sae")],
)
def test_sae(tmp_path: Path, hook: str, kind: str) -> None:
    """An SAE rebuilds what it reads."""
    values = of.common(f"blocks.2.{hook}", f"blocks.2.{hook}", sae_type="sae", act_fn="topk")
    tensors = of.sae(3, **values)
    (dictionary,) = load_replacement(of.write(tmp_path, values, tensors, model="")).dictionaries
    assert (dictionary.kind, dictionary.read.norm, dictionary.read.site) == (kind, "none", dictionary.writes[0])
    torch.testing.assert_close(
        rebuilt(dictionary, inputs()).double(), of.sae_formula(values, tensors, inputs())[1], **CLOSE
    )


@pytest.mark.parametrize("act_fn", ["jumprelu", "topk"])
@pytest.mark.parametrize("before", [False, True])
def test_llama_scope(tmp_path: Path, before: bool, act_fn: str) -> None:
    """Features and outputs, with and without the decoder's bias taken off the input."""
    values = of.llama_scope_values(ATTN, ATTN, act_fn=act_fn, apply_decoder_bias_to_pre_encoder=before)
    drawn = of.write_llama_scope(tmp_path, "Llama3_1-8B-Base-L1A-8x", 4, values)
    (dictionary,) = load_replacement(tmp_path).dictionaries
    a, y = of.llama_scope_formula(values, drawn, inputs())
    torch.testing.assert_close(run(dictionary, inputs())[0].double(), a, **CLOSE)
    torch.testing.assert_close(rebuilt(dictionary, inputs()).double(), y, **CLOSE)
    assert dictionary.kind == "attention-sae"
    assert 0 < (a != 0).float().mean() < 0.9


def test_linear_layers_with_thresholds(tmp_path: Path) -> None:
    """Checkpoints of 2025 (Llama Scope R1 Distill): torch's linear layers, but `config.json` and a threshold each."""
    values = of.common(ATTN, ATTN, sae_type="sae", act_fn="jumprelu")
    tensors = of.sae(12, **values)
    held = {"encoder.weight": tensors["W_E"].T.contiguous(), "encoder.bias": tensors["b_E"]}
    held |= {"decoder.weight": tensors["W_D"].T.contiguous(), "decoder.bias": tensors["b_D"]}
    held["log_jumprelu_threshold"] = tensors["activation_function.log_jumprelu_threshold"]
    (dictionary,) = load_replacement(of.write(tmp_path, values, held)).dictionaries
    a, y = of.sae_formula(values, tensors, inputs())
    torch.testing.assert_close(run(dictionary, inputs())[0].double(), a, **CLOSE)
    torch.testing.assert_close(rebuilt(dictionary, inputs()).double(), y, **CLOSE)


@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("include", [True, False])
def test_cross_layer(tmp_path: Path, include: bool, act_fn: str) -> None:
    """Every layer's features and every output, with norms over all of a feature's decoder rows."""
    values, tensors = of.cross_layer(3, act_fn=act_fn, sparsity_include_decoder_norm=include)
    dictionaries = load_replacement(of.write(tmp_path, values, tensors)).dictionaries
    xs = [inputs(seed) for seed in range(3)]
    every, outputs = of.clt_formula(values, tensors, xs)
    total = {f"mlp_out.{n}": torch.zeros(T, D) for n in range(3)}
    for n, dictionary in enumerate(dictionaries):
        a, writes = run(dictionary, xs[n])
        if act_fn == "topk" and include:
            norm = sum(tensors[f"W_D.{to}"][n].square().sum(1) for to in range(n, 3))
            a = a / torch.as_tensor(norm).sqrt()
        torch.testing.assert_close(a.double(), every[n], **CLOSE)
        for site, y in writes.items():
            total[site] += y
        for site in dictionary.writes:
            bias = dictionary.output_bias(site)
            total[str(site)] += 0 if bias is None else bias
    for n in range(3):
        torch.testing.assert_close(total[f"mlp_out.{n}"].double(), outputs[n], **CLOSE)


VARIANTS: dict[str, dict[str, Any]] = {
    "adjacent": {},
    "halves": {"rotary_adjacent_pairs": False},
    "halves, partly": {"rotary_adjacent_pairs": False, "rotary_dim": 4},
    "adjacent, partly": {"rotary_dim": 2, "norm_activation": "inference"},
    "no position": {"positional_embedding_type": "none", "act_fn": "relu"},
    "scale": {"attn_scale": 1.7, "act_fn": "jumprelu", "use_decoder_bias": False},
    "jumprelu, norms apart": {"act_fn": "jumprelu", "sparsity_include_decoder_norm": False},
    "Llama 3": {"rotary_adjacent_pairs": False} | of.NTK,
    "QK-norm": {"use_post_qk_ln": True, "normalization_type": "RMS", "eps": 0.02, "rotary_adjacent_pairs": False},
    "QK-norm, adjacent": {"use_post_qk_ln": True, "normalization_type": "RMS", "rotary_dim": 4},
    "repeated rows": {"rotary_scale": 2, "rotary_dim": 8, "use_post_qk_ln": True, "normalization_type": "RMS"},
    "heads repeated": {"n_qk_heads": 8, "use_post_qk_ln": True, "normalization_type": "RMS"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_lorsa(tmp_path: Path, variant: str) -> None:
    """Patterns, features and outputs of a Lorsa, and the same after saving it in our own format."""
    values = of.common(LN1, ATTN) | of.LORSA | VARIANTS[variant]
    tensors = of.lorsa(9, 4, 6, **values)
    replacement = load_replacement(of.write(tmp_path / "theirs", values, tensors))
    native.save(replacement, tmp_path / "ours")
    a, pattern, y = of.lorsa_formula(values, tensors, inputs())
    norms = tensors["W_O"].double().norm(dim=1)
    if values["act_fn"] == "topk":
        assert (a < 0).any() or values["top_k"] < F // 2
        a = a * norms
    for loaded in (replacement, load_replacement(tmp_path / "ours")):
        (dictionary,) = loaded.dictionaries
        assert (dictionary.kind, str(dictionary.read)) == ("lorsa", "resid_pre.1:scale")
        own = dictionary.moved_by
        assert isinstance(own, OwnAttention)
        torch.testing.assert_close(own.patterns(inputs()).double(), pattern, **CLOSE)
        torch.testing.assert_close(run(dictionary, inputs())[0].double(), a, **CLOSE)
        torch.testing.assert_close(rebuilt(dictionary, inputs()).double(), y, **CLOSE)


def test_top_k_keeps_negative_entries(tmp_path: Path) -> None:
    """`topk` of SAEs and Lorsas takes the k largest whatever their sign; that of a CLT takes positive ones."""
    values = of.common(LN2, MLP, sae_type="sae", act_fn="topk", top_k=F - 2)
    tensors = of.sae(10, **values)
    (dictionary,) = load_replacement(of.write(tmp_path, values, tensors)).dictionaries
    found = run(dictionary, inputs())[0]
    assert ((found != 0).sum(1) == F - 2).all()
    assert (found < 0).any()
    torch.testing.assert_close(
        rebuilt(dictionary, inputs()).double(), of.sae_formula(values, tensors, inputs())[1], **CLOSE
    )


# --- what cannot be read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_activation": "token-wise"}, "depends on the prompt"),
        ({"act_fn": "batchtopk"}, "convert the dictionary to jumprelu"),
        ({"use_glu_encoder": True}, "products of two linear maps"),
        ({"sae_type": "crosscoder"}, "cannot be used here"),
        ({"hook_point_in": "blocks.1.mlp.hook_post"}, "is not known"),
        ({"hook_point_in": "hook_embed"}, "not in a block"),
        ({"expansion_factor": 2}, "should have shape"),
    ],
)
def test_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """What cannot be expressed, or is not there, is refused by name."""
    values = of.common(LN2, MLP, sae_type="sae")
    folder = of.write(tmp_path, values, of.sae(1))
    (folder / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(ReplacementError, match=message):
        load_replacement(folder)


def test_refused_folders(tmp_path: Path) -> None:
    """Two dictionaries for one place, an unknown model, a pickled or missing checkpoint."""
    values = of.common(LN2, MLP, sae_type="sae")
    for k in (64, 128):
        of.write(tmp_path / "two" / f"layer1_transcoder_8x_k{k}", values, of.sae(1))
    with pytest.raises(ReplacementError, match=r"several dictionaries for blocks\.1\.hook_mlp_out: .*k128, .*k64"):
        load_replacement(tmp_path / "two")
    for name in ("unnamed", "Llama-Scope-pythia-70m"):
        of.write(tmp_path / "qwen" / name, values, of.sae(1), model="")
    with pytest.raises(ReplacementError, match="names the model for sure"):
        load_replacement(tmp_path / "qwen" / "Llama-Scope-pythia-70m")
    of.write(tmp_path / "qwen" / "pythia-70m", values, of.sae(1), model="")
    assert load_replacement(tmp_path / "qwen" / "pythia-70m").dictionaries[0].read.norm == "full"
    folder = tmp_path / "qwen" / "unnamed"
    assert load_replacement(folder).dictionaries[0].read.norm == "scale"
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(ReplacementError, match="no weights beside"):
        load_replacement(folder)
    (folder / "sae_weights.dcp").mkdir()
    with pytest.raises(ReplacementError, match="partly pickled"):
        load_replacement(folder)
    torch.save({"sae": {"W_E": replace}}, folder / "sae_weights.pt")
    with pytest.raises(ReplacementError, match="cannot be read as tensors"):
        load_replacement(folder)


@pytest.mark.parametrize("norm", [0.0, float("nan")])
def test_no_average_norm(tmp_path: Path, norm: float) -> None:
    """A dictionary that was saved before its norms were measured has numbers there that mean nothing."""
    values = of.common(LN2, MLP, sae_type="sae")
    folder = of.write(tmp_path, values, of.sae(1))
    held = of.sae(1) | {f"dataset_average_activation_norm.{hook}": torch.tensor(norm) for hook in (LN2, MLP)}
    save_file(held, folder / "sae_weights.safetensors")
    with pytest.raises(ReplacementError, match=r"no norm at all|NaN"):
        load_replacement(folder)


def test_only_its_own(tmp_path: Path) -> None:
    """A Hugging Face model's `config.json` is none of these, nor is a list."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ReplacementError, match="no replacement of a known format"):
        load_replacement(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ReplacementError, match="OpenMOSS"):
        load_replacement(tmp_path)


def test_replacement_names_its_files(tmp_path: Path) -> None:
    """Identity is taken over weights and configurations of all layers."""
    replacement: Replacement = load_replacement(of.write_all(tmp_path, "Qwen/Qwen3-tiny"))
    assert (len(replacement.dictionaries), len(replacement.files)) == (4, 12)
    assert {file.name for file in replacement.files} == {"config.json", "lm_config.json", "sae_weights.safetensors"}
