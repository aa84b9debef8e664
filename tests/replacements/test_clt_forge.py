"""CLT-Forge's checkpoints: its formula in float64, whole, in shards and with decoders of low rank, and traces."""

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

L, D, F, R, T = 3, 12, 20, 4, 7
N = L * (L + 1) // 2
OWN = {"W_dec": (L, F, D), "b_dec": (L, D)}
CROSS = {"W_dec": (N, F, D), "b_dec": (N, D)}
LORA = {"W_dec_base": (L, F, D), "lora_A": (N - L, F, R), "lora_B": (N - L, R, D), "b_dec": (N, D)}
SETTINGS = {"device": "cuda:0", "dtype": "float32", "seed": 42, "model_name": "gpt2", "debug": False, "d_in": D}
SETTINGS |= {"d_latent": F, "n_layers": L, "jumprelu_bandwidth": 1.0, "jumprelu_init_threshold": 0.03, "ddp": False}
SETTINGS |= {"normalize_decoder": False, "dead_feature_window": 250, "cross_layer_decoders": True, "context_size": 32}
SETTINGS |= {"activation_fn": "jumprelu", "l0_coefficient": 1e-3, "sparse_decode": "dense", "fsdp": False}
BY_FEATURES = {"W_enc": 2, "b_enc": 1, "log_threshold": 1, "W_dec": 1, "W_dec_base": 1, "lora_A": 1, "feature_count": 1}


def write(folder: Path, n_ranks: int = 0, **config: Any) -> dict[str, Tensor]:
    """A checkpoint as `CLT.save_model` leaves it, buffers included, in shards of unequal size if `n_ranks`; its tensors
    in float64."""
    torch.manual_seed(3)
    crosses = config.get("cross_layer_decoders", True)
    decoders = LORA if config.get("decoder_type") == "lora" else CROSS if crosses else OWN
    shapes = {"W_enc": (L, D, F), "b_enc": (L, F), "log_threshold": (L, F), **decoders}
    tensors = {name: torch.randn(shape) * 0.4 for name, shape in shapes.items()}
    tensors["feature_count"] = torch.zeros(L, F, dtype=torch.long)
    tensors |= {f"estimated_norm_scaling_factor_{side}": torch.rand(L) + 0.5 for side in ("in", "out")}
    if crosses:
        tensors["layer_mask"] = (torch.triu_indices(L, L)[0] == torch.arange(L)[:, None]).float()
    folder.mkdir(parents=True)
    (folder / "clt_cfg.json").write_text(json.dumps(SETTINGS | {"feature_sharding": n_ranks > 0} | config))
    if not n_ranks:
        save_file(tensors, folder / "clt_weights.safetensors")
    for rank, features in enumerate(torch.arange(F).tensor_split(n_ranks) if n_ranks else ()):
        split = [(name, axis) for name, axis in BY_FEATURES.items() if name in tensors]
        mine = {name: tensors[name].index_select(axis, features) for name, axis in split}
        save_file({**tensors, **mine}, folder / f"rank{rank}_clt_weights.safetensors")
    return {name: tensor.double() for name, tensor in tensors.items()}


def formula(w: dict[str, Tensor], xs: list[Tensor], crosses: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """Activations (T, F) and outputs (T, D) of layers: `encode`, `_get_effective_W_dec`, `decode`, scales undone."""
    activations = []
    for layer, x in enumerate(xs):
        pre = x.double() * w["estimated_norm_scaling_factor_in"][layer] @ w["W_enc"][layer] + w["b_enc"][layer]
        activations.append(pre * (pre > w["log_threshold"][layer].exp()))
    pairs = [(l, m) for l in range(L) for m in range(l, L)] if crosses else [(l, l) for l in range(L)]
    outputs = [torch.zeros(T, D, dtype=torch.float64) for _ in range(L)]
    below = 0
    for number, (l, m) in enumerate(pairs):
        if "W_dec" in w:
            rows = w["W_dec"][number]
        elif l == m:
            rows = w["W_dec_base"][l]
        else:
            rows, below = w["W_dec_base"][l] + w["lora_A"][below] @ w["lora_B"][below], below + 1
        outputs[m] = outputs[m] + activations[l] @ rows + w["b_dec"][number]
    return activations, [y / w["estimated_norm_scaling_factor_out"][m] for m, y in enumerate(outputs)]


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("n_ranks", [0, 3])
@pytest.mark.parametrize("config", [{}, {"decoder_type": "lora", "decoder_rank": R}, {"cross_layer_decoders": False}])
def test_formula(config: dict[str, Any], n_ranks: int, memory: int | None, tmp_path: Path) -> None:
    """Activations and outputs of all layers; encoders held, and read by blocks."""
    crosses = config.get("cross_layer_decoders", True)
    w, xs = write(tmp_path / "clt", n_ranks, **config), [torch.randn(T, D) for _ in range(L)]
    replacement = load_replacement(tmp_path / "clt", memory=memory)
    assert (replacement.format, replacement.model) == ("clt-forge", {"name": "gpt2"})
    assert {d.kind for d in replacement.dictionaries} == {"clt" if crosses else "transcoder"}
    for found, expected in zip(outcome(replacement, xs), formula(w, xs, crosses), strict=True):
        for layer in range(L):
            torch.testing.assert_close(found[layer].double(), expected[layer], rtol=1e-5, atol=1e-5)
    active = torch.stack(formula(w, xs, crosses)[0])
    assert 10 < int((active > 0).sum()) < active.numel() / 2


@pytest.mark.parametrize(
    ("model_name", "norm"), [("gpt2", "full"), ("EleutherAI/pythia-70m", "full"), ("meta-llama/Llama-3.2-1B", "scale")]
)
def test_what_is_read(model_name: str, norm: str, tmp_path: Path) -> None:
    """`ln2.hook_normalized` of TransformerLens 2: behind a LayerNorm's gain and bias, before an RMSNorm's gain."""
    write(tmp_path / "clt", model_name=model_name)
    reads = [str(dictionary.read) for dictionary in load_replacement(tmp_path / "clt").dictionaries]
    assert reads == [f"resid_mid.{layer}:{norm}" for layer in range(L)]


@pytest.mark.parametrize("model_name", ["gpt2", "meta-llama/Llama-3.2-1B"])
def test_a_trace(model_name: str, tmp_path: Path) -> None:
    """The ledger of a tiny model of either norm closes, with features in it."""
    tiny_model(tmp_path / "model", "gpt2" if model_name == "gpt2" else "llama", L, D)
    write(tmp_path / "clt", 2, model_name=model_name)
    model = circuits.load(tmp_path / "model", tmp_path / "clt")
    graph = circuits.trace(model, [2, 5, 3, 9], settings=circuits.TraceSettings(unpruned=True))
    assert graph.metadata["ledger"]["max_relative_gap"] < 1e-5
    assert graph.nodes.kind.tolist().count("mlp_feature") > 20


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"activation_fn": "topk"}, r"clt_cfg\.json: activation_fn 'topk' cannot be expressed; expected jumprelu"),
        ({"decoder_type": "tucker"}, r"decoder_type 'tucker' cannot be expressed; expected full or lora"),
        ({"model_name": "mine"}, "model_name 'mine' names no known model; write its Hugging Face name there"),
        ({"d_latent": None}, "should be a JSON object with n_layers, d_in, d_latent"),
        ({"d_latent": F + 1}, rf"has {F} features a layer, and clt_cfg\.json says d_latent {F + 1}"),
    ],
)
def test_what_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    """With the file, what was found and what to do."""
    write(tmp_path / "clt", **config)
    with pytest.raises(ReplacementError, match=message) as raised:
        load_replacement(tmp_path / "clt")
    assert str(tmp_path) in str(raised.value)


def test_damaged_files(tmp_path: Path) -> None:
    """A shard of the middle and the last one missing, no weights, a tensor of another shape, JSON that is none."""
    folder = tmp_path / "clt"
    write(folder, 3)
    (folder / "rank2_clt_weights.safetensors").rename(tmp_path / "last")
    with pytest.raises(ReplacementError, match=r"has 14 features a layer with its shards.*copy the files of all"):
        load_replacement(folder)
    (tmp_path / "last").rename(folder / "rank2_clt_weights.safetensors")
    (folder / "rank1_clt_weights.safetensors").unlink()
    with pytest.raises(ReplacementError, match=r"there are rank0_clt_weights\.safetensors, rank2_clt_weights"):
        load_replacement(folder)
    for file in folder.glob("rank*"):
        file.unlink()
    with pytest.raises(ReplacementError, match=r"no clt_weights\.safetensors, .*; there are none"):
        load_replacement(folder)
    write(tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "clt_weights.safetensors")
    save_file(tensors | {"b_dec": torch.zeros(L, D)}, folder / "clt_weights.safetensors")
    with pytest.raises(ReplacementError, match=r"'b_dec'.*\(6, 12\)"):
        load_replacement(folder)
    (folder / "clt_cfg.json").write_text("{")
    with pytest.raises(ReplacementError, match="no valid JSON"):
        load_replacement(folder)
