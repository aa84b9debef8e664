"""A model and its replacements as far as headers and configurations tell: every shape and every setting, and no weight.

Tensors are on torch's device "meta": they have a shape and a type, and no content. What a format's reader does with
biases while it loads (folding them, for one) is done to these, and costs nothing.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from circuits.base_models import load_shapes
from circuits.linearize import check_replacements
from circuits.loading import Model, find
from circuits.replacements.dictionary import Replacement
from circuits.replacements.errors import ReplacementError
from circuits.replacements.loading import load_replacement


def load_headers(
    model: str | Path | None = None,
    replacement: str | Path | Sequence[str | Path] | None = None,
    *,
    dtype: str | None = None,
) -> Model:
    """The same model and replacements as `circuits.load` finds, without a weight: to be estimated, and no more.

    What depends on weights is left out: the hash of the model that a replacement was trained on is not compared, and
    TransformerLens's processing is not undone. Of a model `owner/repo` on the hub only the configuration is downloaded;
    a named revision, and replacements, are downloaded whole as for `load`.

    Raises
    ------
    CircuitsError, ReplacementError
        What `circuits.load` raises for a folder, a configuration or a header; or a format cannot be told by headers.
    """
    found = find(model, replacement)
    base = load_shapes(found.model, dtype=dtype)
    base.name = found.name or base.name
    replacements = tuple(_headers(path) for path in found.replacements)
    check_replacements(base, replacements)
    return Model(base, replacements)


def _headers(path: Path) -> Replacement:
    """A replacement as its reader leaves it on the device "meta", without the hash of its model."""
    try:
        found = load_replacement(path, "meta", 0)
    except (NotImplementedError, RuntimeError) as error:
        raise ReplacementError(
            f"{path}: what this replacement is depends on its weights ({str(error).splitlines()[0]}), so headers do "
            "not tell what it takes; trace without --estimate, or write it anew with `circuits convert`"
        ) from error
    return replace(found, model={key: value for key, value in found.model.items() if key != "hash"})
