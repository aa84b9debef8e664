"""Tensors that are too large for what memory is left: they lie in a temporary file that is mapped into memory.

The system reads the pages that are used and drops them again when memory is short, so a long prompt is slow before it
is impossible. The file has no name any more by the time it is filled: it is gone with its tensor, however the process
ends. It lies where temporary files do (`TMPDIR`), and takes as much room there as the tensor.
"""

import ctypes
import tempfile
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.replacements.memory import free_memory

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)
LARGEST, KEPT = 2**25, 2**26  # bytes
LINE = 16  # float32 numbers in a line of the cache
SHARE = 0.5  # of the free memory that one tensor may take


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for the next tensor of that size, up to `KEPT` bytes.

    The covectors of a block are some megabytes, made anew at every sublayer. By default glibc gives such pieces back to
    the system and takes them again page by page, which takes longer than filling them. Does nothing elsewhere.
    """
    try:
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(MMAP_THRESHOLD, LARGEST)
        library.mallopt(TRIM_THRESHOLD, KEPT)
    except (OSError, AttributeError):
        return


def _large_pages(size: int) -> Tensor:
    """An empty tensor in pages of 2 MiB, which numpy asks for where the system has them: filling it at first costs
    a third. It begins where a line of the cache does."""
    numbers = np.empty(size + LINE, dtype=np.float32)
    first = -numbers.ctypes.data // 4 % LINE
    return torch.from_numpy(numbers[first : first + size])


def room(shape: Sequence[int], device: torch.device) -> Tensor:
    """An empty float32 tensor to be filled: on the device, or in a file where the device is the CPU and it is large."""
    size = 4 * prod(shape)
    if device.type != "cpu":
        return torch.empty(tuple(shape), device=device)
    if size <= SHARE * free_memory():
        return _large_pages(prod(shape)).view(tuple(shape))
    try:
        with tempfile.NamedTemporaryFile(prefix="circuits-") as file:
            file.truncate(size)
            return torch.from_file(file.name, shared=True, size=prod(shape)).view(tuple(shape))
    except (OSError, RuntimeError) as error:
        raise CircuitsError(
            f"{size / 1e9:.1f} GB do not fit into memory, and not into {tempfile.gettempdir()} either ({error}); "
            "take a shorter prompt, or set TMPDIR to a folder with more room"
        ) from error
