"""The linearized model of one prompt: what stays live between nodes, and the constants that it adds.

Places in the stream are ordered by *depth*: the embedding is 0, `attn_out.l` is 2l + 1, `mlp_out.l` is 2l + 2. A
reader at depth t sees exactly the writes of depth below t: `resid_pre.l` reads below 2l + 1, `resid_mid.l` below
2l + 2, `resid_final` below 2L + 1. A *live* sublayer passes covectors from its depth to those below it: attention
without a replacement (frozen), and a transcoder's skip connection.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.kernels.attend import pull_readers, pull_stream, push_stream, push_values
from circuits.model import AttentionWeights, BaseModel
from circuits.recording import NormRecord, Recording
from circuits.replacements.dictionary import Dictionary, Replacement
from circuits.replacements.sites import ReadSite, Site


def write_depth(site: Site) -> int:
    """Depth at which a write site adds to the stream."""
    return 2 * site.layer + (1 if site.name in ("attn_out", "z") else 2)


def read_depth(name: str, layer: int) -> int:
    """A stream reader sees the writes of depths below this."""
    return 2 * layer + {"resid_pre": 1, "resid_mid": 2, "resid_post": 3}[name]


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
    attention : one `FrozenAttention` a layer
    replaced_attention : layers whose attention output a dictionary rebuilds; the others stay frozen and live
    replaced_mlp : layers whose MLP output a dictionary rebuilds; the others are error nodes whole
    skips : depth of a live skip connection -> `Skip`
    """

    def __init__(self, model: BaseModel, replacements: Sequence[Replacement], recording: Recording) -> None:
        self.model, self.recording = model, recording
        self.dictionaries: tuple[Dictionary, ...] = tuple(d for r in replacements for d in r.dictionaries)
        shape = model.shape
        self.attention = [
            FrozenAttention(model.attention_weights(layer), recording.patterns[layer], recording.attention_norms[layer])
            for layer in range(shape.n_layers)
        ]
        self.owners: dict[int, list[Dictionary]] = {}
        for dictionary in self.dictionaries:
            for site in dictionary.writes:
                self.owners.setdefault(write_depth(site), []).append(dictionary)
        self.replaced_attention = frozenset(l for l in range(shape.n_layers) if 2 * l + 1 in self.owners)
        self.replaced_mlp = frozenset(l for l in range(shape.n_layers) if 2 * l + 2 in self.owners)
        self.skips = {
            write_depth(d.writes[0]): Skip(d.skip, d.read, recording.mlp_norms[d.layer])
            for d in self.dictionaries
            if d.skip is not None
        }
        self.n_depths = 2 * shape.n_layers + 1

    @cached_property
    def live_depths(self) -> tuple[int, ...]:
        """Depths of the live sublayers, from the top down."""
        frozen = {2 * layer + 1 for layer in range(self.model.shape.n_layers) if layer not in self.replaced_attention}
        return tuple(sorted(frozen | set(self.skips), reverse=True))

    def base_output(self, depth: int) -> Tensor:
        """What the base model recorded at a sublayer's depth, (S, D)."""
        layer, is_mlp = divmod(depth - 1, 2)
        return (self.recording.mlp_out if is_mlp else self.recording.attn_out)[layer]

    def skip_output(self, depth: int) -> Tensor:
        """The skip connection's output on the recording without its constant, (S, D); zero where there is none."""
        skip = self.skips.get(depth)
        if skip is None:
            return torch.zeros_like(self.recording.embedding)
        return skip.push(self.recording.resid_mid[(depth - 2) // 2], slice(None))

    def constant(self, depth: int) -> Tensor:
        """The biases that enter the stream at a depth, (S, D): no node carries them."""
        recording = self.recording
        n = recording.n_positions
        if depth == 0:
            position = self.model.position_embedding(n)
            return torch.zeros_like(recording.embedding) if position is None else position
        layer, is_mlp = divmod(depth - 1, 2)
        if not is_mlp and layer not in self.replaced_attention:
            return self.attention[layer].output_bias
        total = torch.zeros_like(recording.embedding)
        for dictionary in self.owners.get(depth, []):
            for site in dictionary.writes:
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
        first = next(iter(writers.values()))
        x = torch.zeros_like(first)
        for depth in range(below):
            if depth in self.skips:
                x = x + self.skips[depth].push(x, slice(0, x.shape[1]))
            elif depth % 2 == 1 and depth in self.live_depths:
                x = x + self.attention[(depth - 1) // 2].push(x)
            if depth in writers:
                x = x + writers[depth]
        return x


def check_replacements(model: BaseModel, replacements: Sequence[Replacement]) -> None:
    """Refuse replacements that do not fit the model, or two that rebuild the same output."""
    shape = model.shape
    taken: dict[str, str] = {}
    for replacement in replacements:
        replacement.check(shape.n_layers, shape.d_model, shape.n_heads * shape.d_head)
        recorded = replacement.model.get("hash")
        if recorded and recorded != model.identity:
            raise CircuitsError(
                f"{replacement.path}: trained on another model ({replacement.model.get('name', '?')}, "
                f"hash {str(recorded)[:12]}) than {model.name} (hash {model.identity[:12]})"
            )
        for dictionary in replacement.dictionaries:
            if dictionary.read.site.name not in ("resid_mid", "attn_out", "z"):
                raise CircuitsError(f"{dictionary.source}: reading {dictionary.read} is not supported in a trace")
            place = f"{'attention' if write_depth(dictionary.writes[0]) % 2 else 'MLP'} of layer {dictionary.layer}"
            if place in taken:
                raise CircuitsError(f"{dictionary.name} and {taken[place]} both replace the {place}; give only one")
            taken[place] = dictionary.name
