"""Random graphs that look like real ones: seeded, of any size, with every kind of node and head loadings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from circuits.graph import Edges, Graph, Heads, Nodes, completeness_score, depth, replacement_score, with_influence

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


def synthetic_graph(size: Size, seed: int = 0) -> Graph:
    """A full graph (not pruned) with influences, scores and two heads' worth of patterns."""
    rng = np.random.default_rng(seed)
    nodes = _nodes(size, rng)
    edges, heads = _edges(size, nodes, rng)
    tokens = ("<s>", *(f" {word}" if word.isalnum() else word for word in WORDS[: size.n_tokens - 1]))
    patterns = {
        (layer, head): _pattern(size.n_tokens, rng)
        for layer, head in sorted(set(zip(heads.layer.tolist(), heads.head.tolist(), strict=True)))
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
        kind = ("mlp", "attention")[int(rng.random() < 0.45)]
        layer = int(rng.integers(size.n_layers))
        position = last if rng.random() < 0.25 else 1 + int(late[index] * last * 0.999)
        name = f"clt.{layer}" if kind == "mlp" else f"attn.{layer}"
        rows.append((f"{kind}_feature", name, layer, position, 1000 + index, 0.0, np.nan, ""))
    for layer in range(size.n_layers):
        for position in range(1, size.n_tokens):
            rows.append(("mlp_error", "", layer, position, -1, 0.0, np.nan, ""))
            rows.append(("attention_error", "", layer, position, -1, 0.0, np.nan, ""))
    probabilities = (0.62, 0.21, 0.08, 0.04, 0.02)[: size.n_logits]
    for index, probability in enumerate(probabilities):
        word = (" Mary", " her", " the", " them", " it")[index]
        rows.append(("logit", "", size.n_layers, last, 300 + index, probability, probability, word))
    columns = [np.array(values) for values in zip(*rows, strict=True)]
    kind, dictionary, layer, position, feature, weight, probability, label = columns
    is_feature = np.isin(kind, ("mlp_feature", "attention_feature"))
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
        label=label,
    )


def _edges(size: Size, nodes: Nodes, rng: np.random.Generator) -> tuple[Edges, Heads]:
    """Attention features read earlier positions below through heads, all else reads its own position."""
    at = depth(nodes)
    source, target, weight = [], [], []
    loadings: list[tuple[int, int, int, int, int, float]] = []
    for reader in np.flatnonzero(nodes.is_feature | (nodes.kind == "logit")).tolist():
        attends = nodes.kind[reader] == "attention_feature"
        here = nodes.position <= nodes.position[reader] if attends else nodes.position == nodes.position[reader]
        below = np.flatnonzero(here & (at < at[reader]))
        likely = np.where(nodes.is_error[below], 0.25, np.where(nodes.kind[below] == "embedding", 1.0, 2.5))
        chosen = rng.choice(below, min(size.inputs, len(below)), replace=False, p=likely / likely.sum())
        for writer in sorted(chosen.tolist()):
            size_here = rng.lognormal(-1.0, 0.9) * (0.4 if nodes.is_error[writer] else 1.0)
            value = np.float32(size_here * rng.choice((1.0, 1.0, -1.0)))
            if attends:
                heads = rng.choice(8, 3, replace=False)
                parts = (rng.dirichlet((0.4, 0.4, 0.4)) * value).astype(np.float32)
                place = (int(nodes.layer[reader]), int(nodes.position[writer]), int(nodes.position[reader]))
                for head, part in zip(sorted(heads.tolist()), parts.tolist(), strict=True):
                    loadings.append((len(source), place[0], head, place[1], place[2], part))
                value = parts.sum()
            source.append(writer)
            target.append(reader)
            weight.append(value)
    columns = [np.array(values) for values in zip(*loadings, strict=True)]
    edges = Edges(source=np.array(source), target=np.array(target), weight=np.array(weight, dtype=np.float32))
    return edges, Heads(*columns)
