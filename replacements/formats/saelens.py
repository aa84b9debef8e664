"""Read SAELens's directories: `cfg.json` beside `sae_weights.safetensors`, of versions 3 to 6.

Shapes: F features, D width of what is read, D' of what is written.

    W_enc (D, F)  b_enc (F,)  W_dec (F, D')  b_dec (D',)  threshold (F,) of jumprelu  W_skip (D', D) of skip transcoders

    pre = (x - b_dec if apply_b_dec_to_input) W_enc + b_enc          a = activation(pre)
    y = (a * finetuning_scaling_factor) W_dec + b_dec (+ x W_skip^T)

    standard   relu          jumprelu   pre if pre > threshold and positive
    topk       the k largest that are positive; with `rescale_acts_by_decoder_norm` chosen by pre times the decoder
               row's length, which is then taken off again

Sources: SAELens, `sae_lens/saes/{sae,standard_sae,jumprelu_sae,topk_sae,transcoder}.py`. A dictionary sees what
TransformerLens makes of the model under `model_from_pretrained_kwargs`; that is written down as `processing`, and
undone in `circuits.processing`. Refused, because what they do depends on the input or is no such dictionary: gated
SAEs, `normalize_activations` other than none, hooks of single heads, and architectures not named above.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuits.kernels.encode import Activation
from circuits.replacements.dictionary import Decoder, Dictionary, Replacement
from circuits.replacements.errors import ReplacementError
from circuits.replacements.formats.tensors import Tensors
from circuits.replacements.processing import Processing
from circuits.replacements.sites import Norm, ReadSite, Site
from circuits.replacements.weights import Rows
from circuits.replacements.weights_views import Scaled

NAME = "saelens"
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
LOOKED_FOR = f"{CONFIG} with {WEIGHTS}"
HOOKS: dict[str, tuple[str, Norm]] = {
    "hook_resid_pre": ("resid_pre", "none"),
    "hook_resid_mid": ("resid_mid", "none"),
    "hook_resid_post": ("resid_post", "none"),
    "hook_attn_out": ("attn_out", "none"),
    "hook_mlp_out": ("mlp_out", "none"),
    "attn.hook_z": ("z", "none"),
    "ln2.hook_normalized": ("resid_mid", "scale"),
    "mlp.hook_in": ("resid_mid", "full"),
}
# What TransformerLens can do to a model when it loads it, by the name of the option.
STEPS = {
    "fold_ln": "fold_norm",
    "center_writing_weights": "center_writing_weights",
    "fold_value_biases": "fold_value_biases",
    "center_unembed": "center_unembed",
}
ARCHITECTURES = ("standard", "jumprelu", "topk", "transcoder", "skip_transcoder", "jumprelu_transcoder",
                 "jumprelu_skip_transcoder")  # fmt: skip


def recognises(path: Path) -> bool:
    """Whether the two files lie in the folder, or in folders of it."""
    return bool(_folders(path))


def load(path: Path, device: str = "cpu") -> Replacement:
    """Read one SAE or transcoder, or a folder with one for each place.

    Raises
    ------
    ReplacementError
        Two are for the same place, they were trained on models processed differently, a setting cannot be expressed, or
        a file does not hold what it should.
    """
    found = [(folder, _config(folder / CONFIG)) for folder in _folders(path)]
    dictionaries: dict[Site, Dictionary] = {}
    for folder, config in found:
        dictionary = _dictionary(folder, config, device)
        if (other := dictionaries.setdefault(dictionary.writes[0], dictionary)) is not dictionary:
            raise ReplacementError(
                f"{path}: {other.source} and {dictionary.source} are both for {dictionary.writes[0]}; give a folder "
                "with one for each place"
            )
    processing = {_processing(config) for _, config in found}
    if len(processing) > 1:
        raise ReplacementError(f"{path}: trained on models that were processed differently; give them one by one")
    names = {str(_of(config, "model_name")) for _, config in found if _of(config, "model_name")}
    files = tuple(folder / name for folder, _ in found for name in (CONFIG, WEIGHTS))
    return Replacement(
        path.name,
        path,
        NAME,
        tuple(dictionaries[site] for site in sorted(dictionaries, key=lambda site: (site.layer, site.name))),
        {"name": names.pop()} if len(names) == 1 else {},
        files=files,
        processing=processing.pop(),
    )


def _folders(path: Path) -> list[Path]:
    def has_both(folder: Path) -> bool:
        return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()

    if has_both(path):
        return [path]
    return sorted(folder for depth in ("*", "*/*") for folder in path.glob(depth) if has_both(folder))


def _config(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ReplacementError(f"{file}: no valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ReplacementError(f"{file}: should be a JSON object with architecture, d_in, d_sae, ...")
    return {**values, "file": file}


def _of(config: dict[str, Any], key: str, default: Any = None) -> Any:
    """A setting of the SAE, or of the metadata beside it (version 6)."""
    metadata = config.get("metadata")
    return config.get(key, metadata.get(key, default) if isinstance(metadata, dict) else default)


def _processing(config: dict[str, Any]) -> Processing | None:
    """What TransformerLens did to the model: the steps that the configuration switches on.

    SAELens loads models with `from_pretrained_no_processing(..., **model_from_pretrained_kwargs)`. A configuration
    without that key is older than it (September 2024, SAELens #279), when every step was taken.
    """
    if _of(config, "model_class_name", "HookedTransformer") != "HookedTransformer":
        return None
    options = _of(config, "model_from_pretrained_kwargs", dict.fromkeys(STEPS, True)) or {}
    found = Processing(**{ours: bool(options.get(theirs, False)) for theirs, ours in STEPS.items()})
    return None if found == Processing() else found


def _place(config: dict[str, Any], hook: Any) -> tuple[int, tuple[str, Norm]]:
    """Layer and site of a hook such as `blocks.3.attn.hook_z`."""
    parts = str(hook).split(".", 2)
    if len(parts) != 3 or parts[0] != "blocks" or not parts[1].isdigit() or parts[2] not in HOOKS:
        raise ReplacementError(
            f"{config['file']}: hook {hook!r} is not known; expected blocks.LAYER. and one of {', '.join(HOOKS)}"
        )
    return int(parts[1]), HOOKS[parts[2]]


def _check(config: dict[str, Any]) -> None:
    def refuse(what: str) -> None:
        raise ReplacementError(f"{config['file']}: {what}")

    architecture = config.get("architecture", "standard")
    if architecture not in ARCHITECTURES:
        refuse(f"architecture {architecture!r} cannot be expressed; expected one of {', '.join(ARCHITECTURES)}")
    normalization = config.get("normalize_activations") or "none"
    if normalization != "none":
        refuse(
            f"normalize_activations is {normalization!r}, whose factor is not in the files or depends on the input; "
            "fold it with SAELens (fold_activation_norm_scaling_factor) and save again"
        )
    if _of(config, "hook_head_index") is not None:
        refuse(f"reads head {_of(config, 'hook_head_index')} alone; only all heads together are supported")
    function = config.get("activation_fn_str") or config.get("activation_fn") or "relu"
    if "topk" not in architecture and function not in ("relu", "topk"):
        refuse(f"activation function {function!r} is not known; expected relu or topk")


def _dictionary(folder: Path, config: dict[str, Any], device: str) -> Dictionary:
    _check(config)
    layer, (read, norm) = _place(config, _of(config, "hook_name") or _of(config, "hook_point"))
    tensors = Tensors(folder / WEIGHTS, device)
    architecture = str(config.get("architecture", "standard"))
    is_transcoder = "transcoder" in architecture
    out = _of(config, "hook_name_out") if is_transcoder else None
    if is_transcoder and out is None:
        raise ReplacementError(f"{config['file']}: a transcoder needs hook_name_out, the hook that it writes")
    out_layer, (write, _) = (layer, (read, norm)) if out is None else _place(config, out)
    width, n_features = tensors.matrix_shape("W_enc")
    site = Site(write, out_layer)
    decoder = tensors.lazy("W_dec", (n_features, "D'"))
    W_enc, b_enc = tensors.whole("W_enc", (width, n_features)).T.contiguous(), tensors.whole("b_enc", (n_features,))
    b_dec = tensors.whole("b_dec", (decoder.shape[1],))
    if config.get("apply_b_dec_to_input", not is_transcoder):
        b_enc = b_enc - W_enc @ tensors.whole("b_dec", (width,))
    rows: Rows = decoder
    if (factor := _finetuning(config, tensors, n_features)) is not None:
        rows = Scaled(rows, factor)
    activation, threshold = _activation(config, tensors, n_features)
    if activation.kind == "topk" and config.get("rescale_acts_by_decoder_norm"):
        length = _lengths(decoder).to(device)
        W_enc, b_enc, rows = W_enc * length.unsqueeze(1), b_enc * length, Scaled(rows, 1.0 / length)
    kind = (
        "transcoder" if is_transcoder else {"z": "attention-sae", "attn_out": "attention-sae"}.get(read, f"{read}-sae")
    )
    return Dictionary(
        name=f"{kind}.{layer}",
        kind=kind,
        read=ReadSite(Site(read, layer), norm),
        writes=(site,),
        activation=activation,
        W_enc=W_enc,
        b_enc=b_enc,
        decoders={site: Decoder(rows)},
        output_biases={site: b_dec},
        threshold=threshold,
        skip=tensors.optional("W_skip", (decoder.shape[1], width)) if "skip" in architecture else None,
        source=str(folder / WEIGHTS),
    )


def _finetuning(config: dict[str, Any], tensors: Tensors, n_features: int) -> Tensor | None:
    """What activations are multiplied by before they are decoded, (F,); the oldest files call it `scaling_factor`."""
    if "finetuning_scaling_factor" in tensors:
        used = config.get("finetuning_scaling_factor")
        return tensors.whole("finetuning_scaling_factor", (n_features,)) if used else None
    if "scaling_factor" not in tensors:
        return None
    factor = tensors.whole("scaling_factor", (n_features,))
    if (factor == 1.0).all():
        return None
    if not config.get("finetuning_scaling_factor"):
        raise ReplacementError(
            f"{tensors.path}: 'scaling_factor' is not one everywhere, and {config['file']} does not say whether it is "
            "used; set finetuning_scaling_factor to true there, or take the tensor out"
        )
    return factor


def _activation(config: dict[str, Any], tensors: Tensors, n_features: int) -> tuple[Activation, Tensor | None]:
    architecture = str(config.get("architecture", "standard"))
    function = config.get("activation_fn_str") or config.get("activation_fn") or "relu"
    if architecture.startswith("jumprelu"):
        # `pre > threshold` of what ReLU lets through.
        return Activation("jump_relu"), tensors.threshold("threshold", n_features).clamp(min=0.0)
    if architecture == "topk" or function == "topk":
        k = config.get("k") or (config.get("activation_fn_kwargs") or {}).get("k")
        if not isinstance(k, int) or k < 1:
            raise ReplacementError(f"{config['file']}: a top-k needs a whole number k, got {k!r}")
        return Activation("topk", k), None
    return Activation("relu"), None


def _lengths(decoder: Rows) -> Tensor:
    """Length of each decoder row, (F,)."""
    parts = torch.split(torch.arange(decoder.shape[0]), 4096)
    return torch.cat([decoder.rows(part).norm(dim=1) for part in parts])
