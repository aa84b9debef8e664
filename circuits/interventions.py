"""Interventions: set, scale, ablate or add features in the base model, and see what changes.

Baseline is the base model, not the replaced one. A change of a feature changes what the feature writes: new activation
less current activation, times its decoder rows, is added at each of its write sites.

- `real`: everything is recomputed; a batch of interventions is one batch of rows of one forward pass.
- `frozen`: patterns, norm denominators, MLP outputs and replaced attention outputs are held at the recording, and the
  attention that a reader reads is recomputed for that reader alone: the direct effects, which are the graph's edges.

Shapes: B interventions, P positions, V vocabulary, F features that are watched, S positions of the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from circuits.changes import Change, How, PatternChange, Plan, Planner
from circuits.errors import CircuitsError
from circuits.feature_runs import Step, node_direction, on_recording
from circuits.frozen_effects import FrozenRun
from circuits.intervening import Held, RealRun
from circuits.linearize import LinearizedModel
from circuits.loading import Model
from circuits.model import BaseModel
from circuits.prompt import Prompt, prepare, token_texts
from circuits.tracing import lay_out

Mode = Literal["real", "frozen"]

__all__ = ["Bench", "Change", "FeatureRow", "How", "Mode", "Outcome", "PatternChange", "TokenRow", "intervene"]


@dataclass(frozen=True)
class TokenRow:
    """One token of an outcome's table: its logit and probability before and after."""

    token_id: int
    text: str
    logit: float
    new_logit: float
    probability: float
    new_probability: float


@dataclass(frozen=True)
class FeatureRow:
    """One watched feature of an outcome's table: pre-activation and activation, before and after."""

    node: str
    pre_activation: float
    new_pre_activation: float
    activation: float
    new_activation: float


@dataclass(frozen=True)
class Outcome:
    """What a batch of interventions did.

    baseline_logits, logits
        (P, V) and (B, P, V), before a final soft cap, at `positions`.
    baseline_features, features
        (F,) and (B, F): pre-activations of the feature nodes that were asked for, `nodes`. Of a feature of rank r the
        length along its recorded direction.
    baseline_activations, activations
        Likewise, of their activations, after the change of the feature itself if it has one.
    baseline_attention, attention
        (A, S) and (B, A, S): the patterns of the queries that were asked for.
    """

    model: Model
    positions: tuple[int, ...]
    nodes: tuple[str, ...]
    baseline_logits: Tensor
    logits: Tensor
    baseline_features: Tensor
    features: Tensor
    baseline_activations: Tensor
    activations: Tensor
    baseline_attention: Tensor
    attention: Tensor

    @property
    def baseline_probabilities(self) -> Tensor:
        """(P, V)."""
        return capped(self.model.base, self.baseline_logits).softmax(-1)

    @property
    def probabilities(self) -> Tensor:
        """(B, P, V)."""
        return capped(self.model.base, self.logits).softmax(-1)

    def top_tokens(self, row: int = 0, place: int = 0, count: int = 8) -> list[TokenRow]:
        """The most probable tokens before or after one intervention at one of `positions`, in the order of before."""
        before, after = self.baseline_probabilities[place], self.probabilities[row, place]
        strongest = torch.maximum(before, after).topk(min(count, len(before))).indices
        ids: list[int] = strongest[before[strongest].argsort(descending=True, stable=True)].tolist()
        logits, new = self.baseline_logits[place], self.logits[row, place]
        return [
            TokenRow(i, text, float(logits[i]), float(new[i]), float(before[i]), float(after[i]))
            for i, text in zip(ids, token_texts(self.model.base, ids), strict=True)
        ]

    def watched(self, row: int = 0) -> list[FeatureRow]:
        """The feature nodes that were asked for, before and after one intervention."""
        columns = (self.baseline_features, self.features[row], self.baseline_activations, self.activations[row])
        values = zip(*(column.tolist() for column in columns), strict=True)
        return [FeatureRow(node, *of_node) for node, of_node in zip(self.nodes, values, strict=True)]


class Bench:
    """One prompt, recorded once, for many interventions.

    Attributes
    ----------
    prepared, recording, linear, table : the prompt, its recording, the linearized model, and its nodes

    Example
    -------
    >>> bench = Bench(circuits.load(), "When Mary and John went to the store, John gave a drink to")
    >>> outcome = bench.run([[Change("a2_153_14", "ablate")], [Change("a2_153_14", "scale", 2.0)]])
    >>> (outcome.logits - outcome.baseline_logits).shape  # (2, 1, V)
    """

    def __init__(self, model: Model, prompt: str | Sequence[int] | Prompt) -> None:
        self.model = model
        self.prepared = prompt if isinstance(prompt, Prompt) else prepare(model.base, prompt)
        laid_out = lay_out(model, self.prepared, [])
        self.linear, self.table, self.recording = laid_out.linear, laid_out.table, laid_out.linear.recording
        self.planner = Planner(self.linear, self.table, first_is_special=self.prepared.first_is_special)

    @torch.no_grad()
    def run(
        self,
        batch: Sequence[Sequence[Change | PatternChange]],
        *,
        mode: Mode = "real",
        layers: range | None = None,
        features: Sequence[str] = (),
        positions: Sequence[int] = (-1,),
        attention: Sequence[tuple[int, int, int]] = (),
        batch_size: int = 32,
        freeze_attention: bool = False,
    ) -> Outcome:
        """Run B interventions, each a list of changes that happen together.

        Parameters
        ----------
        batch
            B lists; an empty list is the base model itself.
        mode
            `real` or `frozen`, as this module's head has them.
        layers
            Constrained patching (`real` only): within these layers the outputs of MLPs and attention are held at their
            recorded values plus the changes' writes, features change against their recorded activations, and patterns
            are as recorded; elsewhere everything is recomputed.
        features
            Addresses of feature nodes to watch, each with one position.
        positions
            Where logits are wanted.
        attention
            Queries whose patterns are wanted: (layer, head, position).
        batch_size
            Rows of one forward pass.
        freeze_attention
            Hold every attention pattern at its recorded value (`real` only).

        Raises
        ------
        CircuitsError
            An address has no place in this prompt or model, or two options do not go together.
        """
        held = self._held(mode, layers, freeze_attention)
        if batch_size < 1:
            raise CircuitsError(f"batch_size is {batch_size}, expected at least 1")
        places = [self._position(position) for position in positions]
        watching = self.planner.plan([], features)
        baseline = self._baseline(watching, len(features))
        logits, values, patterns = [], [], []
        recorded = self._attention(self.recording.patterns.unsqueeze(1), attention)
        for start in range(0, len(batch), batch_size):
            plan = self.planner.plan(batch[start : start + batch_size], features)
            final, seen, changed = self._run(plan, len(features), mode, held)
            logits.append(self._logits(final[:, places]))
            values.append(seen)
            looked = recorded if changed is None else self._attention(changed, attention)
            patterns.append(looked.expand(plan.n_rows, -1, -1))
        base_logits = self._logits(self.recording.resid_final[places])
        nothing = base_logits.new_zeros(0, *base_logits.shape)
        found = torch.cat([baseline.new_zeros(2, 0, len(features)), *values], 1)
        return Outcome(
            self.model, tuple(places), tuple(features), base_logits, torch.cat([nothing, *logits]),
            baseline[0], found[0], baseline[1], found[1], recorded[0], torch.cat([recorded[:0], *patterns]),
        )  # fmt: skip

    def _attention(self, patterns: Tensor | dict[int, Tensor], queries: Sequence[tuple[int, int, int]]) -> Tensor:
        """Rows (B, A, S) of patterns (B, H, S, S) by layer."""
        n = self.recording.n_positions
        found = []
        for layer, head, position in queries:
            shape = self.model.base.shape
            if not (0 <= layer < shape.n_layers and 0 <= head < shape.n_heads):
                raise CircuitsError(
                    f"there is no head L{layer}H{head}; the model has {shape.n_layers} layers of {shape.n_heads} heads"
                )
            found.append(patterns[layer][:, head, self._position(position)])
        return torch.stack(found, dim=1) if found else self.recording.embedding.new_zeros(1, 0, n)

    def _run(
        self, plan: Plan, n_watched: int, mode: Mode, held: Held
    ) -> tuple[Tensor, Tensor, dict[int, Tensor] | None]:
        """`resid_final` (B, S, D), the values (2, B, F) of what is watched, and patterns by layer unless frozen."""
        recorded = self.on_recording(plan)
        seen = self.recording.embedding.new_zeros(2, plan.n_rows, n_watched)
        if mode == "frozen":
            return self.recording.resid_final + FrozenRun(self.linear, plan, recorded, seen).forward(), seen, None
        ids = self.recording.token_ids.expand(plan.n_rows, -1)
        run = RealRun(self.linear, plan, recorded, seen, held)
        return run.forward(ids), seen, run.patterns

    def on_recording(self, plan: Plan) -> dict[int, Step]:
        """Every dictionary's features of a plan as they are on the recording."""
        return {index: on_recording(self.linear, index, features) for index, features in plan.features.items()}

    def _baseline(self, plan: Plan, n_watched: int) -> Tensor:
        """Recorded pre-activations and activations of what is watched, (2, F)."""
        found = self.recording.embedding.new_zeros(2, n_watched)
        recorded = self.on_recording(plan)
        for index, watched in plan.watched.items():
            for node in watched:
                side, at = recorded[index].sides[node.side], (node.position, node.column)
                direction = node_direction(recorded[index], node, side.pre[:, *at])
                for kept, value in zip(found, (side.pre, side.before), strict=True):
                    kept[node.number] = (value[:, *at] * direction).sum()
        return found

    def _held(self, mode: Mode, layers: range | None, freeze_attention: bool) -> Held:
        if mode not in ("real", "frozen"):
            raise CircuitsError(f"unknown mode {mode!r}; expected real or frozen")
        if mode == "frozen" and (layers is not None or freeze_attention):
            raise CircuitsError("in frozen mode everything is held; layers and freeze_attention belong to real mode")
        return checked_layers(self.linear, layers, freeze_attention)

    def _position(self, position: int) -> int:
        n = self.recording.n_positions
        if not -n <= position < n:
            raise CircuitsError(f"position {position} is outside the prompt of {n} tokens")
        return position % n

    def _logits(self, final: Tensor) -> Tensor:
        return self.model.base.unembed(final)


def capped(model: BaseModel, logits: Tensor) -> Tensor:
    """Logits through the final soft cap that a family may have: what probabilities are taken of."""
    cap = model.final_soft_cap
    return logits if cap is None else cap * (logits / cap).tanh()


def checked_layers(linear: LinearizedModel, layers: range | None, freeze_attention: bool = False) -> Held:
    """What is held, with layers that the model has."""
    n_layers = linear.model.shape.n_layers
    if layers is not None and not (0 <= layers.start < layers.stop <= n_layers and layers.step == 1):
        raise CircuitsError(
            f"layers {layers.start}:{layers.stop} are not among the model's; expected FROM:TO with "
            f"0 <= FROM < TO <= {n_layers}"
        )
    return Held(layers or range(0), freeze_attention)


def intervene(
    model: Model,
    prompt: str | Sequence[int] | Prompt,
    changes: Sequence[Change | PatternChange],
    *,
    mode: Mode = "real",
    layers: range | None = None,
    features: Sequence[str] = (),
    positions: Sequence[int] = (-1,),
    freeze_attention: bool = False,
) -> Outcome:
    """One intervention on one prompt: an `Outcome` of one row. For several, or more than one prompt's worth, `Bench`.

    Example
    -------
    >>> outcome = circuits.intervene(circuits.load(), "The cat sat on the", [Change("a1_12_5", "ablate")])
    >>> outcome.top_tokens()
    """
    return Bench(model, prompt).run(
        [changes],
        mode=mode,
        layers=layers,
        features=features,
        positions=positions,
        freeze_attention=freeze_attention,
    )
