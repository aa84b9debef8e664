"""Load a replacement of any format that is known: one adapter a format, in `replacements/formats/`.

An adapter is a module with

    NAME                       the format, as `Replacement.format` and messages say it
    LOOKED_FOR                 what tells it, in a few words, for the message when nothing is recognised
    recognises(path) -> bool   by the content of the directory; reads headers and configurations only, and never raises
    load(path, device)         the `Replacement`, or a `ReplacementError`; on torch's device "meta" no weight is read
"""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from circuits.replacements.dictionary import Replacement
from circuits.replacements.errors import ReplacementError
from circuits.replacements.memory import free_memory

ADAPTERS = (
    "native",
    "circuit_tracer",
    "openmoss",
    "saelens",
    "clt_forge",
    "crosslayer_coding",
    "clt_training",
    "sparsify",
    "gemma_scope",
    "gemma_scope_2",
)


def adapter_of(path: Path) -> Any:
    """The adapter module of the format that lies in the directory `path`, or None."""
    for name in ADAPTERS:
        adapter = import_module(f"circuits.replacements.formats.{name}")
        if adapter.recognises(path):
            return adapter
    return None


def is_replacement(path: Path) -> bool:
    """Whether a replacement of a known format lies in the directory `path`."""
    return path.is_dir() and adapter_of(path) is not None


def load_replacement(path: str | Path, device: str | torch.device = "cpu", memory: int | None = None) -> Replacement:
    """Read the replacement in the directory `path`; its format is told by its content.

    Biases are loaded whole as float32 to `device`, decoders stay in their files, and so do encoders that do not fit.

    Parameters
    ----------
    memory
        Bytes on the device that encoders may take; of those that do not fit a block at a time is read for encoding, and
        later the rows of active features. By default half of what is free, for those that are to be converted or moved
        to a device; float32 encoders are used where they lie.

    Raises
    ------
    ReplacementError
        No format is recognised, or a file does not hold what it should.
    """
    path = Path(path)
    if not path.is_dir():
        raise ReplacementError(f"{path}: no such directory; a replacement is a directory on this machine")
    adapter = adapter_of(path)
    if adapter is None:
        adapters = [import_module(f"circuits.replacements.formats.{name}") for name in ADAPTERS]
        known = "; ".join(f"{adapter.LOOKED_FOR} ({adapter.NAME})" for adapter in adapters)
        raise ReplacementError(f"{path}: no replacement of a known format here; looked for {known}")
    replacement: Replacement = adapter.load(path, str(device))
    if memory is None:
        replacement.hold_encoders(free_memory(device) // 2, needed=True)
    else:
        replacement.hold_encoders(memory)
    return replacement
