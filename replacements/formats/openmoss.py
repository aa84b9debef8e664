"""Read what OpenMOSS publishes and `lm_saes` saves: SAEs, transcoders, cross-layer transcoders, Lorsas (Llama Scope).

A directory with a configuration and weights is one checkpoint; a directory that has such directories below it is all
of them, as Hugging Face repositories have one for each layer. Several for the same place are refused with their names.
How each kind is laid out stands in `openmoss_sae.py`, `openmoss_clt.py` and `openmoss_lorsa.py`. Source:
github.com/OpenMOSS/Language-Model-SAEs, `src/lm_saes/models/`.
"""

from collections.abc import Callable
from pathlib import Path

from circuits.replacements.dictionary import Dictionary, Replacement
from circuits.replacements.errors import ReplacementError
from circuits.replacements.formats import openmoss_clt, openmoss_lorsa, openmoss_sae
from circuits.replacements.formats.openmoss_config import LM_CONFIG, Config, read_config, weights_of

NAME = "OpenMOSS"
LOOKED_FOR = "config.json with sae_type and hook points, or hyperparams.json, of lm_saes"
DEEPEST = 4  # levels of directories below the one that is given
SHOWN = 8
MAKERS: dict[str, Callable[[Config, str], tuple[Dictionary, ...]]] = {
    "sae": openmoss_sae.dictionaries,
    "clt": openmoss_clt.dictionaries,
    "lorsa": openmoss_lorsa.dictionaries,
}


def recognises(path: Path) -> bool:
    """Whether the directory, or one below it, has a configuration of OpenMOSS."""
    try:
        return bool(_configs(path, DEEPEST, first=True))
    except (OSError, TypeError, ValueError):
        return False


def load(path: Path, device: str = "cpu") -> Replacement:
    """Read the directory `path`. Raises `ReplacementError` for whatever is missing or does not fit."""
    configs = _configs(path, DEEPEST)
    for config in configs:
        _check(config)
    _refuse_variants(path, configs)
    made = [(config, MAKERS[config.kind](config, device)) for config in sorted(configs, key=lambda c: c.layer)]
    dictionaries = tuple(dictionary for _, several in made for dictionary in several)
    names = sorted({config.model_name for config in configs if config.model_name})
    if len(names) > 1:
        raise ReplacementError(f"{path}: dictionaries of different models ({', '.join(names)}); give those of one")
    files = tuple(file for config in configs for file in (config.path, weights_of(config)))
    lm_configs = tuple(config.folder / LM_CONFIG for config in configs if (config.folder / LM_CONFIG).is_file())
    model = {"name": names[0]} if names else {}
    return Replacement(path.name, path, NAME, dictionaries, model, files=files + lm_configs)


def _configs(path: Path, depth: int, *, first: bool = False) -> list[Config]:
    """The configurations in a directory or below it; only one of them where `first`."""
    config = read_config(path)
    if config is not None or depth == 0:
        return [] if config is None else [config]
    found: list[Config] = []
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        found += _configs(folder, depth - 1, first=first)
        if found and first:
            break
    return found


def _check(config: Config) -> None:
    if config.kind not in MAKERS:
        raise ReplacementError(
            f"{config.path}: sae_type {config.kind!r} is no dictionary of {', '.join(MAKERS)}; it cannot be used here"
        )
    if config.d_model < 1 or config.n_features < 1:
        raise ReplacementError(f"{config.path}: d_model and expansion_factor (or d_sae) should say how large it is")


def _refuse_variants(path: Path, configs: list[Config]) -> None:
    """Two checkpoints that write to the same place are a choice, not a set."""
    places: dict[str, list[str]] = {}
    for config in configs:
        for index in range(len(config.hooks_out)):
            places.setdefault(config.hooks_out[index], []).append(str(config.folder.relative_to(path)))
    several = next(((place, names) for place, names in places.items() if len(names) > 1), None)
    if several is not None:
        place, names = several
        more = "" if len(names) <= SHOWN else f" and {len(names) - SHOWN} more"
        raise ReplacementError(
            f"{path}: has several dictionaries for {place}: {', '.join(names[:SHOWN])}{more}; give one of them, or a "
            "directory that holds one for each layer"
        )
