"""Read Gemma Scope 2 (Google DeepMind 2025): `params.safetensors` beside `config.json`, in folders such as
`transcoder_all/layer_5_width_16k_l0_small_affine`, and CLTs of one file a layer, `params_layer_5.safetensors`.

Shapes: F features, D width of what is read, D' of what is written, L layers.

    w_enc (D, F)   b_enc (F,)   threshold (F,)   w_dec (F, D'), of a CLT (F, L, D')   b_dec (D',)
    affine_skip_connection (D, D'), not always there

    pre = x w_enc + b_enc    a = pre if pre > threshold, else 0    y = a w_dec + b_dec (+ x affine_skip_connection)

What is read and written stands in `config.json` as a module of Gemma 3, or else in the name of the folder above:

    resid_post    model.layers.N.output                               the stream after the block
    attn_out      model.layers.N.self_attn.o_proj.input               the concatenated head outputs
    mlp_out       model.layers.N.post_feedforward_layernorm.output    the MLP's output behind the post-norm
    transcoder    model.layers.N.pre_feedforward_layernorm.output to post_feedforward_layernorm.output

Sources: SAELens, `get_gemma_3_config_from_hf` with its tests' configurations; circuit-tracer 0.5.0,
`load_gemma_scope_2_transcoder` and `load_gemma_scope_2_clt` (a CLT's skip connection goes to its own layer).
Crosscoders are refused: they read several layers at once.
"""

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from circuits.kernels.encode import Activation
from circuits.replacements.dictionary import Decoder, Dictionary, Replacement
from circuits.replacements.errors import ReplacementError
from circuits.replacements.formats.tensors import Tensors
from circuits.replacements.sites import Norm, ReadSite, Site
from circuits.replacements.weights_views import Transposed

NAME = "gemma-scope-2"
FILE, CONFIG = "params.safetensors", "config.json"
LAYER_FILE = "params_layer_*.safetensors"
LOOKED_FOR = f"layer_*/{FILE} or {LAYER_FILE}"
MODULES: dict[str, tuple[str, Norm]] = {
    "output": ("resid_post", "none"),
    "self_attn.o_proj.input": ("z", "none"),
    "post_attention_layernorm.output": ("attn_out", "none"),
    "post_feedforward_layernorm.output": ("mlp_out", "none"),
    "pre_feedforward_layernorm.output": ("resid_mid", "full"),
}
FOLDERS = {  # the modules that dictionaries in such a folder read and write
    "resid_post": ("output", "output"),
    "attn_out": ("self_attn.o_proj.input", "self_attn.o_proj.input"),
    "mlp_out": ("post_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
    "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
}
KINDS = {"resid_post": "residual-sae", "z": "attention-sae", "attn_out": "attention-sae", "mlp_out": "mlp-sae"}


def recognises(path: Path) -> bool:
    """Whether files of these names lie in the folder, or in one of a layer below it."""
    return bool(_files(path) or _layer_files(path))


def load(path: Path, device: str = "cpu") -> Replacement:
    """Read one dictionary, one for each layer, or a CLT.

    Raises
    ------
    ReplacementError
        A layer has several dictionaries, nothing says what they read, a crosscoder or another architecture was given,
        or a file does not hold what it should.
    """
    if layers := _layer_files(path):
        dictionaries = _cross_layer(path, layers, device)
        return Replacement(path.name, path, NAME, dictionaries, files=tuple(layers))
    files = _files(path)
    by_layer: dict[int, list[Dictionary]] = {}
    for file in files:
        dictionary = _dictionary(file, device)
        by_layer.setdefault(dictionary.layer, []).append(dictionary)
    for layer, several in sorted(by_layer.items()):
        if len(several) > 1:
            names = ", ".join(Path(dictionary.source).parent.name for dictionary in several)
            raise ReplacementError(
                f"{path}: layer {layer} has {len(several)} dictionaries: {names}; give the folder of one of them, or a "
                "folder with one for each layer"
            )
    dictionaries = tuple(by_layer[layer][0] for layer in sorted(by_layer))
    models = {str(name) for file in files if (name := _config(file).get("model_name"))}
    model = {"name": models.pop()} if len(models) == 1 else {}
    return Replacement(path.name, path, NAME, dictionaries, model, files=tuple(files))


def _files(path: Path) -> list[Path]:
    return [path / FILE] if (path / FILE).is_file() else sorted(path.glob(f"layer_*/{FILE}"))


def _layer_files(path: Path) -> list[Path]:
    return sorted(path.glob(LAYER_FILE), key=_number)


def _number(file: Path) -> int:
    digits = re.findall(r"\d+", file.stem)
    return int(digits[-1]) if digits else -1


def _config(file: Path) -> dict[str, Any]:
    """The configuration beside a file, checked; empty where there is none."""
    path = file.parent / CONFIG
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ReplacementError(f"{path}: no valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ReplacementError(f"{path}: should be a JSON object with hf_hook_point_in, architecture, ...")
    if (architecture := values.get("architecture", "jump_relu")) != "jump_relu":
        raise ReplacementError(f"{path}: architecture is {architecture!r}, expected jump_relu")
    return values


def _places(file: Path, config: dict[str, Any]) -> tuple[tuple[int, str], tuple[int, str]]:
    """Layer and module that a dictionary reads, and that it writes."""
    read = config.get("hf_hook_point_in")
    if "crosscoder" in str(config.get("type")) or any("crosscoder" in part for part in file.parts[-3:-1]):
        raise ReplacementError(f"{file}: a crosscoder reads several layers at once; it cannot be expressed")
    if read is not None:
        written = config.get("hf_hook_point_out") or read
        return _module(file, read), _module(file, written)
    layer = re.match(r"layer_(\d+)", file.parent.name)
    for part in file.resolve().parent.parts[::-1]:
        if layer and (modules := FOLDERS.get(part.removesuffix("_all"))):
            return (int(layer[1]), modules[0]), (int(layer[1]), modules[1])
    raise ReplacementError(
        f"{file}: nothing says what it reads; copy {CONFIG} beside it, or keep the names of its folders, such as "
        f"transcoder_all/layer_5_width_16k_l0_small, with one of {', '.join(FOLDERS)}"
    )


def _module(file: Path, point: Any) -> tuple[int, str]:
    found = re.fullmatch(r"(?:.*\.)?layers\.(\d+)\.(.+)", str(point))
    if not found or found[2] not in MODULES:
        raise ReplacementError(
            f"{file.parent / CONFIG}: hook point {point!r} is not known; expected model.layers.N. and one of "
            f"{', '.join(MODULES)}"
        )
    return int(found[1]), found[2]


def _dictionary(file: Path, device: str) -> Dictionary:
    config, tensors = _config(file), Tensors(file, device)
    (layer, read_module), (out_layer, write_module) = _places(file, config)
    (read, norm), (write, _) = MODULES[read_module], MODULES[write_module]
    width, n_features = tensors.matrix_shape("w_enc")
    rows = tensors.lazy("w_dec", (n_features, "D'"))
    out = rows.shape[1]
    site, kind = Site(write, out_layer), KINDS.get(read, "transcoder")
    b_enc, b_dec = tensors.whole("b_enc", (n_features,)), tensors.whole("b_dec", (out,))
    if config.get("apply_b_dec_to_input"):
        b_enc = b_enc - tensors.whole("b_dec", (width,)) @ tensors.whole("w_enc", (width, n_features))
    return Dictionary(
        name=f"{kind}.{layer}",
        kind=kind,
        read=ReadSite(Site(read, layer), norm),
        writes=(site,),
        activation=Activation("jump_relu"),
        # An entry passes where it is above its threshold and positive: a negative threshold is zero.
        threshold=tensors.threshold("threshold", n_features).clamp(min=0.0),
        W_enc=Transposed(tensors.lazy("w_enc", (width, n_features))),
        b_enc=b_enc,
        decoders={site: Decoder(rows)},
        output_biases={site: b_dec},
        skip=_skip(tensors, width, out),
        source=str(file),
    )


def _skip(tensors: Tensors, width: int, out: int) -> Tensor | None:
    """The skip connection as (D', D), if there is one."""
    found = tensors.optional("affine_skip_connection", (width, out))
    return None if found is None else found.T.contiguous()


def _cross_layer(path: Path, files: list[Path], device: str) -> tuple[Dictionary, ...]:
    n_layers = len(files)
    if (numbers := [_number(file) for file in files]) != list(range(n_layers)):
        raise ReplacementError(f"{path}: has the files of layers {numbers}; a CLT needs those of all layers from 0 on")
    if "crosscoder" in path.name or "crosscoder" in path.parent.name:
        raise ReplacementError(f"{path}: a crosscoder reads several layers at once; it cannot be expressed")
    return tuple(_clt_layer(file, layer, n_layers, device) for layer, file in enumerate(files))


def _clt_layer(file: Path, layer: int, n_layers: int, device: str) -> Dictionary:
    tensors = Tensors(file, device)
    width, n_features = tensors.matrix_shape("w_enc")
    rows = tensors.lazy("w_dec", (n_features, n_layers, width))
    writes = tuple(Site("mlp_out", target) for target in range(layer, n_layers))
    return Dictionary(
        name=f"clt.{layer}",
        kind="clt",
        read=ReadSite(Site("resid_mid", layer), "full"),
        writes=writes,
        activation=Activation("jump_relu"),
        threshold=tensors.threshold("threshold", n_features).clamp(min=0.0),
        W_enc=Transposed(tensors.lazy("w_enc", (width, n_features))),
        b_enc=tensors.whole("b_enc", (n_features,)),
        decoders={site: Decoder(rows, site.layer) for site in writes},
        output_biases={writes[0]: tensors.whole("b_dec", (width,))},
        skip=_skip(tensors, width, width),
        source=str(file),
    )
