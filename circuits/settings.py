"""How a graph is traced and pruned. Apart from the engine, so that the command line can show it without torch."""

from dataclasses import dataclass

from circuits.errors import CircuitsError

PRODUCTS = ("float32", "bfloat16")  # as circuits.kernels.backend has them, which imports torch


@dataclass(frozen=True)
class TraceSettings:
    """How a graph is traced and pruned.

    left_out
        Influence that may stay unexpanded in all; every influence is short by at most this. 0 expands everything.
    max_targets
        Compute the rows of so many features only, the most influential as far as is known by then, as circuit-tracer's
        `max_feature_nodes` does; what has no row is not in the graph. `left_out` is not used then, unless the rows
        would not fit into memory: then each layer gets a part of them, from the top down.
    node_threshold, edge_threshold
        Shares of the influence and of the edge scores that the pruned graph keeps.
    max_feature_nodes
        Keep at most so many feature nodes, the strongest first.
    unpruned
        Keep every node and edge; implies `left_out = 0`.
    hops
        Split edges through frozen attention by their first and last hops; a pruned graph's only.
    products
        How the search for what matters multiplies covectors with weights and writers: in "float32", or rounded to
        "bfloat16" first, which is faster where the processor or the card has such products. Edges are computed in
        float32 all the same; influences and the choice of nodes feel the rounding, and the graph's metadata says how
        much (`products`). Not for an unpruned graph, whose edges are those of the search.
    explain
        Explain the attention scores of the heads that carry the graph's edges (`Graph.scores` and `Graph.pairs`).
    """

    left_out: float = 1e-3
    node_threshold: float = 0.8
    edge_threshold: float = 0.98
    max_feature_nodes: int | None = None
    max_targets: int | None = None
    unpruned: bool = False
    hops: bool = True
    explain: bool = False
    products: str = "float32"

    def __post_init__(self) -> None:
        for name in ("left_out", "node_threshold", "edge_threshold"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise CircuitsError(f"{name} is {getattr(self, name)}, expected a number from 0 to 1")
        if self.products not in PRODUCTS:
            raise CircuitsError(f"products is {self.products!r}, expected one of {', '.join(PRODUCTS)}")
        if self.unpruned and self.products != "float32":
            raise CircuitsError("an unpruned graph keeps the rows of the search: its products are float32")
        for name in ("max_feature_nodes", "max_targets"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CircuitsError(f"{name} is {value}, expected at least 1")
