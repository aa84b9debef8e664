"""A search with rounded products: its rows are computed again in float32 for what is kept, and compared.

`TraceSettings.products` lets a search multiply in bfloat16. What it finds are influences, and which nodes matter; the
edges of the graph are those of float32 rows, and close their ledger like any others.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from circuits.kernels.backend import Products
from circuits.rows import RowBlock
from circuits.sweep import Sweep, Swept

SAMPLE = 64  # targets whose rows are computed both ways


@dataclass(frozen=True)
class Rounding:
    """What rounded products did to a search.

    error
        Largest difference of an edge from its float32 value, relative to the largest edge, over `sample` rows.
    gap
        The worst ledger gap of the search.
    rows
        How many rows were computed again in float32.
    """

    products: Products
    error: float
    sample: int
    gap: float
    rows: int


def in_float32(
    sweep: Sweep, swept: Swept, wanted: np.ndarray, products: Products, on_rows: Callable[[RowBlock], None]
) -> tuple[Swept, Rounding]:
    """Rows of the `wanted` targets (a mask) again in float32, given to `on_rows`: the sweep's findings with the biases
    and the ledger of these, and how far the rounded rows of a sample were from them."""
    bias, worst = swept.bias.copy(), 0.0
    sampled = np.zeros_like(wanted)
    strongest = np.argsort(-np.where(wanted, swept.influence + sweep.targets.start, -1.0), kind="stable")
    sampled[strongest[:SAMPLE]] = True
    sampled &= wanted
    sweep.linear.products = "float32"
    for block in sweep.rows_of(wanted):
        bias[block.targets.nodes.cpu().numpy()] = block.bias.cpu().numpy()
        worst = max(worst, float(block.gaps().max()))
        on_rows(block)
    exact = list(sweep.rows_of(sampled))
    sweep.linear.products = products
    pairs = list(zip(exact, sweep.rows_of(sampled), strict=True))
    sweep.linear.products = "float32"
    largest = max((float(block.weights.abs().max()) for block in exact if block.weights.numel()), default=0.0)
    error = max((_difference(rounded, block) for block, rounded in pairs), default=0.0)
    rounding = Rounding(
        products=products,
        error=error / max(largest, 1e-30),
        sample=int(sampled.sum()),
        gap=swept.max_relative_gap,
        rows=int(wanted.sum()),
    )
    return replace(swept, bias=bias, max_relative_gap=worst), rounding


def _difference(a: RowBlock, b: RowBlock) -> float:
    assert torch.equal(a.targets.nodes, b.targets.nodes)
    return float((a.weights - b.weights).abs().max()) if a.weights.numel() else 0.0
