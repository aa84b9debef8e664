"""One training loop for every kind of replacement.

    calibrate on the first batches
    for each step: loss, gradient, its mean over the processes, clip, Adam with warm-up and decay;
                   now and then figures and a checkpoint

A kind brings its parameters and its loss (`Trainable`); what it reads and writes tells the caller which activations
to put into a batch: `batch[str(read)]` (n, D) for every read site and `batch[str(site)]` (n, D') for every write
site, the same n tokens in all of them, shuffled. Kinds that move features get whole contexts instead.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from circuits.replacements.checkpoints import (
    Resumable,
    begin_log,
    load_checkpoint,
    log,
    read_notes,
    save_checkpoint,
)
from circuits.replacements.dictionary import Dictionary
from circuits.replacements.errors import ReplacementError
from circuits.replacements.parallel import Buffers, Processes
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
        Batches to learn from, those of the calibration not counted. With N processes each has as many.
    lr, warmup, decay
        Adam's learning rate: rises linearly over `warmup` steps, and falls linearly to zero over the last share
        `decay` of all steps.
    clip
        Largest norm of the gradient.
    calibration
        Batches to estimate means and scales from, all processes together (rounded up to as many from each).
    figures_every, checkpoint_every
        In steps. The last step always has both.
    precision
        Of the products in the loss. With bfloat16 parameters, gradients and Adam's moments stay float32 (master
        weights), and so do sums, norms and the products at active entries (`sparse.py`).
    """

    steps: int
    lr: float = 1e-3
    warmup: int = 100
    decay: float = 0.3
    clip: float = 1.0
    calibration: int = 4
    figures_every: int = 50
    checkpoint_every: int = 500
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.precision not in ("float32", "bfloat16"):
            raise ReplacementError(f"cannot train in {self.precision!r}; choose float32 or bfloat16")

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ..., steps - 1."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        falling = max(1.0, self.decay * self.steps)
        return self.lr * rise * min(1.0, (self.steps - step) / falling)


@dataclass(frozen=True)
class Reports:
    """Who hears of a training: `figures(step, figures)` now and then, `step(done, steps)` after every step.

    `step` is called once before the first step of this process too, so that the time left can be told after a resume.
    With several processes only the first one reports.
    """

    figures: Callable[[int, Figures], None] = lambda step, figures: None
    step: Callable[[int, int], None] = lambda done, steps: None


@dataclass
class _Run:
    """A training under way."""

    module: nn.Module
    batches: Resumable[Batch]
    settings: TrainingSettings
    folder: Path
    reports: Reports
    processes: Processes
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=self.settings.lr, fused=True)
        self.device = next(self.module.parameters()).device

    def begin(self) -> tuple[int, Figures]:
        """Go on from a checkpoint, or calibrate; returns the first step to make and the figures so far."""
        notes, folder, count = read_notes(self.folder), self.folder, self.processes.count
        if notes is None:
            torch.manual_seed(self.processes.rank)  # what a module draws in its loss is the same in every training
            batches = [self.next(0) for _ in range(-(-self.settings.calibration // count))]
            batches = self.processes.gather_batches(batches)
            if self.processes.leads:
                _as_trainable(self.module).calibrate([self._here(batch) for batch in batches])
                begin_log(folder, 0)
            self.processes.broadcast(self.module)
            return 0, {}
        if notes["settings"] != _lasting(self.settings):
            raise ReplacementError(
                f"{folder}: its checkpoint was made with settings {notes['settings']}, "
                f"now they are {_lasting(self.settings)}; use the same, or another folder"
            )
        notes = load_checkpoint(folder, self.module, self.optimizer, self.batches, self.processes)
        if self.processes.leads:
            begin_log(folder, int(notes["step"]))
        return int(notes["step"]), dict(notes["figures"])

    def step(self, step: int) -> Figures:
        """One step down; returns the figures of its batch."""
        module, settings, coder = self.module, self.settings, _as_trainable(self.module)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr_at(step)
        coder.begin_step(step / settings.steps)
        batch = self.next(step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
            loss, figures = coder.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        self.processes.average_gradients(module)
        norm = nn.utils.clip_grad_norm_(module.parameters(), settings.clip)
        figures |= {"loss": float(loss.detach()), "lr": settings.lr_at(step), "gradient_norm": float(norm)}
        # The norm is the same in all processes, and not finite where any process's loss is not, so that all stop.
        finite = math.isfinite(figures["gradient_norm"])
        if not finite or (self.processes.count == 1 and not math.isfinite(figures["loss"])):
            raise ReplacementError(
                f"step {step}: the loss is {figures['loss']}, its gradient's norm {figures['gradient_norm']}; "
                f"train with a learning rate below {settings.lr}, or look for NaN in the activations"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return figures

    def report(self, done: int, figures: Figures) -> None:
        """Figures, then the checkpoint, so that no line of the log is missing behind a checkpoint."""
        settings, leads, last = self.settings, self.processes.leads, done == self.settings.steps
        if leads and (done % settings.figures_every == 0 or last):
            log(self.folder, done, figures)
            self.reports.figures(done, figures)
        if done % settings.checkpoint_every == 0 or last:
            notes = {"step": done, "settings": _lasting(settings), "figures": figures}
            save_checkpoint(self.folder, self.module, self.optimizer, self.batches, notes, self.processes)
        if leads:
            self.reports.step(done, settings.steps)

    def due(self, done: int) -> bool:
        """Whether figures of this step are needed by anyone."""
        settings = self.settings
        return done % settings.figures_every == 0 or done % settings.checkpoint_every == 0 or done == settings.steps

    def next(self, step: int) -> Batch:
        """The next batch, on the module's device."""
        try:
            return self._here(next(self.batches))
        except StopIteration:
            raise ReplacementError(
                f"the activations ran out before step {step}; give more text or fewer steps"
            ) from None

    def _here(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}


def train(
    module: nn.Module,
    batches: Resumable[Batch],
    settings: TrainingSettings,
    folder: str | Path,
    on_figures: Callable[[int, Figures], None] | Reports = Reports(),
    processes: Processes | None = None,
) -> Figures:
    """Train `module`, a `Trainable`; goes on from the checkpoint in `folder` if there is one.

    A training that is killed and started again ends with the same weights, to the bit, as one that is not, on the
    same machine with the same number of threads; so does the loss curve, `folder/log.jsonl`.

    Parameters
    ----------
    module
        On the device to train on; batches are brought there.
    batches
        Gives batches for `settings.calibration + settings.steps` steps, and can say where it stands.
    on_figures
        Called with the step and the figures of its batch, and `lr`; or `Reports`.
    processes
        From `parallel.started`, where `torchrun` started several; every one has batches of its own, and its loss and
        other figures are averaged for the report.

    Returns
    -------
    The figures of the last step.

    Raises
    ------
    ReplacementError
        The loss is not finite, the batches run out, or the checkpoint belongs to other settings.
    """
    reports = on_figures if isinstance(on_figures, Reports) else Reports(on_figures)
    run = _Run(module, batches, settings, Path(folder), reports, processes or Processes())
    module.train()
    first, figures = run.begin()
    if run.processes.leads:
        reports.step(first, settings.steps)
    buffers = Buffers(module, run.processes)
    for step in range(first, settings.steps):
        figures = run.step(step)
        buffers.bring_together()
        if run.due(step + 1):
            figures = run.processes.mean_of(figures)
        run.report(step + 1, figures)
    return figures


def _lasting(settings: TrainingSettings) -> dict[str, Any]:
    """The settings that the weights depend on."""
    return {name: value for name, value in asdict(settings).items() if not name.endswith("_every")}


def _as_trainable(module: Any) -> Trainable:
    trainable: Trainable = module
    return trainable
