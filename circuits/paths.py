"""Paths between two features whatever the prompt: through the residual stream, an OV circuit or a QK circuit.

`d_i` is what one unit of feature i writes to the stream, summed over its write sites below the reader; `e_j` is feature
j's reader, `N` a norm with its gain and centring but a denominator of one (`circuits.endpoints` says why). The weight

- through the residual stream is `e_j . N d_i`. A reader of an attention output or of head outputs reads through the
  heads of its own layer, and a value feature leaves through those of its own: these are the edges of a graph in which
  all attention is replaced, patterns left out;
- through the OV circuit of a head is `e_j . N O_h V_h N d_i`, or `e_j . O_h V_h N d_i` if j reads that layer's
  attention output. A path has at most one head, so such a reader has no other;
- through the QK circuit of a head is `c (R_offset g_q W_Q N d_i) . (g_k W_K N d_j)`: i in the query, j in the key
  `offset` places before it, `c` the scale, `R` the rotary turn, `g` the gains of a QK-norm. A soft cap is left out,
  and a head with a sliding window has no path to a key outside it.

OV and QK circuits are those of "A Mathematical Framework for Transformer Circuits" (Elhage et al. 2021). Skip
connections of transcoders are left out. A feature of rank r > 1 has r rows.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from circuits.endpoints import End, Ends
from circuits.errors import CircuitsError
from circuits.linearize import write_depth
from circuits.replacements.sites import Site

Side = Literal["reads", "writes", "queries", "keys"]
Label = tuple[int | None, int | None]  # the layer and the head on a path
Link = tuple[Label, Tensor]
BLOCK = 2**22  # numbers of a decoder that are held at once


@dataclass(frozen=True)
class Through:
    """A circuit, or all of a kind: `layer` and `head` None stand for all."""

    kind: Literal["residual", "ov", "qk"]
    layer: int | None = None
    head: int | None = None

    def has(self, layer: int, head: int | None = None) -> bool:
        """Whether a layer, or one of its heads, is meant."""
        return self.layer is None or (layer == self.layer and head in (None, self.head))


@dataclass(frozen=True)
class Reader:
    """Covectors (r, D) that read the stream below `depth`, and the head behind them."""

    label: Label
    depth: int
    rows: Tensor


def parse_through(ends: Ends, text: str) -> Through:
    """`residual`, `ov`, `L2H5`, `qk` or `qk:L2H5`."""
    if text in ("residual", "ov", "qk"):
        return Through(text)  # type: ignore[arg-type]
    found = re.fullmatch(r"(qk:)?L(\d+)H(\d+)", text)
    shape = ends.shape
    there = f"L from 0 to {shape.n_layers - 1}, H from 0 to {shape.n_heads - 1}"
    if found is None:
        raise CircuitsError(f"{text!r} is no way between features: expected residual, ov, LxHy, qk or qk:LxHy; {there}")
    layer, head = int(found[2]), int(found[3])
    if layer >= shape.n_layers or head >= shape.n_heads:
        raise CircuitsError(f"{text!r}: the model has no such head; {there}")
    if layer in ends.cut:
        raise CircuitsError(f"{text!r}: a dictionary stands for the whole block of layer {layer}, which has no heads")
    return Through("qk" if found[1] else "ov", layer, head)


def blocks(ends: Ends, end: End) -> Iterator[Tensor]:
    """Numbers of the features of an end, so many at a time as can be held."""
    size = max(1, BLOCK // (ends.shape.d_model * end.rank))
    for first in range(0, end.n_features, size):
        yield torch.arange(first, min(first + size, end.n_features))


def heads_below(ends: Ends, through: Through, depth: int) -> list[tuple[int, int]]:
    """Heads that write to a reader of `depth`, and are meant."""
    stretch, shape = ends.stretch(depth), ends.shape
    layers = [layer for layer in range(shape.n_layers) if layer not in ends.cut and _attention_depth(layer) in stretch]
    return [(layer, head) for layer in layers for head in range(shape.n_heads) if through.has(layer, head)]


def links(ends: Ends, source: End, features: Tensor, target: End, through: Through) -> Iterator[Link]:
    """Weights (n r, F r) of features (n,) to all features of a target, head by head, through anything but QK."""
    depth, has_head = ends.depth_of(target), target.reads_heads or target.reads_own
    if source.kind == "value_feature":
        if has_head or _attention_depth(source.layer) not in ends.stretch(depth):
            return
        rows = ends.value_rows(source, features)
        for head in range(ends.shape.n_heads):
            if through.has(source.layer, head):
                for _, weights in ends.responses(target, rows[:, head]):
                    yield (source.layer, head), weights
    elif through.kind == "residual" or has_head:
        x = ends.writer(source, features, depth)
        for own, weights in ends.responses(target, x) if x is not None else ():
            if own is None or through.has(target.layer, own):
                yield (None if own is None else target.layer, own), weights
    else:
        for layer, head in heads_below(ends, through, depth):
            x = ends.writer(source, features, ends.read_depth("resid_pre", layer))
            if x is not None:
                for _, weights in ends.responses(target, ends.through_head(layer, head, x)):
                    yield (layer, head), weights


def score_links(ends: Ends, query: End, key: End, through: Through, offset: int) -> Iterator[tuple[Tensor, Link]]:
    """Features (n,) of the query side, and their weights (n r, F r) with all of a key side, head by head."""
    for scores in layer_scores(ends, through, offset):
        written = [ends.writer(key, features, scores.depth) for features in blocks(ends, key)]
        x_k = torch.cat([rows for rows in written if rows is not None]) if written[0] is not None else None
        for features in blocks(ends, query):
            x_q = ends.writer(query, features, scores.depth)
            if x_q is None or x_k is None:
                break
            for head in range(ends.shape.n_heads):
                if through.has(scores.layer, head):
                    weights = scores.queries(x_q, head) @ scores.keys(x_k, head).T
                    yield features, ((scores.layer, head), weights)


def readers(ends: Ends, end: End, feature: int, through: Through) -> list[Reader]:
    """What reads for a feature: itself, or heads that write to where it reads."""
    depth, found = ends.depth_of(end), []
    for head, rows in ends.covectors(end, torch.tensor([feature])):
        if through.kind == "residual" or head is not None:
            if head is None or through.has(end.layer, head):
                found.append(Reader((None if head is None else end.layer, head), depth, rows))
            continue
        for layer, below in heads_below(ends, through, depth):
            pulled = ends.pull_head(layer, below, rows)
            found.append(Reader((layer, below), ends.read_depth("resid_pre", layer), pulled))
    return found


def value_links(ends: Ends, source: End, features: Tensor, end: End, feature: int, through: Through) -> Iterator[Link]:
    """Weights (n r, r) of value features, through the heads of their layer, to one reader of the stream."""
    if end.reads_heads or end.reads_own or _attention_depth(source.layer) not in ends.stretch(ends.depth_of(end)):
        return
    ((_, covectors),) = ends.covectors(end, torch.tensor([feature]))
    rows = ends.value_rows(source, features)
    for head in range(ends.shape.n_heads):
        if through.has(source.layer, head):
            yield (source.layer, head), rows[:, head] @ covectors.T


def score_readers(ends: Ends, end: End, feature: int, through: Through, side: Side, offset: int) -> list[Reader]:
    """What a feature in the query looks for in the keys (`queries`), or what looks for one in the key (`keys`)."""
    found = []
    for scores in layer_scores(ends, through, offset):
        x = ends.writer(end, torch.tensor([feature]), scores.depth)
        for head in range(ends.shape.n_heads) if x is not None else ():
            if through.has(scores.layer, head):
                assert x is not None
                rows = scores.looks_for(x, head) if side == "queries" else scores.is_looked_for(x, head)
                found.append(Reader((scores.layer, head), scores.depth, rows))
    return found


class LayerScores:
    """The QK circuits of a layer, denominators one, at one offset from key to query."""

    def __init__(self, ends: Ends, layer: int, offset: int) -> None:
        self.layer, self.depth, self.group = layer, ends.read_depth("resid_pre", layer), ends.group
        self.norm = ends.norm(layer)
        weights = ends.base.score_weights(layer)
        self.w_q, self.w_k = weights.scale * weights.w_q, weights.w_k
        if weights.query_norm is not None:
            self.w_q = weights.query_norm[0].unsqueeze(-1) * self.w_q
        if weights.key_norm is not None:
            self.w_k = weights.key_norm[0].unsqueeze(-1) * self.w_k
        one = torch.eye(self.w_q.shape[1], device=self.w_q.device)
        place = torch.zeros(len(one), dtype=torch.long, device=one.device)
        self.turn = weights.turn(one, place + offset) @ weights.turn(one, place).T
        self.in_window = weights.window is None or offset < weights.window

    def queries(self, x: Tensor, head: int) -> Tensor:
        """(n, E) of stream vectors (n, D), turned so that the product with `keys` is the score."""
        return self.norm.apply(x, slice(None)) @ self.w_q[head].T @ self.turn

    def keys(self, x: Tensor, head: int) -> Tensor:
        """(n, E) of stream vectors (n, D)."""
        return self.norm.apply(x, slice(None)) @ self.w_k[head // self.group].T

    def looks_for(self, x: Tensor, head: int) -> Tensor:
        """Covectors (n, D) of the stream at the key, for stream vectors (n, D) in the query."""
        return self.norm.pull(self.queries(x, head) @ self.w_k[head // self.group], slice(None))

    def is_looked_for(self, x: Tensor, head: int) -> Tensor:
        """Covectors (n, D) of the stream at the query, for stream vectors (n, D) in the key."""
        return self.norm.pull(self.keys(x, head) @ self.turn.T @ self.w_q[head], slice(None))


def layer_scores(ends: Ends, through: Through, offset: int) -> Iterator[LayerScores]:
    """The layers whose QK circuits are meant and reach a key `offset` places before the query."""
    for layer in range(ends.shape.n_layers):
        if layer not in ends.cut and through.has(layer):
            scores = LayerScores(ends, layer, offset)
            if scores.in_window:
                yield scores


def _attention_depth(layer: int) -> int:
    return write_depth(Site("attn_out", layer))
