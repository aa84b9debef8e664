"""Read Gemma Scope's dictionaries (Lieberum et al. 2024): `params.npz` in folders `layer_5/width_16k/average_l0_72`.

Shapes: F features, D width of what is read, D' of what is written.

    W_enc (D, F)   b_enc (F,)   threshold (F,)   W_dec (F, D')   b_dec (D',)

    pre = x W_enc + b_enc      a = pre if pre > threshold, else 0      y = a W_dec + b_dec

What is read and written stands in no file, only in the repository's name, such as `gemma-scope-2b-pt-att`; one of the
folders above has to show it:

    transcoders   the MLP's input before the norm's gain, `ln2.hook_normalized`   the MLP's output behind the post-norm
    att           the concatenated head outputs, `hook_z`                         the same
    mlp           the MLP's output behind the post-norm                           the same
    res           the stream after the block                                      the same

Layout and names: the release's tutorial, and circuit-tracer 0.5.0, `load_gemma_scope_transcoder`, with the hooks of
mwhanna/gemma-scope-transcoders. An npz is no safetensors file, so everything is held in memory.
"""

import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from circuits.kernels.encode import Activation
from circuits.replacements.dictionary import Decoder, Dictionary, Replacement
from circuits.replacements.errors import ReplacementError, wrong_shape
from circuits.replacements.sites import Norm, ReadSite, Site
from circuits.replacements.weights import HeldTensor

NAME = "gemma-scope"
FILE = "params.npz"
LOOKED_FOR = f"layer_*/.../{FILE}"
KINDS: dict[str, tuple[str, str, Norm, str]] = {  # in the name: kind, read site, norm, write site
    "transcoders": ("transcoder", "resid_mid", "scale", "mlp_out"),
    "att": ("attention-sae", "z", "none", "z"),
    "mlp": ("mlp-sae", "mlp_out", "none", "mlp_out"),
    "res": ("residual-sae", "resid_post", "none", "resid_post"),
}
ARRAYS = ("W_enc", "b_enc", "threshold", "W_dec", "b_dec")


def recognises(path: Path) -> bool:
    """Whether a file of the name lies in the folder, or in one of a layer below it."""
    return (path / FILE).is_file() or bool(_files(path))


def load(path: Path, device: str = "cpu") -> Replacement:
    """Read one dictionary, or one for each layer, below `path`.

    Raises
    ------
    ReplacementError
        A layer has several dictionaries, no folder's name says what they read, or a file does not hold what it should.
    """
    files = [path / FILE] if (path / FILE).is_file() else _files(path)
    kind = _kind(path)
    by_layer: dict[int, list[Path]] = {}
    for file in files:
        by_layer.setdefault(_layer(file), []).append(file)
    for layer, several in sorted(by_layer.items()):
        if len(several) > 1:
            raise ReplacementError(
                f"{path}: layer {layer} has {len(several)} dictionaries: "
                f"{', '.join(str(file.parent.relative_to(path)) for file in several)}; give the folder of one of "
                "them, or a folder with one for each layer"
            )
    chosen = [(layer, by_layer[layer][0]) for layer in sorted(by_layer)]
    dictionaries = tuple(_dictionary(file, layer, kind, device) for layer, file in chosen)
    return Replacement(path.name, path, NAME, dictionaries, files=tuple(file for _, file in chosen))


def _files(path: Path) -> list[Path]:
    depths = ("layer_*", "layer_*/*", "layer_*/*/*", "width_*/*", "average_l0_*")
    return sorted(file for depth in depths for file in path.glob(f"{depth}/{FILE}"))


def _kind(path: Path) -> tuple[str, str, Norm, str]:
    """What the name of the nearest folder that says it stands for."""
    for part in (path.resolve(), *path.resolve().parents):
        if "gemma-scope" not in part.name.lower():  # in the hub's cache: models--google--gemma-scope-2b-pt-att
            continue
        words = re.split(r"[-_. ]", part.name.lower())
        for word, kind in KINDS.items():
            if word in words or (word == "transcoders" and "transcoder" in words):
                return kind
    raise ReplacementError(
        f"{path}: no folder's name says what these dictionaries read; keep a part such as "
        f"gemma-scope-2b-pt-transcoders in the path, with one of {', '.join(KINDS)}"
    )


def _layer(file: Path) -> int:
    for part in file.resolve().parts[::-1]:
        if found := re.fullmatch(r"layer_(\d+)", part):
            return int(found[1])
        if part == "embedding":
            raise ReplacementError(
                f"{file}: is for the token embedding, which a trace keeps as it is; take another site"
            )
    raise ReplacementError(f"{file}: no folder layer_N above it says which layer it is for")


def _arrays(file: Path, *, is_meta: bool) -> dict[str, Tensor]:
    """The arrays of a file in float32; of `is_meta` ones, on torch's device "meta", only the headers are read."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            missing = [name for name in ARRAYS if name not in archive]
            if missing:
                raise ReplacementError(
                    f"{file}: array {missing[0]!r} is missing; the file has {', '.join(sorted(archive)) or 'none'}"
                )
            if is_meta:
                return {name: torch.empty(_shape(archive.zip, name), device="meta") for name in ARRAYS}
            found = {name: torch.from_numpy(np.asarray(archive[name], dtype=np.float32)) for name in ARRAYS}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ReplacementError(f"{file}: no npz file of plain arrays ({error}); copy or download it again") from error
    for name, tensor in found.items():
        if not torch.isfinite(tensor).all():
            raise ReplacementError(f"{file}: array {name!r} holds NaN or infinite values; download the file again")
    return found


def _shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    """The shape of an array, from the header that its file in the archive begins with."""
    with archive.open(f"{name}.npy") as member:
        version = npy.read_magic(member)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, _ = read(member)
    return shape


def _dictionary(file: Path, layer: int, what: tuple[str, str, Norm, str], device: str) -> Dictionary:
    kind, read, norm, write = what
    arrays = _arrays(file, is_meta=device == "meta")
    width, n_features = arrays["W_enc"].shape if arrays["W_enc"].ndim == 2 else (0, 0)
    out = arrays["b_dec"].shape[-1] if arrays["b_dec"].ndim else 0
    shapes = {"W_enc": (width, n_features), "b_enc": (n_features,), "W_dec": (n_features, out), "b_dec": (out,)}
    for name, shape in {**shapes, "threshold": (n_features,)}.items():
        if arrays[name].shape != shape:
            raise wrong_shape(file, name, shape, tuple(arrays[name].shape))
    held = {name: tensor.to(device) for name, tensor in arrays.items()}
    site = Site(write, layer)
    return Dictionary(
        name=f"{kind}.{layer}",
        kind=kind,
        read=ReadSite(Site(read, layer), norm),
        writes=(site,),
        activation=Activation("jump_relu"),
        # An entry passes where it is above its threshold and positive: a negative threshold is zero.
        threshold=held["threshold"].clamp(min=0.0),
        W_enc=held["W_enc"].T.contiguous(),
        b_enc=held["b_enc"],
        decoders={site: Decoder(HeldTensor("W_dec", held["W_dec"]))},
        output_biases={site: held["b_dec"]},
        source=str(file),
    )
