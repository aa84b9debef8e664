"""The attribution graph: nodes, edges, head loadings, attention patterns, and what is known about them.

    graph.prune()            the part that carries the influence
    graph.to_networkx()      a networkx.DiGraph with every column as an attribute, and back
    graph.save("g.json")     one of the formats in circuits.graph.formats, by suffix
    Graph.load("g.json")     and back, without the model

Shapes: `n` nodes, `m` edges, `k` head loadings, `T` tokens.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from circuits.graph.errors import GraphError
from circuits.graph.explained import Pairs, Scores
from circuits.graph.tables import ID_PREFIXES, OWN_HEAD, STAYS, Booleans, Edges, Float32, Heads, Nodes

if TYPE_CHECKING:
    import networkx


@dataclass(frozen=True, eq=False)
class Graph:
    """An attribution graph on one prompt.

    Attributes:
        prompt: The text that the user gave.
        tokens: Text of each token.
        token_ids: Id of each token.
        n_layers: Number of layers of the model.
        nodes: The nodes, `n` rows.
        edges: The edges, `m` rows, at most one for a pair of nodes.
        heads: The head loadings, `k` rows, brought into the order of the edges.
        patterns: (T, T) attention patterns, [query, key], by (layer, head), for the base model's heads that `heads` and
            the hop splits name.
        metadata: Anything that JSON can hold: versions, model, replacements, settings, scores, ledger, and so on.
        first_hops: Edges through frozen attention split by the head that takes them away from the source's position.
        last_hops: The same edges split by the head that brings them to the target's position. In both, `STAYS` is the
            part that never leaves the position, `REST` the sum of what is too small to be listed; layer -1 for both.
        scores: Attention scores that are explained, `c` rows.
        pairs: What makes these scores, brought into the order of the scores and of the forms.

    Raises:
        GraphError: The parts do not fit together.
    """

    prompt: str
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    n_layers: int
    nodes: Nodes
    edges: Edges
    heads: Heads
    patterns: dict[tuple[int, int], Float32] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    first_hops: Heads = field(default_factory=Heads.empty)
    last_hops: Heads = field(default_factory=Heads.empty)
    scores: Scores = field(default_factory=Scores.empty)
    pairs: Pairs = field(default_factory=Pairs.empty)

    def __post_init__(self) -> None:
        """Check that the parts fit together, and sort the loadings by edge."""
        n_tokens = len(self.tokens)
        if n_tokens != len(self.token_ids):
            raise GraphError(f"Graph has {n_tokens} tokens and {len(self.token_ids)} token_ids; expected as many.")
        _in_range("Nodes.position", self.nodes.position, n_tokens, "the prompt's tokens")
        _check_layers(self.nodes, self.n_layers)
        _in_range("Edges.source", self.edges.source, len(self.nodes), "the nodes")
        _in_range("Edges.target", self.edges.target, len(self.nodes), "the nodes")
        for table in ("heads", "first_hops", "last_hops"):
            self._check_heads(table)
        if len(self.heads.head) and self.heads.head.min() <= STAYS:
            raise GraphError("Graph.heads has the entries of a hop split; put them into first_hops or last_hops.")
        for side in ("query", "key"):
            _in_range(f"Scores.{side}", getattr(self.scores, side), n_tokens, "the prompt's tokens")
        _in_range("Pairs.key", self.pairs.key, n_tokens, "the prompt's tokens")
        self.pairs.check(self.scores)
        object.__setattr__(self, "pairs", self.pairs.in_order())
        pairs = self.edges.target.astype(np.int64) * max(len(self.nodes), 1) + self.edges.source
        if (twice := len(pairs) - len(np.unique(pairs))) > 0:
            raise GraphError(f"Edges has {twice} pairs of nodes more than once; add their weights up to one edge.")
        for name, pattern in self.patterns.items():
            if name[1] < 0:
                raise GraphError(f"Graph.patterns has head {name[1]} of layer {name[0]}; expected heads from 0 on.")
            if pattern.shape != (n_tokens, n_tokens):
                raise GraphError(f"Graph.patterns{name} has shape {pattern.shape}; expected {(n_tokens, n_tokens)}.")

    def _check_heads(self, name: str) -> None:
        """Check the indices of a table of heads, and sort it by edge."""
        heads: Heads = getattr(self, name)
        n_tokens, shown = len(self.tokens), {"heads": "Heads"}.get(name, f"Graph.{name}")
        _in_range(f"{shown}.edge", heads.edge, len(self.edges), "the edges")
        _in_range(f"{shown}.key", heads.key, n_tokens, "the prompt's tokens")
        _in_range(f"{shown}.query", heads.query, n_tokens, "the prompt's tokens")
        if np.any(np.diff(heads.edge) < 0):
            object.__setattr__(self, name, heads.take(np.argsort(heads.edge, kind="stable")))

    def node_ids(self) -> list[str]:
        """One name for each node, each name once.

        Features are `layer_feature_position` and errors `layer_error_position`, with a letter in front: none for an
        MLP, `a` for attention, `k` and `q` for the key and the query side of a multitoken transcoder, `v` for values,
        `r` for the error of a block. Embeddings are `E_token_position`, logits `n_layers_token_position`. A name that
        comes again (two dictionaries at one site) gets `_2`, `_3` and so on.

        Returns:
            n names in the order of the nodes.
        """
        names, seen = [], Counter[str]()
        columns = [getattr(self.nodes, name).tolist() for name in ("kind", "layer", "feature", "position")]
        for kind, layer, feature, position in zip(*columns, strict=True):
            site = ID_PREFIXES[kind] + ("" if kind == "embedding" else str(layer))
            name = f"{site}_{'error' if kind.endswith('_error') else feature}_{position}"
            seen[name] += 1
            names.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
        return names

    def select(self, node_mask: Booleans, edge_mask: Booleans | None = None) -> Graph:
        """The part of the graph under two masks.

        Edges with an end outside the node mask go too; nodes, edges, loadings and hops are numbered again, and patterns
        and explained scores that none of these name any more are dropped. Influences stay those of the full graph.

        Args:
            node_mask: (n,) nodes to keep.
            edge_mask: (m,) edges to keep; all by default.

        Raises:
            GraphError: A mask does not have one value for each node or edge.
        """
        node_mask = np.asarray(node_mask, dtype=np.bool_)
        edge_mask = np.ones(len(self.edges), np.bool_) if edge_mask is None else np.asarray(edge_mask, dtype=np.bool_)
        if node_mask.shape != (len(self.nodes),) or edge_mask.shape != (len(self.edges),):
            raise GraphError(
                f"The masks have shapes {node_mask.shape} and {edge_mask.shape}; expected "
                f"{(len(self.nodes),)} for the nodes and {(len(self.edges),)} for the edges."
            )
        edge_mask = edge_mask & node_mask[self.edges.source] & node_mask[self.edges.target]
        new_node = np.cumsum(node_mask, dtype=np.int32) - 1
        new_edge = np.cumsum(edge_mask, dtype=np.int32) - 1
        edges = self.edges.take(edge_mask)
        split: dict[str, Any] = {}
        kept_score = np.zeros(len(self.scores), np.bool_)
        for name in ("heads", "first_hops", "last_hops"):
            rows: Heads = getattr(self, name)
            kept = edge_mask[rows.edge]
            if len(self.scores):
                explained = self.explained_by(name)
                kept_score[[score for row in np.flatnonzero(kept).tolist() for score in explained[row]]] = True
            rows = rows.take(kept)
            split[name] = dataclasses.replace(rows, edge=new_edge[rows.edge])
        pairs = self.pairs.take(kept_score[self.pairs.score])
        new_score = np.cumsum(kept_score, dtype=np.int32) - 1
        named = {at for rows in split.values() for at in zip(rows.layer.tolist(), rows.head.tolist(), strict=True)}
        return dataclasses.replace(
            self,
            nodes=self.nodes.take(node_mask),
            edges=Edges(source=new_node[edges.source], target=new_node[edges.target], weight=edges.weight),
            patterns={name: pattern for name, pattern in self.patterns.items() if name in named},
            scores=self.scores.take(kept_score),
            pairs=dataclasses.replace(pairs, score=new_score[pairs.score]),
            **split,
        )

    def explained_by(self, name: str = "heads") -> list[list[int]]:
        """Which explained scores each row of a table of heads names.

        A score belongs to a head, a query and a key; one of a feature's own pattern to edges into that feature alone.

        Args:
            name: "heads", "first_hops" or "last_hops".

        Returns:
            For each row of the table the indices of the scores, mostly none or one.
        """
        found: dict[tuple[int | str, ...], list[int]] = {}
        columns = [getattr(self.scores, column).tolist() for column in ("layer", "head", "query", "key", "owner")]
        for index, place in enumerate(zip(*columns, strict=True)):
            found.setdefault(place, []).append(index)
        rows: Heads = getattr(self, name)
        if not found or not len(rows):
            return [[] for _ in range(len(rows))]
        names = self.node_ids()
        owners = [names[node] for node in self.edges.target[rows.edge].tolist()]
        places = zip(*(getattr(rows, column).tolist() for column in ("layer", "head", "query", "key")), strict=True)
        return [
            found.get((*place, owner if place[1] == OWN_HEAD else ""), [])
            for place, owner in zip(places, owners, strict=True)
        ]

    def prune(
        self, node_threshold: float = 0.8, edge_threshold: float = 0.98, max_feature_nodes: int | None = None
    ) -> Graph:
        """The part of the graph that carries the influence; see `circuits.graph.pruning.prune`."""
        from circuits.graph.pruning import prune

        return prune(self, node_threshold, edge_threshold, max_feature_nodes)

    def to_networkx(self) -> networkx.DiGraph[str]:
        """The same graph for networkx; see `circuits.graph.formats.networkx_graph.to_networkx`."""
        from circuits.graph.formats.networkx_graph import to_networkx

        return to_networkx(self)

    @classmethod
    def from_networkx(cls, digraph: networkx.DiGraph[str]) -> Graph:
        """The inverse of `to_networkx`; see `circuits.graph.formats.networkx_graph.from_networkx`."""
        from circuits.graph.formats.networkx_graph import from_networkx

        return from_networkx(digraph)

    def save(self, path: str | Path) -> None:
        """Write the graph in the format of the path's suffix: .json, .npz, .dot, .graphml, .svg or .html.

        The file is written whole or not at all, and the same graph gives the same bytes.

        Raises:
            GraphError: The suffix is unknown or the file cannot be written.
        """
        from circuits.graph.formats import writer

        writer(path)(self, Path(path))

    def _repr_html_(self) -> str | None:
        """The viewer in a frame, for notebooks: cut off from the notebook's page, and with everything in it."""
        from circuits.graph.formats.html_file import in_frame

        return in_frame(self) if self.tokens else None

    @classmethod
    def load(cls, path: str | Path) -> Graph:
        """Read a graph that was saved as .json or .npz.

        Raises:
            GraphError: The suffix has no reader, or the file is missing, truncated or no graph.
        """
        from circuits.graph.formats import reader

        return reader(path)(Path(path))


def _check_layers(nodes: Nodes, n_layers: int) -> None:
    expected = np.clip(nodes.layer, 0, n_layers - 1)
    expected[nodes.kind == "embedding"] = -1
    expected[nodes.kind == "logit"] = n_layers
    wrong = np.flatnonzero(nodes.layer != expected)
    if len(wrong):
        first = int(wrong[0])
        raise GraphError(
            f"Nodes.layer has {nodes.layer[first]} for a node of kind {nodes.kind[first]} in a model of {n_layers} "
            f"layers; expected -1 for embeddings, {n_layers} for logits, 0 to {n_layers - 1} for all others."
        )


def _in_range(name: str, values: np.ndarray[Any, Any], end: int, what: str) -> None:
    outside = (values < 0) | (values >= end)
    if outside.any():
        raise GraphError(f"{name} has {values[outside][0]}; expected 0 to {end - 1}, an index into {what}.")
