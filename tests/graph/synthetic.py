"""Random graphs that look like real ones: seeded, of any size, with every kind of node and head loadings.

Plain graphs have MLP features and attention features in every layer. Mixed ones have another replacement in each layer:
values, a multitoken transcoder of the attention output, one of the residual stream, features with own patterns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from circuits.graph import (
    IDENTITY_HEAD,
    OWN_HEAD,
    Edges,
    Graph,
    Heads,
    Nodes,
    completeness_score,
    depth,
    replacement_score,
    with_influence,
)

TEXT = (
    "When Mary and John went to the store , John gave a drink to her because the old king had asked him for it and "
    "so they walked home along the river , where a small boat was waiting for them under the willow trees . Nobody "
    "knew who had left it there , but the lantern still burned ; somebody must have been here not long ago"
)
WORDS = TEXT.split()


@dataclass(frozen=True)
class Size:
    """How large a graph to make."""

    n_tokens: int
    n_layers: int = 4
    n_features: int = 60
    inputs: int = 6
    n_logits: int = 3
    mixed: bool = False

    def features(self, layer: int) -> tuple[str, str]:
        """Kinds of the features of a layer's MLP and of its attention; both are the same where the block is one."""
        if not self.mixed:
            return "mlp_feature", "attention_feature"
        kind = ("value_feature", "mtc_key", "mtc_key", "attention_feature")[layer % 4]
        return ("mtc_key" if layer % 4 == 2 else "mlp_feature"), kind

    def errors(self, layer: int) -> tuple[str, ...]:
        """Kinds of the errors of a layer."""
        attention = ("value_error", "attention_error", "", "attention_error")[layer % 4 if self.mixed else 1]
        return ("mlp_error", attention) if attention else ("block_error",)


def synthetic_graph(size: Size, seed: int = 0) -> Graph:
    """A full graph (not pruned) with influences, scores and the patterns of the heads that are named."""
    rng = np.random.default_rng(seed)
    nodes = _nodes(size, rng)
    edges, heads = _edges(size, nodes, rng)
    tokens = ("<s>", *(f" {word}" if word.isalnum() else word for word in WORDS[: size.n_tokens - 1]))
    patterns = {
        (layer, head): _pattern(size.n_tokens, rng)
        for layer, head in sorted(set(zip(heads.layer.tolist(), heads.head.tolist(), strict=True)))
        if head >= 0
    }
    metadata: dict[str, Any] = {
        "model": {"name": "circuits-default", "hash": "0123abcd"},
        "versions": {"circuits": "0.1.0"},
        "scores": {
            "replacement": replacement_score(nodes, edges),
            "completeness": completeness_score(nodes, edges),
        },
        "ledger": {"max_relative_gap": 3.2e-06},
        "left_out_influence": 0.0007,
    }
    graph = Graph(
        prompt="".join(tokens[1:]).strip(),
        tokens=tokens,
        token_ids=tuple(range(100, 100 + size.n_tokens)),
        n_layers=size.n_layers,
        nodes=nodes,
        edges=edges,
        heads=heads,
        patterns=patterns,
        metadata=metadata,
    )
    return with_influence(graph)


def _pattern(n_tokens: int, rng: np.random.Generator) -> Any:
    scores = np.tril(rng.random((n_tokens, n_tokens)) + 0.01).astype(np.float32)
    return (scores / scores.sum(1, keepdims=True)).astype(np.float32)


def _nodes(size: Size, rng: np.random.Generator) -> Nodes:
    rows: list[tuple[Any, ...]] = []
    last = size.n_tokens - 1
    for position in range(size.n_tokens):
        word = "<s>" if position == 0 else f" {WORDS[position - 1]}"
        rows.append(("embedding", "", -1, position, 100 + position, 0.0, np.nan, word))
    late = rng.beta(2.2, 1.1, size.n_features)
    for index in range(size.n_features):
        side = int(rng.random() < 0.45)
        layer = int(rng.integers(size.n_layers))
        position = last if rng.random() < 0.25 else 1 + int(late[index] * last * 0.999)
        kind = size.features(layer)[side]
        name = f"clt.{layer}" if kind == "mlp_feature" else f"attn.{layer}"
        rows.append((kind, name, layer, position, 1000 + index, 0.0, np.nan, ""))
        if kind == "mtc_key":
            queries = {position, int(rng.integers(position, size.n_tokens)), last}
            rows += [("mtc_query", name, layer, query, 1000 + index, 0.0, np.nan, "") for query in sorted(queries)]
    for layer in range(size.n_layers):
        for position in range(1, size.n_tokens):
            rows += [(kind, "", layer, position, -1, 0.0, np.nan, "") for kind in size.errors(layer)]
    probabilities = (0.62, 0.21, 0.08, 0.04, 0.02)[: size.n_logits]
    for index, probability in enumerate(probabilities):
        word = (" Mary", " her", " the", " them", " it")[index]
        rows.append(("logit", "", size.n_layers, last, 300 + index, probability, probability, word))
    columns = [np.array(values) for values in zip(*rows, strict=True)]
    kind, dictionary, layer, position, feature, weight, probability, label = columns
    is_feature = np.char.endswith(kind, "_feature") | np.char.startswith(kind, "mtc_")
    count = len(kind)
    return Nodes(
        kind=kind,
        dictionary=dictionary,
        layer=layer,
        position=position,
        feature=feature,
        activation=np.where(is_feature, rng.lognormal(0.5, 0.7, count), np.nan),
        pre_activation=np.where(is_feature | (kind == "logit"), rng.normal(2.0, 1.0, count), np.nan),
        bias=np.where(is_feature | (kind == "logit"), rng.normal(0.0, 0.3, count), np.nan),
        influence=np.zeros(count),
        cumulative_influence=np.ones(count),
        target_weight=weight,
        probability=probability,
        predicted=np.full(count, np.nan),
        measured=np.full(count, np.nan),
        label=label,
    )


def _edges(size: Size, nodes: Nodes, rng: np.random.Generator) -> tuple[Edges, Heads]:
    """Readers of attention outputs and of values see earlier positions through heads, all else its own position."""
    source, target, weight = [], [], []
    loadings: list[tuple[int, int, int, int, int, float]] = []
    for reader in np.flatnonzero(nodes.is_feature | (nodes.kind == "logit")).tolist():
        below = _readable(nodes, reader)
        likely = np.where(nodes.is_error[below], 0.25, np.where(nodes.kind[below] == "embedding", 1.0, 2.5))
        chosen = rng.choice(below, min(size.inputs, len(below)), replace=False, p=likely / likely.sum())
        for writer in sorted(chosen.tolist()):
            size_here = rng.lognormal(-1.0, 0.9) * (0.4 if nodes.is_error[writer] else 1.0)
            value = np.float32(size_here * rng.choice((1.0, 1.0, -1.0)))
            layer, heads = _heads(size, nodes, writer, reader, rng)
            if heads:
                # Loadings are signed: some go against their edge.
                signed = rng.dirichlet([0.4] * len(heads)) * (np.where(rng.random(len(heads)) < 0.15, -0.5, 1.0))
                parts = (signed * value).astype(np.float32)
                place = int(nodes.position[writer]), int(nodes.position[reader])
                for head, part in zip(heads, parts.tolist(), strict=True):
                    loadings.append((len(source), layer, head, *place, part))
                value = parts.sum()
            source.append(writer)
            target.append(reader)
            weight.append(value)
    columns = [np.array(values) for values in zip(*loadings, strict=True)]
    edges = Edges(source=np.array(source), target=np.array(target), weight=np.array(weight, dtype=np.float32))
    return edges, Heads(*columns)


def _readable(nodes: Nodes, reader: int) -> Any:
    """The nodes that a reader may have edges from."""
    at = depth(nodes)
    is_key = nodes.kind == "mtc_key"
    here = nodes.position == nodes.position[reader]
    before = nodes.position <= nodes.position[reader]
    if nodes.kind[reader] == "mtc_query":
        same = (nodes.dictionary == nodes.dictionary[reader]) & (nodes.feature == nodes.feature[reader])
        return np.flatnonzero(is_key & same & before)
    attends = nodes.kind[reader] == "attention_feature"
    moved = np.isin(nodes.kind, ("value_feature", "value_error"))
    return np.flatnonzero((before if attends else here | (before & moved)) & (at < at[reader]) & ~is_key)


def _heads(size: Size, nodes: Nodes, writer: int, reader: int, rng: np.random.Generator) -> tuple[int, list[int]]:
    """Layer and heads that carry an edge; no heads where none does."""
    layer = int(nodes.layer[reader])
    if nodes.kind[writer] in ("value_feature", "value_error"):
        layer = int(nodes.layer[writer])
    elif nodes.kind[reader] == "attention_feature" and size.mixed:
        return layer, [OWN_HEAD]
    elif nodes.kind[reader] not in ("attention_feature", "mtc_query"):
        return layer, []
    heads = sorted(rng.choice(8, 3, replace=False).tolist())
    same = nodes.kind[reader] == "mtc_query" and nodes.position[writer] == nodes.position[reader]
    return layer, [IDENTITY_HEAD, *heads] if same else heads
