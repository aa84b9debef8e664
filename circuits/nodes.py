"""The nodes of a prompt and their writers: which features are active, what each writes and where, and the errors.

Nodes are sorted by position, then depth, then feature, so the nodes of one position are one slice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from circuits.kernels.decode import gather_decode
from circuits.linearize import LinearizedModel, write_depth
from circuits.replacements.dictionary import Active, Dictionary

FEATURE_KINDS = ("mlp_feature", "attention_feature")
ERROR_KINDS = ("mlp_error", "attention_error")


@dataclass(frozen=True)
class Write:
    """What some nodes write at one depth: `nodes` (m,) ascending, `vectors` (m, D)."""

    nodes: Tensor
    vectors: Tensor


@dataclass(frozen=True)
class NodeTable:
    """All source nodes of a prompt, (n,) each, and their writers.

    `dictionary` is an index into `LinearizedModel.dictionaries`, -1 for none; `depth` is where the node first writes;
    `feature` is the token id of an embedding and -1 for an error; `starts[s]:starts[s + 1]` are the nodes at
    position s. `constants[depth]` (S, D) is what no node carries: biases, position embeddings, and everything that a
    special first token's position writes.
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

    def __len__(self) -> int:
        return len(self.kind)


@dataclass
class _Block:
    """Nodes of one kind before sorting."""

    kind: str
    dictionary: int
    layer: int
    depth: int
    position: Tensor
    feature: Tensor
    activation: Tensor
    pre_activation: Tensor
    writes: dict[int, Tensor]


def build_nodes(linear: LinearizedModel, *, first_is_special: bool) -> NodeTable:
    """Encode every dictionary on the recording and lay out nodes, writers, errors and constants."""
    recording = linear.recording
    n = recording.n_positions
    every = torch.arange(n, device=recording.token_ids.device)
    nan = torch.full((n,), torch.nan)
    blocks = [
        _Block("embedding", -1, -1, 0, every, recording.token_ids, nan, nan, {0: recording.embedding}),
    ]
    actives = [_active(linear, d, first_is_special) for d in linear.dictionaries]
    written = {depth: torch.zeros_like(recording.embedding) for depth in linear.owners}
    for index, (dictionary, active) in enumerate(zip(linear.dictionaries, actives, strict=True)):
        block = _feature_block(linear, index, dictionary, active)
        for depth, vectors in block.writes.items():
            ones = torch.ones_like(active.activations)
            written[depth] += gather_decode(active.positions, None, ones, vectors, n)
        blocks.append(block)
    constants = {0: linear.constant(0)}
    for depth in range(1, linear.n_depths):
        constants[depth] = constant = linear.constant(depth)
        layer, is_mlp = divmod(depth - 1, 2)
        if not is_mlp and layer not in linear.replaced_attention:
            continue
        error = linear.base_output(depth) - linear.skip_output(depth) - constant
        if depth in written:
            error = error - written[depth]
        errors = every
        if first_is_special:
            constants[depth] = constant.clone()
            constants[depth][0] += error[0]
            errors = every[1:]
        kind = "mlp_error" if is_mlp else "attention_error"
        minus = torch.full_like(errors, -1)
        blocks.append(_Block(kind, -1, layer, depth, errors, minus, nan[errors], nan[errors], {depth: error[errors]}))
    return _sorted_table(blocks, constants, n)


def _active(linear: LinearizedModel, dictionary: Dictionary, first_is_special: bool) -> Active:
    active = dictionary.encode(linear.recording.read(dictionary.read))
    if not first_is_special:
        return active
    kept = active.positions > 0
    return Active(active.positions[kept], active.features[kept], active.activations[kept], active.pre_activations[kept])


def _feature_block(linear: LinearizedModel, index: int, dictionary: Dictionary, active: Active) -> _Block:
    writes = {}
    for site in dictionary.writes:
        rows = linear.through_output(site, dictionary.decoder_rows(active.features, site))
        writes[write_depth(site)] = rows * active.activations.unsqueeze(1)
    depth = min(writes)
    return _Block(
        "mlp_feature" if depth % 2 == 0 else "attention_feature",
        index,
        dictionary.layer,
        depth,
        active.positions,
        active.features,
        active.activations,
        active.pre_activations,
        writes,
    )


def _sorted_table(blocks: Sequence[_Block], constants: dict[int, Tensor], n_positions: int) -> NodeTable:
    sizes = [len(block.position) for block in blocks]
    position = torch.cat([block.position for block in blocks]).cpu().numpy()
    feature = torch.cat([block.feature for block in blocks]).cpu().numpy()
    depth = np.repeat([block.depth for block in blocks], sizes)
    is_error = np.repeat([block.kind in ERROR_KINDS for block in blocks], sizes)
    order = np.lexsort((feature, is_error, depth, position))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    writes: dict[int, list[tuple[np.ndarray, Tensor]]] = {}
    offset = 0
    for block, size in zip(blocks, sizes, strict=True):
        for at, vectors in block.writes.items():
            writes.setdefault(at, []).append((rank[offset : offset + size], vectors))
        offset += size
    device = constants[0].device
    merged = {}
    for at, pieces in sorted(writes.items()):
        nodes = np.concatenate([piece[0] for piece in pieces])
        ascending = np.argsort(nodes)
        vectors = torch.cat([piece[1] for piece in pieces])[torch.from_numpy(ascending).to(device)]
        merged[at] = Write(torch.from_numpy(nodes[ascending]).to(device), vectors)
    return NodeTable(
        kind=np.repeat([block.kind for block in blocks], sizes)[order],
        dictionary=np.repeat([block.dictionary for block in blocks], sizes)[order],
        layer=np.repeat([block.layer for block in blocks], sizes)[order],
        position=position[order],
        feature=feature[order],
        depth=depth[order],
        activation=torch.cat([block.activation.cpu() for block in blocks]).numpy()[order],
        pre_activation=torch.cat([block.pre_activation.cpu() for block in blocks]).numpy()[order],
        starts=np.searchsorted(position[order], np.arange(n_positions + 1)).tolist(),
        writes=merged,
        constants=constants,
    )
