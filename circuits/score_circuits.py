"""Attention scores as bilinear forms of the stream: what of the stream becomes queries and keys, node by node.

    score[p, s] = c (R_p g_q r_q (W_Q N(x)[p] + b_Q)) . (R_s g_k r_k (W_K N(x)[s] + b_K))

`N` is the norm with its recorded denominator, `R` the rotary turn, `g` and `r` gain and recorded denominator of a
QK-norm, `c` the family's scale. A node's part of a query or key is what its contribution to the stream at that position
becomes, what passed through frozen layers included: rows of the attribution matrix whose readers are the rows of `W_Q`
or `W_K`. What is no node has a name: biases, position embeddings, and what a special first position writes.

Shapes: C circuits, E head width, D model width, S positions, n parts of a query or key.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.graph import NAMED_CONSTANTS, OWN_HEAD
from circuits.linearize import LinearizedModel
from circuits.nodes import NodeTable
from circuits.pushed_parts import PushedParts
from circuits.readers import behind_gain
from circuits.replacements.movement import OwnAttention
from circuits.rows import RowBlock, Rows, Targets
from circuits.score_weights import ScoreWeights

BIAS, POSITION, FIRST = (-1 - i for i in range(len(NAMED_CONSTANTS)))

# So many numbers of pushed streams are held at once; above it covectors are pulled instead.
PUSH_BUDGET = 2**28


@dataclass(frozen=True)
class Side:
    """Queries or keys of several circuits at one position, part by part.

    sources
        (n,) the node of each part; a named constant has -1 less its place in `NAMED_CONSTANTS`.
    vectors
        (C, n, E), the score's scale in those of queries: over the parts they add up to the query or the key.
    """

    sources: Tensor
    vectors: Tensor


@dataclass(frozen=True)
class Projection:
    """How a circuit makes queries or keys of what it reads: `weight` (E, D), `bias` (E,), then norm, turn and scale.

    `norm` is the gain (E,) and epsilon; where it goes over all heads, `scales` (S,) is one over its denominators.
    """

    weight: Tensor
    bias: Tensor | None
    norm: tuple[Tensor, float] | None
    scale: float
    scales: Tensor | None = None


class ScoreCircuit:
    """Queries and keys of one head of the base model.

    Attributes
    ----------
    query, key : how they are made of the stream
    keys_of : circuits of a layer with the same number have the same keys
    scores, secant, pattern : (S, S) as recorded, after a soft cap; what the cap makes of one unit; attention
    """

    def __init__(self, linear: LinearizedModel, layer: int, head: int, weights: ScoreWeights) -> None:
        self.linear, self.layer, self.head = linear, layer, head
        kv = head // (weights.w_q.shape[0] // weights.w_k.shape[0])
        self.keys_of, self.weights = kv, weights
        b_q, b_k = weights.b_q, weights.b_k
        recording = linear.recording
        over_all = linear.head_norm_scales(layer)
        norm_q, norm_k = _of_head(weights.query_norm, head), _of_head(weights.key_norm, kv)
        self.query = Projection(
            weights.w_q[head], None if b_q is None else b_q[head], norm_q, weights.scale, over_all[0]
        )
        self.key = Projection(weights.w_k[kv], None if b_k is None else b_k[kv], norm_k, 1.0, over_all[1])
        raw = recording.queries[layer, :, head] @ recording.keys[layer, :, kv].T
        cap = weights.soft_cap
        self.scores = raw if cap is None else cap * torch.tanh(raw / cap)
        # A soft cap is not linear: its secant through the recorded score stands for it.
        self.secant = torch.ones_like(raw) if cap is None else torch.where(raw == 0, 1.0, self.scores / raw)
        self.pattern = recording.patterns[layer, head]

    def allowed(self, query: int) -> Tensor:
        """(query + 1,) which keys a query may look at: a sliding window leaves out those too far back."""
        distance = query - torch.arange(query + 1, device=self.scores.device)
        window = self.weights.window
        return distance >= 0 if window is None else distance < window

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotary position embedding of x (..., n, E) at positions (n,)."""
        return self.weights.turn(x, positions)


def _of_head(norm: tuple[Tensor, float] | None, head: int) -> tuple[Tensor, float] | None:
    """The gain (E,) and epsilon of one head."""
    return norm if norm is None or norm[0].ndim == 1 else (norm[0][head], norm[1])


class OwnScoreCircuit(ScoreCircuit):
    """Queries and keys of a feature that has an attention pattern of its own."""

    def __init__(self, linear: LinearizedModel, dictionary: int, feature: int) -> None:
        owner = linear.dictionaries[dictionary]
        own = owner.moved_by
        assert isinstance(own, OwnAttention)
        # A name of its own among the layer's key projections.
        self.linear, self.layer, self.head, self.keys_of = linear, owner.layer, OWN_HEAD, -1 - id(self)
        self.own = own
        group = int(own.group[feature])
        norms = [None if gain is None else (gain[group], own.norm_eps) for gain in (own.q_gain, own.k_gain)]
        bias = linear.recording.attention_norms[self.layer].bias
        sides = []
        for rows, constants in ((own.W_q[group], own.b_q[group]), (own.W_k[group], own.b_k[group])):
            weight, constant = behind_gain(linear, owner, rows, constants)
            sides.append((weight, constant if bias is None else constant - weight @ bias))
        self.query = Projection(*sides[0], norms[0], own.scale)
        self.key = Projection(*sides[1], norms[1], 1.0)
        x = linear.read(owner.read)
        self.scores = own.scale * (own.queries(x)[group] @ own.keys(x)[group].T)
        self.secant = torch.ones_like(self.scores)
        self.pattern = linear.own_patterns(dictionary)[group]

    def allowed(self, query: int) -> Tensor:
        return torch.ones(query + 1, dtype=torch.bool, device=self.scores.device)

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.own.turn(x, positions)


class SideReader:
    """Splits queries and keys of one prompt into the parts that nodes make of them."""

    def __init__(self, linear: LinearizedModel, table: NodeTable) -> None:
        if linear.model.family.sinks is not None:
            raise CircuitsError(
                f"{linear.model.name}: attention scores of {linear.model.family.model_type} cannot be explained yet: "
                "its attention sinks take part of every pattern; trace without --explain"
            )
        self.linear, self.table = linear, table
        parts = constant_parts(linear, table)
        self._constants = parts
        self._pushed: PushedParts | None = None
        self._nodes = Rows(linear, _with_constants(table, parts[BIAS]))
        nothing = {layer: write.take(slice(0, 0)) for layer, write in table.value_writes.items()}
        empty = replace(table, writes={}, value_writes=nothing, starts=[0] * len(table.starts))
        self._named = {
            name: Rows(linear, _with_constants(empty, parts[name])) for name in (POSITION, FIRST) if name in parts
        }

    def read(
        self, circuits: Sequence[ScoreCircuit], side: str, positions: Mapping[int, Sequence[int]]
    ) -> dict[int, Side]:
        """Queries (`side` "query") or keys ("key") of circuits of one layer.

        positions
            Position -> which of the circuits are asked for there.
        """
        projections: list[Projection] = [getattr(circuit, side) for circuit in circuits]
        depth = 2 * circuits[0].layer + 1
        if not self.linear.passed(depth):
            return self._finish(circuits[0], projections, positions, self._local(depth, sorted(positions)))
        if PushedParts.size(self.linear, self.table) <= PUSH_BUDGET:
            return self._finish(circuits[0], projections, positions, self._risen(depth, sorted(positions)))
        return self._pulled(circuits, projections, positions)

    def _pulled(
        self,
        circuits: Sequence[ScoreCircuit],
        projections: Sequence[Projection],
        positions: Mapping[int, Sequence[int]],
    ) -> dict[int, Side]:
        """The rows of the projections pulled down through what is live: slow, but needs no room for all streams."""
        items = [(number, p) for p in sorted(positions) for number in positions[p]]
        targets = self._targets(circuits[0], projections, items)
        blocks = list(self._nodes.blocks(targets))
        bare = replace(targets, constants=torch.zeros_like(targets.constants))
        named = {BIAS: torch.cat([block.bias for block in blocks])}
        for name, rows in self._named.items():
            named[name] = torch.cat([block.bias for block in rows.blocks(bare)])
        names = torch.tensor(list(named), device=targets.nodes.device)
        found, start, width = {}, 0, projections[0].weight.shape[0]
        for position in sorted(positions):
            asked = positions[position]
            rows_of = slice(start, start + len(asked) * width)
            sources, weights = _rows(blocks, rows_of, self.table.starts[position + 1])
            constants = torch.stack([bias[rows_of] for bias in named.values()], dim=1)
            parts = torch.cat([weights, constants], dim=1).view(len(asked), width, -1).transpose(1, 2)
            place = torch.full((parts.shape[1],), position, device=parts.device)
            vectors = _finished(circuits[0], [projections[number] for number in asked], parts, place)
            found[position] = Side(torch.cat([sources, names]), vectors)
            start = rows_of.stop
        return found

    def _local(self, depth: int, wanted: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Nodes (m,) at each wanted position, and what they and the named constants add to the stream (m + names, D),
        where nothing passes below the depth: only writers at the position itself."""
        low = self.linear.floor(depth)
        written = [rows.stretches.between(low, depth) for rows in (self._nodes, *self._named.values())]
        starts = written[0].starts
        found = []
        for position in wanted:
            rows = slice(starts[position], starts[position + 1])
            vectors = [written[0].vectors[rows], *(part.constant[position : position + 1] for part in written)]
            found.append((written[0].nodes[rows], torch.cat(vectors)))
        return found

    def _risen(self, depth: int, wanted: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """The same where sublayers pass on what is written below: all nodes at or before the position."""
        if self._pushed is None or self._pushed.depth > depth:
            self._pushed = PushedParts(self.linear, self.table, list(self._constants.values()))
        found = []
        for position in wanted:
            nodes, vectors = self._pushed.parts(depth, position)
            found.append((nodes, torch.cat([vectors, self._pushed.constants[:, position]])))
        return found

    def _finish(
        self,
        circuit: ScoreCircuit,
        projections: Sequence[Projection],
        positions: Mapping[int, Sequence[int]],
        found: Sequence[tuple[Tensor, Tensor]],
    ) -> dict[int, Side]:
        """Queries or keys of the parts of the stream found at each position, in ascending order, in one product."""
        norm, wanted = self.linear.recording.attention_norms[circuit.layer], sorted(positions)
        device = norm.gain.device
        names = torch.tensor(list(self._constants), device=device)
        sources = [torch.cat([nodes, names]) for nodes, _ in found]
        sizes = [len(source) for source in sources]
        place = torch.tensor(wanted, device=device).repeat_interleave(torch.tensor(sizes, device=device))
        normed = norm.apply(torch.cat([vectors for _, vectors in found]), place)
        weight = torch.stack([projection.weight for projection in projections])
        parts = (normed @ weight.flatten(0, 1).T).view(len(place), *weight.shape[:2]).transpose(0, 1).contiguous()
        bias = torch.zeros_like(weight[..., 0]) if norm.bias is None else weight @ norm.bias
        if projections[0].bias is not None:
            bias = bias + torch.stack([p.bias for p in projections if p.bias is not None])
        ends = torch.tensor(sizes, device=device).cumsum(0)
        parts[:, ends - len(names)] += bias.unsqueeze(1)
        vectors = _finished(circuit, projections, parts, place, sizes)
        return {
            p: Side(source, of[list(positions[p])] if len(positions[p]) < len(projections) else of)
            for p, source, of in zip(wanted, sources, torch.split(vectors, sizes, dim=1), strict=True)
        }

    def _targets(
        self, circuit: ScoreCircuit, projections: Sequence[Projection], items: Sequence[tuple[int, int]]
    ) -> Targets:
        """The rows of the projections as readers of the stream, (items x E) of them, in the order of positions."""
        norm = self.linear.recording.attention_norms[circuit.layer]
        number = torch.tensor([number for number, _ in items], device=norm.gain.device)
        every = torch.stack([projection.weight for projection in projections])
        constants = every @ norm.bias if norm.bias is not None else torch.zeros_like(every[..., 0])
        if projections[0].bias is not None:
            constants = constants + torch.stack([p.bias for p in projections if p.bias is not None])
        place = torch.tensor([p for _, p in items], device=number.device).repeat_interleave(every.shape[1])
        covectors = norm.pull(every[number].flatten(0, 1), place)
        nodes = torch.arange(len(covectors), device=number.device)
        flat = constants[number].flatten()
        return Targets(2 * circuit.layer + 1, nodes, place, torch.zeros_like(flat), flat, covectors)


def _rows(blocks: Sequence[RowBlock], wanted: slice, end: int) -> tuple[Tensor, Tensor]:
    """Some rows of blocks that stand one after the other, and their sources before node `end`."""
    start, pieces = 0, []
    sources = blocks[0].sources[:0]
    for block in blocks:
        low, high = max(wanted.start - start, 0), min(wanted.stop - start, len(block.targets))
        if low < high:
            columns = int(torch.searchsorted(block.sources, end))
            sources = block.sources[:columns]
            pieces.append(block.weights[low:high, :columns])
        start += len(block.targets)
    return sources, pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _finished(
    circuit: ScoreCircuit, projections: Sequence[Projection], parts: Tensor, place: Tensor, sizes: Sequence[int] = ()
) -> Tensor:
    """Parts (C, n, E) at positions (n,) after QK-norm, turn and scale; `sizes` parts at a time stand together."""
    if projections[0].norm is not None:
        gain = torch.stack([p.norm[0] for p in projections if p.norm is not None]).unsqueeze(1)
        epsilon = projections[0].norm[1]
        if projections[0].scales is not None:
            parts = parts * (gain * projections[0].scales[place].unsqueeze(-1))
        else:
            whole = torch.split(parts, list(sizes) or [parts.shape[1]], dim=1)
            size = [part.double().sum(1).square().mean(-1, keepdim=True).expand(-1, part.shape[1]) for part in whole]
            parts = parts * (gain * (torch.cat(size, dim=1) + epsilon).rsqrt().float().unsqueeze(-1))
    turned = circuit.turn(parts, place)
    return turned if projections[0].scale == 1.0 else turned * projections[0].scale


def _with_constants(table: NodeTable, part: dict[str, dict[int, Tensor]]) -> NodeTable:
    return replace(table, constants=part["constants"], value_constants=part["value_constants"])


def constant_parts(linear: LinearizedModel, table: NodeTable) -> dict[int, dict[str, dict[int, Tensor]]]:
    """The table's constants by name; what is zero everywhere is left out, biases never are."""
    zero = torch.zeros_like(table.constants[0])
    bias = {depth: linear.constant(depth) if depth else zero for depth in table.constants}
    position = {depth: zero if depth else linear.constant(0) for depth in table.constants}
    first = {depth: table.constants[depth] - bias[depth] - position[depth] for depth in table.constants}
    values: dict[int, Tensor] = {}
    for layer, constant in table.value_constants.items():
        values[layer] = torch.zeros_like(constant)
        for dictionary in linear.dictionaries:
            for site in dictionary.writes:
                if str(site) == f"v.{layer}" and (added := dictionary.output_bias(site)) is not None:
                    values[layer] = values[layer] + added
    nothing = {layer: torch.zeros_like(constant) for layer, constant in table.value_constants.items()}
    left = {layer: constant - values[layer] for layer, constant in table.value_constants.items()}
    parts = {
        BIAS: {"constants": bias, "value_constants": values},
        POSITION: {"constants": position, "value_constants": nothing},
        FIRST: {"constants": first, "value_constants": left},
    }
    return {
        name: part
        for name, part in parts.items()
        if name == BIAS or any(bool(t.any()) for tensors in part.values() for t in tensors.values())
    }
