"""Files that are written whole or not at all, and read with an error that names them."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from circuits.graph.errors import GraphError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file by way of a temporary one in the same folder, so that no reader sees a half of it.

    Args:
        path: Where the file shall be; its folder must exist.
        content: All of it.

    Raises:
        GraphError: The folder is missing or not writable, the disk is full, and so on.
    """
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        reason = error.strerror or error
        raise GraphError(
            f"{path}: cannot be written ({reason}). Check that the folder exists and is writable."
        ) from error


def read_whole(path: Path) -> bytes:
    """All bytes of a file.

    Raises:
        GraphError: The file is missing or not readable.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise GraphError(f"{path}: cannot be read ({error.strerror or error}). Check the path.") from error


def _umask() -> int:
    """The mask that new files of this process get; mkstemp ignores it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
