"""Checkpoints of a training: one safetensors file that holds everything a later process needs to go on exactly.

Tensors of the file: `module.<name>`, `optimizer.<parameter>.<entry>`, and for every process r `batches.<r>.<name>` and
`random.<r>.<device>`. What is no tensor (the step, the settings, the places in the data) is JSON in the file's own
header. One file, moved into place when it is complete: a process that is killed while writing leaves the previous
checkpoint as it was.

Beside it stands the loss curve, `log.jsonl`, one line a report: `{"step": ..., "loss": ..., ...}`. A training that
goes on takes off the lines behind its checkpoint, so that every step is there once.
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
from circuits.replacements.parallel import Processes

CHECKPOINT = "checkpoint.safetensors"
LOG = "log.jsonl"
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
    processes: Processes | None = None,
) -> None:
    """Write `folder/checkpoint.safetensors`, whole or not at all. `notes` are JSON values.

    All processes call this; the first one writes.
    """
    processes = processes or Processes()
    places = processes.gather((batches.state_dict(), _random_states(module)))
    if not processes.leads:
        return
    tensors = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    for parameter, entries in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{parameter}.{name}": torch.as_tensor(value) for name, value in entries.items()}
    for rank, (place, random) in enumerate(places):
        tensors |= {f"batches.{rank}.{name}": value for name, value in place.items() if isinstance(value, Tensor)}
        tensors |= {f"random.{rank}.{device}": state for device, state in random.items()}
    values = [{n: v for n, v in place.items() if not isinstance(v, Tensor)} for place, _ in places]
    header = json.dumps(notes | {"processes": processes.count, "batches": values})
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{CHECKPOINT}.{os.getpid()}"
    try:
        held = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        save_file(held, unfinished, metadata={"notes": header})
        _to_disk(unfinished)
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
    folder: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Resumable[Any],
    processes: Processes | None = None,
) -> dict[str, Any]:
    """Set module, optimizer, batches and the random state as the checkpoint has them; returns its notes."""
    path, notes, processes = folder / CHECKPOINT, read_notes(folder), processes or Processes()
    if notes is None:
        raise ReplacementError(f"{path}: no such file")
    if notes.get("processes") != processes.count:
        raise ReplacementError(
            f"{path}: made by {notes.get('processes', 'an unknown number of')} processes, now there are "
            f"{processes.count}; go on with the same number, or use another folder"
        )
    own = {f"batches.{processes.rank}.": "batches", f"random.{processes.rank}.": "random"}
    prefixes = {"module.": "module", "optimizer.": "optimizer"} | own
    groups: dict[str, dict[str, Tensor]] = {group: {} for group in prefixes.values()}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
            for prefix, group in prefixes.items():
                if name.startswith(prefix):
                    groups[group][name.removeprefix(prefix)] = file.get_tensor(name)
    try:
        module.load_state_dict(groups["module"])
    except RuntimeError as error:
        raise ReplacementError(f"{path}: belongs to another module; remove it to begin again: {error}") from error
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in groups["optimizer"].items():
        parameter, _, entry = name.partition(".")
        state.setdefault(int(parameter), {})[entry] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    batches.load_state_dict(notes.pop("batches")[processes.rank] | groups["batches"])
    torch.set_rng_state(groups["random"]["cpu"])
    if "cuda" in groups["random"] and _device(module).type == "cuda":
        torch.cuda.set_rng_state(groups["random"]["cuda"], _device(module))
    return notes


def begin_log(folder: Path, step: int) -> None:
    """Take off what a stopped training has left behind `step`: lines of the log, and an unfinished checkpoint."""
    for path in folder.glob(f".{CHECKPOINT}.*"):
        path.unlink()
    path = folder / LOG
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] > step or not line.endswith("\n"):
                break
        except (ValueError, KeyError):  # cut off
            break
        kept.append(line)
    unfinished = folder / f".{LOG}"
    unfinished.write_text("".join(kept), encoding="utf-8")
    os.replace(unfinished, path)


def log(folder: Path, step: int, figures: dict[str, float]) -> None:
    """One more line of the loss curve."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, **figures}) + "\n")


def read_log(folder: Path) -> list[dict[str, float]]:
    """The loss curve of the training in `folder`."""
    return [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]


def _random_states(module: nn.Module) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if (device := _device(module)).type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
