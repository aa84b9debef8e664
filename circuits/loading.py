"""Load a base model with its replacements: the embedded default, or any that the user names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from circuits.errors import CircuitsError
from circuits.linearize import check_replacements
from circuits.model import BaseModel, load_base_model
from circuits.replacements.dictionary import Replacement, load_replacement

DEFAULT = Path(__file__).resolve().parent / "default"
# What comes with the embedded model, by the name that --replacement takes.
EMBEDDED = {
    "attention-sae": ("clt", "attention-sae"),
    "mtc": ("clt", "mtc"),
    "weakly-causal": ("weakly-causal",),
    "clt": ("clt",),
}


@dataclass(frozen=True)
class Model:
    """A base model and the replacements that stand for its MLPs and attention."""

    base: BaseModel
    replacements: tuple[Replacement, ...]

    def __repr__(self) -> str:
        names = ", ".join(replacement.name for replacement in self.replacements) or "no replacement"
        return f"Model({self.base.name}: {self.base.shape.n_layers} layers of width {self.base.shape.d_model}; {names})"


def load(
    model: str | Path | None = None,
    replacement: str | Path | Sequence[str | Path] | None = None,
    *,
    device: str = "cpu",
    dtype: str | None = None,
) -> Model:
    """Load a model and its replacements.

    Parameters
    ----------
    model
        A local folder or hub id of a causal LM; by default the embedded model.
    replacement
        One or several directories of replacements. With the embedded model also a name of what comes with it:
        `attention-sae` (the default: CLT and attention output SAEs), `mtc` (CLT and multitoken transcoders),
        `weakly-causal` (features of both types), or `clt` alone. Layers without a replacement stay as they are:
        attention frozen, MLP outputs as error nodes.
    device, dtype
        Where and in which precision the weights are held. Recording and attribution run in float32.

    Returns
    -------
    Model
        To be given to `circuits.trace`.

    Raises
    ------
    CircuitsError, ReplacementError
        With what is wrong, in which file, and what to do.
    """
    base = load_base_model(model if model is not None else _embedded("model"), device=device, dtype=dtype)
    if model is None:
        base.name = "circuits-default"
    if replacement is None:
        replacement = [] if model is not None else "attention-sae"
    given = [replacement] if isinstance(replacement, str | Path) else replacement
    paths = [path for one in given for path in _paths(one, embedded=model is None)]
    replacements = tuple(load_replacement(path, device) for path in paths)
    check_replacements(base, replacements)
    return Model(base, replacements)


def _paths(given: str | Path, *, embedded: bool) -> list[Path]:
    """Directories of a replacement that the user named; one that is there goes before a name of the embedded ones."""
    if embedded and str(given) in EMBEDDED and not Path(given).is_dir():
        return [_embedded(name) for name in EMBEDDED[str(given)]]
    return [Path(given)]


def _embedded(name: str) -> Path:
    path = DEFAULT / name
    if not path.is_dir():
        raise CircuitsError(f"{path}: the embedded default is missing from this installation; name a --model")
    return path
