"""Several processes that train one replacement together, each on text of its own; one process is the simplest case.

    torchrun --nproc-per-node N -m circuits train KIND ...

After every backward pass the gradients are averaged over the processes, so that all take the same step, from the same
weights, to the bit. Nothing is wrapped: a module needs not know. With token-wise kinds N processes with batches of B
tokens do what one process does with batches of N B tokens, except for a choice over the whole batch, such as BatchTopK,
which each process makes in its own. A process's loss is a mean over its own batch; where batches have unequal numbers
of scored tokens, as contexts have, what is followed is the mean of these means.

Buffers are brought together after every step, by what they are:

    floats     the mean of what each process has added: running thresholds, scales
    integers   counters of tokens since something happened, such as `unfired`: where it happened in no process, what
               each has counted is added up; else the smallest
    booleans   true where they are true in any process
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

from circuits.replacements.errors import ReplacementError

BUCKET = 1 << 23  # numbers that are sent together
PATIENCE = timedelta(hours=4)  # for a process that saves and measures while the others wait for it


@dataclass(frozen=True)
class Processes:
    """Which process this is, and of how many."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process reports, and writes checkpoints."""
        return self.rank == 0

    @torch.no_grad()
    def broadcast(self, module: nn.Module) -> None:
        """Every process gets the parameters and buffers of the first."""
        if self.count > 1:
            for tensor in [*module.parameters(), *module.buffers()]:
                distributed.broadcast(tensor.data, 0)

    @torch.no_grad()
    def average_gradients(self, module: nn.Module) -> None:
        """The mean over all processes; a parameter without gradient counts as zero where another process has one."""
        if self.count == 1:
            return
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        flags = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
        distributed.all_reduce(flags, distributed.ReduceOp.MAX)
        found = []
        for parameter, flag in zip(parameters, flags.tolist(), strict=True):
            if flag:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                found.append(parameter.grad)
        self._mean(found)

    def _mean(self, tensors: list[Tensor]) -> None:
        """Each tensor becomes its mean over the processes, sent in large pieces."""
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            distributed.all_reduce(flat)
            flat /= self.count
            for tensor, part in zip(bucket, torch.split(flat, [t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def mean_of(self, figures: dict[str, float]) -> dict[str, float]:
        """Each figure's mean over the processes; all must call this with the same figures."""
        if self.count == 1:
            return figures
        everyone = self.gather(figures)
        return {name: sum(one.get(name, value) for one in everyone) / self.count for name, value in figures.items()}

    def gather(self, value: Any) -> list[Any]:
        """What every process has, in the order of the processes, in every process; values that can be pickled."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values

    def gather_batches(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """All processes' batches on the first process: every first one, every second one, ...; elsewhere none."""
        if self.count == 1:
            return batches
        held = [{name: tensor.cpu() for name, tensor in batch.items()} for batch in batches]
        values: list[Any] | None = [None] * self.count if self.leads else None
        distributed.gather_object(held, values)
        return [batch for step in zip(*values, strict=True) for batch in step] if values else []

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            distributed.barrier()


class Buffers:
    """Keeps a module's buffers the same in all processes; see the head of this file."""

    def __init__(self, module: nn.Module, processes: Processes) -> None:
        self.module, self.processes = module, processes
        self.before = [buffer.clone() for buffer in module.buffers()] if processes.count > 1 else []

    @torch.no_grad()
    def bring_together(self) -> None:
        """Call this after every step, in all processes."""
        if self.processes.count == 1:
            return
        pairs = list(zip(self.module.buffers(), self.before, strict=True))
        floats = [(buffer, before) for buffer, before in pairs if buffer.is_floating_point()]
        others = [(buffer, before) for buffer, before in pairs if not buffer.is_floating_point()]
        added = [buffer - before for buffer, before in floats]
        self.processes._mean(added)
        for (buffer, before), change in zip(floats, added, strict=True):
            buffer.copy_(before + change)
        for buffer, before in others:
            _bring_counters_together(buffer, before)
        self.before = [buffer.clone() for buffer in self.module.buffers()]


def _bring_counters_together(buffer: Tensor, before: Tensor) -> None:
    if buffer.dtype == torch.bool:
        flags = buffer.int()
        distributed.all_reduce(flags, distributed.ReduceOp.MAX)
        buffer.copy_(flags > 0)
        return
    smallest, total = buffer.clone(), buffer - before
    distributed.all_reduce(smallest, distributed.ReduceOp.MIN)
    distributed.all_reduce(total)
    happened = (smallest < before) | (smallest == 0)
    buffer.copy_(torch.where(happened, smallest, before + total))


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of the same dtype, together at most `BUCKET` numbers, or a single larger one."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        bucket: list[Tensor] = []
        for tensor in (t for t in tensors if t.dtype == dtype):
            if bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET:
                yield bucket
                bucket = []
            bucket.append(tensor)
        if bucket:
            yield bucket


@contextmanager
def started(device: str = "cpu") -> Iterator[tuple[Processes, str]]:
    """The processes that `torchrun` started, or just this one, and the device for this one.

    "cuda" becomes this process's own GPU. Processes talk through gloo for what is on the CPU, NCCL for what is on GPUs.
    They leave together: the last to be done saves and measures while the others wait.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes(), device
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = device.startswith("cuda")
    if on_gpu:
        if torch.cuda.device_count() <= local:
            raise ReplacementError(
                f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}; "
                "start as many processes a machine as it has GPUs"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    distributed.init_process_group(backend, rank=rank, world_size=count, timeout=PATIENCE)
    processes = Processes(rank, count)
    try:
        yield processes, device
        processes.wait()
    finally:
        distributed.destroy_process_group()
