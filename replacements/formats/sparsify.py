"""Read EleutherAI's sparsify: `cfg.json` beside `sae.safetensors`, a folder for each hookpoint such as `layers.5.mlp`.

Shapes: F features, D width.

    encoder.weight (F, D)   encoder.bias (F,)   W_dec (F, D)   b_dec (D,)   W_skip (D, D), with `skip_connection`

    pre = relu((x - b_dec if not transcode) encoder.weight^T + encoder.bias)
    y = top_k(pre) W_dec + b_dec (+ x W_skip^T)

The hookpoint, which stands in the folder's name alone, is a module of transformers' model. An SAE rebuilds the module's
output, a transcoder (`transcode`) the output from the input:

    layers.5                                 SAE: the stream after the block
    layers.5.mlp                             SAE: the MLP's output; transcoder: from what the norm before it gives
    layers.5.self_attn, .attn, .attention    SAE: the attention output

All are the modules' own outputs, before a post-norm. Source: EleutherAI/sparsify, `sparse_coder.py`, `config.py`,
`fused_encoder.py`. Refused: the activation groupmax, signed top-k, skips from the embedding, what n-grams explain
(`gram_lookup`), and transcoders of other modules. What the fork clt-training writes is read by `clt_training.py`.
"""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from circuits.kernels.encode import Activation
from circuits.replacements.dictionary import Decoder, Dictionary, Replacement
from circuits.replacements.errors import ReplacementError
from circuits.replacements.formats.tensors import Tensors
from circuits.replacements.sites import Norm, ReadSite, Site

NAME = "sparsify"
CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
LOOKED_FOR = f"{CONFIG} with {WEIGHTS}"
HOOKPOINT = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)(?:\.(mlp|self_attn|attn|attention))?")
SITES = {None: ("residual-sae", "resid_post"), "mlp": ("mlp-sae", "mlp_out")}
ATTENTION = ("attention-sae", "attn_out")


def recognises(path: Path) -> bool:
    """Whether the two files lie in the folder, or in folders of it."""
    return bool(folders(path))


def load(path: Path, device: str = "cpu") -> Replacement:
    """Read one coder, or a folder with one for each hookpoint.

    Raises
    ------
    ReplacementError
        A folder's name is no hookpoint, a setting cannot be expressed, or a file does not hold what it should.
    """
    found = folders(path)
    dictionaries = [_dictionary(folder, device) for folder in found]
    dictionaries.sort(key=lambda dictionary: (dictionary.layer, dictionary.writes[0].name))
    for below, above in pairwise(dictionaries):
        if below.writes == above.writes:
            raise ReplacementError(f"{path}: {below.source} and {above.source} are both for {below.writes[0]}")
    files = tuple(folder / name for folder in found for name in (CONFIG, WEIGHTS))
    return Replacement(path.name, path, NAME, tuple(dictionaries), files=files)


def folders(path: Path) -> list[Path]:
    """Where the two files of a coder lie: the folder, or folders of it."""

    def has_both(folder: Path) -> bool:
        return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()

    if has_both(path):
        return [path]
    return sorted(folder for folder in path.glob("*") if has_both(folder))


def config_of(file: Path) -> dict[str, Any]:
    """The settings of one coder, checked."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ReplacementError(f"{file}: no valid JSON: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("k"), int) or values["k"] < 1:
        raise ReplacementError(f"{file}: should be a JSON object with k, d_in, activation, ...; k a whole number")
    if (activation := values.get("activation", "topk")) != "topk":
        raise ReplacementError(f"{file}: activation {activation!r} cannot be expressed; expected topk")
    for setting in ("signed", "embed_skip", "gram_lookup"):
        if values.get(setting):
            raise ReplacementError(f"{file}: the setting {setting} = {values[setting]!r} cannot be expressed")
    return values


def place(folder: Path, transcode: bool) -> tuple[str, ReadSite, Site]:
    """Kind, read site and write site of a hookpoint."""
    found = HOOKPOINT.fullmatch(folder.name)
    if not found:
        raise ReplacementError(
            f"{folder}: the folder's name should be the hookpoint, such as layers.5.mlp or h.3; sparsify writes it "
            "nowhere else"
        )
    layer, module = int(found[1]), found[2]
    if transcode:
        if module != "mlp":
            raise ReplacementError(
                f"{folder}: a transcoder of {folder.name} cannot be expressed; expected one of an mlp"
            )
        return "transcoder", ReadSite(Site("resid_mid", layer), "full"), Site("mlp_out", layer)
    kind, name = SITES.get(module, ATTENTION)
    norm: Norm = "none"
    return kind, ReadSite(Site(name, layer), norm), Site(name, layer)


def _dictionary(folder: Path, device: str) -> Dictionary:
    config, tensors = config_of(folder / CONFIG), Tensors(folder / WEIGHTS, device)
    transcode = bool(config.get("transcode"))
    kind, read, site = place(folder, transcode)
    n_features, width = tensors.matrix_shape("encoder.weight")
    b_enc, b_dec = tensors.whole("encoder.bias", (n_features,)), tensors.whole("b_dec", (width,))
    W_enc = tensors.lazy("encoder.weight", (n_features, width))
    if not transcode:
        b_enc = b_enc - W_enc.all().to(b_dec) @ b_dec
    return Dictionary(
        name=f"{kind}.{read.site.layer}",
        kind=kind,
        read=read,
        writes=(site,),
        activation=Activation("topk", config["k"]),
        W_enc=W_enc,
        b_enc=b_enc,
        decoders={site: Decoder(tensors.lazy("W_dec", (n_features, width)))},
        output_biases={site: b_dec},
        skip=tensors.whole("W_skip", (width, width)) if config.get("skip_connection") else None,
        before_post_norm=site.name != "resid_post",
        source=str(folder / WEIGHTS),
    )
