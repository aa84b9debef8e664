"""Which edges get hop splits where a prompt is so long that not all can: the strongest, within a bound on the work.

Shapes: m edges, S positions, D model width, H heads, E head width, L layers.
"""

import numpy as np

from circuits.sweep import Sweep

HOP_WORK = 2**42  # multiplications of a graph's hop splits: about two minutes of a small machine


def worth_splitting(sweep: Sweep, source: np.ndarray, target: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(k,) numbers of the edges to split, ascending: the strongest by `scores` (m,) until their work is `HOP_WORK`.

    A target's covector at position p is pulled through the heads below it, H E p^2 / 2 each, a source's stream pushed
    through those above it alike, both once however many edges they have; then each edge meets H E S of every layer. An
    edge within one position costs D.
    """
    shape, table = sweep.linear.model.shape, sweep.table
    outputs = [position for readers in sweep.targets.outputs for position in readers.positions]
    position = np.append(table.position, outputs).astype(np.float64)
    layer = np.append(table.layer, [shape.n_layers] * len(outputs)).clip(min=0)
    width, n_positions = shape.n_heads * shape.d_head, sweep.linear.recording.n_positions
    order = np.argsort(-scores, kind="stable")
    source, target = source[order], target[order]
    moves = position[source] != position[target]
    work = np.where(moves, 2.0 * width * n_positions * shape.n_layers, float(shape.d_model))
    for nodes, square in (
        (target, layer * (position + 1) ** 2),
        (source, (shape.n_layers - layer) * (n_positions - position) ** 2),
    ):
        moving = np.flatnonzero(moves)
        first = moving[np.unique(nodes[moving], return_index=True)[1]]
        work[first] += width * square[nodes[first]] / 2
    return np.sort(order[np.cumsum(work) <= HOP_WORK])
