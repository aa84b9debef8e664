"""Products of covectors with writers, position by position: what a row of the attribution matrix is made of.

Shapes: B covectors, N writers sorted by position, S positions, D model width. `starts[s]:starts[s + 1]` are the
writers at position s. Only writers and covectors at the same position meet, so no B x N x D array ever exists.
"""

from torch import Tensor


def contract_spread(g_BSD: Tensor, writers_ND: Tensor, starts: list[int]) -> Tensor:
    """Covectors at the first S positions with the writers at each: (B, starts[S])."""
    n = g_BSD.shape[1]
    out = g_BSD.new_empty(g_BSD.shape[0], starts[n])
    for s in range(n):
        rows = slice(starts[s], starts[s + 1])
        out[:, rows] = g_BSD[:, s] @ writers_ND[rows].T
    return out
