"""The nodes of a prompt and their writers: which features are active, what each writes and where, and the errors.

Nodes are sorted by position, then depth, then feature, so the nodes of one position are one slice.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from circuits.graph.tables import ERROR_KINDS
from circuits.linearize import LinearizedModel, write_depth
from circuits.offload import room
from circuits.replacements.dictionary import Active, Dictionary
from circuits.replacements.movement import HeadLoading
from circuits.replacements.sites import Site
from circuits.replacements.weights import unmap

# Of a dictionary's features, on one side ("own", "key", "query"): what they are once changes are held.
Hold = Callable[[int, Literal["own", "key", "query"], Active], Active]

ROWS = 1024  # decoder rows on their way at a time: they fit into the cache
SHORT = 16  # decoder rows that are too few to be read alone
GAPS = 1.15  # writers without gaps may be so many times those that write


@dataclass(frozen=True)
class Write:
    """What some nodes write at one depth: `nodes` (m,) ascending, `vectors` (m, D), some of them zero."""

    nodes: Tensor
    vectors: Tensor

    def take(self, rows: slice) -> "Write":
        """Some of the nodes."""
        return Write(self.nodes[rows], self.vectors[rows])


@dataclass(frozen=True)
class Carried:
    """Features that the base layer's heads move, by dictionary: the key side, and what is no node on it.

    `nodes` (m,) are the key-side nodes, `positions`, `features` (m,) and `values` (m, r) what they send. `hidden` is
    the same for the special first position, without nodes.
    """

    nodes: Tensor
    positions: Tensor
    features: Tensor
    values: Tensor
    hidden: tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class NodeTable:
    """All source nodes of a prompt, (n,) each, and their writers.

    `dictionary` is an index into `LinearizedModel.dictionaries`, -1 for none; `depth` is where the node first writes;
    `feature` is the token id of an embedding and -1 for an error; `starts[s]:starts[s + 1]` are the nodes at
    position s. `constants[depth]` (S, D) is what no node carries: biases, position embeddings, and everything that a
    special first token's position writes.

    `value_writes` and `value_constants` are the same for the values of a layer, (m, K x E) and (S, K x E), by layer.
    `carried` has the key sides of features that move, by dictionary. `directions` (n, r) is there if any feature has a
    rank above one: the unit vector that reads and writes, padded with zeros.
    """

    kind: np.ndarray
    dictionary: np.ndarray
    layer: np.ndarray
    position: np.ndarray
    feature: np.ndarray
    depth: np.ndarray
    activation: np.ndarray
    pre_activation: np.ndarray
    starts: list[int]
    writes: dict[int, Write]
    constants: dict[int, Tensor]
    value_writes: dict[int, Write] = field(default_factory=dict)
    value_constants: dict[int, Tensor] = field(default_factory=dict)
    carried: dict[int, Carried] = field(default_factory=dict)
    directions: Tensor | None = None

    def __len__(self) -> int:
        return len(self.kind)

    def directions_of(self, nodes: np.ndarray, rank: int) -> Tensor | None:
        """(n, rank) of some nodes of one dictionary; None for rank one."""
        if rank == 1 or self.directions is None:
            return None
        return self.directions[torch.from_numpy(nodes).to(self.directions.device), :rank]


@dataclass
class _Block:
    """Nodes of one kind before sorting.

    `sites` has where features write by depth, `writes` vectors that are known at once; errors have neither until what
    the features write is known. `values` go into the values of the block's layer.
    """

    kind: str
    dictionary: int
    layer: int
    depth: int
    active: Active
    sites: dict[int, Site] = field(default_factory=dict)
    writes: dict[int, Tensor] = field(default_factory=dict)
    values: Tensor | None = None

    @property
    def is_error(self) -> bool:
        return self.kind in ERROR_KINDS

    @property
    def depths(self) -> set[int]:
        """Where the block's nodes write to the stream."""
        return {*self.sites, *self.writes} | ({self.depth} if self.is_error and self.values is None else set())


def build_nodes(linear: LinearizedModel, *, first_is_special: bool, hold: Hold | None = None) -> NodeTable:
    """Encode every dictionary on the recording and lay out nodes, writers, errors and constants.

    hold
        On the recording of a changed model (`circuits.held`): the changes of the features, which write what they are
        held at, not what they read.
    """
    recording = linear.recording
    n = recording.n_positions
    every = torch.arange(n, device=recording.token_ids.device)
    tokens = _Block("embedding", -1, -1, 0, _plain(every, recording.token_ids), writes={0: recording.embedding})
    blocks = [tokens]
    hidden: dict[int, Active] = {}
    for index, dictionary in enumerate(linear.dictionaries):
        found = _feature_blocks(linear, index, dictionary, hold or _unchanged)
        for block in found:
            if first_is_special:
                if block.kind == "mtc_key":
                    hidden[index] = block.active.take(block.active.positions == 0)
                _drop_first(block)
        blocks += found
    constants = {depth: linear.constant(depth) for depth in range(linear.n_depths)}
    errors = [error for depth in range(1, linear.n_depths) if (error := _stream_error(linear, depth)) is not None]
    value_constants = {}
    for layer in sorted(linear.replaced_values):
        error, value_constants[layer] = _value_error(linear, blocks, layer)
        errors.append(error)
    for error in errors if first_is_special else ():
        if error.values is not None:
            value_constants[error.layer] = value_constants[error.layer].clone()
            value_constants[error.layer][0] += error.values[0]
        _drop_first(error)
    return _sorted_table(linear, [*blocks, *errors], constants, value_constants, hidden)


def _plain(positions: Tensor, features: Tensor) -> Active:
    nan = torch.full(positions.shape, torch.nan, device=positions.device)
    return Active(positions, features, nan, nan)


def _drop_first(block: _Block) -> None:
    """Take the entries of the first position out of a block."""
    kept = block.active.positions > 0
    block.active = block.active.take(kept)
    block.writes = {depth: vectors[kept] for depth, vectors in block.writes.items()}
    block.values = None if block.values is None else block.values[kept]


def _unchanged(index: int, side: Literal["own", "key", "query"], active: Active) -> Active:
    return active


def _feature_blocks(linear: LinearizedModel, index: int, dictionary: Dictionary, hold: Hold) -> list[_Block]:
    """The features of one dictionary: one block, or key side and query side."""
    layer = dictionary.layer
    moves = isinstance(dictionary.moved_by, HeadLoading)
    active = hold(index, "key" if moves else "own", dictionary.encode(linear.input_of(dictionary)))
    if not dictionary.is_held:
        unmap()
    if dictionary.read.site.name == "v":
        rows = dictionary.decoder_rows(active.features, dictionary.writes[0])
        values = rows * active.activations.unsqueeze(1)
        return [_Block("value_feature", index, layer, 2 * layer + 1, active, values=values)]
    blocks = []
    kind = "mlp_feature" if dictionary.read.site.name == "resid_mid" else "attention_feature"
    if moves:
        blocks.append(_Block("mtc_key", index, layer, 2 * layer + 1, active))
        active = hold(index, "query", dictionary.move(active, linear.recording.patterns[layer]))
        kind = "mtc_query"
    sites = {write_depth(site): site for site in linear.writes_of(dictionary)}
    depth = min(sites, default=linear.read_depth(dictionary.read.site.name, layer))
    return [*blocks, _Block(kind, index, layer, depth, active, sites)]


def _stream_error(linear: LinearizedModel, depth: int) -> _Block | None:
    """The errors at a depth, without vectors; None where attention is frozen or a block is replaced whole."""
    layer, is_mlp = divmod(depth - 1, 2)
    if not is_mlp and layer not in linear.replaced_attention:
        return None
    kind = "block_error" if layer in linear.replaced_blocks else "mlp_error" if is_mlp else "attention_error"
    every = torch.arange(linear.recording.n_positions, device=linear.recording.token_ids.device)
    return _Block(kind, -1, layer, depth, _plain(every, torch.full_like(every, -1)))


def _summed(positions: Tensor, vectors: Tensor, n_positions: int) -> Tensor:
    return vectors.new_zeros(n_positions, vectors.shape[1]).index_add_(0, positions, vectors)


def _value_error(linear: LinearizedModel, blocks: Sequence[_Block], layer: int) -> tuple[_Block, Tensor]:
    """Base values minus replacement values of a layer, and the values' constant (S, K x E): the decoder biases."""
    error = linear.attention[layer].read_values(linear.recording.resid_pre[layer])
    if (added := linear.recording.values_added.get(layer)) is not None:
        error = error + added
    constant = torch.zeros_like(error)
    for block in blocks:
        if block.values is not None and block.layer == layer:
            error = error - _summed(block.active.positions, block.values, len(error))
            dictionary = linear.dictionaries[block.dictionary]
            if (bias := dictionary.output_bias(dictionary.writes[0])) is not None:
                constant, error = constant + bias, error - bias
    every = torch.arange(len(error), device=error.device)
    minus = _plain(every, torch.full_like(every, -1))
    return _Block("value_error", -1, layer, 2 * layer + 1, minus, values=error), constant


def _sorted_table(
    linear: LinearizedModel,
    blocks: Sequence[_Block],
    constants: dict[int, Tensor],
    value_constants: dict[int, Tensor],
    hidden: dict[int, Active],
) -> NodeTable:
    """Number the nodes, and write down what each writes; the errors' vectors and the constants of a special first
    position come out of that."""
    sizes = [len(block.active) for block in blocks]
    position = torch.cat([block.active.positions for block in blocks]).cpu().numpy()
    feature = torch.cat([block.active.features for block in blocks]).cpu().numpy()
    depth = np.repeat([block.depth for block in blocks], sizes)
    is_error = np.repeat([block.is_error for block in blocks], sizes)
    order = np.lexsort((feature, is_error, depth, position))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    ends = np.cumsum(sizes)
    numbers = [rank[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    place = position[order]
    writes = {}
    for at in sorted(set().union(*(block.depths for block in blocks))):
        writing = [(block, number) for block, number in zip(blocks, numbers, strict=True) if at in block.depths]
        writes[at], constants[at] = _write(linear, writing, at, place, constants[at])
        if all(max(block.sites, default=0) <= at for block, _ in writing):
            unmap()
    values = {
        layer: [
            (b, number) for b, number in zip(blocks, numbers, strict=True) if b.values is not None and b.layer == layer
        ]
        for layer in linear.replaced_values
    }
    return NodeTable(
        kind=np.repeat([block.kind for block in blocks], sizes)[order],
        dictionary=np.repeat([block.dictionary for block in blocks], sizes)[order],
        layer=np.repeat([block.layer for block in blocks], sizes)[order],
        position=place,
        feature=feature[order],
        depth=depth[order],
        activation=torch.cat([block.active.activations.cpu() for block in blocks]).numpy()[order],
        pre_activation=torch.cat([block.active.pre_activations.cpu() for block in blocks]).numpy()[order],
        starts=np.searchsorted(place, np.arange(linear.recording.n_positions + 1)).tolist(),
        writes=writes,
        constants=constants,
        value_writes={layer: _value_write(pieces, place) for layer, pieces in sorted(values.items())},
        value_constants=value_constants,
        carried={
            block.dictionary: _carried(block.active, number, hidden.get(block.dictionary))
            for block, number in zip(blocks, numbers, strict=True)
            if block.kind == "mtc_key"
        },
        directions=_directions(blocks, numbers, len(order)),
    )


def _write(
    linear: LinearizedModel,
    writing: Sequence[tuple[_Block, np.ndarray]],
    depth: int,
    position: np.ndarray,
    constant: Tensor,
) -> tuple[Write, Tensor]:
    """What some blocks write at one depth, in the order of their nodes, and what no node carries there.

    Decoder rows go from their file to their place, some at a time, and are summed on the way: what the base model wrote
    there less that sum is the error, and where the first position is special its part goes to the constant.

    Parameters
    ----------
    writing
        Blocks with the numbers of their nodes, the errors last.
    position
        (n,) where all nodes stand.
    constant
        (S, D) the biases.
    """
    nodes = _without_gaps(np.sort(np.concatenate([number for _, number in writing])), position)
    vectors = _empty(nodes, [number for _, number in writing], constant.shape[1], constant.device)
    total = torch.zeros_like(constant)
    for block, number in writing:
        places = np.searchsorted(nodes, number)
        at = torch.from_numpy(places).to(constant.device)
        if depth in block.writes:
            vectors[at] = block.writes[depth]
        elif block.is_error:
            error = linear.base_output(depth) - linear.skip_output(depth) - constant - total
            vectors[at] = error[block.active.positions]
            if len(block.active) < len(error):
                constant = constant.clone()
                constant[0] += error[0]
        else:
            for some, is_run in _runs(places):
                out = vectors[places[some.start] : places[some.start] + some.stop - some.start] if is_run else None
                rows = _decoded(linear, block, depth, some, out)
                if out is None:
                    vectors.index_copy_(0, at[some], rows)
                elif rows.data_ptr() != out.data_ptr():
                    out.copy_(rows)
                total.index_add_(0, block.active.positions[some], rows)
    return Write(torch.from_numpy(nodes).to(constant.device), vectors), constant


def _runs(places: np.ndarray) -> Iterator[tuple[slice, bool]]:
    """Pieces of ascending places, at most `ROWS` long, and whether a piece has no gaps; runs where they are long."""
    ends = np.append(np.flatnonzero(np.diff(places) != 1) + 1, len(places))
    long = len(places) >= SHORT * len(ends)
    first = 0
    for end in ends.tolist() if long else [len(places)]:
        for start in range(first, end, ROWS):
            yield slice(start, min(start + ROWS, end)), long
        first = end


def _decoded(linear: LinearizedModel, block: _Block, depth: int, some: slice, out: Tensor | None) -> Tensor:
    """What some features of a block write at a depth, (m, D); in `out` if it can be put there at once."""
    dictionary, active, site = linear.dictionaries[block.dictionary], block.active, block.sites[depth]
    directions = None if active.directions is None else active.directions[some]
    rows = dictionary.decoder_rows(active.features[some], site, directions, out=None if site.name == "z" else out)
    rows = linear.through_output(site, rows, active.positions[some], before_post_norm=dictionary.before_post_norm)
    return rows.mul_(active.activations[some].unsqueeze(1))


def _value_write(pieces: list[tuple[_Block, np.ndarray]], position: np.ndarray) -> Write:
    """The same for the values of a layer, whose vectors are there already."""
    nodes = _without_gaps(np.sort(np.concatenate([number for _, number in pieces])), position)
    blocks = [(block.values, number) for block, number in pieces if block.values is not None]
    vectors = _empty(nodes, [number for _, number in blocks], blocks[0][0].shape[1], blocks[0][0].device)
    for values, number in blocks:
        vectors[torch.from_numpy(np.searchsorted(nodes, number)).to(vectors.device)] = values
    return Write(torch.from_numpy(nodes).to(vectors.device), vectors)


def _empty(nodes: np.ndarray, numbers: Sequence[np.ndarray], width: int, device: torch.device) -> Tensor:
    """Room for the vectors of some nodes, (m, width), zero for those that are not among the `numbers`."""
    vectors = room((len(nodes), width), device)
    gaps = np.ones(len(nodes), dtype=bool)
    for number in numbers:
        gaps[np.searchsorted(nodes, number)] = False
    vectors[torch.from_numpy(np.flatnonzero(gaps)).to(device)] = 0.0
    return vectors


def _without_gaps(nodes: np.ndarray, position: np.ndarray) -> np.ndarray:
    """At each position all numbers from the first of some nodes, ascending, to the last, if they are not many more."""
    first = np.flatnonzero(np.diff(position[nodes], prepend=-1))
    last = np.append(first[1:], len(nodes)) - 1
    if not len(nodes) or (nodes[last] - nodes[first] + 1).sum() > GAPS * len(nodes):
        return nodes
    return np.concatenate([np.arange(a, b + 1) for a, b in zip(nodes[first], nodes[last], strict=True)])


def _carried(active: Active, number: np.ndarray, hidden: Active | None) -> Carried:
    def sent(entries: Active) -> tuple[Tensor, Tensor, Tensor]:
        values = entries.activations.unsqueeze(1)
        values = values if entries.directions is None else values * entries.directions
        return entries.positions, entries.features, values

    nodes = torch.from_numpy(number).to(active.positions.device)
    nothing = active.take(torch.zeros(0, dtype=torch.long, device=nodes.device))
    return Carried(nodes, *sent(active), hidden=sent(nothing if hidden is None else hidden))


def _directions(blocks: Sequence[_Block], numbers: Sequence[np.ndarray], n_nodes: int) -> Tensor | None:
    found = [
        (b.active.directions, at) for b, at in zip(blocks, numbers, strict=True) if b.active.directions is not None
    ]
    if not found:
        return None
    widest = max(directions.shape[1] for directions, _ in found)
    table = found[0][0].new_zeros(n_nodes, widest)
    for directions, at in found:
        table[torch.from_numpy(at).to(table.device), : directions.shape[1]] = directions
    return table
