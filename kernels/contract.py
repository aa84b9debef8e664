"""Products of covectors with writers, position by position: what a row of the attribution matrix is made of.

Shapes: B covectors, N writers sorted by position, S positions, D model width. `starts[s]:starts[s + 1]` are the
writers at position s. Only writers and covectors at the same position meet, so no B x N x D array ever exists.
"""

from collections.abc import Sequence

from torch import Tensor

from circuits.kernels.backend import Products, use_triton


def contract_spread(
    weights_BM: Tensor,
    g_BSD: Tensor,
    writers_ND: Tensor,
    starts: Sequence[int],
    columns: Sequence[int],
    products: Products = "float32",
) -> None:
    """Add the products of covectors at the first S positions with the writers at each to their columns, in place.

    columns
        The first column of the writers at each position; the others follow it.
    products
        `bfloat16` rounds covectors and writers to it on a GPU; off it these products are too narrow to gain by that.
    """
    if use_triton(weights_BM, g_BSD, writers_ND):
        from circuits.kernels.triton_contract import contract_spread as on_triton

        return on_triton(weights_BM, g_BSD, writers_ND, starts, columns, products=products)
    for s in range(g_BSD.shape[1]):
        first, last = starts[s], starts[s + 1]
        if last > first:
            weights_BM[:, columns[s] : columns[s] + last - first].addmm_(g_BSD[:, s], writers_ND[first:last].T)
