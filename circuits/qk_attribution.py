"""QK attributions: why a head looked where it did (DESIGN.md section 5).

    c_ij(s) = c (R_p g_q r_q W_Q N(v_i)[p]) . (R_s g_k r_k W_K N(v_j)[s])       sum over pairs (i, j) = recorded score
    (delta_sk - A[p,k]) c_ij(k)      sum over pairs and keys k = log A[p,s] - sum_k A[p,k] log A[p,k]

The first form says what makes the score, the second what makes it beat the other keys: softmax sees nothing else.
Where a head looks hardly anywhere else, all of the second form vanishes; divided by `1 - A[p,s]` it is the score's
*lead*: the score less the mean of the other keys' scores, weighted with their attention. Both forms have a ledger, the
sum over all pairs against what the forward pass recorded. A soft cap is not linear; its secant through the recorded
score stands for it.

Shapes: C circuits, n parts of a query, m parts of all keys up to it, E head width, S positions, T explained scores.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from circuits.graph import OWN_HEAD
from circuits.linearize import LinearizedModel
from circuits.nodes import NodeTable
from circuits.score_circuits import OwnScoreCircuit, ScoreCircuit, Side, SideReader
from circuits.sweep import Sweep

PAIR_BUDGET = 2**22
KEY_BUDGET = 2**24
# So many parts of the keys are multiplied out before bounds tell whether more of them can matter.
FIRST_LOOK = 32


@dataclass(frozen=True, order=True)
class HeadStep:
    """A head that looks from a query position at a key position.

    `owner` is the node, in the table, of the feature whose own pattern it is; -1 for a head of the base model.
    """

    layer: int
    head: int
    query: int
    key: int
    owner: int = -1


@dataclass(frozen=True)
class Strongest:
    """The strongest parts of T scores, (T, top) each: nodes or named constants, the key's position, and weights.

    Of one side's sums both sides have the same name.

    Weights of entries that are not there (fewer parts than asked for) are zero.
    """

    query: Tensor
    key: Tensor
    place: Tensor
    weight: Tensor


class QueryBlock:
    """Queries of several circuits of one layer at one position, against all their keys.

    Attributes
    ----------
    circuits, position : whose queries, and where
    query : their parts, (C, n, E)
    key_sources, key_of : (m,) node, or named constant, and position of each part of the keys
    keys : (C, m, E)
    scores, attention, log_attention : (C, position + 1) as recorded, float64; log A is -inf where a window forbids it
    """

    def __init__(self, circuits: Sequence[ScoreCircuit], position: int, query: Side, keys: "_Keys") -> None:
        self.circuits, self.position, self.query = circuits, position, query
        end = position + 1
        self._all_keys, self._names = keys, [circuit.keys_of for circuit in circuits]
        self.key_sources, self.key_of, self.keys = keys.up_to(position, self._names)
        self.scores = torch.stack([circuit.scores[position, :end] for circuit in circuits]).double()
        self.secant = torch.stack([circuit.secant[position, :end] for circuit in circuits])
        allowed = torch.stack([circuit.allowed(position) for circuit in circuits])
        self.log_attention = self.scores.masked_fill(~allowed, -torch.inf).log_softmax(-1)
        self.attention = self.log_attention.exp()

    def pairs(self, circuit: int, columns: Tensor | slice) -> Tensor:
        """(n, columns) what each pair of parts adds to the score of its key."""
        keys = self.keys[circuit, columns] * self.secant[circuit, self.key_of[columns]].unsqueeze(1)
        return self.query.vectors[circuit] @ keys.T

    def met(self, keys: Tensor, circuit: Tensor) -> Tensor:
        """Products (T, X, n) of keys (T, X, E) with the parts of the queries of circuits (T,), which ascend."""
        width, n = keys.shape[1], self.query.vectors.shape[1]
        products, start = keys.new_empty(len(keys) * width, n), 0
        # One matrix product for each circuit: many small ones, one for each of T, take longer.
        for queries, count in zip(self.query.vectors, torch.bincount(circuit).tolist(), strict=False):
            rows = slice(start * width, (start + count) * width)
            torch.mm(keys[start : start + count].flatten(0, 1), queries.T, out=products[rows])
            start += count
        return products.view(len(keys), width, n)

    @cached_property
    def key_totals(self) -> Tensor:
        """(C, position + 1, E) the keys, float64, put together from their parts."""
        return self._all_keys.totals[self._all_keys.numbers(self._names), : self.position + 1]

    @cached_property
    def query_totals(self) -> Tensor:
        """(C, E) the queries, float64, put together from their parts."""
        return self.query.vectors.double().sum(1)

    @cached_property
    def totals(self) -> Tensor:
        """(C, position + 1) the sum of all pairs at each key, float64."""
        return torch.einsum("ce,cke->ck", self.query_totals, self.key_totals) * self.secant

    @cached_property
    def bounds(self) -> Tensor:
        """(C, m) at least the largest product of each part k of the keys with a part of the query, before the secant.

        `|q_i . k| <= min(max_i |q_i| |k|, sqrt(sum_i (q_i . k)^2))`; the latter from the (E, E) Gram matrix, with room
        for what float32 loses there.
        """
        queries = self.query.vectors
        gram = queries.transpose(1, 2) @ queries
        size = self._all_keys.sizes[self._all_keys.numbers(self._names), : len(self.key_of)]
        room = 1e-6 * gram.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
        together = ((self.keys @ gram) * self.keys).sum(2).clamp_(min=0) + room * size
        alone = size * queries.square().sum(2).amax(1, keepdim=True)
        return torch.minimum(together, alone * (1 + 1e-5)).sqrt_()


@dataclass(frozen=True)
class Explained:
    """T scores of one block: `steps[i]` is that of circuit `circuit[i]` at key `key[i]`."""

    steps: tuple[HeadStep, ...]
    block: QueryBlock
    circuit: Tensor
    key: Tensor

    @property
    def scores(self) -> Tensor:
        """(T,) as recorded, after a soft cap, float64."""
        return self.block.scores[self.circuit, self.key]

    @property
    def attention(self) -> Tensor:
        """(T,) A[p, s], float64."""
        return self.block.attention[self.circuit, self.key]

    @cached_property
    def _others(self) -> Tensor:
        """(T, position + 1) the attention on other keys."""
        return self.block.attention[self.circuit].scatter(1, self.key.unsqueeze(1), 0.0)

    @cached_property
    def relative(self) -> Tensor:
        """(T,) `log A[p,s] - sum_k A[p,k] log A[p,k]`: the attention on other keys times the lead."""
        logs = self.block.log_attention[self.circuit]
        own = logs.gather(1, self.key.unsqueeze(1))
        return (self._others * (own - logs.masked_fill(self._others == 0, 0.0))).sum(1)

    @property
    def lead(self) -> Tensor:
        """(T,) the score less the mean of the other keys' scores, weighted with their attention; 0 with no other."""
        rest = self._others.sum(1)
        mean = (self._others * self.block.scores[self.circuit]).sum(1) / rest.clamp(min=torch.finfo(rest.dtype).tiny)
        return torch.where(rest > 0, self.scores - mean, 0.0)

    @cached_property
    def shares(self) -> Tensor:
        """(T, position + 1) `delta_sk - A[p,k]`: how the score of each key counts in the relative form."""
        return (-self._others).scatter(1, self.key.unsqueeze(1), self._others.sum(1, keepdim=True))

    @cached_property
    def lead_shares(self) -> Tensor:
        """(T, position + 1) how the score of each key counts in the lead: one for the key, all others minus one."""
        own = self.shares.gather(1, self.key.unsqueeze(1))
        return torch.where(own > 0, self.shares / own.clamp(min=torch.finfo(own.dtype).tiny), 0.0)

    @cached_property
    def query_sides(self) -> Tensor:
        """(T, n) each query part's sum over all parts of the key."""
        block, circuit, key = self.block, self.circuit, self.key
        keys = (block.key_totals[circuit, key] * block.secant[circuit, key].unsqueeze(1)).float()
        return (block.query.vectors[circuit] @ keys.unsqueeze(-1)).squeeze(-1)

    @cached_property
    def own_columns(self) -> tuple[Tensor, Tensor]:
        """(T, parts of the longest key) the parts that stand at each score's key, and 1 where there is one."""
        starts = torch.searchsorted(self.block.key_of, torch.arange(self.block.position + 2, device=self.key.device))
        width = int(starts.diff()[self.key].max())
        columns = starts[self.key].unsqueeze(1) + torch.arange(width, device=self.key.device)
        there = columns < starts[self.key + 1].unsqueeze(1)
        return columns.clamp(max=len(self.block.key_of) - 1), there.float()

    @cached_property
    def key_sides(self) -> Tensor:
        """(T, parts of the longest key) the sum of each of `own_columns` over all parts of the query."""
        block, circuit = self.block, self.circuit
        columns, there = self.own_columns
        sums = (block.keys @ block.query_totals.float().unsqueeze(-1)).squeeze(-1)
        return sums[circuit.unsqueeze(1), columns] * there * block.secant[circuit, self.key].unsqueeze(1)

    @property
    def gaps(self) -> Tensor:
        """(T,) the ledger: the worse relative gap of the two forms.

        `|sum of all pairs - recorded| / max(|recorded|, largest part)`; the parts are each query part's sum over the
        key, and in the relative form the keys' terms.
        """
        totals, largest = self.block.totals[self.circuit], self.query_sides.abs().amax(1)
        gap = totals.gather(1, self.key.unsqueeze(1)).squeeze(1) - self.scores
        gap = gap.abs() / torch.maximum(self.scores.abs(), largest).clamp(min=1e-30)
        terms = self.shares * totals
        size = torch.maximum(self.relative.abs(), terms.abs().amax(1)).clamp(min=torch.finfo(terms.dtype).tiny)
        return torch.maximum(gap, (terms.sum(1) - self.relative).abs() / size)

    def strongest_pairs(self, top: int) -> tuple[Strongest, Strongest]:
        """The pairs with the largest parts of the scores, and of their leads, in the order of the relative form."""
        block, circuit = self.block, self.circuit
        columns, there = self.own_columns
        own = there * block.secant[circuit, self.key].unsqueeze(1)
        shares = (self.lead_shares.float() * block.secant[circuit])[:, block.key_of]
        return self._strongest(columns, own, top), self._strongest(None, shares, top)

    def _strongest(self, columns: Tensor | None, factors: Tensor, top: int) -> Strongest:
        """The largest pairs with some parts of the keys, `columns` (T, X) or all, times factors (T, X) of these.

        Exact: parts of the keys are multiplied out from the largest bound of their pairs down, until the bound of the
        next is below the pairs that were found.
        """
        block, circuit, n = self.block, self.circuit, self.block.query.vectors.shape[1]
        whole = block.bounds[circuit] if columns is None else block.bounds[circuit.unsqueeze(1), columns]
        bounds = whole * factors.abs()
        weight, place, column = (
            bounds.new_zeros(len(factors), top, dtype=kind) for kind in (bounds.dtype, torch.long, torch.long)
        )
        rows, width = torch.argsort(circuit, stable=True), FIRST_LOOK
        while len(rows):
            width = min(width, factors.shape[1])
            bound, best = bounds[rows].topk(min(width + 1, factors.shape[1]), dim=1)
            left = []
            for some in torch.split(torch.arange(len(rows), device=rows.device), max(1, PAIR_BUDGET // (width * n))):
                row, at = rows[some], best[some, :width]
                where = at if columns is None else columns[row].gather(1, at)
                keys = block.keys[circuit[row].unsqueeze(1), where] * factors[row].gather(1, at).unsqueeze(-1)
                pairs = block.met(keys, circuit[row])
                # The largest pairs lie in as many parts of the keys: those whose own largest pair is largest.
                low, high = torch.aminmax(pairs, dim=2)
                peaks = torch.maximum(high, -low).topk(min(top, width), dim=1).indices
                flat = pairs.gather(1, peaks.unsqueeze(2).expand(-1, -1, n)).flatten(1)
                found = flat.abs().topk(min(top, flat.shape[1]), dim=1)
                got = found.indices.shape[1]
                weight[row, :got], place[row, :got] = flat.gather(1, found.indices), found.indices % n
                column[row, :got] = where.gather(1, peaks.gather(1, found.indices // n))
                if width < factors.shape[1]:
                    left.append(row if got < top else row[bound[some, width] > found.values[:, -1]])
            rows, width = torch.cat(left) if left else rows[:0], 4 * width
        return Strongest(block.query.sources[place], block.key_sources[column], block.key_of[column], weight)

    def strongest_sides(self, top: int) -> tuple[Strongest, Strongest]:
        """The parts of the query, and of the key, with the largest sums over the other side."""
        found = []
        queries = self.block.query.sources.expand(len(self.key), -1)
        for sums, sources in (
            (self.query_sides, queries),
            (self.key_sides, self.block.key_sources[self.own_columns[0]]),
        ):
            at = sums.abs().topk(min(top, sums.shape[1]), dim=1).indices
            names, place = sources.gather(1, at), self.key.unsqueeze(1).expand_as(at)
            found.append(Strongest(names, names, place, sums.gather(1, at)))
        return found[0], found[1]


class QKAttribution:
    """Explains any score of one traced prompt."""

    def __init__(self, linear: LinearizedModel, table: NodeTable) -> None:
        self.linear, self.table = linear, table
        self._reader = SideReader(linear, table)

    @classmethod
    def of(cls, sweep: Sweep) -> "QKAttribution":
        """On the nodes of a sweep."""
        return cls(sweep.linear, sweep.table)

    @torch.no_grad()
    def explain(self, steps: Iterable[HeadStep]) -> Iterable[Explained]:
        """The steps, by layer and query position; the parts of keys are read once a layer."""
        layers: dict[int, list[HeadStep]] = defaultdict(list)
        for step in sorted(set(steps), key=lambda s: (s.layer, s.head, s.query, s.key, s.owner)):
            layers[step.layer].append(step)
        for layer, group in layers.items():
            yield from self._layer(layer, group)

    def _layer(self, layer: int, steps: Sequence[HeadStep]) -> Iterable[Explained]:
        kinds = defaultdict(list)
        for step in steps:
            kinds[-1 if step.owner < 0 else int(self.table.dictionary[step.owner])].append(step)
        for alike in kinds.values():
            yield from self._alike(layer, alike)

    def _alike(self, layer: int, steps: Sequence[HeadStep]) -> Iterable[Explained]:
        """Steps of one layer by heads of the base model, or by patterns of one dictionary."""
        names = sorted({(step.head, step.owner) for step in steps})
        number = {name: i for i, name in enumerate(names)}
        weights = self.linear.model.score_weights(layer)
        circuits = [
            OwnScoreCircuit(self.linear, int(self.table.dictionary[owner]), int(self.table.feature[owner]))
            if head == OWN_HEAD
            else ScoreCircuit(self.linear, layer, head, weights)
            for head, owner in names
        ]
        places: dict[int, list[HeadStep]] = defaultdict(list)
        for step in steps:
            places[step.query].append(step)
        asked = {p: sorted({number[s.head, s.owner] for s in group}) for p, group in places.items()}
        queries = self._reader.read(circuits, "query", asked)
        keys = _Keys(self._reader, circuits, max(places))
        for position, group in sorted(places.items()):
            numbers = asked[position]
            n_numbers = keys.count(position) * queries[position].vectors.shape[2]
            for start in range(0, len(numbers), size := max(1, KEY_BUDGET // max(1, n_numbers))):
                chosen = numbers[start : start + size]
                side = queries[position]
                part = Side(side.sources, side.vectors[start : start + size])
                block = QueryBlock([circuits[which] for which in chosen], position, part, keys)
                at = {which: i for i, which in enumerate(chosen)}
                mine = [step for step in group if number[step.head, step.owner] in at]
                device = part.vectors.device
                of = torch.tensor([at[number[s.head, s.owner]] for s in mine], device=device)
                yield Explained(tuple(mine), block, of, torch.tensor([step.key for step in mine], device=device))


class _Keys:
    """Keys of a layer's circuits at all positions, one after the other; circuits that share keys share their parts."""

    def __init__(self, reader: SideReader, circuits: Sequence[ScoreCircuit], last: int) -> None:
        different = {circuit.keys_of: circuit for circuit in circuits}
        self._number = {name: i for i, name in enumerate(different)}
        everyone = list(range(len(different)))
        sides = reader.read(list(different.values()), "key", dict.fromkeys(range(last + 1), everyone))
        self._starts = [0]
        for position in range(last + 1):
            self._starts.append(self._starts[-1] + len(sides[position].sources))
        self._sources = torch.cat([sides[p].sources for p in range(last + 1)])
        self._vectors = torch.cat([sides[p].vectors for p in range(last + 1)], dim=1)
        sizes = torch.tensor(self._starts, device=self._sources.device).diff()
        self._key_of = torch.arange(last + 1, device=sizes.device).repeat_interleave(sizes)

    def count(self, position: int) -> int:
        """How many parts all keys up to a position have."""
        return self._starts[position + 1]

    def up_to(self, position: int, names: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Sources (m,), positions (m,) and vectors (C, m, E) of the keys up to a position."""
        end = self.count(position)
        return self._sources[:end], self._key_of[:end], self._vectors[self.numbers(names), :end]

    def numbers(self, names: Sequence[int]) -> Tensor | slice:
        """Where the keys of these names stand."""
        found = [self._number[name] for name in names]
        if found == list(range(found[0], found[0] + len(found))):
            return slice(found[0], found[0] + len(found))
        return torch.tensor(found, device=self._sources.device)

    @cached_property
    def totals(self) -> Tensor:
        """(keys, last + 1, E) float64, put together from their parts."""
        shape = (len(self._vectors), len(self._starts) - 1, self._vectors.shape[2])
        return self._vectors.new_zeros(shape, dtype=torch.float64).index_add_(1, self._key_of, self._vectors.double())

    @cached_property
    def sizes(self) -> Tensor:
        """(keys, m) the squared length of each part."""
        return self._vectors.square().sum(2)
