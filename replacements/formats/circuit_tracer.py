"""Read circuit-tracer's directories: `config.yaml` beside safetensors.

Shapes: F features, D width of the stream, L layers.

    transcoder_set           layer_{l}.safetensors    W_enc (F, D), W_dec (F, D), b_enc (F,), b_dec (D,),
                                                      optional activation_function.threshold (F,), W_skip (D, D)
    cross_layer_transcoder   W_enc_{l}.safetensors    W_enc_{l} (F, D), b_enc_{l} (F,), b_dec_{l} (D,),
                                                      optional threshold_{l} (F,)
                             W_dec_{l}.safetensors    W_dec_{l} (F, L - l, D), one column for each output layer

The activation is `relu` or `topk` where the configuration says so, else JumpReLU where the file has a threshold, else
ReLU. A top-k keeps its k entries whatever their sign, as circuit-tracer does. Not handled: the checkpoints of other
makers that circuit-tracer converts while loading (Gemma Scope).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from circuits.kernels.encode import Activation
from circuits.replacements.dictionary import Decoder, Dictionary, Replacement
from circuits.replacements.errors import ReplacementError
from circuits.replacements.formats.hub_file import hub_file
from circuits.replacements.formats.tensors import Tensors
from circuits.replacements.sites import Norm, ReadSite, Site

NAME = "circuit-tracer"
CONFIG = "config.yaml"
LOOKED_FOR = CONFIG
READS: dict[str, tuple[str, Norm]] = {
    "mlp.hook_in": ("resid_mid", "full"),
    "ln2.hook_normalized": ("resid_mid", "scale"),
    "hook_resid_mid": ("resid_mid", "none"),
}
# Whether the hook lies before a post-norm: it does in Gemma 2, and elsewhere there is none.
WRITES: dict[str, bool] = {"hook_mlp_out": False, "mlp.hook_out": True}


@dataclass(frozen=True)
class Config:
    """What `config.yaml` says, checked."""

    path: Path
    kind: str
    model_name: str
    read: tuple[str, Norm]
    before_post_norm: bool
    activation: str | None
    k: int | None
    folder: Path
    transcoders: tuple[Path, ...] | None

    def read_site(self, layer: int) -> ReadSite:
        return ReadSite(Site(self.read[0], layer), self.read[1])


def recognises(path: Path) -> bool:
    """Whether the directory has the format's configuration."""
    return (path / CONFIG).is_file()


def load(path: Path, device: str = "cpu") -> Replacement:
    """Read the directory `path`. Raises `ReplacementError` for whatever is missing or does not fit."""
    config = _read_config(path / CONFIG)
    if config.kind == "transcoder_set":
        dictionaries, files = _transcoders(config, device)
    else:
        dictionaries, files = _cross_layer(config, device)
    model = {"name": config.model_name} if config.model_name else {}
    return Replacement(path.name, path, "circuit-tracer", dictionaries, model, files=(config.path, *files))


def _read_config(path: Path) -> Config:
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ReplacementError(f"{path}: no valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ReplacementError(f"{path}: should be a YAML mapping with model_kind, feature_input_hook, ...")
    kind = _one_of(path, values, "model_kind", ("transcoder_set", "cross_layer_transcoder"))
    read = READS[_one_of(path, values, "feature_input_hook", tuple(READS))]
    before_post_norm = WRITES[_one_of(path, values, "feature_output_hook", tuple(WRITES))]
    activation, k = values.get("activation"), values.get("k")
    if activation not in (None, "relu", "topk", "jump_relu"):
        raise ReplacementError(f"{path}: activation is {activation!r}, expected relu, topk, jump_relu or none given")
    if activation == "topk" and not (isinstance(k, int) and k > 0):
        raise ReplacementError(f"{path}: activation topk needs a whole number k, got {k!r}")
    subfolder = str(values.get("subfolder") or "")
    folder = path.parent / subfolder if subfolder else path.parent
    transcoders = _explicit_paths(path, folder, values.get("transcoders"))
    name = str(values.get("model_name") or "")
    return Config(path, kind, name, read, before_post_norm, activation, k, folder, transcoders)


def _one_of(path: Path, values: dict[str, Any], key: str, known: tuple[str, ...]) -> str:
    value = values.get(key)
    if value not in known:
        raise ReplacementError(f"{path}: {key} is {value!r}, expected one of {', '.join(known)}")
    return str(value)


def _explicit_paths(path: Path, folder: Path, listed: Any) -> tuple[Path, ...] | None:
    """The `transcoders:` list: paths of local files, relative ones from the directory of the configuration."""
    if listed is None:
        return None
    if not isinstance(listed, list) or not all(isinstance(entry, str) for entry in listed):
        raise ReplacementError(f"{path}: transcoders should be a list of file names, one for each layer")
    for entry in listed:
        if "://" in entry and not entry.startswith("hf://"):
            raise ReplacementError(f"{path}: transcoder {entry!r} is neither a local file nor hf://owner/repo/file")
    return tuple(hub_file(entry) if entry.startswith("hf://") else folder / entry for entry in listed)


def _transcoders(config: Config, device: str) -> tuple[tuple[Dictionary, ...], tuple[Path, ...]]:
    if config.transcoders is None:
        n_layers = len(list(config.folder.glob("layer_*.safetensors")))
        files = tuple(config.folder / f"layer_{layer}.safetensors" for layer in range(n_layers))
    else:
        files = config.transcoders
    if not files:
        raise ReplacementError(
            f"{config.folder}: no layer_0.safetensors, layer_1.safetensors, ... as {CONFIG} promises"
        )
    return tuple(_transcoder(config, file, layer, device) for layer, file in enumerate(files)), files


def _transcoder(config: Config, file: Path, layer: int, device: str) -> Dictionary:
    tensors = Tensors(file, device)
    n_features, d_model = tensors.matrix_shape("W_enc")
    site = Site("mlp_out", layer)
    has_threshold = "activation_function.threshold" in tensors
    threshold = tensors.threshold("activation_function.threshold", n_features) if has_threshold else None
    if threshold is not None and config.activation in ("relu", "topk"):
        raise ReplacementError(
            f"{file}: has tensor 'activation_function.threshold' although {config.path} says activation "
            f"{config.activation}; remove one of the two"
        )
    activation = Activation("relu" if threshold is None else "jump_relu")
    if config.activation == "topk":
        activation = Activation("topk", config.k, rectify=False)
    return Dictionary(
        name=f"transcoder.{layer}",
        kind="transcoder",
        read=config.read_site(layer),
        writes=(site,),
        activation=activation,
        W_enc=tensors.lazy("W_enc", (n_features, d_model)),
        b_enc=tensors.whole("b_enc", (n_features,)),
        decoders={site: Decoder(tensors.lazy("W_dec", (n_features, d_model)))},
        output_biases={site: tensors.whole("b_dec", (d_model,))},
        threshold=threshold,
        skip=tensors.optional("W_skip", (d_model, d_model)),
        before_post_norm=config.before_post_norm,
        source=str(file),
    )


def _cross_layer(config: Config, device: str) -> tuple[tuple[Dictionary, ...], tuple[Path, ...]]:
    n_layers = len(list(config.folder.glob("W_enc_*.safetensors")))
    if not n_layers:
        raise ReplacementError(
            f"{config.folder}: no W_enc_0.safetensors, W_enc_1.safetensors, ... as {CONFIG} promises"
        )
    files = [config.folder / f"{part}_{layer}.safetensors" for layer in range(n_layers) for part in ("W_enc", "W_dec")]
    has_threshold = "threshold_0" in Tensors(files[0], device)
    dictionaries = [_clt_layer(config, layer, n_layers, has_threshold, device) for layer in range(n_layers)]
    return tuple(dictionaries), tuple(files)


def _clt_layer(config: Config, layer: int, n_layers: int, has_threshold: bool, device: str) -> Dictionary:
    encoder = Tensors(config.folder / f"W_enc_{layer}.safetensors", device)
    decoder = Tensors(config.folder / f"W_dec_{layer}.safetensors", device)
    n_features, d_model = encoder.matrix_shape(f"W_enc_{layer}")
    rows = decoder.lazy(f"W_dec_{layer}", (n_features, n_layers - layer, d_model))
    writes = tuple(Site("mlp_out", target) for target in range(layer, n_layers))
    threshold = None
    if has_threshold:
        threshold = encoder.threshold(f"threshold_{layer}", n_features)
    return Dictionary(
        name=f"clt.{layer}",
        kind="clt",
        read=config.read_site(layer),
        writes=writes,
        activation=Activation("jump_relu" if has_threshold else "relu"),
        W_enc=encoder.lazy(f"W_enc_{layer}", (n_features, d_model)),
        b_enc=encoder.whole(f"b_enc_{layer}", (n_features,)),
        decoders={site: Decoder(rows, column) for column, site in enumerate(writes)},
        output_biases={writes[0]: encoder.whole(f"b_dec_{layer}", (d_model,))},
        threshold=threshold,
        before_post_norm=config.before_post_norm,
        source=str(encoder.path),
    )
