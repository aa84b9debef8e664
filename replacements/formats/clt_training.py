"""Read EleutherAI's clt-training, a fork of sparsify: transcoders that may write to several layers, and SAEs.

As in sparsify there is a folder for each hookpoint, such as `layers.5.mlp`, with `cfg.json` and `sae.safetensors`. A
coder l writes to the next `n_targets` hookpoints from its own on (0: to its own alone). F features, D width:

    encoder.weight (F, D)   encoder.bias (F,)   in_norm, out_norm (1,), with `normalize_io`
    W_decs.i (F, D)   b_decs.i (D,)   W_skips.i (D, D), with `skip_connection`   post_enc_scales.i (F,)

    a_l = top_k(relu(x_l n_l encoder.weight_l^T + encoder.bias_l))                     n_l = sqrt(D) / in_norm_l
    y_m = out_norm_m / sqrt(D) sum_{l <= m} (a_l post_enc_scales_l,m-l W_decs_l,m-l + b_decs_l,m-l) / c_lm + skip

`divide_cross_layer`: c_lm = max(1, how many write to m, less one) for l < m, else 1. What decodes by `coalesce_topk`:

    none         W_decs_l,m-l; or W_dec_l for all targets, with `per_source_tied`
    concat       W_dec_m for all sources, b_dec_m once, W_skip_m from x_m
    per-layer    the same with a W_dec_m (sources x F, D) of one block for each source

Names lose their number where there is one target. x is what the module gets, or with the run's `hookpoints_in` (in
`config.json` beside the folders) what the norm before it gets. Source: EleutherAI/clt-training, `sparsify/config.py`,
`sparse_coder.py`, `runner.py`, `trainer.py`, `fused_encoder.py`.

Refused: post-encoder biases other than zero (with one, what a feature writes is no multiple of its activation), skips
to other layers, a top-k over several layers (`topk_coalesced`), `secondary_target_tied`, `matryoshka`, coalescing by
group, and the activations batchtopk and groupmax.
"""

import json
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuits.kernels.encode import Activation
from circuits.replacements.dictionary import Decoder, Dictionary, Replacement
from circuits.replacements.errors import ReplacementError
from circuits.replacements.formats import sparsify
from circuits.replacements.formats.hooks import NORMS_BEFORE_MLP
from circuits.replacements.formats.sparsify import CONFIG, WEIGHTS
from circuits.replacements.formats.tensors import Tensors
from circuits.replacements.sites import ReadSite, Site
from circuits.replacements.weights import Rows
from circuits.replacements.weights_views import Scaled, part

NAME = "clt-training"
MARK = "n_targets"
LOOKED_FOR = f"{CONFIG} of {MARK} with {WEIGHTS}"
RUN = "config.json"
COALESCED = ("none", "concat", "per-layer")


@dataclass(frozen=True, eq=False)
class _Coder:
    """One hookpoint's files, checked."""

    folder: Path
    config: dict[str, Any]
    tensors: Tensors
    kind: str
    read: ReadSite
    site: Site

    @property
    def layer(self) -> int:
        return self.read.site.layer

    @property
    def shape(self) -> tuple[int, int]:
        """(F, D)."""
        return self.tensors.matrix_shape("encoder.weight")

    @property
    def n_targets(self) -> int:
        return int(self.config.get(MARK) or 0)

    @property
    def coalesced(self) -> str:
        return str(self.config.get("coalesce_topk", "none"))

    def named(self, name: str, number: int, *, several: bool = True) -> str:
        """A tensor's name: with its number among the targets where there are several of its kind."""
        if self.n_targets == 0 or not several:
            return name
        return f"{name}s.{number}"

    def norm(self, name: str) -> float:
        """`in_norm` or `out_norm` over sqrt(D); 1 without `normalize_io`."""
        if not self.config.get("normalize_io"):
            return 1.0
        return self.tensors.number(name, (1,)) / sqrt(self.shape[1])


def recognises(path: Path) -> bool:
    """Whether a coder of the fork lies in the folder, or in folders of it: its configuration says `n_targets`."""
    return any(_is_marked(folder / CONFIG) for folder in sparsify.folders(path))


def load(path: Path, device: str = "cpu") -> Replacement:
    """Read the coders of all layers, or a single one that writes to its own layer alone.

    Raises
    ------
    ReplacementError
        A setting or a tensor cannot be expressed, a folder's name is no hookpoint, a layer that is written has no
        coder, or a file does not hold what it should.
    """
    folders = sparsify.folders(path)
    coders = sorted((_coder(folder, device) for folder in folders), key=lambda coder: (coder.layer, coder.site.name))
    _check(path, coders)
    dictionaries = tuple(_dictionary(coders, position) for position in range(len(coders)))
    name = _run(folders[0]).get("model")
    files = tuple(folder / name for folder in folders for name in (CONFIG, WEIGHTS))
    return Replacement(path.name, path, NAME, dictionaries, {"name": str(name)} if name else {}, files=files)


def _is_marked(file: Path) -> bool:
    try:
        return MARK in json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, TypeError):
        return False


def _coder(folder: Path, device: str) -> _Coder:
    file = folder / CONFIG
    config = sparsify.config_of(file)
    transcode = bool(config.get("transcode"))
    refused = ["secondary_target_tied", "matryoshka", *(() if transcode else (MARK,))]
    if config.get("coalesce_topk", "none") not in COALESCED:
        refused.append("coalesce_topk")
    elif config.get("coalesce_topk", "none") != "none":
        refused.append("topk_coalesced")
    for setting in refused:
        if config.get(setting):
            raise ReplacementError(f"{file}: the setting {setting} = {config[setting]!r} cannot be expressed")
    kind, read, site = sparsify.place(folder, transcode)
    if transcode:
        read = _input(folder, read)
    return _Coder(folder, config, Tensors(folder / WEIGHTS, device), kind, read, site)


def _run(folder: Path) -> dict[str, Any]:
    """The configuration of the training run, which stands beside the folders; empty where there is none."""
    try:
        run = json.loads((folder.parent / RUN).read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return {}
    return run if isinstance(run, dict) else {}


def _input(folder: Path, read: ReadSite) -> ReadSite:
    """Where a transcoder reads: as its hookpoint says, or as the run's configuration does."""
    file, run = folder.parent / RUN, _run(folder)
    if not (inputs := run.get("hookpoints_in")):
        return read
    outputs = run.get("hookpoints")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or folder.name not in outputs:
        raise ReplacementError(f"{file}: hookpoints_in and hookpoints should be lists, with {folder.name} among them")
    number = outputs.index(folder.name)
    if number >= len(inputs):
        return read
    stem = folder.name.removesuffix("mlp")
    if inputs[number] not in [stem + norm for norm in NORMS_BEFORE_MLP]:
        raise ReplacementError(
            f"{file}: {folder.name} reads what {inputs[number]!r} gets, which cannot be expressed; expected {stem} and "
            f"one of {', '.join(NORMS_BEFORE_MLP)}"
        )
    return replace(read, norm="none")


def _check(path: Path, coders: list[_Coder]) -> None:
    """Every site has one coder, and whoever writes to following layers finds theirs."""
    for position, coder in enumerate(coders):
        if position and coder.site == coders[position - 1].site:
            other = coders[position - 1].folder
            raise ReplacementError(f"{path}: {other} and {coder.folder} are both for {coder.site}")
        if (there := len(coders) - position) < coder.n_targets:
            raise ReplacementError(
                f"{coder.folder}: writes to {coder.n_targets} hookpoints from its own on, and {there} are in {path}; "
                "give the folder that has all of them"
            )


def _sources(coders: list[_Coder], target: int) -> list[int]:
    """The coders that write to a target's site: those that have not come to their last target below it."""
    return [number for number in range(target + 1) if number + max(1, coders[number].n_targets) > target]


def _dictionary(coders: list[_Coder], position: int) -> Dictionary:
    coder = coders[position]
    tensors, (n_features, width) = coder.tensors, coder.shape
    gain = 1.0 / coder.norm("in_norm")
    b_enc = tensors.whole("encoder.bias", (n_features,))
    decoders: dict[Site, Decoder] = {}
    for target in range(position, position + max(1, coder.n_targets)):
        scale = b_enc.new_full((n_features,), _factor(coders, position, target))
        scale = scale * _after_encoder(coder, target - position)
        decoders[coders[target].site] = Decoder(Scaled(_rows(coders, position, target), scale))
    W_enc = tensors.lazy("encoder.weight", (n_features, width))
    if not coder.config.get("transcode"):
        b_enc = b_enc - W_enc.all().to(b_enc) @ tensors.whole("b_dec", (width,))
    skip = _skip(coder)
    kind = "clt" if coder.n_targets else coder.kind
    return Dictionary(
        name=f"{kind}.{coder.layer}",
        kind=kind,
        read=coder.read,
        writes=tuple(decoders),
        activation=Activation("topk", coder.config["k"]),
        W_enc=Scaled(W_enc, b_enc.new_full((n_features,), gain)),
        b_enc=b_enc,
        decoders=decoders,
        output_biases={coder.site: _bias(coders, position)},
        skip=None if skip is None else skip * (gain * coder.norm("out_norm")),
        before_post_norm=coder.site.name != "resid_post",
        source=str(tensors.path),
    )


def _factor(coders: list[_Coder], source: int, target: int) -> float:
    """What a source's contribution to a target is multiplied by."""
    coder = coders[target]
    divides = coder.coalesced == "none" and coder.config.get("divide_cross_layer") and source != target
    return coder.norm("out_norm") / (max(1, len(_sources(coders, target)) - 1) if divides else 1)


def _rows(coders: list[_Coder], source: int, target: int) -> Rows:
    """The decoder from a source to a target, (F, D)."""
    coder, (n_features, width) = coders[target], coders[source].shape
    if coder.coalesced == "per-layer" and coder.n_targets:
        sources = _sources(coders, target)
        stacked = coder.tensors.lazy("W_dec", ("sources x F", width))
        n_blocks = stacked.shape[0] // n_features
        if n_blocks < len(sources) or stacked.shape[0] % n_features:
            raise ReplacementError(
                f"{coder.tensors.path}: tensor 'W_dec' has {stacked.shape[0]} rows; expected {len(sources)} blocks of "
                f"{n_features}, one for each layer that writes to {coder.site}"
            )
        return part(replace(stacked, shape=(n_blocks, n_features, width)), sources.index(source))
    if coder.coalesced == "concat":
        return coder.tensors.lazy("W_dec", (n_features, width))
    coder = coders[source]
    name = coder.named("W_dec", target - source, several=not coder.config.get("per_source_tied"))
    return coder.tensors.lazy(name, (n_features, width))


def _bias(coders: list[_Coder], target: int) -> Tensor:
    """What all sources add to a target whatever the prompt, (D,)."""
    coder, shape = coders[target], coders[target].shape[1:]
    if coder.coalesced != "none":
        return coder.tensors.whole("b_dec", shape) * coder.norm("out_norm")
    total = torch.zeros(())
    for source in _sources(coders, target):
        bias = coders[source].tensors.whole(coders[source].named("b_dec", target - source), shape)
        total = total.to(bias) + bias * _factor(coders, source, target)
    return total


def _skip(coder: _Coder) -> Tensor | None:
    """The skip connection to the own layer, (D, D); those to others have to be zero."""
    if not coder.config.get("skip_connection"):
        return None
    shape, tensors = (coder.shape[1], coder.shape[1]), coder.tensors
    if coder.coalesced != "none":
        return tensors.whole("W_skip", shape)
    for number in range(1, coder.n_targets):
        name = coder.named("W_skip", number)
        if not tensors.is_zero(name, shape):
            raise ReplacementError(
                f"{tensors.path}: tensor {name!r} is not zero: a skip connection to another layer cannot be expressed"
            )
    return tensors.whole(coder.named("W_skip", 0), shape)


def _after_encoder(coder: _Coder, number: int) -> Tensor | float:
    """What activations are multiplied by before they are decoded for a target, (F,) or 1."""
    tensors, (n_features, _) = coder.tensors, coder.shape
    name = coder.named("post_enc", number)
    if name in tensors and not tensors.is_zero(name, (n_features,)):
        raise ReplacementError(
            f"{tensors.path}: tensor {name!r} is not zero: with a bias behind the encoder what a feature writes is no "
            "multiple of its activation, which cannot be expressed; train with train_post_encoder=False"
        )
    if not coder.config.get("post_encoder_scale"):
        return 1.0
    return tensors.whole(coder.named("post_enc_scale", number), (n_features,))
