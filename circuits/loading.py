"""Load a base model with its replacements: the embedded default, any that the user names, or those of a graph."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from circuits.base_models import load_base_model
from circuits.errors import CircuitsError
from circuits.graph import Graph
from circuits.hub import model_folder, name_of, replacement_folder
from circuits.linearize import check_replacements
from circuits.model import BaseModel
from circuits.offload import keep_freed_memory
from circuits.placing import DeviceMap
from circuits.processing import undo
from circuits.replacements.dictionary import Replacement
from circuits.replacements.formats import qk_format
from circuits.replacements.formats.qk_format import QKReplacement
from circuits.replacements.loading import is_replacement, load_replacement
from circuits.replacements.memory import free_memory

DEFAULT = Path(__file__).resolve().parent / "default"
EMBEDDED_MODEL = "circuits-default"
# What comes with the embedded model, by the name that --replacement takes.
EMBEDDED = {
    "attention-sae": ("clt", "attention-sae"),
    "mtc": ("clt", "mtc"),
    "weakly-causal": ("weakly-causal",),
    "clt": ("clt",),
}


@dataclass(frozen=True)
class Model:
    """A base model, the replacements that stand for its MLPs and attention, and a QK diagonalization for analysis."""

    base: BaseModel
    replacements: tuple[Replacement, ...]
    qk: QKReplacement | None = None

    def __repr__(self) -> str:
        names = ", ".join(replacement.name for replacement in self.replacements) or "no replacement"
        return f"Model({self.base.name}: {self.base.shape.n_layers} layers of width {self.base.shape.d_model}; {names})"


def load(
    model: str | Path | None = None,
    replacement: str | Path | Sequence[str | Path] | None = None,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    device_map: DeviceMap | None = None,
    memory: int | None = None,
) -> Model:
    """Load a model and its replacements.

    Parameters
    ----------
    model
        A local folder or hub id of a causal LM, `owner/repo` or `owner/repo@revision`; by default the embedded model.
    replacement
        One or several directories of replacements, or hub ids of such: `owner/repo@revision:sub/folder` and the other
        forms of `circuits.hub`. With the embedded model also a name of what comes with it:
        `attention-sae` (the default: CLT and attention output SAEs), `mtc` (CLT and multitoken transcoders),
        `weakly-causal` (features of both types), or `clt` alone. Layers without a replacement stay as they are:
        attention frozen, MLP outputs as error nodes. One directory may be a QK diagonalization: it explains attention
        scores and stands for nothing. The embedded model has its own.
    device, dtype
        Where and in which precision the weights are held. Recording and attribution run in float32.
    device_map
        Instead of `device`, for a model that is too large for one: "auto" and the other words of transformers, or
        {module: device}, which needs accelerate. Dictionaries go to the device of the layer that they read.
    memory
        Bytes on each device that the encoders of each replacement may take; those that do not fit stay in their files
        and are read a block of features at a time. By default half of what is free; float32 encoders are used where
        they lie in their files, which takes no longer.

    Returns
    -------
    Model
        To be given to `circuits.trace`.

    Raises
    ------
    CircuitsError, ReplacementError
        With what is wrong, in which file, and what to do.
    """
    keep_freed_memory()
    found = find(model, replacement)
    base = load_base_model(found.model, device=device, dtype=dtype, device_map=device_map)
    base.name = found.name or base.name
    held = memory if len(base.devices) == 1 else 0
    replacements = tuple(load_replacement(path, base.device, held) for path in found.replacements)
    for one in replacements:
        if one.name == one.path.name:  # in the hub's cache that is a commit
            one.name = name_of(one.path) or one.name
    replacements = tuple(undo(base, one) for one in replacements)
    check_replacements(base, replacements)
    if len(base.devices) > 1:
        for one in replacements:
            place(base, one, memory)
    return Model(base, replacements, _load_qk(base, found.qk, model is None))


@dataclass(frozen=True)
class Found:
    """Where a model, its replacements and QK diagonalizations lie. `name` is the model's, if its folder has another."""

    model: str | Path
    name: str | None
    replacements: tuple[Path, ...]
    qk: tuple[Path, ...]


def find(model: str | Path | None, replacement: str | Path | Sequence[str | Path] | None) -> Found:
    """What the names given to `load` stand for; replacements of the hub are downloaded."""
    folder = _embedded("model") if model is None else model_folder(model)
    name = EMBEDDED_MODEL if model is None else str(model) if folder != model else None
    if replacement is None:
        replacement = [] if model is not None else "attention-sae"
    given = [replacement] if isinstance(replacement, str | Path) else replacement
    paths = [path for one in given for path in _paths(one, embedded=model is None)]
    qk = tuple(path for path in paths if qk_format.is_qk(path))
    return Found(folder, name, tuple(path for path in paths if path not in qk), qk)


def place(base: BaseModel, replacement: Replacement, memory: int | None = None) -> None:
    """Put each dictionary on the device of the layer that it reads, and as many encoders there as `memory` allows."""
    for device in sorted(base.devices, key=str):
        mine = tuple(d for d in replacement.dictionaries if base.layer_devices[d.layer] == device)
        for dictionary in mine:
            dictionary.place(device)
        budget = free_memory(device) // 2 if memory is None else memory
        replace(replacement, dictionaries=mine).hold_encoders(budget, needed=memory is None)


def _load_qk(base: BaseModel, paths: Sequence[Path], embedded: bool) -> QKReplacement | None:
    """The QK diagonalization among the paths, or that of the embedded model."""
    if len(paths) > 1:
        raise CircuitsError(f"{paths[0]} and {paths[1]} are both QK diagonalizations; give only one")
    if not paths and not (embedded and (DEFAULT / "qk").is_dir()):
        return None
    path = paths[0] if paths else DEFAULT / "qk"
    found = qk_format.load(path, str(base.device))
    trained = found.model.get("hash")
    if trained and trained != base.identity:
        raise CircuitsError(
            f"{path}: trained on another model ({found.model.get('name', '?')}, hash {str(trained)[:12]}) than "
            f"{base.name} (hash {base.identity[:12]})"
        )
    for dictionary in found.dictionaries:
        of, shape = dictionary.of, base.shape
        if of.layer >= shape.n_layers or (of.n_heads, of.n_kv_heads, of.d_head) != (
            shape.n_heads,
            shape.n_kv_heads,
            shape.d_head,
        ):
            raise CircuitsError(
                f"{path}: {dictionary.name} is for layer {of.layer} with {of.n_heads} heads, {of.n_kv_heads} key-value "
                f"heads of width {of.d_head}; {base.name} has {shape.n_layers} layers, {shape.n_heads}, "
                f"{shape.n_kv_heads} and {shape.d_head}"
            )
    return found


def _paths(given: str | Path, *, embedded: bool) -> list[Path]:
    """Directories of a replacement that the user named; one that is there goes before a name of the embedded ones.

    A folder that only has such a name, of graphs perhaps, does not. What is not there may be a hub id.
    """
    if embedded and str(given) in EMBEDDED and not is_replacement(Path(given)):
        return [_embedded(name) for name in EMBEDDED[str(given)]]
    return [replacement_folder(given)]


def _embedded(name: str) -> Path:
    path = DEFAULT / name
    if not path.is_dir():
        raise CircuitsError(f"{path}: the embedded default is missing from this installation; name a --model")
    return path


def model_of(
    graph: Graph,
    model: str | Path | None = None,
    replacement: str | Path | Sequence[str | Path] | None = None,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    device_map: DeviceMap | None = None,
) -> Model:
    """The model and the replacements that a graph was traced with.

    Parameters
    ----------
    graph
        With the metadata that `trace` writes.
    model, replacement
        Where they lie, as for `load`. Not needed for a graph of the embedded model and what comes with it; a
        replacement that is given then goes before the names in the graph.
    device, dtype, device_map
        As for `load`.

    Raises
    ------
    CircuitsError
        The graph was traced with something that is not embedded and was not given, or with something else.
    """
    recorded = graph.metadata.get("model", {})
    name, names = recorded.get("name"), [r.get("name", "?") for r in graph.metadata.get("replacements", [])]
    if name is None:
        raise CircuitsError("the graph does not say which model it was traced with; only graphs of `circuits trace` do")
    if model is None and name != EMBEDDED_MODEL:
        raise CircuitsError(
            f"the graph was traced with the model {name} and {_listed(names)}; give them as --model and --replacement"
        )
    if replacement is None:
        if model is not None and names:
            raise CircuitsError(f"the graph was traced with {_listed(names)}; give each as --replacement")
        embedded = {part for parts in EMBEDDED.values() for part in parts}
        if unknown := [part for part in names if part not in embedded]:
            raise CircuitsError(
                f"the graph was traced with {_listed(unknown)}, not embedded; give each of {', '.join(names)} as "
                "--replacement"
            )
        replacement = [_embedded(part) for part in names]
    found = load(model, replacement, device=device, dtype=dtype, device_map=device_map)
    check_fits(graph, found)
    return found


def check_fits(graph: Graph, model: Model) -> None:
    """Refuse a model or replacements other than those that a graph was traced with, by their hashes, and a graph of a
    changed model."""
    if changes := graph.metadata.get("changes"):
        raise CircuitsError(
            f"the graph was traced with {len(changes)} of its nodes changed; the model alone does not do what it "
            "shows. Trace the prompt without changes"
        )
    recorded = graph.metadata.get("model", {})
    if recorded.get("hash") != model.base.identity:
        raise CircuitsError(
            f"the graph was traced with the model {recorded.get('name', '?')} (hash "
            f"{str(recorded.get('hash', '?'))[:12]}), but the model given is {model.base.name} "
            f"(hash {model.base.identity[:12]}); give the model of the graph, or trace again"
        )
    traced = [(r.get("name", "?"), str(r.get("hash", "?"))) for r in graph.metadata.get("replacements", [])]
    given = [(replacement.name, replacement.identity) for replacement in model.replacements]
    if [identity for _, identity in traced] != [identity for _, identity in given]:
        raise CircuitsError(
            f"the graph was traced with {_hashes(traced)}, but the model given has {_hashes(given)}; give the "
            "replacements of the graph in its order, or trace again"
        )


def _listed(names: Sequence[str]) -> str:
    return "the replacements " + ", ".join(names) if names else "no replacement"


def _hashes(named: Sequence[tuple[str, str]]) -> str:
    return _listed([f"{name} ({identity[:12]})" for name, identity in named])
