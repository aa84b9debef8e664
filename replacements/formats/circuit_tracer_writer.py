"""Write circuit-tracer's directories, as `circuit_tracer.py` reads them: transcoders of every layer, or one CLT."""

from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from circuits.replacements.dictionary import Dictionary, Replacement
from circuits.replacements.errors import ReplacementError
from circuits.replacements.formats.circuit_tracer import CONFIG, READS, WRITES
from circuits.replacements.formats.native import DTYPES, whole_or_nothing
from circuits.replacements.sites import Site


def save(replacement: Replacement, path: str | Path, dtype: str = "float32") -> None:
    """Write a replacement of MLPs as circuit-tracer 0.5.0 loads it, to the directory `path`, whole or not at all.

    Parameters
    ----------
    dtype
        What is stored: "float32", "float16" or "bfloat16".

    Raises
    ------
    ReplacementError
        The format has no room for it: attention is replaced, features move or have a rank, a layer has none or two.
    """
    dictionaries = sorted(replacement.dictionaries, key=lambda dictionary: dictionary.layer)
    is_clt = any(len(dictionary.writes) > 1 for dictionary in dictionaries)
    _check(replacement, dictionaries, is_clt)
    first = dictionaries[0]
    reads = {place: hook for hook, place in READS.items()}
    config: dict[str, object] = {
        "model_name": str(replacement.model.get("name", "")),
        "model_kind": "cross_layer_transcoder" if is_clt else "transcoder_set",
        "feature_input_hook": reads[(first.read.site.name, first.read.norm)],
        "feature_output_hook": next(hook for hook, before in WRITES.items() if before == first.before_post_norm),
        "scan": replacement.name,
    }
    if first.activation.kind == "topk":
        config |= {"activation": "topk", "k": first.activation.k}
    if not is_clt:
        config["transcoders"] = [f"layer_{dictionary.layer}.safetensors" for dictionary in dictionaries]
    if (path := Path(path)).exists():
        raise ReplacementError(f"{path}: exists; choose another directory")
    try:
        with whole_or_nothing(path) as folder:
            for dictionary in dictionaries:
                write = _save_clt_layer if is_clt else _save_transcoder
                write(dictionary, folder, DTYPES[dtype])
            (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise ReplacementError(f"{path}: cannot be written ({error}); choose another directory") from error


def _check(replacement: Replacement, dictionaries: list[Dictionary], is_clt: bool) -> None:
    def refuse(why: str) -> None:
        raise ReplacementError(f"{replacement.path}: circuit-tracer's format cannot hold it: {why}")

    n_layers = len(dictionaries)
    if [dictionary.layer for dictionary in dictionaries] != list(range(n_layers)):
        refuse("it wants one dictionary for each layer from 0 on")
    for dictionary in dictionaries:
        site = dictionary.read.site
        if dictionary.moved_by is not None or dictionary.rank > 1:
            refuse(f"features of {dictionary.name} move, or have a rank above one")
        if (site.name, dictionary.read.norm) not in READS.values():
            refuse(f"{dictionary.name} reads {dictionary.read}")
        layers = range(site.layer, n_layers) if is_clt else (site.layer,)
        if dictionary.writes != tuple(Site("mlp_out", layer) for layer in layers):
            refuse(f"{dictionary.name} writes {', '.join(map(str, dictionary.writes))}")
        if is_clt and dictionary.skip is not None:
            refuse(f"{dictionary.name} has a skip connection beside its cross-layer decoders")
        if is_clt and any(bias_site != dictionary.writes[0] for bias_site in dictionary.output_biases):
            refuse(f"{dictionary.name} has output biases of later layers")
        if dictionary.activation.kind not in ("relu", "jump_relu", "batch_topk", "topk"):
            refuse(f"activation {dictionary.activation.kind} of {dictionary.name}")
        if dictionary.activation.kind == "topk" and (is_clt or dictionary.activation.rectify):
            refuse(f"a top-k that drops negative entries, or of a CLT, as in {dictionary.name}")
    for what in ("read.norm", "activation.kind", "activation.k", "before_post_norm"):
        values = {str(_field(dictionary, what)) for dictionary in dictionaries}
        if len(values) > 1:
            refuse(f"layers differ in {what}: {', '.join(sorted(values))}")


def _field(dictionary: Dictionary, path: str) -> object:
    value: object = dictionary
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _save_transcoder(dictionary: Dictionary, path: Path, dtype: torch.dtype) -> None:
    site = dictionary.writes[0]
    tensors = {
        "W_enc": dictionary.W_enc,
        "W_dec": dictionary.decoders[site].all(),
        "b_enc": dictionary.b_enc,
        "b_dec": _bias(dictionary, site),
    }
    if (threshold := _threshold(dictionary)) is not None:
        tensors["activation_function.threshold"] = threshold
    if dictionary.skip is not None:
        tensors["W_skip"] = dictionary.skip
    _write(tensors, path / f"layer_{dictionary.layer}.safetensors", dtype)


def _save_clt_layer(dictionary: Dictionary, path: Path, dtype: torch.dtype) -> None:
    layer = dictionary.layer
    tensors = {
        f"W_enc_{layer}": dictionary.W_enc,
        f"b_enc_{layer}": dictionary.b_enc,
        f"b_dec_{layer}": _bias(dictionary, dictionary.writes[0]),
    }
    if (threshold := _threshold(dictionary)) is not None:
        tensors[f"threshold_{layer}"] = threshold
    _write(tensors, path / f"W_enc_{layer}.safetensors", dtype)
    rows = torch.stack([dictionary.decoders[site].all().to(dtype) for site in dictionary.writes], dim=1)
    _write({f"W_dec_{layer}": rows}, path / f"W_dec_{layer}.safetensors", dtype)


def _bias(dictionary: Dictionary, site: Site) -> Tensor:
    bias = dictionary.output_bias(site)
    return torch.zeros(dictionary.decoders[site].width) if bias is None else bias


def _threshold(dictionary: Dictionary) -> Tensor | None:
    """One for each feature; a BatchTopK's is that of the JumpReLU that it is used as."""
    if not dictionary.activation.needs_threshold or dictionary.threshold is None:
        return None
    return dictionary.threshold.expand(dictionary.n_features)


def _write(tensors: dict[str, Tensor], file: Path, dtype: torch.dtype) -> None:
    save_file({name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}, file)
