"""Headers alone: on torch's device "meta" every format's reader gives the same dictionaries without reading a weight.

Each format is written, loaded, and then poisoned: every weight in its files becomes NaN, which who reads it refuses.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openmoss_files as of
import pytest
import test_clt_forge
import test_clt_training
import test_crosslayer_coding
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from circuits.headers import load_headers
from circuits.replacements import ReplacementError, load_replacement
from circuits.replacements.dictionary import Dictionary
from circuits.replacements.loading import ADAPTERS, adapter_of
from circuits.replacements.movement import HeadLoading, OwnAttention
from circuits.replacements.weights import open_safetensors

D, F, LAYERS, HEADS = 8, 20, 3, 2
MLP_IN, MLP_OUT = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"


def drawn(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Random tensors by name; a dot in a name is written as two underscores."""
    return {name.replace("__", "."): torch.rand(shape) for name, shape in shapes.items()}


def native(folder: Path) -> Path:
    """Three dictionaries: one that folds its output bias, one that heads move, one of rank 2 with its own attention."""
    entries: list[dict[str, Any]] = []

    def add(name: str, rows: int, writes: list[str], entry: dict[str, Any], **more: tuple[int, ...]) -> None:
        save_file(
            drawn(W_enc=(rows, D), b_enc=(rows,), W_dec=(rows, len(writes), D), **more), folder / f"{name}.safetensors"
        )
        entries.append({"name": name, "kind": name, "writes": writes, "file": f"{name}.safetensors", **entry})
        entries[-1].setdefault("n_features", F)

    folder.mkdir()
    relu, topk, gated = ({"kind": kind, "k": k} for kind, k in (("relu", None), ("topk", 4), ("jump_relu", None)))
    add("folds", F, ["attn_out.0"], {"read": "attn_out.0:none", "activation": gated, "subtracts_output_bias": True},
        **{"b_dec__attn_out.0": (D,), "threshold": (F,)})  # fmt: skip
    moved = {"kind": "head-loading", "context_k": 7}
    add("moves", F, ["attn_out.1", "attn_out.2"],
        {"read": "resid_pre.1:full", "activation": topk, "moved_by": moved}, loading=(F, HEADS + 1))  # fmt: skip
    own = {"kind": "own-attention", "scale": 0.5}
    add("own", 2 * F, ["attn_out.2"], {"read": "resid_pre.2:full", "activation": relu, "moved_by": own, "rank": 2},
        W_q=(3, 4, D), W_k=(3, 4, D), b_q=(3, 4), b_k=(3, 4), group=(F,))  # fmt: skip
    manifest = {"format": "circuits-replacement", "version": 1, "model": {"hash": "other"}, "dictionaries": entries}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def circuit_tracer(folder: Path) -> Path:
    """A CLT in half precision."""
    folder.mkdir()
    for layer in range(LAYERS):
        names = {f"W_enc_{layer}": (F, D), f"b_enc_{layer}": (F,), f"b_dec_{layer}": (D,), f"threshold_{layer}": (F,)}
        save_file({k: v.bfloat16() for k, v in drawn(**names).items()}, folder / f"W_enc_{layer}.safetensors")
        save_file(drawn(**{f"W_dec_{layer}": (F, LAYERS - layer, D)}), folder / f"W_dec_{layer}.safetensors")
    config = {"model_kind": "cross_layer_transcoder", "feature_input_hook": "hook_resid_mid"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"feature_output_hook": "hook_mlp_out"}))
    return folder


def circuit_tracer_set(folder: Path) -> Path:
    """Transcoders with skip connections."""
    folder.mkdir()
    for layer in range(LAYERS):
        tensors = drawn(W_enc=(F, D), W_dec=(F, D), b_enc=(F,), b_dec=(D,), W_skip=(D, D))
        save_file(tensors, folder / f"layer_{layer}.safetensors")
    config = {"model_kind": "transcoder_set", "feature_input_hook": "mlp.hook_in", "activation": "topk", "k": 3}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"feature_output_hook": "mlp.hook_out"}))
    return folder


def openmoss(folder: Path, container: str = "") -> Path:
    """A JumpReLU transcoder whose thresholds are in units of decoder norms, and whose average norms are in the file."""
    values = of.common(MLP_IN, MLP_OUT, sae_type="sae", act_fn="jumprelu")
    return of.write(folder, values, of.sae(1, **values), container=container)


def openmoss_pt(folder: Path) -> Path:
    """The same as a `.pt` file."""
    return openmoss(folder, ".pt")


def openmoss_lorsa(folder: Path) -> Path:
    """A Lorsa with norms of queries and keys."""
    hooks = ("blocks.1.ln1.hook_normalized", "blocks.1.hook_attn_out")
    values = of.common(*hooks, sae_type="lorsa", act_fn="topk", n_qk_heads=4, d_qk_head=6, rotary_dim=6)
    values |= {"use_post_qk_ln": True, "normalization_type": "RMS"}
    return of.write(folder, values, of.lorsa(5, 4, 6, **values))


def saelens(folder: Path) -> Path:
    """A top-k SAE chosen by decoder lengths."""
    folder.mkdir()
    config = {"architecture": "topk", "k": 4, "hook_name": "blocks.1.attn.hook_z", "rescale_acts_by_decoder_norm": True}
    (folder / "cfg.json").write_text(json.dumps(config | {"model_from_pretrained_kwargs": {}}))
    save_file(drawn(W_enc=(D, F), b_enc=(F,), W_dec=(F, D), b_dec=(D,)), folder / "sae_weights.safetensors")
    return folder


def sparsify(folder: Path) -> Path:
    """An SAE of an MLP's output."""
    (folder / "layers.1.mlp").mkdir(parents=True)
    (folder / "layers.1.mlp" / "cfg.json").write_text(json.dumps({"k": 5, "d_in": D}))
    tensors = drawn(encoder__weight=(F, D), encoder__bias=(F,), W_dec=(F, D), b_dec=(D,))
    save_file(tensors, folder / "layers.1.mlp" / "sae.safetensors")
    return folder


def gemma_scope(folder: Path, value: float | None = None) -> Path:
    """Compressed npz files of two layers."""
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,), "threshold": (F,)}
    for layer in range(2):
        target = folder / "gemma-scope-tiny-att" / f"layer_{layer}" / "width_16k" / "average_l0_20"
        target.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(0)
        arrays = {n: random.random(s) if value is None else np.full(s, value) for n, s in shapes.items()}
        np.savez_compressed(target / "params.npz", allow_pickle=False, **arrays)
    return folder / "gemma-scope-tiny-att"


def gemma_scope_2(folder: Path) -> Path:
    """A transcoder with a skip connection that reads its input less the decoder's bias."""
    place = folder / "transcoder_all" / "layer_1_width_16k_l0_small_affine"
    place.mkdir(parents=True)
    tensors = drawn(w_enc=(D, F), w_dec=(F, D), b_enc=(F,), b_dec=(D,), threshold=(F,), affine_skip_connection=(D, D))
    save_file(tensors, place / "params.safetensors")
    (place / "config.json").write_text(json.dumps({"architecture": "jump_relu", "apply_b_dec_to_input": True}))
    return folder / "transcoder_all"


def clt_forge(folder: Path) -> Path:
    """A CLT in two shards with decoders of low rank."""
    test_clt_forge.write(folder, 2, decoder_type="lora", decoder_rank=4)
    return folder


def clt_training(folder: Path) -> Path:
    """Coders that write to later layers, with skip connections, scales, and normalised inputs and outputs."""
    test_clt_training.write(
        folder, ["h.0.mlp", "h.1.mlp", "h.2.mlp"], 3, skip_connection=True, post_encoder_scale=True, normalize_io=True
    )
    return folder


def crosslayer_coding(folder: Path) -> Path:
    """A CLT with skip connections and normalised activations."""
    test_crosslayer_coding.write(folder, skip_connection=True)
    return folder


WRITERS: dict[Callable[[Path], Path], str] = {
    native: "native",
    circuit_tracer: "circuit_tracer",
    circuit_tracer_set: "circuit_tracer",
    openmoss: "openmoss",
    openmoss_pt: "openmoss",
    openmoss_lorsa: "openmoss",
    saelens: "saelens",
    sparsify: "sparsify",
    gemma_scope: "gemma_scope",
    gemma_scope_2: "gemma_scope_2",
    clt_forge: "clt_forge",
    clt_training: "clt_training",
    crosslayer_coding: "crosslayer_coding",
}


def poison(folder: Path) -> int:
    """Make every weight in the files of a folder NaN, but single numbers, which are settings; how many became so."""
    poisoned = 0
    for path in folder.rglob("*.safetensors"):
        with path.open("r+b") as file:
            for tensor in open_safetensors(path).values():
                if math.prod(tensor.shape) > 1 and tensor.dtype in ("F32", "BF16"):
                    file.seek(tensor.offset)
                    file.write(b"\xff" * (tensor.itemsize * math.prod(tensor.shape)))
                    poisoned += 1
    for path in folder.rglob("*.pt"):
        content = torch.load(path, weights_only=True)
        for tensor in filter(lambda tensor: tensor.ndim, content["sae"].values()):
            poisoned += 1
            tensor.fill_(torch.nan)
        torch.save(content, path)
    if folder.name == "gemma-scope-tiny-att":
        poisoned += bool(gemma_scope(folder.parent, math.nan))
    return poisoned


def described(dictionary: Dictionary) -> dict[str, Any]:
    """All of a dictionary but its numbers."""
    moved = dictionary.moved_by
    tensors = (dictionary.b_enc, dictionary.threshold, dictionary.skip, *dictionary.output_biases.values())
    if isinstance(moved, HeadLoading):
        tensors += (moved.weights,)
    elif isinstance(moved, OwnAttention):
        tensors += (moved.W_q, moved.b_q, moved.W_k, moved.b_k, moved.group, moved.q_gain, moved.k_gain)
    return {
        "names": (dictionary.name, dictionary.kind, dictionary.source, type(moved)),
        "sites": (dictionary.read, dictionary.writes, dictionary.before_post_norm),
        "sizes": (dictionary.n_features, dictionary.rank, dictionary.d_read, dictionary.is_held),
        "decoders": [(d.rows.shape, d.column, type(d.rows)) for d in dictionary.decoders.values()],
        "tensors": [None if tensor is None else tensor.shape for tensor in tensors],
        "gate": dictionary.activation,
    }


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_every_format_is_read_without_a_weight(write: Callable[[Path], Path], tmp_path: Path) -> None:
    """The same dictionaries, of files whose weights are NaN: to read one raises, as loading them does."""
    torch.manual_seed(0)
    folder = write(tmp_path / "made")
    assert adapter_of(folder).__name__.rpartition(".")[2] == WRITERS[write]
    whole = load_replacement(folder, memory=0)
    assert poison(folder) > 0
    with pytest.raises(ReplacementError, match=r"NaN|finite"):
        load_replacement(folder)
    headers = load_replacement(folder, "meta", 0)
    assert [described(d) for d in headers.dictionaries] == [described(d) for d in whole.dictionaries]
    assert (headers.name, headers.model, headers.files) == (whole.name, whole.model, whole.files)
    for dictionary in headers.dictionaries:
        assert dictionary.b_enc.is_meta
        decoder = dictionary.decoders[dictionary.writes[-1]]
        for stored in (decoder.rows, dictionary.encoder):
            if write is not clt_forge:  # shards are put together on the CPU, when they are read
                rows = stored.rows(torch.tensor([3, 1]), column=decoder.column if stored is decoder.rows else None)
                assert rows.is_meta
                assert rows.shape == (2, stored.shape[-1])


def test_every_adapter_is_among_them() -> None:
    """A new format gets a line above."""
    assert set(WRITERS.values()) == set(ADAPTERS)


def test_what_depends_on_weights_is_refused(tmp_path: Path) -> None:
    """Whether SAELens's old scaling factor is one everywhere decides what the SAE is."""
    folder = saelens(tmp_path / "old")
    tensors = drawn(W_enc=(D, F), b_enc=(F,), W_dec=(F, D), b_dec=(D,), scaling_factor=(F,))
    save_file(tensors, folder / "sae_weights.safetensors")
    model = Path(__file__).parents[1] / "data" / "golden" / "gpt2_clt" / "model"
    with pytest.raises(ReplacementError, match=r"old: what this replacement is depends on its weights .*trace without"):
        load_headers(model, folder)
