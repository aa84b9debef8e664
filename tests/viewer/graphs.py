"""The graphs that the viewer is tested on, and a feature page written by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from hand_graph import explained_hand_graph
from synthetic import Size, synthetic_graph

from circuits.graph import Graph

# With `<script>` and its like in every place that a user or a model may fill.
HOSTILE = "</script><img src=x onerror=alert(1)><script>alert(2)</script>"
HOSTILE_QUOTE = '"><svg onload=alert(3)>\' onmouseover=alert(4) `${alert(5)}` \u2028\u202e{{script}}'


@cache
def small() -> Graph:
    """A pruned graph of 12 tokens and 4 layers."""
    return synthetic_graph(Size(n_tokens=12, n_features=90, inputs=10), seed=3).prune(0.9, 0.98)


@cache
def mixed() -> Graph:
    """A full graph with every kind of node."""
    return synthetic_graph(Size(n_tokens=14, n_features=80, inputs=8, mixed=True), seed=5)


@cache
def large() -> Graph:
    """2,000 nodes and over 20,000 edges, not pruned."""
    graph = synthetic_graph(Size(n_tokens=24, n_layers=10, n_features=1520, inputs=16))
    assert len(graph.nodes) >= 2000
    assert len(graph.edges) >= 20000
    return graph


@cache
def explained() -> Graph:
    """The hand-made graph with hops, scores and pairs."""
    return explained_hand_graph()


def hostile() -> Graph:
    """A small graph whose tokens, labels, dictionaries, slug, model and annotations would like to run."""
    graph = small()
    nodes, count = graph.nodes, len(graph.nodes)
    texts = np.array([HOSTILE, HOSTILE_QUOTE])[np.arange(count) % 2]
    labels = np.where(nodes.is_error, "", texts)
    return replace(
        graph,
        prompt=HOSTILE + HOSTILE_QUOTE,
        tokens=tuple((HOSTILE, HOSTILE_QUOTE)[position % 2] for position in range(len(graph.tokens))),
        nodes=replace(nodes, label=labels, dictionary=np.where(nodes.is_feature, texts, "")),
        metadata={
            **graph.metadata,
            "slug": "../../" + HOSTILE,
            "scan": HOSTILE,
            "qParams": {
                "pinnedIds": [HOSTILE, graph.node_ids()[-1]],
                "supernodes": [[HOSTILE, *graph.node_ids()[:2]], [HOSTILE_QUOTE, graph.node_ids()[-1]]],
                "clerps": [[graph.node_ids()[3], HOSTILE]],
            },
        },
    )


def page(dictionary: str, feature: int, **changes: Any) -> dict[str, Any]:
    """A feature page as the store writes one."""
    tokens = [" the", " King", " of", " France", " is", " bald"]
    return {
        "dictionary": dictionary, "feature": feature, "kind": "clt", "label": "kings and queens", "label_by": "person",
        "tokens_seen": 200000, "density": 0.0123, "largest": 8.5,
        "histogram": {"edges": [0.0, 2.0, 4.0, 8.5], "counts": [900, 40, 3]},
        "examples": [
            {"group": "top", "tokens": tokens, "activations": [0, 8.5, 0, 2.0, 0, 0.5], "document": 7, "start": 40},
            {"group": "quantile 3 of 5", "tokens": tokens[:3], "activations": [0, 3.0, 0], "document": 9, "start": 2},
        ],
        "top_outputs": [[" crown", 1.5], [" throne", 1.25]], "bottom_outputs": [[" the", -0.75]],
        "near_by_decoder": [[dictionary, feature + 1, 0.87]], "near_by_coactivation": [],
        **changes,
    }  # fmt: skip
