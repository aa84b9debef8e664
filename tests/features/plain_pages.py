"""Feature pages computed a second time, plainly: one document at a time, from whole recordings, with loops.

It shares `draws`, which says which places a sample has, and the encoders; nothing else of the engine's pages.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tiny_models import BOS
from torch import Tensor

from circuits.families import part
from circuits.feature_gathering import DRAWN, QUANTILES, Settings
from circuits.loading import Model
from circuits.recording import Recording, record
from circuits.replacements.dictionary import Active, Dictionary
from circuits.replacements.movement import HeadLoading
from circuits.strongest import draws

Documents = list[tuple[int, ...]]


@dataclass
class Seen:
    """One dictionary on all documents: recordings, what was active, and the counted activations of every feature."""

    recordings: list[Recording]
    active: list[Active]
    events: dict[int, list[tuple[int, int, float]]] = field(default_factory=dict)


def inputs(model: Model, recording: Recording, dictionary: Dictionary) -> Tensor:
    """What a dictionary reads, (S, D), as DESIGN.md has it: an output before a post-norm if it was trained there."""
    site, layer = dictionary.read.site.name, dictionary.layer
    if site == "v":
        weights = model.base.attention_weights(layer)
        normed = recording.norm_at("resid_pre", layer).apply(recording.resid_pre[layer], slice(None))
        bias = recording.norm_at("resid_pre", layer).bias
        normed = normed if bias is None else normed + bias
        values = torch.einsum("sd,ked->ske", normed, weights.w_v)
        return (values if weights.b_v is None else values + weights.b_v).flatten(1)
    if site == "attn_out" and dictionary.before_post_norm and recording.attn_before is not None:
        return recording.attn_before[layer]
    return recording.read(dictionary.read)


def see(model: Model, dictionary: Dictionary, documents: Documents) -> Seen:
    """Run every document by itself."""
    seen = Seen([], [])
    for number, document in enumerate(documents):
        recording = record(model.base, torch.tensor(document))
        active = dictionary.encode(inputs(model, recording, dictionary))
        seen.recordings.append(recording)
        seen.active.append(active)
        for p, f, a in zip(active.positions.tolist(), active.features.tolist(), active.activations.tolist()):
            if p > 0 or document[0] != BOS:
                seen.events.setdefault(f, []).append((number, p, a))
    return seen


def counted(documents: Documents) -> int:
    """Tokens that may carry features."""
    return sum(len(document) - (document[0] == BOS) for document in documents)


def histogram(values: list[float]) -> dict[str, list[float]]:
    """Bins as wide as the largest value asks for: the smallest power of two of which 32 hold it."""
    width = 2.0**-60
    while max(map(abs, values)) >= 32 * width:
        width *= 2
    places = [int(np.floor(value / width)) for value in values]
    first, last = min(*places, 0), max(*places, -1)
    edges = [place * width for place in range(first, last + 2)]
    return {"edges": edges, "counts": [places.count(place) for place in range(first, last + 1)]}


def coarse(value: float) -> float:
    """To twelve bits."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 2**12), exponent - 12)


def chosen(events: list[tuple[int, int, float]], feature: int, settings: Settings) -> list[tuple[str, int, int]]:
    """(group, document, position) of every example."""
    best: dict[int, tuple[int, int, float]] = {}
    for event in events:
        if event[0] not in best or coarse(abs(event[2])) > coarse(abs(best[event[0]][2])):
            best[event[0]] = event
    top = sorted(best.values(), key=lambda event: (-coarse(abs(event[2])), event[0]))[: settings.top]
    found = [("top", document, position) for document, position, _ in top]
    keyed = [(float(draws(np.array([d]), np.array([p]), np.array([feature]))[0]), d, p, a) for d, p, a in events]
    sample = sorted(sorted(keyed, reverse=True)[: QUANTILES * DRAWN], key=lambda one: (coarse(one[3]), one[1], one[2]))
    for quantile in range(QUANTILES, 0, -1):
        mine = [one for rank, one in enumerate(sample) if rank * QUANTILES // len(sample) + 1 == quantile]
        fresh = [one for one in sorted(mine, reverse=True) if ("top", one[1], one[2]) not in found]
        found += [(f"quantile {quantile} of {QUANTILES}", d, p) for _, d, p, _ in fresh[: settings.per_quantile]]
    return found


def carried(dictionary: Dictionary, recording: Recording, active: Active, feature: int) -> dict[tuple[int, int], Any]:
    """(key, query) -> what a multitoken transcoder's feature brings there, a vector (r,)."""
    assert isinstance(dictionary.moved_by, HeadLoading)
    alpha = dictionary.moved_by.weights[feature].double()
    found = {}
    for i in (active.features == feature).nonzero().flatten().tolist():
        s, a = int(active.positions[i]), float(active.activations[i])
        direction = torch.ones(1) if active.directions is None else active.directions[i]
        for p in range(s, recording.n_positions):
            weight = sum(float(alpha[h] * recording.patterns[dictionary.layer][h, p, s]) for h in range(len(alpha) - 1))
            weight += float(alpha[-1]) if p == s else 0.0
            found[s, p] = weight * a * direction.double()
    return found


def effect(model: Model, dictionary: Dictionary, feature: int) -> Tensor:
    """(V,) direct effect on every token, for rank one: each write site by hand."""
    base, total = model.base, torch.zeros(model.base.shape.d_model, dtype=torch.float64)
    for site in dictionary.writes:
        row = dictionary.decoder_rows(torch.tensor([feature]), site)[0].double()
        weights = base.attention_weights(site.layer)
        if site.name == "z":
            row = row @ weights.w_o.flatten(0, 1).double()
        if site.name == "v":
            per = base.shape.n_heads // base.shape.n_kv_heads
            values = row.view(base.shape.n_kv_heads, -1)
            row = sum((values[h // per] @ weights.w_o[h].double() for h in range(base.shape.n_heads)), torch.zeros(1))
        mlp, block = site.name == "mlp_out", base.blocks[site.layer]
        path = base.family.mlp_post_norm if mlp else base.family.attention_post_norm
        if path is not None and (dictionary.before_post_norm or site.name in ("z", "v")) and site.name != "resid_post":
            row = row * base.norm_parameters(part(block, path))[0].double()
        total = total + row
    gain, _, _ = base.norm_parameters(part(base.lm, base.family.final_norm))
    if base.family.norm == "layer":
        total = total - total.mean()
    logits = base.unembedding.double() @ (total * gain.double())
    return logits - logits.mean()
