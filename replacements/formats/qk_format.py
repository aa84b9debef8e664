"""QK diagonalizations in files: a directory with `manifest.json` and one safetensors file a dictionary.

    {"format": "circuits-qk", "version": 1, "name": ..., "model": {"name": ..., "hash": ...}, "training": {...},
     "dictionaries": [{"name": "qk.1", "layer": 1, "heads": [0, 1, ...], "n_heads": 8, "n_kv_heads": 8, "d_head": 32,
                       "n_features": 512, "rank": 1, "prediction": "softmax", "activation": "batch_topk",
                       "query": {"k": 16, "cut": 0.3}, "key": {"k": 16, "cut": 0.2}, "file": "qk.1.safetensors"}, ...]}

Tensors of a file, with F features of rank R, D the width of a side's heads together, H the heads:

    query.W, key.W (F, R, D)    query.b, key.b (F, R)    query.threshold, key.threshold (F,), for R > 1
    head_weights (F, H)

`W` may be float32, float16 or bfloat16; all else is always float32. These write nothing to the stream, so they are no
dictionaries of a `Replacement` and have a format of their own.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from circuits.replacements.errors import ReplacementError
from circuits.replacements.formats.native import DTYPES, MANIFEST, whole_or_nothing
from circuits.replacements.formats.tensors import Tensors
from circuits.replacements.qk_score import QKDictionary, QKHeads, Side

FORMAT = "circuits-qk"
VERSION = 1


@dataclass(frozen=True)
class QKReplacement:
    """The QK dictionaries of one directory; `model` and `training` say what they were trained on, and how."""

    name: str
    dictionaries: tuple[QKDictionary, ...]
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def of_layer(self, layer: int) -> tuple[QKDictionary, ...]:
        """Those that predict heads of this layer."""
        return tuple(dictionary for dictionary in self.dictionaries if dictionary.of.layer == layer)


def is_qk(path: str | Path) -> bool:
    """Whether the directory `path` says that it is of this format."""
    try:
        manifest = json.loads((Path(path) / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def load(path: str | Path, device: str = "cpu") -> QKReplacement:
    """Read the directory `path`. Raises `ReplacementError` for whatever is missing or does not fit."""
    path = Path(path)
    manifest_path = path / MANIFEST
    try:
        manifest: Any = json.loads(manifest_path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReplacementError(f"{manifest_path}: cannot be read ({error}); is this a QK diagonalization?") from error
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
        dictionaries = tuple(_dictionary(path, dict(entry), device) for entry in manifest["dictionaries"])
        model, training = dict(manifest.get("model") or {}), dict(manifest.get("training") or {})
    except ReplacementError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise ReplacementError(f"{manifest_path}: a dictionary's entry is missing or malformed: {error!r}") from error
    if not dictionaries:
        raise ReplacementError(f"{manifest_path}: lists no dictionaries")
    return QKReplacement(str(manifest.get("name") or path.name), dictionaries, model, training)


def _dictionary(path: Path, entry: dict[str, Any], device: str) -> QKDictionary:
    """One dictionary; its tensors are checked against the manifest."""
    tensors = Tensors(path / Path(str(entry["file"])).name, device)
    sizes = (int(entry[name]) for name in ("n_heads", "n_kv_heads", "d_head"))
    of = QKHeads(int(entry["layer"]), tuple(map(int, entry["heads"])), *sizes)
    F, R = int(entry["n_features"]), int(entry["rank"])
    sides = []
    for name, width in (("query", of.d_query), ("key", of.d_key)):
        k = entry[name].get("k")
        sides.append(
            Side(
                W=tensors.whole(f"{name}.W", (F, R, width)),
                b=tensors.whole(f"{name}.b", (F, R)),
                threshold=tensors.whole(f"{name}.threshold", (F,)) if R > 1 else None,
                k=None if k is None else int(k),
                cut=float(entry[name].get("cut", 0.0)),
            )
        )
    return QKDictionary(
        name=str(entry["name"]),
        of=of,
        queries=sides[0],
        keys=sides[1],
        head_weights=tensors.whole("head_weights", (F, len(of.heads))),
        prediction=entry["prediction"],
        choice=entry["activation"],
        source=str(tensors.path),
    )


def save(replacement: QKReplacement, path: str | Path, dtype: str = "float32") -> None:
    """Write to the directory `path`, whole or not at all; a QK diagonalization that stands there is replaced.

    Parameters
    ----------
    dtype
        What the encoders' matrices are stored as: "float32", "float16" or "bfloat16".

    Raises
    ------
    ReplacementError
        The type is unknown, a value does not fit into it, two dictionaries share a name, or the directory holds
        something else or cannot be written.
    """
    path = Path(path)
    if dtype not in DTYPES:
        raise ReplacementError(f"unknown type {dtype!r} for weights; expected one of {', '.join(DTYPES)}")
    names = [dictionary.name for dictionary in replacement.dictionaries]
    if not names or len(set(names)) < len(names):
        raise ReplacementError(f"{path}: needs at least one dictionary, and each a name of its own; got {names}")
    if path.exists() and not is_qk(path) and (not path.is_dir() or any(path.iterdir())):
        raise ReplacementError(f"{path}: exists and is no QK diagonalization; choose another directory")
    try:
        with whole_or_nothing(path) as folder:
            entries = [_write(folder, dictionary, DTYPES[dtype]) for dictionary in replacement.dictionaries]
            manifest = {
                "format": FORMAT,
                "version": VERSION,
                "name": replacement.name,
                "model": replacement.model,
                "training": replacement.training,
                "dictionaries": entries,
            }
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise ReplacementError(f"{path}: cannot be written ({error}); choose another directory") from error


def _write(folder: Path, dictionary: QKDictionary, dtype: torch.dtype) -> dict[str, Any]:
    """Write the dictionary's file; returns its entry in the manifest."""
    tensors: dict[str, Tensor] = {"head_weights": dictionary.head_weights.float()}
    sides = {"query": dictionary.queries, "key": dictionary.keys}
    for name, side in sides.items():
        tensors |= {f"{name}.W": side.W.to(dtype), f"{name}.b": side.b.float()}
        if side.threshold is not None:
            tensors[f"{name}.threshold"] = side.threshold.float()
    file = f"{dictionary.name}.safetensors"
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ReplacementError(f"{file}: tensor {name!r} is not finite as {tensor.dtype}; save it as float32")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / file)
    of = dictionary.of
    return {
        "name": dictionary.name,
        "layer": of.layer,
        "heads": list(of.heads),
        "n_heads": of.n_heads,
        "n_kv_heads": of.n_kv_heads,
        "d_head": of.d_head,
        "n_features": dictionary.n_features,
        "rank": dictionary.rank,
        "prediction": dictionary.prediction,
        "activation": dictionary.choice,
        **{name: {"k": side.k, "cut": side.cut} for name, side in sides.items()},
        "file": file,
    }
