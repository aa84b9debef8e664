"""Labels of a graph's features: one way for all of them, whoever wrote them.

A source of labels (`NeuronpediaLabels`, a `FeatureStore`) says what it knows of a graph's nodes; `label` puts that
into the nodes' `label` column, which tables, pictures and files show.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from circuits.graph import Graph

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Found:
    """What a source knows.

    labels
        By node.
    asked
        Features of the graph that the source could be asked for.
    unreachable
        Why some of them were not, if so.
    facts
        What the graph's metadata shall say from now on.
    """

    labels: dict[int, str]
    asked: int
    unreachable: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class LabelSource(Protocol):
    """Somebody who knows about features."""

    def graph_labels(self, graph: Graph, progress: Progress | None = None) -> Found:
        """Labels of a graph's features."""


@dataclass(frozen=True)
class Labelled:
    """A graph with labels: how many of its features have one, of how many, and why some could not be asked for."""

    graph: Graph
    found: int
    features: int
    unreachable: str | None = None


def label(graph: Graph, source: LabelSource, progress: Progress | None = None) -> Labelled:
    """Give the features of a graph the labels that a source knows; those that it does not know stay as they are.

    Raises
    ------
    CircuitsError
        The source does not fit the graph, or cannot be asked.
    """
    found = source.graph_labels(graph, progress)
    labels = graph.nodes.label.tolist()
    for node, text in found.labels.items():
        labels[node] = text
    nodes = replace(graph.nodes, label=np.array(labels, dtype=np.str_))
    labelled = replace(graph, nodes=nodes, metadata={**graph.metadata, **found.facts})
    return Labelled(labelled, len(found.labels), found.asked, found.unreachable)
