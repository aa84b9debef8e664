"""Which tokens a node gets what it reads from, over all paths below it.

    origin(t) = sum_i |w_ti| / sum_j |w_tj| origin(i)        a token is its own origin

The same shares in which influence flows down (DESIGN.md section 4), followed from below for every node at once. What
comes from errors has no origin: it is counted apart.
"""

import numpy as np

from circuits.graph import ERROR_KINDS
from circuits.sweep import Sweep


def token_origins(sweep: Sweep) -> np.ndarray:
    """(nodes and output targets, S + 1): the share of each position's token; the last column is that of errors."""
    table = sweep.table
    n_positions = sweep.linear.recording.n_positions
    origins = np.zeros((len(table) + sweep.targets.n_outputs, n_positions + 1))
    tokens = np.flatnonzero(table.kind == "embedding")
    origins[tokens, table.position[tokens]] = 1.0
    origins[np.flatnonzero(np.isin(table.kind, ERROR_KINDS)), -1] = 1.0
    for nodes, build in reversed(sweep.groups):
        for block in sweep.rows.blocks(build(np.arange(len(nodes)))):
            shares = block.weights.abs().double()
            shares /= shares.sum(1, keepdim=True).clamp(min=1e-30)
            at, sources = block.targets.nodes.cpu().numpy(), block.sources.cpu().numpy()
            origins[at] = shares.cpu().numpy() @ origins[sources]
    return origins
