"""One training loop for every kind of replacement.

    calibrate on the first batches
    for each step: loss, gradient, clip, Adam with warm-up and decay; figures; now and then a checkpoint

A kind brings its parameters and its loss (`Trainable`); what it reads and writes tells the caller which activations
to put into a batch: `batch[str(read)]` (n, D) for every read site and `batch[str(site)]` (n, D') for every write
site, the same n tokens in all of them, shuffled.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from circuits.replacements.checkpoints import Resumable, load_checkpoint, read_notes, save_checkpoint
from circuits.replacements.dictionary import Dictionary
from circuits.replacements.errors import ReplacementError
from circuits.replacements.sites import ReadSite, Site

Batch = dict[str, Tensor]
Figures = dict[str, float]


class Trainable(Protocol):
    """What the loop asks of a kind of replacement; the object is an `nn.Module` as well."""

    reads: tuple[ReadSite, ...]
    writes: tuple[Site, ...]

    def calibrate(self, batches: list[Batch]) -> None:
        """Set scales and first weights from a few batches."""

    def begin_step(self, progress: float) -> None:
        """Tell how far the training is, 0 to 1."""

    def loss(self, batch: Batch) -> tuple[Tensor, Figures]:
        """The loss to follow down, and figures of this batch."""

    def to_dictionaries(self) -> tuple[Dictionary, ...]:
        """What is saved."""


@dataclass(frozen=True)
class TrainingSettings:
    """How to train.

    steps
        Batches to learn from, those of the calibration not counted.
    lr, warmup, decay
        Adam's learning rate: rises linearly over `warmup` steps, and falls linearly to zero over the last share
        `decay` of all steps.
    clip
        Largest norm of the gradient.
    calibration
        Batches to estimate means and scales from.
    figures_every, checkpoint_every
        In steps. The last step always has both.
    """

    steps: int
    lr: float = 1e-3
    warmup: int = 100
    decay: float = 0.3
    clip: float = 1.0
    calibration: int = 4
    figures_every: int = 50
    checkpoint_every: int = 500

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ..., steps - 1."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        falling = max(1.0, self.decay * self.steps)
        return self.lr * rise * min(1.0, (self.steps - step) / falling)


def train(
    module: nn.Module,
    batches: Resumable[Batch],
    settings: TrainingSettings,
    folder: str | Path,
    on_figures: Callable[[int, Figures], None] = lambda step, figures: None,
) -> Figures:
    """Train `module`, a `Trainable`; goes on from the checkpoint in `folder` if there is one.

    A training that is killed and started again ends with the same weights, to the bit, as one that is not, on the
    same machine with the same number of threads.

    Parameters
    ----------
    batches
        Gives batches for `settings.calibration + settings.steps` steps, and can say where it stands.
    on_figures
        Called with the step and the figures of its batch, and `lr`.

    Returns
    -------
    The figures of the last step.

    Raises
    ------
    ReplacementError
        The loss is not finite, the batches run out, or the checkpoint belongs to other settings.
    """
    folder, coder = Path(folder), _as_trainable(module)
    module.train()
    optimizer = torch.optim.Adam(module.parameters(), lr=settings.lr, fused=True)
    first, figures = _begin(module, optimizer, batches, settings, folder)
    for step in range(first, settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr_at(step)
        coder.begin_step(step / settings.steps)
        loss, figures = coder.loss(_next(batches, step))
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(module.parameters(), settings.clip)
        figures |= {"loss": float(loss.detach()), "lr": settings.lr_at(step), "gradient_norm": float(norm)}
        if not math.isfinite(figures["loss"]) or not math.isfinite(figures["gradient_norm"]):
            raise ReplacementError(
                f"step {step}: the loss is {figures['loss']}, its gradient's norm {figures['gradient_norm']}; "
                f"train with a learning rate below {settings.lr}, or look for NaN in the activations"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if done % settings.checkpoint_every == 0 or done == settings.steps:
            notes = {"step": done, "settings": _lasting(settings), "figures": figures}
            save_checkpoint(folder, module, optimizer, batches, notes)
        if done % settings.figures_every == 0 or done == settings.steps:
            on_figures(done, figures)
    return figures


def _begin(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Resumable[Batch],
    settings: TrainingSettings,
    folder: Path,
) -> tuple[int, Figures]:
    """Go on from a checkpoint, or calibrate; returns the first step to make and the figures so far."""
    notes = read_notes(folder)
    if notes is None:
        _as_trainable(module).calibrate([_next(batches, 0) for _ in range(settings.calibration)])
        return 0, {}
    if notes["settings"] != _lasting(settings):
        raise ReplacementError(
            f"{folder}: its checkpoint was made with settings {notes['settings']}, "
            f"now they are {_lasting(settings)}; use the same, or another folder"
        )
    notes = load_checkpoint(folder, module, optimizer, batches)
    return int(notes["step"]), dict(notes["figures"])


def _lasting(settings: TrainingSettings) -> dict[str, Any]:
    """The settings that the weights depend on."""
    return {name: value for name, value in asdict(settings).items() if not name.endswith("_every")}


def _next(batches: Resumable[Batch], step: int) -> Batch:
    try:
        return next(batches)
    except StopIteration:
        raise ReplacementError(f"the activations ran out before step {step}; give more text or fewer steps") from None


def _as_trainable(module: Any) -> Trainable:
    trainable: Trainable = module
    return trainable
