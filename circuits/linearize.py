"""The linearized model of one prompt: what stays live between nodes, and the constants that it adds.

Places in the stream are ordered by *depth*: the embedding is 0, `attn_out.l` is 2l + 1, `mlp_out.l` is 2l + 2. A
reader at depth t sees exactly the writes of depth below t: `resid_pre.l` reads below 2l + 1, `resid_mid.l` below
2l + 2, `resid_final` below 2L + 1. A *live* sublayer passes covectors from its depth to those below it: attention
without a replacement (frozen), and a transcoder's skip connection. Where the values of a layer are replaced, covectors
pass its frozen heads and end at the values. A *cut* is the depth 2l + 2 of a replacement that writes `resid_post.l` and
stands for the whole block: nothing passes it.

In a parallel block `resid_mid.l` is `resid_pre.l` and reads below 2l + 1 too. Its sublayers are live together at depth
2l + 1: both take the covector from above the block, and give it to the stream below the block.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.frozen import FrozenAttention, Skip, standing, whole
from circuits.kernels.backend import Products
from circuits.model import BaseModel
from circuits.recording import Recording
from circuits.replacements.dictionary import Dictionary, Replacement
from circuits.replacements.movement import OwnAttention
from circuits.replacements.sites import ReadSite, Site


def write_depth(site: Site) -> int:
    """Depth at which a write site adds to the stream."""
    return 2 * site.layer + (1 if site.name in ("attn_out", "z") else 2)


def read_depth(name: str, layer: int, *, parallel: bool = False) -> int:
    """A reader sees the writes of depths below this; one of an attention output or of values through its heads."""
    return 2 * layer + {"resid_mid": 1 if parallel else 2, "resid_post": 3}.get(name, 1)


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
    parallel : whether attention and MLP of a block read the same stream
    products : how covectors are multiplied with weights and writers, "float32" or "bfloat16"; may be set
    """

    def __init__(self, model: BaseModel, replacements: Sequence[Replacement], recording: Recording) -> None:
        self.model, self.recording = model, recording
        shape = model.shape
        self.parallel = model.parallel
        self.attention = [
            FrozenAttention(
                model.attention_weights(layer),
                recording.patterns[layer],
                recording.attention_norms[layer],
                recording.post_norm(layer),
            )
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
            write_depth(d.writes[0]): Skip(
                d.skip,
                d.read,
                recording.mlp_norms[d.layer],
                recording.post_norm(d.layer, mlp=True) if d.before_post_norm else None,
            )
            for d in self.dictionaries
            if d.skip is not None
        }
        self.n_depths = 2 * shape.n_layers + 1
        self._own_patterns: dict[int, Tensor] = {}
        self._probabilities: dict[int, Tensor] = {}
        self._head_scales: dict[int, tuple[Tensor | None, Tensor | None]] = {}

    @property
    def products(self) -> Products:
        return self.attention[0].products

    @products.setter
    def products(self, products: Products) -> None:
        for attention in self.attention:
            attention.set_products(products)

    def _reads_inside_block(self, dictionary: Dictionary) -> bool:
        inside = dictionary.read.site.name in ("attn_out", "z", "v", "resid_mid")
        return inside and dictionary.layer in self.replaced_blocks

    def writes_of(self, dictionary: Dictionary) -> tuple[Site, ...]:
        """The write sites of a dictionary that there are: none inside a block that is replaced whole."""
        blocks = self.replaced_blocks
        return tuple(site for site in dictionary.writes if site.name == "resid_post" or site.layer not in blocks)

    def read_depth(self, name: str, layer: int) -> int:
        """A reader sees the writes of depths below this; see the function of this name."""
        return read_depth(name, layer, parallel=self.parallel)

    def head_norm_scales(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """One over the recorded denominators (S,) of the norms of queries and keys that go over all heads of a layer;
        None in most families."""
        if not self.model.family.head_norm_over_all:
            return None, None
        if layer not in self._head_scales:
            x = self.recording.read(ReadSite(Site("resid_pre", layer), "full"))
            self._head_scales[layer] = self.model.score_weights(layer).scales_over_all(x)
        return self._head_scales[layer]

    @cached_property
    def live_depths(self) -> tuple[int, ...]:
        """Depths of the live sublayers, from the top down; frozen heads over replaced values are among them.

        The skip connection of a parallel block is live at the depth of its attention.
        """
        skips = {depth - 1 if self.parallel else depth for depth in self.skips}
        return tuple(sorted({2 * layer + 1 for layer in self.frozen_attention} | skips, reverse=True))

    def skip_at(self, live: int) -> Skip | None:
        """The skip connection that is live at a depth."""
        return self.skips.get(live + 1 if self.parallel else live)

    def heads_at(self, live: int) -> int | None:
        """The layer whose frozen heads pass covectors at a live depth, to the stream or to replaced values."""
        layer, is_mlp = divmod(live - 1, 2)
        return None if is_mlp or layer not in self.frozen_attention else layer

    def passing_at(self, live: int) -> FrozenAttention | None:
        """The frozen attention that passes the stream on at a live depth; where values are replaced it does not."""
        layer = self.heads_at(live)
        return None if layer is None or layer in self.replaced_values else self.attention[layer]

    def pull_past(self, live: int, g: Tensor) -> Tensor:
        """Covectors (B, S, D) above a live depth as covectors of the stream below it."""
        attention, skip = self.passing_at(live), self.skip_at(live)
        below = g if attention is None else attention.pull(g)
        return below if skip is None else below + skip.pull(g, whole(g))

    def pull_local_past(self, live: int, g: Tensor, positions: Tensor, n_keys: int) -> Tensor:
        """Covectors (B, D) at one position each above a live depth as covectors (B, n_keys, D) below it."""
        attention, skip = self.passing_at(live), self.skip_at(live)
        below = (
            g.new_zeros(len(g), n_keys, g.shape[1]) if attention is None else attention.pull_local(g, positions, n_keys)
        )
        below[torch.arange(len(g), device=g.device), positions] += g if skip is None else g + skip.pull(g, positions)
        return below

    def push_local_past(self, live: int, x: Tensor, positions: Tensor) -> Tensor:
        """Writers (N, D) below a live depth at one position each as the stream (N, S, D) above it."""
        attention, skip = self.passing_at(live), self.skip_at(live)
        n = self.recording.n_positions
        above = x.new_zeros(len(x), n, x.shape[1]) if attention is None else attention.push_local(x, positions)
        above[torch.arange(len(x), device=x.device), positions] += x if skip is None else x + skip.push(x, positions)
        return above

    def push_past(self, live: int, x: Tensor) -> Tensor:
        """The stream (N, S, D) below a live depth with what the sublayers there make of it: the transpose."""
        above = x
        if (skip := self.skip_at(live)) is not None:
            above = above + skip.push(x, whole(x))
        if (attention := self.passing_at(live)) is not None:
            above = above + attention.push(x)
        return above

    def floor(self, depth: int) -> int:
        """The depth of the highest cut below a reader of `depth`, 0 without one: no write below the cut reaches it."""
        return max((2 * layer + 2 for layer in self.replaced_blocks if 2 * layer + 2 < depth), default=0)

    def passed(self, depth: int) -> list[int]:
        """Live depths between a reader of `depth` and the cut below it, from the top down."""
        return [live for live in self.live_depths if self.floor(depth) < live < depth]

    def read(self, read: ReadSite, *, before_post_norm: bool = False) -> Tensor:
        """What a read site holds on the recording, (S, d_read); an attention output before its post-norm if wanted."""
        if read.site.name == "v":
            return self.attention[read.site.layer].read_values(self.recording.resid_pre[read.site.layer])
        if before_post_norm and read.site.name == "attn_out" and self.recording.attn_before is not None:
            return self.recording.attn_before[read.site.layer]
        return self.recording.read(read)

    def input_of(self, dictionary: Dictionary) -> Tensor:
        """What a dictionary reads on the recording, (S, d_read)."""
        return self.read(dictionary.read, before_post_norm=dictionary.before_post_norm)

    def output_probabilities(self, position: int) -> Tensor:
        """Probabilities (V,) of the next token at a position."""
        if position not in self._probabilities:
            logits, cap = self.recording.logits(self.model, position), self.model.final_soft_cap
            self._probabilities[position] = (logits if cap is None else cap * torch.tanh(logits / cap)).softmax(-1)
        return self._probabilities[position]

    def own_patterns(self, index: int) -> Tensor:
        """Patterns (G, S, S) that dictionary `index` has of its own."""
        dictionary = self.dictionaries[index]
        assert isinstance(dictionary.moved_by, OwnAttention)
        if index not in self._own_patterns:
            self._own_patterns[index] = dictionary.moved_by.patterns(self.input_of(dictionary))
        return self._own_patterns[index]

    def base_output(self, depth: int) -> Tensor:
        """What the base model recorded at a sublayer's depth, (S, D); at a cut the stream after the block."""
        layer, is_mlp = divmod(depth - 1, 2)
        if layer in self.replaced_blocks:
            return self.recording.resid_post(layer)
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
        if depth == 0:
            position = self.model.position_embedding(recording.n_positions)
            return torch.zeros_like(recording.embedding) if position is None else position
        layer, is_mlp = divmod(depth - 1, 2)
        total = torch.zeros_like(recording.embedding)
        if not is_mlp and layer in self.frozen_attention:
            attention = self.attention[layer]
            return attention.after_heads if layer in self.replaced_values else attention.output_bias
        for dictionary in self.owners.get(depth, []):
            for site in self.writes_of(dictionary):
                if write_depth(site) == depth and (bias := dictionary.output_bias(site)) is not None:
                    rows = bias.expand(recording.n_positions, -1)
                    total = total + self.through_output(site, rows, before_post_norm=dictionary.before_post_norm)
        total = total + self._constant_behind(depth)
        if (skip := self.skips.get(depth)) is not None and skip.bias is not None:
            total = total + skip.bias
        return total

    def _constant_behind(self, depth: int) -> Tensor:
        """The biases of the model itself behind what dictionaries write at a depth, (S, D)."""
        layer, is_mlp = divmod(depth - 1, 2)
        there = [d for d in self.owners.get(depth, []) for s in self.writes_of(d) if write_depth(s) == depth]
        if not is_mlp and any(str(d.read.site) == f"z.{layer}" for d in there):
            return self.attention[layer].after_heads
        total = torch.zeros_like(self.recording.embedding)
        post = self.recording.post_norm(layer, mlp=bool(is_mlp))
        if layer not in self.replaced_blocks and any(d.before_post_norm for d in there):
            total = total if post is None or post.bias is None else total + post.bias
        return total

    def through_output(
        self, site: Site, rows: Tensor, positions: Tensor | slice | None = None, *, before_post_norm: bool = False
    ) -> Tensor:
        """Decoder rows (..., width) at `positions` as they enter the stream, (..., D).

        Rows of `z` go through the layer's output projection, and with those of a dictionary that was trained before a
        post-norm through that. Without positions the rows (..., S, width) stand at each from the first on.
        """
        if site.name == "z":
            return self.attention[site.layer].write(rows, standing(rows, positions))
        if not before_post_norm or site.name not in ("attn_out", "mlp_out"):
            return rows
        post = self.recording.post_norm(site.layer, mlp=site.name == "mlp_out")
        return rows if post is None else post.apply(rows, standing(rows, positions))

    def push(self, writers: dict[int, Tensor], below: int) -> Tensor:
        """Stream (N, S, D) that writers make at a reader of depth `below`, live sublayers included.

        writers
            Depth -> (N, S, D): what each of N nodes writes there.
        """
        x = torch.zeros_like(next(iter(writers.values())))
        floor = self.floor(below)
        for depth in range(floor, below):
            if depth > floor:
                x = self.push_past(depth, x)
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
        # In a parallel block too: a forward pass comes to `resid_mid.l` only after `attn_out.l`.
        if not fits or write_depth(site) < read_depth(read.site.name, read.site.layer):
            raise CircuitsError(
                f"{dictionary.source}: {dictionary.name} reads {read} and writes {site}; it is for analysis only"
            )
