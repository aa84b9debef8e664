"""Read crosslayer-coding's CLTs (Curt Tigges): `cfg.json` beside one safetensors file of any name.

Shapes: L layers, F features, D width. Source layer l, target layer m >= l; older files lack the names' first part:

    encoder_module.encoders.l.weight (F, D)   .bias_param (F,)          theta_manager.log_threshold (L, F)
    decoder_module.decoders.l->m.weight (D, F)   .bias_param (D,)       decoder_module.skip_weights.l->m (D, D)

    pre_l = (x_l - mean_l) / std_l encoders.l^T + bias
    a_l   = relu(pre_l), or for jumprelu pre_l if pre_l >= exp(log_threshold_l), else 0
    y_m   = mean'_m + std'_m (sum_{l <= m} (a_l decoders.l->m^T + bias) + (x_m - mean_m) / std_m skip_weights.m->m^T)

Means and standard deviations (plus 1e-6) are those of "inputs" and, with a stroke, of "targets" in `norm_stats.json`,
which belongs to the training data: it has to lie in the folder or in the one above. Without normalisation they are 0
and 1. `decoder_tying` "per_source" has one decoder a source, `decoders.l`, whose bias every target gets; "per_target"
one a target, `decoders.m`, with its bias once. Both multiply a_l by `decoder_module.feature_scale.m` (F,) if there is
one.

What is read and written stands in the configuration if it does at all, as a module of transformers' model
(`mlp_input_template`) or a hook of TransformerLens 2 (`tl_input_template`):

    transformer.h.{}.ln_2.input, model.layers.{}.post_attention_layernorm.input   the stream before the MLP's norm
    blocks.{}.hook_resid_mid, blocks.{}.hook_mlp_in                               the same
    transformer.h.{}.mlp.input, transformer.h.{}.ln_2.output, blocks.{}.mlp.hook_in   behind the norm
    blocks.{}.ln2.hook_normalized                                                 as the model has it, by model_name

Source: curt-tigges/crosslayer-coding, `clt/config/clt_config.py`, `clt/models/{encoder,decoder,theta,activations,
parallel}.py`, `clt/training/data/manifest_activation_store.py`, `clt/nnsight/extractor.py`,
`scripts/convert_batchtopk_to_jumprelu.py`.

Refused: batchtopk and topk, which rank entries by their mean and deviation over a batch (the script above makes
jumprelu of them); feature offsets other than zero (what a feature writes is then no multiple of its activation); skips
from other layers (with tied decoders every layer below has one); sqrt_d_model; and pickled checkpoints.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuits.kernels.encode import Activation
from circuits.replacements.dictionary import Decoder, Dictionary, Replacement
from circuits.replacements.errors import ReplacementError
from circuits.replacements.formats.hooks import NORMS_BEFORE_MLP, norm_of_ln2
from circuits.replacements.formats.tensors import Tensors
from circuits.replacements.sites import Norm, ReadSite, Site
from circuits.replacements.weights import Rows
from circuits.replacements.weights_views import ColumnScaled, Scaled, Transposed

NAME = "crosslayer-coding"
CONFIG, LATEST, STATISTICS = "cfg.json", "clt_checkpoint_latest.safetensors", "norm_stats.json"
LOOKED_FOR = f"{CONFIG} of num_features, num_layers and d_model"
SIZES = ("num_features", "num_layers", "d_model")
TYING = ("none", "per_source", "per_target")
MEAN_STD = ("mean_std", "auto", "estimated_mean_std")  # the same by its older names
# What of `resid_mid` is read, by the end of the template.
INPUTS: dict[str, Norm] = {
    **dict.fromkeys([*(f"{norm}.input" for norm in NORMS_BEFORE_MLP), "hook_resid_mid", "hook_mlp_in"], "none"),
    **dict.fromkeys([*(f"{norm}.output" for norm in NORMS_BEFORE_MLP), "mlp.input", "mlp.c_fc.input"], "full"),
    "mlp.hook_in": "full",
}
# Whether what is written is the sublayer's own output, before a post-norm.
OUTPUTS = {
    "mlp.output": True,
    "mlp.c_proj.output": True,
    "mlp.hook_out": True,
    "hook_mlp_out": False,
    "post_feedforward_layernorm.output": False,
}
OFFSET = "with an offset what a feature writes is no multiple of its activation, which cannot be expressed"
SKIP = "a skip connection from a layer to others cannot be expressed"


@dataclass(frozen=True, eq=False)
class _Scale:
    """How activations of one layer were normalised on one side: (x - mean) / std, (D,) each.

    shifts
        Whether the mean is not zero.
    """

    mean: Tensor
    std: Tensor
    shifts: bool = True


@dataclass(frozen=True, eq=False)
class _Checkpoint:
    """The configuration, checked, and the tensors."""

    file: Path
    config: dict[str, Any]
    tensors: Tensors

    @property
    def n_features(self) -> int:
        return int(self.config["num_features"])

    @property
    def n_layers(self) -> int:
        return int(self.config["num_layers"])

    @property
    def width(self) -> int:
        return int(self.config["d_model"])

    @property
    def tying(self) -> str:
        return str(self.config.get("decoder_tying", "none"))

    def name(self, module: str, rest: str) -> str:
        """A tensor's name, with its module's in front unless the file is older than the modules."""
        return rest if rest in self.tensors else f"{module}.{rest}"

    def decoder(self, source: int, target: int, what: str) -> str:
        """The name of a decoder's "weight" or "bias_param"."""
        number = {"none": f"{source}->{target}", "per_source": str(source), "per_target": str(target)}[self.tying]
        return self.name("decoder_module", f"decoders.{number}.{what}")

    @cached_property
    def thresholds(self) -> Tensor | None:
        """The largest numbers (L, F) that do not pass: an entry that is equal to exp(log_threshold) does."""
        if self.config.get("activation_fn", "jumprelu") == "relu":
            return None
        name = self.name("theta_manager", "log_threshold")
        threshold = self.tensors.whole(name, (self.n_layers, self.n_features)).exp()
        return torch.nextafter(threshold, threshold.new_tensor(-torch.inf))


def recognises(path: Path) -> bool:
    """Whether a configuration with the format's sizes lies in the folder."""
    try:
        values = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return False
    return isinstance(values, dict) and all(size in values for size in SIZES)


def load(path: Path, device: str = "cpu") -> Replacement:
    """Read the CLT.

    Raises
    ------
    ReplacementError
        A setting or a tensor cannot be expressed, nothing says what is read, the statistics are missing, or a file does
        not hold what it should.
    """
    config, weights = _config(path / CONFIG), _weights(path)
    checkpoint = _Checkpoint(path / CONFIG, config, Tensors(weights, device))
    norm, before_post_norm = _input(path / CONFIG, config), _output(path / CONFIG, config)
    statistics, scales = _scales(path, checkpoint, device)
    _check(checkpoint)
    dictionaries = tuple(
        _layer(checkpoint, layer, scales, norm, before_post_norm) for layer in range(checkpoint.n_layers)
    )
    model = {"name": str(config["model_name"])} if config.get("model_name") else {}
    return Replacement(path.name, path, NAME, dictionaries, model, files=(path / CONFIG, weights, *statistics))


def _config(file: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if not all(isinstance(values[size], int) and values[size] > 0 for size in SIZES):
        raise ReplacementError(f"{file}: {', '.join(SIZES)} should be positive whole numbers")
    activation = values.get("activation_fn", "jumprelu")
    if activation in ("batchtopk", "topk"):
        raise ReplacementError(
            f"{file}: activation_fn {activation!r} ranks entries by their mean and deviation over a batch, which "
            "cannot be expressed; make jumprelu of it with crosslayer-coding's scripts/convert_batchtopk_to_jumprelu.py"
        )
    if activation not in ("jumprelu", "relu"):
        raise ReplacementError(f"{file}: activation_fn {activation!r} is not known; expected jumprelu or relu")
    if (tying := values.get("decoder_tying", "none")) not in TYING:
        raise ReplacementError(f"{file}: decoder_tying {tying!r} is not known; expected one of {', '.join(TYING)}")
    return values


def _weights(path: Path) -> Path:
    """The one safetensors file, or the latest of the checkpoints that training leaves."""
    files = sorted(path.glob("*.safetensors"))
    if path / LATEST in files:
        return path / LATEST
    if len(files) == 1:
        return files[0]
    if files:
        names = ", ".join(file.name for file in files)
        raise ReplacementError(f"{path}: has {names}; leave the one file that belongs to {CONFIG}")
    pickled = ", ".join(sorted(file.name for file in path.glob("*.pt")))
    why = f"; {pickled} is pickled and not read: save its state dict as safetensors" if pickled else ""
    raise ReplacementError(f"{path}: no safetensors file beside {CONFIG}{why}")


def _input(file: Path, config: dict[str, Any]) -> Norm:
    """What of `resid_mid` is read."""
    template = config.get("mlp_input_template") or config.get("tl_input_template")
    if not template:
        raise ReplacementError(
            f"{file}: nothing says what is read; write the template there that activations were generated with, such "
            'as "mlp_input_template": "transformer.h.{}.ln_2.input"'
        )
    end = str(template).rpartition("{}.")[2]
    if end == "ln2.hook_normalized":
        return norm_of_ln2(file, config.get("model_name"))
    if end not in INPUTS:
        known = ", ".join([*INPUTS, "ln2.hook_normalized"])
        raise ReplacementError(f"{file}: input template {template!r} is not known; its end should be one of {known}")
    return INPUTS[end]


def _output(file: Path, config: dict[str, Any]) -> bool:
    """Whether the MLP's own output is written, before a post-norm; so it is where nothing says."""
    template = config.get("mlp_output_template") or config.get("tl_output_template") or "{}.mlp.output"
    end = str(template).rpartition("{}.")[2]
    if end not in OUTPUTS:
        known = ", ".join(OUTPUTS)
        raise ReplacementError(f"{file}: output template {template!r} is not known; its end should be one of {known}")
    return OUTPUTS[end]


def _scales(path: Path, checkpoint: _Checkpoint, device: str) -> tuple[tuple[Path, ...], list[dict[str, _Scale]]]:
    """The file of the statistics, if it counts, and for each layer the scales of "inputs" and "targets"."""
    width, n_layers = checkpoint.width, checkpoint.n_layers
    method = checkpoint.config.get("normalization_method", "none")
    if method not in ("none", *MEAN_STD) or checkpoint.config.get("sqrt_d_model_normalize"):
        raise ReplacementError(
            f"{checkpoint.file}: normalization_method {method!r} cannot be expressed; expected none or mean_std"
        )
    if method == "none":
        same = _Scale(torch.zeros(width, device=device), torch.ones(width, device=device), shifts=False)
        return (), [{"inputs": same, "targets": same}] * n_layers
    file = next((folder / STATISTICS for folder in (path, path.parent) if (folder / STATISTICS).is_file()), None)
    if file is None:
        raise ReplacementError(
            f"{path}: normalization_method is {method!r}, and there is no {STATISTICS} here or in the folder above; "
            "copy it from the activations that the CLT was trained on"
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        found = [
            {side: _scale(values[str(layer)][side], width, device) for side in ("inputs", "targets")}
            for layer in range(n_layers)
        ]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ReplacementError(
            f"{file}: should have a mean and a std of {width} numbers for inputs and for targets of every layer below "
            f"{n_layers}: {error!r}"
        ) from error
    return (file,), found


def _scale(values: dict[str, Any], width: int, device: str) -> _Scale:
    mean, std = (torch.tensor(values[name], dtype=torch.float32) for name in ("mean", "std"))
    if mean.shape != (width,) or std.shape != (width,):
        raise ValueError(f"shapes {tuple(mean.shape)} and {tuple(std.shape)}")
    if not (mean.isfinite().all() and std.isfinite().all() and (std >= 0).all()):
        raise ValueError("numbers that are not finite, or a negative deviation")
    return _Scale(mean.to(device), (std + 1e-6).to(device), shifts=bool(mean.any()))


def _check(checkpoint: _Checkpoint) -> None:
    """Raise unless what cannot be expressed is zero."""
    tensors, n_features, width = checkpoint.tensors, checkpoint.n_features, checkpoint.width
    for target in range(checkpoint.n_layers):
        numbers = [f"{source}->{target}" for source in range(target)] + ([str(target)] if target else [])
        skips = [(checkpoint.name("decoder_module", f"skip_weights.{number}"), (width, width)) for number in numbers]
        modules = ("decoder_module", "encoder_module")
        offsets = [(checkpoint.name(module, f"feature_offset.{target}"), (n_features,)) for module in modules]
        for named, why in ((skips, SKIP), (offsets, OFFSET)):
            for name, shape in named:
                if name in tensors and not tensors.is_zero(name, shape):
                    raise ReplacementError(f"{tensors.path}: tensor {name!r} is not zero: {why}")


def _layer(
    checkpoint: _Checkpoint, layer: int, scales: list[dict[str, _Scale]], norm: Norm, before_post_norm: bool
) -> Dictionary:
    tensors, n_features, width = checkpoint.tensors, checkpoint.n_features, checkpoint.width
    inner, outer = scales[layer]["inputs"], scales[layer]["targets"]
    W_enc = ColumnScaled(_encoder(checkpoint, layer), 1.0 / inner.std)
    b_enc = tensors.whole(checkpoint.name("encoder_module", f"encoders.{layer}.bias_param"), (n_features,))
    b_enc = b_enc - W_enc.all().to(b_enc) @ inner.mean if inner.shifts else b_enc
    decoders = {
        Site("mlp_out", target): Decoder(_rows(checkpoint, layer, target, scales[target]["targets"]))
        for target in range(layer, checkpoint.n_layers)
    }
    sources = range(layer if checkpoint.tying == "per_target" else 0, layer + 1)
    each = [tensors.whole(checkpoint.decoder(source, layer, "bias_param"), (width,)) for source in sources]
    bias, skip = torch.stack(each).sum(0) * outer.std + outer.mean, _skip(checkpoint, layer)
    if skip is not None:
        skip = skip * outer.std.unsqueeze(1) / inner.std
        bias = bias - skip @ inner.mean
    return Dictionary(
        name=f"clt.{layer}",
        kind="clt",
        read=ReadSite(Site("resid_mid", layer), norm),
        writes=tuple(decoders),
        activation=Activation("relu" if checkpoint.thresholds is None else "jump_relu"),
        threshold=None if checkpoint.thresholds is None else checkpoint.thresholds[layer],
        W_enc=W_enc,
        b_enc=b_enc,
        decoders=decoders,
        output_biases={Site("mlp_out", layer): bias},
        skip=skip,
        before_post_norm=before_post_norm,
        source=str(tensors.path),
    )


def _encoder(checkpoint: _Checkpoint, layer: int) -> Rows:
    name = checkpoint.name("encoder_module", f"encoders.{layer}.weight")
    return checkpoint.tensors.lazy(name, (checkpoint.n_features, checkpoint.width))


def _rows(checkpoint: _Checkpoint, source: int, target: int, outer: _Scale) -> Rows:
    """The decoder of a pair, (F, D), in the model's own units."""
    tensors, shape = checkpoint.tensors, (checkpoint.width, checkpoint.n_features)
    rows = ColumnScaled(Transposed(tensors.lazy(checkpoint.decoder(source, target, "weight"), shape)), outer.std)
    for module in ("decoder_module", "encoder_module") if checkpoint.tying != "none" else ():
        if (scale := checkpoint.name(module, f"feature_scale.{target}")) in tensors:
            return Scaled(rows, tensors.whole(scale, shape[1:]))
    return rows


def _skip(checkpoint: _Checkpoint, layer: int) -> Tensor | None:
    """The skip connection of a layer to itself, (D, D); None where there is none, or it is zero."""
    number = f"{layer}->{layer}" if checkpoint.tying == "none" else str(layer)
    name = checkpoint.name("decoder_module", f"skip_weights.{number}")
    found = checkpoint.tensors.optional(name, (checkpoint.width, checkpoint.width))
    return found if found is not None and (found.is_meta or found.any()) else None
