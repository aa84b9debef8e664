"""Decode: from active features back to the stream. Plain PyTorch on any device; Triton on a GPU (`triton_decode.py`).

Letters of shapes: T positions, D width of the write site, n active entries, M rows held.
"""

from torch import Tensor

from circuits.kernels.backend import use_triton


def gather_decode(
    positions: Tensor, features: Tensor | None, activations: Tensor, rows: Tensor, n_positions: int
) -> Tensor:
    """Sum the active decoder rows at each position: `y[p] = sum over i with positions[i] = p of a_i rows[features[i]]`.

    Parameters
    ----------
    positions, activations
        (n,) each: where entry i is active, and how much.
    features
        (n,) which row of `rows` entry i takes: feature numbers when `rows` is a whole decoder (F, D), places in a list
        of unique features when only their rows were read, None when `rows` has one row an entry, (n, D), in order.
    rows
        (M, D).
    n_positions
        T, positions without an active feature included.

    Returns
    -------
    (T, D), without output bias.
    """
    if use_triton(rows, activations):
        from circuits.kernels.triton_decode import gather_decode as on_triton

        return on_triton(positions, features, activations, rows, n_positions)
    y_TD = rows.new_zeros((n_positions, rows.shape[1]))
    taken = rows if features is None else rows[features]
    return y_TD.index_add_(0, positions, taken * activations[:, None])
