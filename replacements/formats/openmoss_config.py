"""What OpenMOSS's configurations say: kind, sites, gate, and how activations were normalised.

`config.json` (with "sae_type"; until 2025 `hyperparams.json`) and, from uploads, `lm_config.json` stand beside the
weights. Source: github.com/OpenMOSS/Language-Model-SAEs, `src/lm_saes/models/sparse_dictionary.py`:

- `norm_activation` "dataset-wise": activations are multiplied by sqrt(D) / (their average norm), before the encoder and
  as what is rebuilt; the norms are tensors `dataset_average_activation_norm.<hook>` of the checkpoint (older ones: in
  the configuration, under "in" and "out"). "inference": that is in the weights already. "token-wise" and "batch-wise"
  depend on the prompt, on the output side even on what is to be rebuilt, and are refused.
- `sparsity_include_decoder_norm`: the gate sees each pre-activation times the norm of the feature's decoder row.
- "batchtopk" compares positions and "layertopk" layers: there is no threshold in the file, so these are refused.

Activations come from `HookedTransformer.from_pretrained_no_processing` (`backend/language_model.py`): no processing has
to be undone. There `hook_normalized` of an RMSNorm lies before its gain, that of a LayerNorm behind gain and bias
(TransformerLens 2, `components/rms_norm.py`, `layer_norm.py`), so what it holds is told by the model's name: that in
`lm_config.json`, else the nearest directory that has one.
"""

import json
import re
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuits.kernels.encode import Activation
from circuits.replacements.errors import ReplacementError
from circuits.replacements.formats.hooks import norm_of_hook_normalized
from circuits.replacements.formats.openmoss_rows import Checkpoint
from circuits.replacements.sites import Norm, ReadSite, Site

CONFIGS = ("config.json", "hyperparams.json", "hyperparameters.json")
LM_CONFIG = "lm_config.json"
WEIGHTS = ("sae_weights", "checkpoints/pruned", "checkpoints/final")
KINDS = ("sae", "clt", "lorsa")
HOOKS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "attn.hook_z": "z",
}
NORMALISED = {"ln1.hook_normalized": "resid_pre", "ln2.hook_normalized": "resid_mid"}
LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, eq=False)
class Config:
    """One configuration, read. `kind` is "sae", "clt" or "lorsa"; `hooks_in` and `hooks_out` have one entry a layer."""

    path: Path
    values: dict[str, Any]
    kind: str
    d_model: int
    hooks_in: tuple[str, ...]
    hooks_out: tuple[str, ...]
    model_name: str

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def layer(self) -> int:
        """The layer that is read first."""
        return self.read_site(0).site.layer

    @property
    def includes_decoder_norm(self) -> bool:
        return bool(self.values.get("sparsity_include_decoder_norm", True))

    @property
    def has_output_bias(self) -> bool:
        return bool(self.values.get("use_decoder_bias", True))

    def read_site(self, index: int) -> ReadSite:
        """Where dictionary `index` reads."""
        layer, hook = _parts(self.path, self.hooks_in[index])
        if hook in NORMALISED:
            return ReadSite(Site(NORMALISED[hook], layer), self._norm())
        return ReadSite(Site(_known(self.path, hook), layer), "none")

    def write_site(self, index: int) -> Site:
        """Where dictionary `index` writes."""
        layer, hook = _parts(self.path, self.hooks_out[index])
        return Site(_known(self.path, hook), layer)

    def _norm(self) -> Norm:
        found = norm_of_hook_normalized(self.model_name, *reversed(self.folder.absolute().parts))
        if found is not None:
            return found
        raise ReplacementError(
            f"{self.path}: reads {self.hooks_in[0]}, which a LayerNorm has behind its gain and an RMSNorm before it, "
            f"and neither {LM_CONFIG} nor the path names the model for sure; write the model's Hugging Face name as "
            f'{{"model_name": ...}} into {self.folder / LM_CONFIG}'
        )

    def factors(self, checkpoint: Checkpoint) -> tuple[list[float], list[float]]:
        """What inputs and outputs of every layer were multiplied by in training."""
        how = self.values.get("norm_activation", "dataset-wise")
        if how == "inference":
            return [1.0] * len(self.hooks_in), [1.0] * len(self.hooks_out)
        if how != "dataset-wise":
            raise ReplacementError(
                f"{self.path}: norm_activation is {how!r}: it depends on the prompt and cannot be folded into weights; "
                "only 'dataset-wise' and 'inference' can be used"
            )
        return (
            [self._factor(checkpoint, hook, "in") for hook in self.hooks_in],
            [self._factor(checkpoint, hook, "out") for hook in self.hooks_out],
        )

    def _factor(self, checkpoint: Checkpoint, hook: str, side: str) -> float:
        name, written = f"dataset_average_activation_norm.{hook}", self.values.get("dataset_average_activation_norm")
        if name in checkpoint:
            norm = checkpoint.number(name)
        elif isinstance(written, dict) and (hook in written or side in written):
            norm = float(written[hook if hook in written else side])
        else:
            raise ReplacementError(
                f"{self.path}: norm_activation is 'dataset-wise', but neither tensor {name!r} of {checkpoint.path} nor "
                "the configuration has the average norm; save the dictionary again with fold_activation_scale=True"
            )
        if not 0 < norm < LARGEST:
            raise ReplacementError(
                f"{checkpoint.path}: the average activation norm of {hook} is {norm}, no norm at all"
            )
        return sqrt(self.d_model) / norm

    def gate(self, *, rectify: bool) -> Activation:
        """The activation function; `rectify` says whether a top-k of this kind keeps positive entries only."""
        name, k = str(self.values.get("act_fn", "relu")).lower(), self.values.get("top_k", 50)
        if name == "relu":
            return Activation("relu")
        if name == "jumprelu":
            return Activation("jump_relu")
        if name == "topk":
            return Activation("topk", min(int(k), self.n_features), rectify)
        raise ReplacementError(
            f"{self.path}: act_fn {name!r} chooses features of several positions or layers together and has no "
            "threshold of its own; relu, jumprelu and topk can be used: convert the dictionary to jumprelu"
        )

    @property
    def n_features(self) -> int:
        """F of every layer."""
        if "d_sae" in self.values:
            return int(self.values["d_sae"])
        return int(self.d_model * float(self.values.get("expansion_factor", 0)))


@dataclass(frozen=True, eq=False)
class Gate:
    """How a dictionary's features are let through, and what each is multiplied by on the way in, divided by on the
    way out: a top-k of `pre times norm` is that of features whose decoder rows have length one."""

    activation: Activation
    threshold: Tensor | None
    unit: Tensor


def make_gate(config: Config, activation: Activation, norms: Tensor | None, log_threshold: Tensor | None) -> Gate:
    """The gate from decoder norms (F,), None where they do not count, and the JumpReLU's thresholds (F,) as stored.

    A JumpReLU lets `pre` through where `pre norm > exp(log_threshold)`, and a ReLU wherever it is positive: there
    activations keep the scale that they have in the file.
    """
    ones = torch.ones(config.n_features)
    if activation.kind == "topk":
        return Gate(activation, None, ones if norms is None else norms)
    if log_threshold is None:
        return Gate(activation, None, ones)
    threshold = log_threshold.exp()
    if norms is not None:
        threshold = (threshold / norms.to(threshold)).clamp(max=LARGEST)
    return Gate(activation, threshold, ones)


def inverse(unit: Tensor) -> Tensor:
    """One over each entry; a decoder row of zeros stays as it is."""
    return torch.where(unit == 0, 1.0, unit).reciprocal()


def read_config(folder: Path) -> Config | None:
    """The configuration in a directory, or None where there is none of OpenMOSS."""
    for name in CONFIGS:
        values = _json(folder / name)
        if "hook_point_in" not in values and "hook_points_in" not in values and "sae_type" not in values:
            continue
        kind = str(values.get("sae_type", "clt" if "hook_points_in" in values else "sae"))
        many = isinstance(values.get("hook_points_in"), list)
        hooks = [
            values.get("hook_points_in" if many else "hook_point_in"),
            values.get("hook_points_out" if many else "hook_point_out"),
        ]
        hooks_in, hooks_out = (tuple(map(str, hook)) if many and hook else (str(hook),) for hook in hooks)
        name_of = str(_json(folder / LM_CONFIG).get("model_name") or "")
        return Config(folder / name, values, kind, int(values.get("d_model") or 0), hooks_in, hooks_out, name_of)
    return None


def _json(path: Path) -> dict[str, Any]:
    """An object in a file, empty where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def weights_of(config: Config) -> Path:
    """The checkpoint of a directory, in the order in which `SparseDictionary.from_local` looks for it."""
    places = [config.folder / f"{place}{end}" for place in WEIGHTS for end in (".safetensors", ".pt", ".dcp")]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise ReplacementError(
            f"{config.folder}: no weights beside {config.path.name}, such as {WEIGHTS[0]}.safetensors"
        )
    if found.suffix == ".dcp":
        raise ReplacementError(
            f"{found}: a distributed checkpoint is partly pickled and is not read; load it with lm_saes "
            "(SparseDictionary.from_pretrained) without a device mesh and save_pretrained it as safetensors"
        )
    return found


def _parts(path: Path, hook: str) -> tuple[int, str]:
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    if not found:
        raise ReplacementError(f"{path}: hook point {hook!r} is not in a block; expected blocks.<layer>.<hook>")
    return int(found[1]), found[2]


def _known(path: Path, hook: str) -> str:
    if hook not in HOOKS:
        raise ReplacementError(
            f"{path}: hook point {hook!r} is not known; expected one of {', '.join([*HOOKS, *NORMALISED])}"
        )
    return HOOKS[hook]
