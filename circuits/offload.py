"""Tensors that are too large for what memory is left: they lie in a temporary file that is mapped into memory.

The system reads the pages that are used and drops them again when memory is short, so a long prompt is slow before it
is impossible. The file has no name any more by the time it is filled: it is gone with its tensor, however the process
ends. It lies where temporary files do (`TMPDIR`), and takes as much room there as the tensor.
"""

import tempfile
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.replacements.memory import free_memory

SHARE = 0.5  # of the free memory that one tensor may take


def room(shape: Sequence[int], device: torch.device) -> Tensor:
    """An empty float32 tensor to be filled: on the device, or in a file where the device is the CPU and it is large."""
    size = 4 * prod(shape)
    if device.type != "cpu" or size <= SHARE * free_memory():
        return torch.empty(tuple(shape), device=device)
    try:
        with tempfile.NamedTemporaryFile(prefix="circuits-") as file:
            file.truncate(size)
            return torch.from_file(file.name, shared=True, size=prod(shape)).view(tuple(shape))
    except (OSError, RuntimeError) as error:
        raise CircuitsError(
            f"{size / 1e9:.1f} GB do not fit into memory, and not into {tempfile.gettempdir()} either ({error}); "
            "take a shorter prompt, or set TMPDIR to a folder with more room"
        ) from error
