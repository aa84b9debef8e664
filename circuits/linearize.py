"""The linearized model of one prompt: what stays live between nodes, and the constants that it adds.

Places in the stream are ordered by *depth*: the embedding is 0, `attn_out.l` is 2l + 1, `mlp_out.l` is 2l + 2. A
reader at depth t sees exactly the writes of depth below t: `resid_pre.l` reads below 2l + 1, `resid_mid.l` below
2l + 2, `resid_final` below 2L + 1. A *live* sublayer passes covectors from its depth to those below it: attention
without a replacement (frozen), and a transcoder's skip connection. Where the values of a layer are replaced, covectors
pass its frozen heads and end at the values. A *cut* is the depth 2l + 2 of a replacement that writes `resid_post.l` and
stands for the whole block: nothing passes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.kernels.attend import pull_readers, pull_stream, pull_values, push_stream, push_values
from circuits.model import AttentionWeights, BaseModel
from circuits.recording import NormRecord, Recording
from circuits.replacements.dictionary import Dictionary, Replacement
from circuits.replacements.movement import OwnAttention
from circuits.replacements.sites import ReadSite, Site


def write_depth(site: Site) -> int:
    """Depth at which a write site adds to the stream."""
    return 2 * site.layer + (1 if site.name in ("attn_out", "z") else 2)


def read_depth(name: str, layer: int) -> int:
    """A reader sees the writes of depths below this; one of an attention output or of values through its heads."""
    return 2 * layer + {"resid_mid": 2, "resid_post": 3}.get(name, 1)


class FrozenAttention:
    """One layer's attention with its pattern and norm frozen: linear in the stream below it."""

    def __init__(self, weights: AttentionWeights, pattern: Tensor, norm: NormRecord) -> None:
        self.weights, self.pattern, self.norm = weights, pattern, norm
        self.n_heads = pattern.shape[0]

    def head_readers(self, readers: Tensor) -> Tensor:
        """Readers of the attention output (B, D) as readers of the concatenated head outputs (B, H, E)."""
        w_o = self.weights.w_o
        return (readers @ w_o.flatten(0, 1).T).reshape(*readers.shape[:-1], *w_o.shape[:2])

    def pull_heads(self, positions: Tensor, u: Tensor, n_keys: int) -> Tensor:
        """Readers (B, H, E) of the head outputs at `positions` (B,) as covectors (B, n_keys, D) of `resid_pre`."""
        c = pull_readers(self.pattern, positions, u, self.weights.w_v, n_keys)
        return self.norm.pull(c, slice(0, n_keys))

    def pull(self, g: Tensor) -> Tensor:
        """Covectors (B, S, D) of the attention output as covectors (B, S, D) of `resid_pre`."""
        return self.norm.pull(pull_stream(self.pattern, g, self.weights.w_o, self.weights.w_v), slice(0, g.shape[1]))

    def pull_values(self, g: Tensor) -> Tensor:
        """Covectors (B, S, D) of the attention output as covectors (B, S, K x E) of the values."""
        return pull_values(self.pattern, g, self.weights.w_o, len(self.weights.w_v))

    def pull_value_readers(self, readers: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Readers (B, K x E) of the values at `positions` as covectors (B, D) of `resid_pre`, and what they make of the
        biases of the values and of the norm, (B,)."""
        constants = readers.new_zeros(len(readers))
        if self.weights.b_v is not None:
            constants = constants + readers @ self.weights.b_v.flatten()
        readers = readers @ self.weights.w_v.flatten(0, 1)
        if self.norm.bias is not None:
            constants = constants + readers @ self.norm.bias
        return self.norm.pull(readers, positions), constants

    def read_values(self, x: Tensor) -> Tensor:
        """Values (S, K x E) of all key-value heads for the stream x (S, D) at `resid_pre`."""
        normed = self.norm.apply(x, slice(None))
        if self.norm.bias is not None:
            normed = normed + self.norm.bias
        v = normed @ self.weights.w_v.flatten(0, 1).T
        return v if self.weights.b_v is None else v + self.weights.b_v.flatten()

    def push(self, x: Tensor) -> Tensor:
        """Writers (N, S, D) in `resid_pre` as what they add to the attention output (N, S, D)."""
        normed = self.norm.apply(x, slice(0, x.shape[1]))
        return push_stream(self.pattern, normed, self.weights.w_o, self.weights.w_v)

    def values(self, x: Tensor, positions: Tensor) -> Tensor:
        """Values (n, H, E) of every head for stream vectors (n, D) at `positions` (n,)."""
        return push_values(self.norm.apply(x, positions), self.weights.w_v, self.n_heads)

    @cached_property
    def head_bias(self) -> Tensor:
        """What norm and value biases add to the concatenated head outputs, (S, H, E)."""
        v = torch.zeros_like(self.weights.w_o[:, :, 0])
        if self.norm.bias is not None:
            v = v + push_values(self.norm.bias, self.weights.w_v, self.n_heads)
        if self.weights.b_v is not None:
            v = v + self.weights.b_v.repeat_interleave(self.n_heads // len(self.weights.b_v), dim=0)
        return self.pattern.sum(-1).T.unsqueeze(-1) * v

    @cached_property
    def output_bias(self) -> Tensor:
        """What the layer's biases add to the attention output, (S, D)."""
        bias = torch.einsum("she,hed->sd", self.head_bias, self.weights.w_o)
        return bias if self.weights.b_o is None else bias + self.weights.b_o


@dataclass(frozen=True)
class Skip:
    """A transcoder's skip connection, `mlp_out += W_skip read(resid_mid)`, live at depth 2l + 2."""

    weight: Tensor
    read: ReadSite
    norm: NormRecord

    def pull(self, g: Tensor, positions: Tensor | slice) -> Tensor:
        """Covectors (..., D) of the MLP output as covectors of `resid_mid` at the same positions."""
        g = g @ self.weight
        return g if self.read.norm == "none" else self.norm.pull(g, positions, gain=self.read.norm == "full")

    def push(self, x: Tensor, positions: Tensor | slice) -> Tensor:
        """Stream vectors (..., D) at `resid_mid` as what they add to the MLP output."""
        if self.read.norm != "none":
            x = self.norm.apply(x, positions, gain=self.read.norm == "full")
        return x @ self.weight.T

    @property
    def bias(self) -> Tensor | None:
        """What the norm's bias adds through the skip connection, (D,)."""
        if self.read.norm != "full" or self.norm.bias is None:
            return None
        return self.weight @ self.norm.bias


class LinearizedModel:
    """The base model and its replacements on one recorded prompt.

    Attributes
    ----------
    dictionaries : those that take part; one that reads inside a block that is replaced whole does not
    attention : one `FrozenAttention` a layer
    replaced_attention : layers whose attention output a dictionary rebuilds
    replaced_values : layers whose values a dictionary rebuilds; their heads stay frozen
    replaced_mlp : layers whose MLP output a dictionary rebuilds; the others are error nodes whole
    replaced_blocks : layers that are replaced whole; they have no sublayers
    skips : depth of a live skip connection -> `Skip`
    """

    def __init__(self, model: BaseModel, replacements: Sequence[Replacement], recording: Recording) -> None:
        self.model, self.recording = model, recording
        shape = model.shape
        self.attention = [
            FrozenAttention(model.attention_weights(layer), recording.patterns[layer], recording.attention_norms[layer])
            for layer in range(shape.n_layers)
        ]
        offered = [d for r in replacements for d in r.dictionaries]
        self.replaced_blocks = frozenset(s.layer for d in offered for s in d.writes if s.name == "resid_post")
        self.dictionaries: tuple[Dictionary, ...] = tuple(d for d in offered if not self._reads_inside_block(d))
        self.owners: dict[int, list[Dictionary]] = {}
        for dictionary in self.dictionaries:
            for site in self.writes_of(dictionary):
                if site.name != "v":
                    self.owners.setdefault(write_depth(site), []).append(dictionary)
        layers = [layer for layer in range(shape.n_layers) if layer not in self.replaced_blocks]
        self.replaced_attention = frozenset(l for l in layers if 2 * l + 1 in self.owners)
        self.replaced_values = frozenset(s.layer for d in self.dictionaries for s in d.writes if s.name == "v")
        self.replaced_mlp = frozenset(l for l in layers if 2 * l + 2 in self.owners)
        self.frozen_attention = frozenset(layers) - self.replaced_attention
        self.skips = {
            write_depth(d.writes[0]): Skip(d.skip, d.read, recording.mlp_norms[d.layer])
            for d in self.dictionaries
            if d.skip is not None
        }
        self.n_depths = 2 * shape.n_layers + 1
        self._own_patterns: dict[int, Tensor] = {}

    def _reads_inside_block(self, dictionary: Dictionary) -> bool:
        inside = dictionary.read.site.name in ("attn_out", "z", "v", "resid_mid")
        return inside and dictionary.layer in self.replaced_blocks

    def writes_of(self, dictionary: Dictionary) -> tuple[Site, ...]:
        """The write sites of a dictionary that there are: none inside a block that is replaced whole."""
        blocks = self.replaced_blocks
        return tuple(site for site in dictionary.writes if site.name == "resid_post" or site.layer not in blocks)

    @cached_property
    def live_depths(self) -> tuple[int, ...]:
        """Depths of the live sublayers, from the top down; frozen heads over replaced values are among them."""
        return tuple(sorted({2 * layer + 1 for layer in self.frozen_attention} | set(self.skips), reverse=True))

    def floor(self, depth: int) -> int:
        """The depth of the highest cut below a reader of `depth`, 0 without one: no write below the cut reaches it."""
        return max((2 * layer + 2 for layer in self.replaced_blocks if 2 * layer + 2 < depth), default=0)

    def passed(self, depth: int) -> list[int]:
        """Live depths between a reader of `depth` and the cut below it, from the top down."""
        return [live for live in self.live_depths if self.floor(depth) < live < depth]

    def read(self, read: ReadSite) -> Tensor:
        """What a dictionary reads on the recording, (S, d_read)."""
        if read.site.name == "v":
            return self.attention[read.site.layer].read_values(self.recording.resid_pre[read.site.layer])
        return self.recording.read(read)

    def own_patterns(self, index: int) -> Tensor:
        """Patterns (G, S, S) that dictionary `index` has of its own."""
        dictionary = self.dictionaries[index]
        assert isinstance(dictionary.moved_by, OwnAttention)
        if index not in self._own_patterns:
            self._own_patterns[index] = dictionary.moved_by.patterns(self.read(dictionary.read))
        return self._own_patterns[index]

    def base_output(self, depth: int) -> Tensor:
        """What the base model recorded at a sublayer's depth, (S, D); at a cut the stream after the block."""
        layer, is_mlp = divmod(depth - 1, 2)
        output = (self.recording.mlp_out if is_mlp else self.recording.attn_out)[layer]
        return output + self.recording.resid_mid[layer] if layer in self.replaced_blocks else output

    def skip_output(self, depth: int) -> Tensor:
        """The skip connection's output on the recording without its constant, (S, D); zero where there is none."""
        skip = self.skips.get(depth)
        if skip is None:
            return torch.zeros_like(self.recording.embedding)
        return skip.push(self.recording.resid_mid[(depth - 2) // 2], slice(None))

    def constant(self, depth: int) -> Tensor:
        """The biases that enter the stream at a depth, (S, D): no node carries them."""
        recording = self.recording
        if depth == 0:
            position = self.model.position_embedding(recording.n_positions)
            return torch.zeros_like(recording.embedding) if position is None else position
        layer, is_mlp = divmod(depth - 1, 2)
        total = torch.zeros_like(recording.embedding)
        if not is_mlp and layer in self.frozen_attention:
            b_o = self.attention[layer].weights.b_o
            if layer not in self.replaced_values:
                return self.attention[layer].output_bias
            return total if b_o is None else total + b_o
        for dictionary in self.owners.get(depth, []):
            for site in self.writes_of(dictionary):
                if write_depth(site) == depth and (bias := dictionary.output_bias(site)) is not None:
                    total = total + self.through_output(site, bias)
        if not is_mlp and any(str(d.read.site) == f"z.{layer}" for d in self.owners.get(depth, [])):
            b_o = self.attention[layer].weights.b_o
            total = total if b_o is None else total + b_o
        if (skip := self.skips.get(depth)) is not None and skip.bias is not None:
            total = total + skip.bias
        return total

    def through_output(self, site: Site, rows: Tensor) -> Tensor:
        """Decoder rows as they enter the stream: rows of `z` go through the layer's output projection."""
        if site.name != "z":
            return rows
        w_o = self.attention[site.layer].weights.w_o
        return rows @ w_o.flatten(0, 1)

    def push(self, writers: dict[int, Tensor], below: int) -> Tensor:
        """Stream (N, S, D) that writers make at a reader of depth `below`, live sublayers included.

        writers
            Depth -> (N, S, D): what each of N nodes writes there.
        """
        x = torch.zeros_like(next(iter(writers.values())))
        floor = self.floor(below)
        for depth in range(floor, below):
            if depth > floor and depth in self.skips:
                x = x + self.skips[depth].push(x, slice(0, x.shape[1]))
            elif depth > floor and depth in self.live_depths and (depth - 1) // 2 not in self.replaced_values:
                x = x + self.attention[(depth - 1) // 2].push(x)
            if depth in writers:
                x = x + writers[depth]
        return x


def check_replacements(model: BaseModel, replacements: Sequence[Replacement]) -> None:
    """Refuse replacements that do not fit the model, that write nothing to the stream, or two for the same output.

    Each MLP, attention and block has one replacement. A cross-layer one may be several dictionaries that write there,
    of one directory.
    """
    shape = model.shape
    taken: dict[str, tuple[int, str]] = {}
    for number, replacement in enumerate(replacements):
        replacement.check(shape.n_layers, shape.d_model, shape.n_heads * shape.d_head, shape.n_kv_heads * shape.d_head)
        recorded = replacement.model.get("hash")
        if recorded and recorded != model.identity:
            raise CircuitsError(
                f"{replacement.path}: trained on another model ({replacement.model.get('name', '?')}, "
                f"hash {str(recorded)[:12]}) than {model.name} (hash {model.identity[:12]})"
            )
        for dictionary in replacement.dictionaries:
            _check_sites(dictionary)
            for site in dictionary.writes:
                place = {"resid_post": "block", "mlp_out": "MLP"}.get(site.name, "attention")
                key = f"{place} of layer {site.layer}"
                owner, name = taken.setdefault(key, (number, dictionary.name))
                if owner != number:
                    raise CircuitsError(f"{dictionary.name} and {name} both replace the {key}; give only one")


def _check_sites(dictionary: Dictionary) -> None:
    """Refuse a dictionary whose sites have no place in a trace."""
    read = dictionary.read
    if read.also:
        raise CircuitsError(
            f"{dictionary.source}: {dictionary.name} reads several layers at once ({read}) and writes nothing to the "
            "stream; it is for analysis, not for a trace"
        )
    moves = dictionary.moved_by is not None
    known = {"resid_mid": {"mlp_out", "attn_out"}, "attn_out": {"attn_out", "mlp_out"}, "z": {"z"}, "v": {"v"}}
    if moves:
        known = {"resid_pre": {"attn_out", "mlp_out", "resid_post"}}
    for site in dictionary.writes:
        fits = site.name in known.get(read.site.name, ())
        if not fits or write_depth(site) < read_depth(read.site.name, read.site.layer):
            raise CircuitsError(
                f"{dictionary.source}: {dictionary.name} reads {read} and writes {site}; it is for analysis only"
            )
