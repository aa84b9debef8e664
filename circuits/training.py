"""`circuits train`: from text to a saved replacement with its figures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from circuits.errors import CircuitsError
from circuits.evaluation import cross_entropy, dictionary_figures
from circuits.kinds import Places, Settings, build_module
from circuits.model import BaseModel
from circuits.qk_evaluation import qk_figures
from circuits.replacements.dictionary import Replacement
from circuits.replacements.formats import native, qk_format
from circuits.replacements.formats.qk_format import QKReplacement
from circuits.replacements.loading import load_replacement
from circuits.replacements.parallel import Processes
from circuits.replacements.side_by_side import SideBySide
from circuits.replacements.training import Reports, TrainingSettings, train
from circuits.streams import StreamSettings, open_stream
from circuits.text import Document, DocumentSource, open_text, read_documents

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class TextSettings:
    """Which text, and how it is cut.

    held_out
        Text for the figures at the end; by default every fiftieth document of `files`, which is then not trained on.
    field
        Field or column that has the text, in JSONL and Parquet.
    window
        Longest document that the model is run on, in tokens.
    shuffle
        Documents that are shuffled among one another.
    """

    files: tuple[Path, ...]
    held_out: tuple[Path, ...] = ()
    field: str = "text"
    window: int = 256
    shuffle: int = 20_000


@dataclass(frozen=True)
class TrainingPlan:
    """What to train, on which text, and where to.

    kind, places, settings
        See `circuits.kinds`.
    output
        Folder; the replacement goes to `output/kind`, checkpoints to `output/checkpoints/kind`.
    """

    kind: str
    text: TextSettings
    output: Path
    settings: Settings
    loop: TrainingSettings
    places: Places = field(default_factory=Places)
    stream: StreamSettings = field(default_factory=StreamSettings)
    dtype: str = "float16"
    evaluation_documents: int = 200


@dataclass(frozen=True)
class Watch:
    """Who hears of a training: its figures and steps, and how much has been cached before it."""

    reports: Reports = field(default_factory=Reports)
    caching: Callable[[int, int], None] = lambda done, total: None


def train_replacement(
    model: BaseModel, plan: TrainingPlan, watch: Watch | None = None, processes: Processes | None = None
) -> Replacement | QKReplacement | None:
    """Train, save and measure a replacement; goes on from the checkpoint under `plan.output` if there is one.

    Returns
    -------
    The replacement as it was saved; None in processes of `torchrun` other than the first.

    Raises
    ------
    CircuitsError, ReplacementError
        The text is too short or unreadable, the settings do not fit the checkpoint, or the loss is not finite.
    """
    watch, processes = watch or Watch(), processes or Processes()
    documents, held_out = _split(model, plan)
    module = build_module(model, plan.kind, plan.places, plan.settings)
    stream = open_stream(model, documents, module, plan.stream, processes, watch.caching)
    checkpoints = plan.output / CHECKPOINTS / plan.kind
    train(module, stream, plan.loop, checkpoints, watch.reports, processes)
    if not processes.leads:
        return None
    tokens = plan.loop.steps * plan.stream.batch_tokens * processes.count
    training = {"tokens": tokens, "steps": plan.loop.steps}
    identity = {"name": Path(model.name).name, "hash": model.identity}
    if isinstance(module, SideBySide):
        return _save_qk(model, plan, module, identity, training, held_out)
    path = plan.output / plan.kind
    replacement = Replacement(plan.kind, path, "circuits", _dictionaries(module), identity)
    native.save(replacement, path, plan.dtype)
    saved = load_replacement(path)
    saved.training = measure(model, [saved], held_out) | training
    native.save(saved, path, plan.dtype)
    return load_replacement(path)


def _save_qk(
    model: BaseModel,
    plan: TrainingPlan,
    module: SideBySide,
    identity: dict[str, Any],
    training: dict[str, Any],
    held_out: Sequence[Document],
) -> QKReplacement:
    """QK dictionaries have a format of their own: they write nothing to the stream."""
    path = plan.output / plan.kind
    parts: list[Any] = list(module.parts)
    dictionaries = tuple(part.to_qk_dictionary() for part in parts)
    qk_format.save(QKReplacement(plan.kind, dictionaries, identity, training), path, plan.dtype)
    saved = qk_format.load(path)
    training = qk_figures(model, saved, held_out) | training
    qk_format.save(QKReplacement(plan.kind, saved.dictionaries, identity, training), path, plan.dtype)
    return qk_format.load(path)


def _dictionaries(module: nn.Module) -> Any:
    trainable: Any = module
    return trainable.to_dictionaries()


def measure(model: BaseModel, replacements: Sequence[Replacement], documents: Sequence[Document]) -> dict[str, Any]:
    """Figures on held-out documents: those of every dictionary, and the cross-entropy kept.

    A dictionary that reads several layers at once, or rebuilds the stream below a layer, cannot take its output's place
    in a forward pass, so it has no cross-entropy.
    """
    figures: dict[str, Any] = {"dictionaries": dictionary_figures(model, replacements, documents)}
    dictionaries = [d for replacement in replacements for d in replacement.dictionaries]
    if not any(d.read.also or d.writes[0].name == "resid_pre" for d in dictionaries):
        loss = cross_entropy(model, replacements, documents)
        figures["cross_entropy"] = {
            "base": loss.base,
            "replaced": loss.replaced,
            "ablated": loss.ablated,
            "kept": loss.kept,
        }
    return figures | {"held_out_tokens": sum(len(document) - 1 for document in documents)}


def _split(model: BaseModel, plan: TrainingPlan) -> tuple[DocumentSource, list[Document]]:
    """Documents to train on, and those for the figures."""
    text = plan.text
    if not 2 <= text.window <= model.shape.context:
        raise CircuitsError(f"window is {text.window}, expected 2 to the model's context of {model.shape.context}")
    source = open_text(model, text.files, text.window, field=text.field, buffer=text.shuffle, seed=plan.stream.seed)
    if text.held_out:
        held = read_documents(model, text.held_out, text.window, field=text.field)
        return source, held[: plan.evaluation_documents]
    rest, held_out = source.split()
    held = []
    for document in held_out.in_order():
        held.append(document)
        if len(held) == plan.evaluation_documents:
            break
    return rest, held


def set_threads(threads: int | None) -> None:
    """Limit the CPU threads that training uses."""
    if threads is not None:
        torch.set_num_threads(threads)
