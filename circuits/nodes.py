"""The nodes of a prompt and their writers: which features are active, what each writes and where, and the errors.

Nodes are sorted by position, then depth, then feature, so the nodes of one position are one slice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from circuits.graph.tables import ERROR_KINDS
from circuits.kernels.decode import gather_decode
from circuits.linearize import LinearizedModel, write_depth
from circuits.replacements.dictionary import Active, Dictionary
from circuits.replacements.movement import HeadLoading


@dataclass(frozen=True)
class Write:
    """What some nodes write at one depth: `nodes` (m,) ascending, `vectors` (m, D)."""

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
    """Nodes of one kind before sorting; `writes` by depth, `values` into the values of the block's layer."""

    kind: str
    dictionary: int
    layer: int
    depth: int
    active: Active
    writes: dict[int, Tensor] = field(default_factory=dict)
    values: Tensor | None = None

    @property
    def is_error(self) -> bool:
        return self.kind in ERROR_KINDS


def build_nodes(linear: LinearizedModel, *, first_is_special: bool) -> NodeTable:
    """Encode every dictionary on the recording and lay out nodes, writers, errors and constants."""
    recording = linear.recording
    n = recording.n_positions
    every = torch.arange(n, device=recording.token_ids.device)
    blocks = [_Block("embedding", -1, -1, 0, _plain(every, recording.token_ids), {0: recording.embedding})]
    hidden: dict[int, Active] = {}
    for index, dictionary in enumerate(linear.dictionaries):
        found = _feature_blocks(linear, index, dictionary)
        for block in found:
            if first_is_special:
                if block.kind == "mtc_key":
                    hidden[index] = block.active.take(block.active.positions == 0)
                _drop_first(block)
        blocks += found
    constants = {0: linear.constant(0)}
    errors = []
    for depth in range(1, linear.n_depths):
        constants[depth] = linear.constant(depth)
        if (error := _stream_error(linear, blocks, depth, constants[depth])) is not None:
            errors.append(error)
    value_constants = {}
    for layer in sorted(linear.replaced_values):
        error, value_constants[layer] = _value_error(linear, blocks, layer)
        errors.append(error)
    for error in errors if first_is_special else ():
        at = value_constants[error.layer] if error.values is not None else constants[error.depth]
        at = at.clone()
        at[0] += (error.writes[error.depth] if error.values is None else error.values)[0]
        if error.values is None:
            constants[error.depth] = at
        else:
            value_constants[error.layer] = at
        _drop_first(error)
    return _sorted_table([*blocks, *errors], constants, value_constants, hidden, n)


def _plain(positions: Tensor, features: Tensor) -> Active:
    nan = torch.full(positions.shape, torch.nan, device=positions.device)
    return Active(positions, features, nan, nan)


def _drop_first(block: _Block) -> None:
    """Take the entries of the first position out of a block."""
    kept = block.active.positions > 0
    block.active = block.active.take(kept)
    block.writes = {depth: vectors[kept] for depth, vectors in block.writes.items()}
    block.values = None if block.values is None else block.values[kept]


def _feature_blocks(linear: LinearizedModel, index: int, dictionary: Dictionary) -> list[_Block]:
    """The features of one dictionary: one block, or key side and query side."""
    layer = dictionary.layer
    active = dictionary.encode(linear.input_of(dictionary))
    if dictionary.read.site.name == "v":
        rows = dictionary.decoder_rows(active.features, dictionary.writes[0])
        values = rows * active.activations.unsqueeze(1)
        return [_Block("value_feature", index, layer, 2 * layer + 1, active, values=values)]
    blocks = []
    kind = "mlp_feature" if dictionary.read.site.name == "resid_mid" else "attention_feature"
    if isinstance(dictionary.moved_by, HeadLoading):
        blocks.append(_Block("mtc_key", index, layer, 2 * layer + 1, active))
        active = dictionary.move(active, linear.recording.patterns[layer])
        kind = "mtc_query"
    writes = {}
    for site in linear.writes_of(dictionary):
        rows = dictionary.decoder_rows(active.features, site, active.directions)
        rows = linear.through_output(site, rows, active.positions, before_post_norm=dictionary.before_post_norm)
        writes[write_depth(site)] = rows * active.activations.unsqueeze(1)
    depth = min(writes, default=linear.read_depth(dictionary.read.site.name, layer))
    return [*blocks, _Block(kind, index, layer, depth, active, writes)]


def _stream_error(linear: LinearizedModel, blocks: Sequence[_Block], depth: int, constant: Tensor) -> _Block | None:
    """Base output minus replacement output at a depth; None where attention is frozen or a block is replaced whole."""
    layer, is_mlp = divmod(depth - 1, 2)
    is_block = layer in linear.replaced_blocks
    if not is_mlp and layer not in linear.replaced_attention:
        return None
    error = linear.base_output(depth) - linear.skip_output(depth) - constant - _written(blocks, depth, constant)
    kind = "block_error" if is_block else "mlp_error" if is_mlp else "attention_error"
    every = torch.arange(len(error), device=error.device)
    return _Block(kind, -1, layer, depth, _plain(every, torch.full_like(every, -1)), {depth: error})


def _written(blocks: Sequence[_Block], depth: int, like: Tensor) -> Tensor:
    """What all feature nodes write at a depth, (S, D)."""
    total = torch.zeros_like(like)
    for block in blocks:
        if block.kind != "embedding" and depth in block.writes:
            total += _summed(block.active.positions, block.writes[depth], len(like))
    return total


def _summed(positions: Tensor, vectors: Tensor, n_positions: int) -> Tensor:
    return gather_decode(positions, None, torch.ones(len(positions), device=vectors.device), vectors, n_positions)


def _value_error(linear: LinearizedModel, blocks: Sequence[_Block], layer: int) -> tuple[_Block, Tensor]:
    """Base values minus replacement values of a layer, and the values' constant (S, K x E): the decoder biases."""
    error = linear.attention[layer].read_values(linear.recording.resid_pre[layer])
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
    blocks: Sequence[_Block],
    constants: dict[int, Tensor],
    value_constants: dict[int, Tensor],
    hidden: dict[int, Active],
    n_positions: int,
) -> NodeTable:
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
    writes: dict[int, list[tuple[np.ndarray, Tensor]]] = {}
    values: dict[int, list[tuple[np.ndarray, Tensor]]] = {}
    for block, number in zip(blocks, numbers, strict=True):
        for at, vectors in block.writes.items():
            writes.setdefault(at, []).append((number, vectors))
        if block.values is not None:
            values.setdefault(block.layer, []).append((number, block.values))
    device = constants[0].device
    return NodeTable(
        kind=np.repeat([block.kind for block in blocks], sizes)[order],
        dictionary=np.repeat([block.dictionary for block in blocks], sizes)[order],
        layer=np.repeat([block.layer for block in blocks], sizes)[order],
        position=position[order],
        feature=feature[order],
        depth=depth[order],
        activation=torch.cat([block.active.activations.cpu() for block in blocks]).numpy()[order],
        pre_activation=torch.cat([block.active.pre_activations.cpu() for block in blocks]).numpy()[order],
        starts=np.searchsorted(position[order], np.arange(n_positions + 1)).tolist(),
        writes={at: _merged(pieces, device) for at, pieces in sorted(writes.items())},
        constants=constants,
        value_writes={layer: _merged(pieces, device) for layer, pieces in sorted(values.items())},
        value_constants=value_constants,
        carried={
            block.dictionary: _carried(block.active, number, hidden.get(block.dictionary))
            for block, number in zip(blocks, numbers, strict=True)
            if block.kind == "mtc_key"
        },
        directions=_directions(blocks, numbers, len(order)),
    )


def _merged(pieces: Sequence[tuple[np.ndarray, Tensor]], device: torch.device) -> Write:
    nodes = np.concatenate([piece[0] for piece in pieces])
    ascending = np.argsort(nodes)
    vectors = torch.cat([piece[1] for piece in pieces])[torch.from_numpy(ascending).to(device)]
    return Write(torch.from_numpy(nodes[ascending]).to(device), vectors)


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
