"""Read CLT-Forge's cross-layer transcoders: `clt_cfg.json` beside `clt_weights.safetensors`.

Shapes: L layers, F features, D width, r a rank, N = L (L + 1) / 2 pairs (source l, target m >= l) in the order of l,
then m.

    W_enc (L, D, F)   b_enc (L, F)   log_threshold (L, F)   W_dec (N, F, D)   b_dec (N, D)
    estimated_norm_scaling_factor_in, _out (L,)

    pre_l = in_l x_l W_enc,l + b_enc,l     a_l = pre_l if pre_l > exp(log_threshold_l), else 0
    y_m   = sum_{l <= m} (a_l W_dec,lm + b_dec,lm) / out_m

`decoder_type` "lora" has W_dec_base (L, F, D), lora_A (N - L, F, r) and lora_B (N - L, r, D) in its place: W_dec,ll is
W_dec_base,l, and W_dec,lm is W_dec_base,l + lora_A,lm lora_B,lm. Without `cross_layer_decoders` W_dec is (L, F, D),
b_dec (L, D), and each layer writes to itself. A training with `feature_sharding` leaves the features in shards,
`rank0_clt_weights.safetensors` and so on, with what is not counted by features in each.

x is `ln2.hook_normalized` and y `hook_mlp_out` of a TransformerLens 2 model that was not processed (sae-lens before
6.11.2, `load_model`; other `model_from_pretrained_kwargs` are in no file): the model's name tells which norm it has.
Sources: LLM-Interp/CLT-Forge, `src/clt_forge/clt.py`, `config/clt_config.py`, `attribution/loading.py`,
`training/activations_store.py`, `training/optim.py`; for lora, `src/circuitlab/clt.py`. Refused: other activations.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuits.kernels.encode import Activation
from circuits.replacements.dictionary import Decoder, Dictionary, Replacement
from circuits.replacements.errors import ReplacementError
from circuits.replacements.formats.hooks import norm_of_ln2
from circuits.replacements.formats.tensors import Tensors
from circuits.replacements.sites import Norm, ReadSite, Site
from circuits.replacements.weights import Rows
from circuits.replacements.weights_views import Joined, LowRank, Scaled, Transposed, part

NAME = "clt-forge"
CONFIG, WEIGHTS = "clt_cfg.json", "clt_weights.safetensors"
LOOKED_FOR = f"{CONFIG} with {WEIGHTS}"
SHARD = re.compile(rf"rank(\d+)_{re.escape(WEIGHTS)}")


@dataclass(frozen=True, eq=False)
class _Checkpoint:
    """The shards of a checkpoint, one where it is whole, and how many features of each layer are in each."""

    config: dict[str, Any]
    shards: tuple[Tensors, ...]
    features: tuple[int, ...]
    n_layers: int
    width: int

    @property
    def crosses(self) -> bool:
        return bool(self.config.get("cross_layer_decoders", True))

    def targets(self, layer: int) -> range:
        """The layers that a layer writes to."""
        return range(layer, self.n_layers if self.crosses else layer + 1)

    def pair(self, source: int, target: int) -> int:
        """The place of a pair in the order of the file."""
        return source * self.n_layers - source * (source - 1) // 2 + target - source if self.crosses else source

    @cached_property
    def b_enc(self) -> Tensor:
        """(L, F)."""
        return self._by_feature("b_enc")

    @cached_property
    def threshold(self) -> Tensor:
        """(L, F)."""
        return self._by_feature("log_threshold").exp()

    @cached_property
    def b_dec(self) -> Tensor:
        """(N, D)."""
        return self.shards[0].whole("b_dec", (self.pair(self.n_layers - 1, self.n_layers - 1) + 1, self.width))

    def bias(self, target: int) -> Tensor:
        """What all sources add to a target whatever the prompt, (D,)."""
        sources = range(target + 1) if self.crosses else (target,)
        return self.b_dec[[self.pair(source, target) for source in sources]].sum(0)

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor]:
        """What inputs and outputs were multiplied by, (L,) each."""
        inner, outer = (
            self.shards[0].whole(f"estimated_norm_scaling_factor_{side}", (self.n_layers,)) for side in ("in", "out")
        )
        return inner, outer

    def _by_feature(self, name: str) -> Tensor:
        pairs = zip(self.shards, self.features, strict=True)
        return torch.cat([shard.whole(name, (self.n_layers, n)) for shard, n in pairs], dim=1)

    def encoder(self, layer: int) -> Rows:
        """(F, D)."""
        shapes = [(self.n_layers, self.width, n) for n in self.features]
        pairs = zip(self.shards, shapes, strict=True)
        return _joined([Transposed(part(shard.lazy("W_enc", shape), layer)) for shard, shape in pairs])

    def decoder(self, source: int, target: int) -> Rows:
        """(F, D)."""
        pairs = zip(self.shards, self.features, strict=True)
        return _joined([self._rows(shard, n, source, target) for shard, n in pairs])

    def _rows(self, shard: Tensors, n: int, source: int, target: int) -> Rows:
        number, n_layers = self.pair(source, target), self.n_layers
        if not self.crosses or self.config.get("decoder_type", "full") == "full":
            n_pairs = n_layers * (n_layers + 1) // 2 if self.crosses else n_layers
            return part(shard.lazy("W_dec", (n_pairs, n, self.width)), number)
        base = part(shard.lazy("W_dec_base", (n_layers, n, self.width)), source)
        if source == target:
            return base
        number, n_pairs = number - source - 1, n_layers * (n_layers - 1) // 2  # no layer with itself
        left = shard.lazy("lora_A", (n_pairs, n, "r"))
        right = part(shard.lazy("lora_B", (n_pairs, left.shape[2], self.width)), number).all()
        return LowRank(part(left, number), right, base)


def recognises(path: Path) -> bool:
    """Whether the configuration lies in the folder."""
    return (path / CONFIG).is_file()


def load(path: Path, device: str = "cpu") -> Replacement:
    """Read the CLT, or the transcoders.

    Raises
    ------
    ReplacementError
        A setting cannot be expressed, the model's norm is not told, a file is missing or does not hold what it should.
    """
    config = _config(path / CONFIG)
    files = _files(path, config)
    checkpoint = _checkpoint(config, files, device)
    norm = norm_of_ln2(path / CONFIG, config.get("model_name"))
    dictionaries = tuple(_layer(checkpoint, layer, norm) for layer in range(checkpoint.n_layers))
    model = {"name": str(config["model_name"])}
    return Replacement(path.name, path, NAME, dictionaries, model, files=(path / CONFIG, *files))


def _config(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ReplacementError(f"{file}: no valid JSON: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("d_latent"), int):
        raise ReplacementError(f"{file}: should be a JSON object with n_layers, d_in, d_latent, ...")
    known = {"activation_fn": ("jumprelu",), "decoder_type": ("full", "lora")}
    for setting, expected in known.items():
        if (value := values.get(setting, expected[0])) not in expected:
            raise ReplacementError(f"{file}: {setting} {value!r} cannot be expressed; expected {' or '.join(expected)}")
    return values


def _files(path: Path, config: dict[str, Any]) -> tuple[Path, ...]:
    """The weights, in one file or in one for each rank of a training with `feature_sharding`."""
    found = {int(match[1]): file for file in path.iterdir() if (match := SHARD.fullmatch(file.name))}
    if (path / WEIGHTS).is_file() and not (found and config.get("feature_sharding")):
        return (path / WEIGHTS,)
    if not found or sorted(found) != list(range(len(found))):
        names = ", ".join(file.name for _, file in sorted(found.items())) or "none"
        raise ReplacementError(f"{path}: no {WEIGHTS}, and not the shards of all ranks from 0 on; there are {names}")
    return tuple(found[rank] for rank in range(len(found)))


def _checkpoint(config: dict[str, Any], files: tuple[Path, ...], device: str) -> _Checkpoint:
    shards = tuple(Tensors(file, device) for file in files)
    n_layers, width, _ = shards[0].lazy("W_enc", ("L", "D", "F")).shape
    features = tuple(shard.lazy("W_enc", (n_layers, width, "F")).shape[2] for shard in shards)
    if sum(features) != config["d_latent"]:
        raise ReplacementError(
            f"{files[0]}: has {sum(features)} features a layer{' with its shards' if len(files) > 1 else ''}, and "
            f"{CONFIG} says d_latent {config['d_latent']}; copy the files of all ranks"
        )
    return _Checkpoint(config, shards, features, n_layers, width)


def _joined(pieces: list[Rows]) -> Rows:
    return pieces[0] if len(pieces) == 1 else Joined(tuple(pieces))


def _layer(checkpoint: _Checkpoint, layer: int, norm: Norm) -> Dictionary:
    n_features, (inner, outer) = sum(checkpoint.features), checkpoint.factors
    decoders = {
        Site("mlp_out", target): Decoder(
            Scaled(checkpoint.decoder(layer, target), (1.0 / outer[target]).expand(n_features))
        )
        for target in checkpoint.targets(layer)
    }
    kind = "clt" if checkpoint.crosses else "transcoder"
    return Dictionary(
        name=f"{kind}.{layer}",
        kind=kind,
        read=ReadSite(Site("resid_mid", layer), norm),
        writes=tuple(decoders),
        activation=Activation("jump_relu"),
        threshold=checkpoint.threshold[layer],
        W_enc=Scaled(checkpoint.encoder(layer), inner[layer].expand(n_features)),
        b_enc=checkpoint.b_enc[layer],
        decoders=decoders,
        output_biases={Site("mlp_out", layer): checkpoint.bias(layer) / outer[layer]},
        source=str(checkpoint.shards[0].path),
    )
