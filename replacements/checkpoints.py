"""Checkpoints of a training: one safetensors file that holds everything a later process needs to go on exactly.

Tensors of the file: `module.<name>`, `optimizer.<parameter>.<entry>`, `batches.<name>`, `random`. What is no tensor
(the step, the settings, the place in the data) is JSON in the file's own header. One file, moved into place when it
is complete: a process that is killed while writing leaves the previous checkpoint as it was.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from circuits.replacements.errors import ReplacementError

CHECKPOINT = "checkpoint.safetensors"
Item = TypeVar("Item", covariant=True)


class Resumable(Protocol[Item]):
    """An iterator that can say where it stands. Its state is a flat dictionary of tensors and JSON values."""

    def __iter__(self) -> Iterator[Item]: ...

    def __next__(self) -> Item: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def save_checkpoint(
    folder: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Resumable[Any],
    notes: dict[str, Any],
) -> None:
    """Write `folder/checkpoint.safetensors`, whole or not at all. `notes` are JSON values."""
    place = batches.state_dict()
    tensors = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    for parameter, entries in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{parameter}.{name}": torch.as_tensor(value) for name, value in entries.items()}
    tensors |= {f"batches.{name}": value for name, value in place.items() if isinstance(value, Tensor)}
    tensors["random"] = torch.get_rng_state()
    header = json.dumps(notes | {"batches": {n: v for n, v in place.items() if not isinstance(v, Tensor)}})
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{CHECKPOINT}.{os.getpid()}"
    try:
        held = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        save_file(held, unfinished, metadata={"notes": header})
        os.replace(unfinished, folder / CHECKPOINT)
    finally:
        unfinished.unlink(missing_ok=True)


def read_notes(folder: Path) -> dict[str, Any] | None:
    """The JSON part of the checkpoint in `folder`; None where there is no checkpoint."""
    path = folder / CHECKPOINT
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            notes: dict[str, Any] = json.loads((file.metadata() or {})["notes"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ReplacementError(f"{path}: no checkpoint of a training ({error}); remove it to begin again") from error
    return notes


def load_checkpoint(
    folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, batches: Resumable[Any]
) -> dict[str, Any]:
    """Set module, optimizer, batches and the random state as the checkpoint has them; returns its notes."""
    path, notes = folder / CHECKPOINT, read_notes(folder)
    if notes is None:
        raise ReplacementError(f"{path}: no such file")
    groups: dict[str, dict[str, Tensor]] = {"module": {}, "optimizer": {}, "batches": {}}
    with safe_open(path, framework="pt") as file:
        random = file.get_tensor("random")
        for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
            group, _, rest = name.partition(".")
            if group in groups:
                groups[group][rest] = file.get_tensor(name)
    try:
        module.load_state_dict(groups["module"])
    except RuntimeError as error:
        raise ReplacementError(f"{path}: belongs to another module; remove it to begin again: {error}") from error
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in groups["optimizer"].items():
        parameter, _, entry = name.partition(".")
        state.setdefault(int(parameter), {})[entry] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    batches.load_state_dict(notes.pop("batches") | groups["batches"])
    torch.set_rng_state(random)
    return notes
