"""Several trainable modules as one: they share batches and steps, nothing else."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from circuits.replacements.coder import Batch
from circuits.replacements.dictionary import Dictionary


class SideBySide(nn.Module):
    """Modules of one kind, such as one a layer, trained on the same batches; the loss is the sum of theirs."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self.in_context = bool(getattr(modules[0], "in_context", False))
        self.reads = self._union("reads")
        self.writes = self._union("writes")
        self.extra = self._union("extra")

    def _union(self, name: str) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(one for part in self.parts for one in getattr(part, name, ())))

    def calibrate(self, batches: list[Batch]) -> None:
        """Each part calibrates on the same batches."""
        for part in self._parts():
            part.calibrate(batches)

    def begin_step(self, progress: float) -> None:
        """Tell every part how far the training is."""
        for part in self._parts():
            part.begin_step(progress)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The sum of the parts' losses; their figures must have different names."""
        losses: list[Tensor] = []
        figures: dict[str, float] = {}
        for part in self._parts():
            loss, found = part.loss(batch)
            losses.append(loss)
            figures |= found
        return torch.stack(losses).sum(), figures

    def to_dictionaries(self) -> tuple[Dictionary, ...]:
        """Those of every part."""
        return tuple(dictionary for part in self._parts() for dictionary in part.to_dictionaries())

    def _parts(self) -> list[Any]:
        return list(self.parts)
