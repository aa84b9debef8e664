"""The graph of a changed model: nodes ablated or scaled while it runs, and everything that follows recomputed.

A real run (`circuits.intervening`) finds what the changes add at every site. The prompt is then recorded with exactly
that added, so streams, patterns and norm denominators are those of the changed model, and it is linearized and encoded
like any other recording. Two things differ:

- A changed feature writes what it is held at. Its pre-activation is what it reads in the changed model, and its edges
  explain that; its activation, which its own edges to others start from, is the factor times what the gate gives. An
  ablated feature is no node.
- Readers of an attention output read it before anything was added, as in every run.

An error is, as always, what was recorded less what dictionaries write: one that was ablated alone, with nothing changed
before it, is zero. The ledger closes as it does without changes, which `tests/interventions/test_held.py` shows.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from circuits.changes import Change, Plan, Planner, Side
from circuits.errors import CircuitsError
from circuits.feature_runs import on_recording
from circuits.intervening import RealRun, through_heads
from circuits.linearize import LinearizedModel
from circuits.loading import Model
from circuits.nodes import NodeTable, build_nodes
from circuits.recording import Added, record
from circuits.replacements.dictionary import Active
from circuits.replacements.sites import Site

HOWS = ("ablate", "scale")


@torch.no_grad()
def hold(
    model: Model, linear: LinearizedModel, table: NodeTable, changes: Sequence[Change], *, first_is_special: bool
) -> tuple[LinearizedModel, NodeTable]:
    """The linearized model and the nodes of a prompt with changes held, from those without.

    Raises
    ------
    CircuitsError
        A change is neither `ablate` nor `scale`, or its node has no place in this prompt or model.
    """
    for change in changes:
        if change.how not in HOWS:
            raise CircuitsError(
                f"{change.node}: a graph is traced with nodes ablated or scaled, not with {change.how!r}; use "
                "`circuits intervene` for that"
            )
    plan = Planner(linear, table, first_is_special=first_is_special).plan([changes])
    recording = record(model.base, linear.recording.token_ids, added_by(linear, plan))
    changed = LinearizedModel(model.base, model.replacements, recording)

    def held(index: int, side: Side, active: Active) -> Active:
        return _held(plan, index, side, active, recording.n_positions)

    return changed, build_nodes(changed, first_is_special=first_is_special, hold=held)


def added_by(linear: LinearizedModel, plan: Plan) -> Added:
    """What a plan of one intervention adds at each site of a real run."""
    recorded = {index: on_recording(linear, index, features) for index, features in plan.features.items()}
    nothing = linear.recording.embedding.new_zeros(2, 1, 0)
    run = RealRun(linear, plan, recorded, nothing, keep_written=True)
    run.forward(linear.recording.token_ids[None])
    sites: dict[Site, Tensor] = {}
    raw: dict[Site, Tensor] = {}
    values: dict[int, Tensor] = {}
    for (site, is_raw), added in run.written.items():
        if bool(added.any()):
            if site.name == "v":
                values[site.layer] = added[0]
            else:
                (raw if is_raw else sites)[site] = added[0]
    for layer, value in values.items():
        moved = through_heads(run.patterns[layer], value[None], linear.model.shape.d_head)[0]
        site = Site("z", layer)
        sites[site] = sites[site] + moved if site in sites else moved
    return Added(sites, raw, values)


def _held(plan: Plan, index: int, side: Side, active: Active, length: int) -> Active:
    """Active features with their activations changed; those that are zero then are no longer among them."""
    if index not in plan.changes:
        return active
    keep, _ = plan.factors(index, side, 0, length)
    activations = active.activations.clone()
    for column, feature in enumerate(plan.features[index].tolist()):
        mine = active.features == feature
        activations[mine] *= keep[0, active.positions[mine], column].to(activations)
    return replace(active, activations=activations).take(activations != 0)
