"""What a graph predicts of an ablation: signed effects over all paths of the unpruned graph (DESIGN.md section 6).

    T_ti = w_ti + sum_j (w_ji / pre_j) T_tj        j: the feature nodes that i feeds; T_t of the target itself is 1

A target's change is passed on in proportion to its activation: node j changes by `-w_ji` when i is ablated, the share
`w_ji / pre_j` of all that it writes. Ablating node i changes target t by `-T_ti`. Gates, patterns and norm denominators
are frozen, so this is what the linearized model says of nodes that follow from each other.
"""

import numpy as np
import torch

from circuits.sweep import Progress, Sweep


@torch.no_grad()
def total_effects(sweep: Sweep, progress: Progress | None = None, *, direct: bool = False) -> np.ndarray:
    """T (output targets, nodes), float64: by how much each output target falls when a node is ablated.

    One sweep from the top: when the nodes of a layer are reached, what they have on every target is final. `direct`:
    by their own edges to the targets alone.
    """
    table, n = sweep.table, len(sweep.table)
    effects = torch.zeros(sweep.targets.n_outputs, n, dtype=torch.float64, device=sweep.device)
    groups = sweep.groups
    done, in_all = 0, sum(len(nodes) for nodes, _ in groups)
    for nodes, build in groups:
        for block in sweep.rows.blocks(build(np.arange(len(nodes)))):
            weights = block.weights.double()
            numbers = block.targets.nodes
            if int(numbers[0]) >= n:
                effects[numbers - n] = effects[numbers - n].index_add(1, block.sources, weights)
            elif not direct:
                pre = block.targets.values.double()
                shares = weights / torch.where(pre.abs() > 0, pre, torch.inf).unsqueeze(1)
                effects.index_add_(1, block.sources, effects[:, numbers] @ shares)
        done += len(nodes)
        if progress is not None:
            progress(done, in_all)
    assert len(table) == n
    return effects.cpu().numpy()
