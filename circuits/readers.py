"""Feature nodes as targets: what each reads, as a covector or through which heads, and its biases.

Within one dictionary all nodes of one side read alike; the side is told by the node's kind.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.linearize import LinearizedModel
from circuits.nodes import NodeTable
from circuits.replacements import Dictionary
from circuits.replacements.movement import OwnAttention
from circuits.rows import Targets


def feature_targets(linear: LinearizedModel, table: NodeTable, index: int, nodes: np.ndarray) -> Targets:
    """Readers of some feature nodes of dictionary `index`, all of one kind."""
    dictionary, layer = linear.dictionaries[index], linear.dictionaries[index].layer
    device = table.constants[0].device
    features = torch.from_numpy(table.feature[nodes]).to(device)
    directions = table.directions_of(nodes, dictionary.rank)
    plain = Targets(
        depth=linear.read_depth(dictionary.read.site.name, layer),
        nodes=torch.from_numpy(nodes).to(device),
        positions=torch.from_numpy(table.position[nodes]).to(device),
        values=torch.from_numpy(table.pre_activation[nodes]).to(device),
        constants=torch.zeros(len(nodes), device=device),
        attention_layer=layer,
        dictionary=index,
    )
    if len(nodes) and table.kind[nodes[0]] == "mtc_query":
        carried = torch.ones(len(nodes), 1, device=device) if directions is None else directions
        return replace(plain, carried=carried, features=features)
    readers = dictionary.encoder_rows(features, directions)
    constants = dictionary.encoder_bias(features, directions)
    if isinstance(dictionary.moved_by, OwnAttention):
        group = dictionary.moved_by.group.to(device)[features]
        keys = linear.own_patterns(index)[group, plain.positions]
        readers, constants = behind_gain(linear, dictionary, readers, constants)
        return replace(plain, constants=constants * keys.sum(1), covectors=readers, keys=keys)
    return _plain_reader(linear, index, plain, readers, constants)


def behind_gain(
    linear: LinearizedModel, dictionary: Dictionary, readers: Tensor, constants: Tensor
) -> tuple[Tensor, Tensor]:
    """Readers (..., D) of what lies behind the attention's norm, with its gain, but without its bias; and constants.

    `readers` and `constants` (...) are those of a dictionary, which may read the norm without gain and bias: there each
    entry is divided by the gain.
    """
    norm = linear.recording.attention_norms[dictionary.layer]
    if dictionary.read.norm == "full":
        return readers, constants if norm.bias is None else constants + readers @ norm.bias
    if bool((norm.gain == 0).any()):
        raise CircuitsError(
            f"{dictionary.source}: {dictionary.name} reads {dictionary.read}, before the gain of a norm that is zero "
            "in places; such a dictionary has no place in a trace"
        )
    return readers / norm.gain, constants


def _plain_reader(linear: LinearizedModel, index: int, plain: Targets, readers: Tensor, constants: Tensor) -> Targets:
    """Readers (B, d_read) at the node's own position: of the stream, of an attention output, or of values."""
    dictionary, layer = linear.dictionaries[index], plain.attention_layer
    read = dictionary.read
    attention = linear.attention[layer]
    if read.site.name == "z":
        shape = linear.model.shape
        return replace(plain, constants=constants, heads=readers.reshape(len(readers), shape.n_heads, shape.d_head))
    if read.site.name == "attn_out":
        at, below = plain.positions, dictionary.before_post_norm
        constants = constants + attention.reader_constants(readers, at, below_post=below)
        return replace(plain, constants=constants, heads=attention.head_readers(readers, at, below_post=below))
    if read.site.name == "v":
        readers, biases = attention.pull_value_readers(readers, plain.positions)
        return replace(plain, constants=constants + biases, covectors=readers)
    if read.norm != "none":
        norm, full = linear.recording.norm_at(read.site.name, layer), read.norm == "full"
        if full and norm.bias is not None:
            constants = constants + readers @ norm.bias
        readers = norm.pull(readers, plain.positions, gain=full)
    return replace(plain, constants=constants, covectors=readers)
