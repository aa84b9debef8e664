"""The entries of a hop split while they are found: the strongest of each edge are listed, the others summed up.

Shapes: m edges, e edges of one portion, X places, H heads.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from circuits.graph import REST
from circuits.loadings import NEGLIGIBLE, Loadings

# An entry's layer, head, key and query as one number; heads from the lowest special one on.
_HEADS, _FIRST_HEAD = 2**12, REST


@dataclass(frozen=True)
class Hops:
    """Hops of some edges (e,) through one layer: `weights` (e, X, H) of `heads` (H,) at keys and queries (e, X).

    Keys or queries that are the same at all places are (e, 1).
    """

    edges: Tensor
    layer: int
    heads: np.ndarray
    weights: Tensor
    key: Tensor
    query: Tensor


class Split:
    """Keeps the strongest `keep` hops of each of m edges.

    Holds m times `keep` entries, however many layers, heads and positions the edges run through.
    """

    def __init__(self, n_edges: int, n_positions: int, keep: int, device: torch.device) -> None:
        self.keep, self.n_positions = keep, n_positions
        self._weight = torch.zeros(n_edges, keep, device=device)
        self._code = torch.zeros(n_edges, keep, dtype=torch.long, device=device)
        self._rest = torch.zeros(n_edges, dtype=torch.float64, device=device)
        self._size = torch.zeros(n_edges, device=device)

    def add(self, hops: Hops) -> None:
        """Take the hops of one layer; each edge comes once a layer."""
        if not len(hops.edges):
            return
        flat = hops.weights.flatten(1)
        both = torch.cat([self._weight[hops.edges], flat], dim=1)
        at = both.abs().topk(self.keep, dim=1).indices
        heads = torch.from_numpy(hops.heads - _FIRST_HEAD).to(at.device) + (hops.layer + 1) * _HEADS
        ends = (hops.key * self.n_positions + hops.query).unsqueeze(2)
        codes = (heads * self.n_positions**2 + ends).expand(hops.weights.shape).flatten(1)
        self._code[hops.edges] = torch.cat([self._code[hops.edges], codes], dim=1).gather(1, at)
        self._weight[hops.edges] = both.gather(1, at)
        self._rest[hops.edges] += both.double().scatter(1, at, 0.0).sum(1)
        self._size[hops.edges] += flat.abs().sum(1)

    def loadings(self, key: np.ndarray, query: np.ndarray) -> Loadings:
        """The strongest hops of each edge and the sum of the others; `key` and `query` (m,) are the edges' ends."""
        size = self._size.cpu().numpy()
        weights, codes, rest = (values.cpu().numpy() for values in (self._weight, self._code, self._rest))
        edge, column = np.nonzero(np.abs(weights) > NEGLIGIBLE * size[:, None])
        code, query_of = np.divmod(codes[edge, column], self.n_positions)
        code, key_of = np.divmod(code, self.n_positions)
        layer, head = np.divmod(code, _HEADS)
        more = np.flatnonzero(np.abs(rest) > NEGLIGIBLE * size)
        listed = (edge, layer - 1, head + _FIRST_HEAD, key_of, query_of, weights[edge, column])
        others = (more, np.full(len(more), -1), np.full(len(more), REST), key[more], query[more], rest[more])
        columns = [np.concatenate(parts) for parts in zip(listed, others, strict=True)]
        order = np.lexsort((columns[4], columns[3], columns[2], columns[1], columns[0]))
        edge, layer, head, key_of, query_of, weight = (values[order] for values in columns)
        return Loadings(edge, layer, head, key_of, query_of, weight.astype(np.float32))
