"""`circuits train`: from text files to a saved replacement with its figures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from circuits.activations import TokenStream
from circuits.errors import CircuitsError
from circuits.evaluation import cross_entropy, dictionary_figures
from circuits.model import BaseModel
from circuits.replacements.attention_sae import AttentionSAE
from circuits.replacements.clt import CrossLayerTranscoder
from circuits.replacements.coder import Coder, CoderSettings
from circuits.replacements.dictionary import Replacement, load_replacement
from circuits.replacements.formats import native
from circuits.replacements.sites import ReadSite, Site
from circuits.replacements.training import TrainingSettings, train
from circuits.replacements.weakly_causal import WeaklyCausalTranscoder
from circuits.text import Document, read_documents

Kind = Literal["clt", "attention-sae", "weakly-causal"]
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class TrainingPlan:
    """What to train, on which text, and where to.

    held_out
        Text for the figures at the end; by default every fiftieth document of `text`, which is then not trained on.
    layers
        Layers of attention to train for; all by default.
    window
        Longest document that the model is run on, in tokens.
    """

    kind: Kind
    text: tuple[Path, ...]
    output: Path
    coder: CoderSettings
    loop: TrainingSettings
    held_out: tuple[Path, ...] = ()
    site: Literal["attn_out", "z"] = "attn_out"
    layers: tuple[int, ...] = ()
    batch_tokens: int = 4096
    window: int = 256
    dtype: str = "float16"
    evaluation_documents: int = 200


def build_coder(model: BaseModel, plan: TrainingPlan) -> Coder:
    """The untrained replacement of the kind that the plan names."""
    shape = model.shape
    if plan.layers and plan.kind != "attention-sae":
        raise CircuitsError(f"{plan.kind} has dictionaries for every layer; choose layers for attention SAEs only")
    if plan.kind == "weakly-causal":
        return WeaklyCausalTranscoder(shape.n_layers, shape.d_model, plan.coder)
    if plan.kind == "clt":
        return CrossLayerTranscoder(shape.n_layers, shape.d_model, plan.coder)
    width = shape.d_model if plan.site == "attn_out" else shape.n_heads * shape.d_head
    layers = plan.layers or tuple(range(shape.n_layers))
    if not all(0 <= layer < shape.n_layers for layer in layers):
        raise CircuitsError(f"layers {layers} are not all in the model, which has layers 0 to {shape.n_layers - 1}")
    return AttentionSAE(layers, width, plan.coder, site=plan.site)


def train_replacement(
    model: BaseModel, plan: TrainingPlan, on_figures: Callable[[int, dict[str, float]], None]
) -> Replacement:
    """Train, save and measure a replacement; goes on from the checkpoint under `plan.output` if there is one.

    Raises
    ------
    CircuitsError, ReplacementError
        The text is too short or unreadable, the settings do not fit the checkpoint, or the loss is not finite.
    """
    documents, held_out = _split(model, plan)
    module = build_coder(model, plan)
    sites: tuple[ReadSite | Site, ...] = tuple(dict.fromkeys([*module.reads, *module.writes]))
    stream = TokenStream(model, documents, sites, plan.batch_tokens, seed=plan.coder.seed)
    train(module, stream, plan.loop, plan.output / CHECKPOINTS / plan.kind, on_figures)
    replacement = Replacement(
        name=plan.kind,
        path=plan.output,
        format="circuits",
        dictionaries=module.to_dictionaries(),
        model={"name": Path(model.name).name, "hash": model.identity},
    )
    native.save(replacement, plan.output / plan.kind, plan.dtype)
    saved = load_replacement(plan.output / plan.kind)
    saved.training = measure(model, [saved], held_out[: plan.evaluation_documents])
    saved.training["tokens"] = plan.loop.steps * plan.batch_tokens
    native.save(saved, plan.output / plan.kind, plan.dtype)
    return load_replacement(plan.output / plan.kind)


def measure(model: BaseModel, replacements: Sequence[Replacement], documents: Sequence[Document]) -> dict[str, Any]:
    """Figures on held-out documents: those of every dictionary, and the cross-entropy kept."""
    loss = cross_entropy(model, replacements, documents)
    return {
        "dictionaries": dictionary_figures(model, replacements, documents),
        "cross_entropy": {"base": loss.base, "replaced": loss.replaced, "ablated": loss.ablated, "kept": loss.kept},
        "held_out_tokens": sum(len(document) - 1 for document in documents),
    }


def _split(model: BaseModel, plan: TrainingPlan) -> tuple[list[Document], list[Document]]:
    if not 2 <= plan.window <= model.shape.context:
        raise CircuitsError(f"window is {plan.window}, expected 2 to the model's context of {model.shape.context}")
    documents = read_documents(model, plan.text, plan.window)
    if plan.held_out:
        return documents, read_documents(model, plan.held_out, plan.window)
    if len(documents) < 50:
        raise CircuitsError(f"{len(documents)} documents are too few to hold some out; give --held-out")
    return [d for i, d in enumerate(documents) if i % 50], documents[::50]


def set_threads(threads: int | None) -> None:
    """Limit the CPU threads that training uses."""
    if threads is not None:
        torch.set_num_threads(threads)
