"""Our own format: a directory with `manifest.json` and one safetensors file a dictionary.

    {"format": "circuits-replacement", "version": 1, "name": ..., "kind": ...,
     "model": {"name": ..., "hash": ...}, "training": {...},
     "dictionaries": [{"name": "clt.3", "kind": "clt", "read": "resid_mid.3:full", "writes": ["mlp_out.3", ...],
                       "activation": {"kind": "topk", "k": 20, "rectify": true}, "file": "clt.3.safetensors",
                       "n_features": 3072, "subtracts_output_bias": false, "before_post_norm": false}, ...]}

Tensors of a file, with F features, R rows (features x rank), D the width of the read site, W write sites of width D':

    W_enc (R, D)   b_enc (R,)   W_dec (R, W, D')   threshold (F,) or one number, for activations that need it
    b_dec.<site> (D',), for write sites that have an output bias                  skip (D', D), if there is one

A dictionary whose features move says how in its entry, and has the tensors for it, with H heads of the base layer, G
patterns of width E (`HeadLoading` and `OwnAttention` in replacements/movement.py):

    "moved_by": {"kind": "head-loading", "context_k": 512}                        loading (F, H + 1)
    "moved_by": {"kind": "own-attention", "scale": 0.25, "rotary_theta": null}    W_q, W_k (G, E, D)   b_q, b_k (G, E)
                                                                                  group (F,), and where it has them
                                                                                  rotary_speeds (E / 2,)
                                                                                  q_gain, k_gain (G, E) with "norm_eps"

With `subtracts_output_bias` the encoder reads x minus the output bias of the first write site. Matrices may be
float32, float16 or bfloat16; vectors are always float32. All write sites of one dictionary have the same width.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from circuits.kernels.encode import Activation
from circuits.replacements.dictionary import Decoder, Dictionary, Replacement
from circuits.replacements.errors import ReplacementError
from circuits.replacements.formats.tensors import Tensors
from circuits.replacements.movement import HeadLoading, Movement, OwnAttention
from circuits.replacements.sites import ReadSite, Site

NAME = "circuits"
MANIFEST = "manifest.json"
LOOKED_FOR = MANIFEST
FORMAT = "circuits-replacement"
VERSION = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def recognises(path: Path) -> bool:
    """Whether the directory has the format's configuration."""
    return (path / MANIFEST).is_file()


def load(path: Path, device: str = "cpu") -> Replacement:
    """Read the directory `path`. Raises `ReplacementError` for whatever is missing or does not fit."""
    manifest_path = path / MANIFEST
    try:
        manifest: Any = json.loads(manifest_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReplacementError(f"{manifest_path}: no valid JSON: {error}; copy the replacement again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ReplacementError(f'{manifest_path}: should be a JSON object with "format": "{FORMAT}"')
    if manifest.get("version") != VERSION:
        raise ReplacementError(
            f"{manifest_path}: format version {manifest.get('version')}, this program reads version {VERSION}; "
            "update the program or save the replacement again"
        )
    try:
        entries = [dict(entry) for entry in manifest["dictionaries"]]
        dictionaries = tuple(_dictionary(path, entry, device) for entry in entries)
    except (KeyError, TypeError) as error:
        raise ReplacementError(f"{manifest_path}: a dictionary's entry is missing or malformed: {error}") from error
    if not dictionaries:
        raise ReplacementError(f"{manifest_path}: lists no dictionaries")
    files = (manifest_path, *(path / str(entry["file"]) for entry in entries))
    name = str(manifest.get("name") or path.name)
    model, training = dict(manifest.get("model") or {}), dict(manifest.get("training") or {})
    return Replacement(name, path, "circuits", dictionaries, model, training, files)


def _dictionary(path: Path, entry: dict[str, Any], device: str) -> Dictionary:
    """One dictionary; its tensors are checked against each other and against the manifest."""
    tensors = Tensors(path / Path(str(entry["file"])).name, device)
    writes = tuple(Site.parse(site) for site in entry["writes"])
    activation = _activation(path, entry["activation"])
    n_features, rank = int(entry["n_features"]), int(entry.get("rank", 1))
    n_rows = n_features * rank
    d_read = tensors.lazy("W_enc", (n_rows, "D")).shape[1]
    W_enc, b_enc = tensors.lazy("W_enc", (n_rows, d_read)), tensors.whole("b_enc", (n_rows,))
    rows = tensors.lazy("W_dec", (n_rows, len(writes), "D'"))
    d_write = rows.shape[2]
    biases = {site: tensors.whole(f"b_dec.{site}", (d_write,)) for site in writes if f"b_dec.{site}" in tensors}
    if entry.get("subtracts_output_bias"):
        if writes[0] not in biases:
            raise ReplacementError(f"{tensors.path}: tensor 'b_dec.{writes[0]}' is missing, shape ({d_write},)")
        b_enc = b_enc - W_enc.all().to(b_enc.device) @ biases[writes[0]]
    return Dictionary(
        name=str(entry["name"]),
        kind=str(entry["kind"]),
        read=ReadSite.parse(entry["read"]),
        writes=writes,
        activation=activation,
        W_enc=W_enc,
        b_enc=b_enc,
        decoders={site: Decoder(rows, column) for column, site in enumerate(writes)},
        output_biases=biases,
        threshold=tensors.threshold("threshold", n_features) if activation.needs_threshold else None,
        skip=tensors.optional("skip", (d_write, d_read)),
        before_post_norm=bool(entry.get("before_post_norm")),
        moved_by=_movement(tensors, entry, n_features, d_read),
        rank=rank,
        source=str(tensors.path),
    )


def _movement(tensors: Tensors, entry: dict[str, Any], n_features: int, d_read: int) -> Movement | None:
    moved = entry.get("moved_by")
    if moved is None:
        return None
    if moved["kind"] == "head-loading":
        n_heads = tensors.lazy("loading", (n_features, "H + 1")).shape[1]
        k = moved.get("context_k")
        return HeadLoading(tensors.whole("loading", (n_features, n_heads)), None if k is None else int(k))
    if moved["kind"] == "own-attention":
        n_patterns, width, _ = tensors.lazy("W_q", ("G", "E", d_read)).shape
        weights = (n_patterns, width, d_read)
        theta = moved.get("rotary_theta")
        return OwnAttention(
            W_q=tensors.whole("W_q", weights),
            b_q=tensors.whole("b_q", weights[:2]),
            W_k=tensors.whole("W_k", weights),
            b_k=tensors.whole("b_k", weights[:2]),
            group=tensors.whole("group", (n_features,)).long(),
            scale=float(moved["scale"]),
            rotary_theta=None if theta is None else float(theta),
            rotary_speeds=tensors.optional("rotary_speeds", ("E / 2",)),
            q_gain=tensors.optional("q_gain", weights[:2]),
            k_gain=tensors.optional("k_gain", weights[:2]),
            norm_eps=float(moved.get("norm_eps", 1e-6)),
        )
    raise ReplacementError(f"{tensors.path}: unknown movement {moved['kind']!r}; expected head-loading, own-attention")


def _activation(path: Path, entry: dict[str, Any]) -> Activation:
    try:
        k = entry.get("k")
        return Activation(entry["kind"], None if k is None else int(k), bool(entry.get("rectify", True)))
    except ValueError as error:
        raise ReplacementError(f"{path / MANIFEST}: {error}") from error


def save(replacement: Replacement, path: str | Path, dtype: str = "float32") -> None:
    """Write a replacement to the directory `path`, whole or not at all; one that stands there is replaced.

    Parameters
    ----------
    dtype
        What matrices are stored as: "float32", "float16" or "bfloat16".

    Raises
    ------
    ReplacementError
        The type is unknown, a value does not fit into it, or the directory holds something else or cannot be written.
    """
    path = Path(path)
    if dtype not in DTYPES:
        raise ReplacementError(f"unknown type {dtype!r} for weights; expected one of {', '.join(DTYPES)}")
    if path.exists() and not (path / MANIFEST).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise ReplacementError(f"{path}: exists and is no replacement; choose another directory")
    try:
        with whole_or_nothing(path) as folder:
            _write_all(folder, replacement, DTYPES[dtype])
    except (OSError, SafetensorError) as error:
        raise ReplacementError(f"{path}: cannot be written ({error}); choose another directory") from error


def _write_all(folder: Path, replacement: Replacement, dtype: torch.dtype) -> None:
    """The files of the dictionaries, then the manifest that lists them."""
    entries = [_write(folder, dictionary, dtype) for dictionary in replacement.dictionaries]
    kinds = sorted({dictionary.kind for dictionary in replacement.dictionaries})
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "name": replacement.name,
        "kind": "+".join(kinds),
        "model": replacement.model,
        "training": replacement.training,
        "dictionaries": entries,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _write(folder: Path, dictionary: Dictionary, dtype: torch.dtype) -> dict[str, Any]:
    """Write the dictionary's file; returns its entry in the manifest.

    A bias that was folded into `b_enc` stays folded, so `subtracts_output_bias` is never set in what we write.
    """
    W_dec = torch.stack([decoder.all() for decoder in map(dictionary.decoders.__getitem__, dictionary.writes)], dim=1)
    tensors: dict[str, Tensor] = {"W_enc": dictionary.W_enc.to(dtype), "W_dec": W_dec.to(dtype)}
    if dictionary.skip is not None:
        tensors["skip"] = dictionary.skip.to(dtype)
    tensors["b_enc"] = dictionary.b_enc.float()
    if dictionary.threshold is not None:
        tensors["threshold"] = dictionary.threshold.float()
    for site, bias in dictionary.output_biases.items():
        tensors[f"b_dec.{site}"] = bias.float()
    movement, moved = _describe_movement(dictionary, dtype)
    tensors |= movement
    file = f"{dictionary.name}.safetensors"
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ReplacementError(f"{file}: tensor {name!r} is not finite as {tensor.dtype}; save it as float32")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / file)
    activation = dictionary.activation
    return {
        "name": dictionary.name,
        "kind": dictionary.kind,
        "read": str(dictionary.read),
        "writes": [str(site) for site in dictionary.writes],
        "activation": {"kind": activation.kind, "k": activation.k, "rectify": activation.rectify},
        "file": file,
        "n_features": dictionary.n_features,
        "subtracts_output_bias": False,
        "before_post_norm": dictionary.before_post_norm,
        "rank": dictionary.rank,
        "moved_by": moved,
    }


def _describe_movement(dictionary: Dictionary, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors and manifest entry of a dictionary's movement."""
    movement = dictionary.moved_by
    if movement is None:
        return {}, None
    if isinstance(movement, HeadLoading):
        return {"loading": movement.weights.float()}, {"kind": "head-loading", "context_k": movement.context_k}
    matrices = {"W_q": movement.W_q.to(dtype), "W_k": movement.W_k.to(dtype)}
    vectors = {"b_q": movement.b_q.float(), "b_k": movement.b_k.float(), "group": movement.group.float()}
    more = {"rotary_speeds": movement.rotary_speeds, "q_gain": movement.q_gain, "k_gain": movement.k_gain}
    vectors |= {name: tensor.float() for name, tensor in more.items() if tensor is not None}
    entry = {"kind": "own-attention", "scale": movement.scale, "rotary_theta": movement.rotary_theta}
    return matrices | vectors, entry | {"norm_eps": movement.norm_eps}


@contextmanager
def whole_or_nothing(path: Path) -> Iterator[Path]:
    """A temporary directory beside `path` that takes its place at the end, and disappears after an error.

    `os.replace` does not replace a directory that has files, so an old one steps aside first and comes back if the
    new one cannot take its place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield folder
        folder.chmod(0o755)
        aside = folder.with_name(folder.name + ".old")
        if path.exists():
            os.replace(path, aside)
        try:
            os.replace(folder, path)
        except OSError:
            if aside.exists():
                os.replace(aside, path)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
