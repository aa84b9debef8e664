"""Direct effects: what changes do when all that the linearized model freezes is held at the recording.

Patterns, norm denominators, MLP outputs and replaced attention outputs stay as recorded. What changed features write
goes up the stream; attention without a replacement and skip connections pass it on. The attention that a reader reads
is recomputed for that reader alone. So a node taken away changes what a target reads by minus the weight of their edge,
and a key side changes its query sides and nothing else.

This is a forward computation with plain products, apart from `circuits.rows`, which pulls readers down instead: one
checks the other.

Letters of shapes: B interventions, S positions, D model width, H heads, K key-value heads, E head width, n features, r
rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from circuits.changes import Plan, Side, Watched, changed_pattern
from circuits.feature_runs import Step, move, node_direction
from circuits.feature_values import unit
from circuits.intervening import through_heads
from circuits.linearize import LinearizedModel, write_depth
from circuits.replacements.dictionary import Dictionary
from circuits.replacements.movement import HeadLoading, OwnAttention
from circuits.replacements.sites import ReadSite


@dataclass
class FrozenRun:
    """The direct effects of a plan.

    Parameters
    ----------
    recorded
        Each dictionary's chosen features on the recording.
    values
        (2, B, F): pre-activations and activations of what is watched, filled in.
    """

    linear: LinearizedModel
    plan: Plan
    recorded: dict[int, Step]
    values: Tensor

    def __post_init__(self) -> None:
        recording = self.linear.recording
        self.stream = recording.embedding.new_zeros(self.plan.n_rows, *recording.embedding.shape)
        self.below: dict[int, Tensor] = {}  # the change of `resid_pre` by layer
        self.in_values: dict[int, Tensor] = {}
        self.writes: dict[int, Tensor] = {}
        for index in self.plan.changes:
            self._write(index)
        for vector in self.plan.vectors:
            at = (vector.row, vector.position)
            if vector.in_values:
                like = torch.zeros(*self.stream.shape[:2], len(vector.vector), device=self.stream.device)
                self.in_values.setdefault(vector.layer, like)[at] += vector.vector
            else:
                self.writes.setdefault(vector.depth, torch.zeros_like(self.stream))[at] += vector.vector

    @torch.no_grad()
    def forward(self) -> Tensor:
        """The change of `resid_final` (B, S, D), linear in the changes."""
        for depth in range(self.linear.n_depths):
            if depth % 2 == 1:
                self.below[depth // 2] = self.stream
            self._read(depth)
            self._pass(depth)
            if depth in self.writes:
                self.stream = self.stream + self.writes[depth]
        self._read(self.linear.n_depths)
        return self.linear.recording.final_norm.apply(self.stream, slice(None))

    # --- what is written ------------------------------------------------------------------------------------------

    def change(self, index: int, side: Side) -> Tensor:
        """New less recorded activations of a dictionary's features on one side, (B, S, n, r)."""
        before = self.recorded[index].sides[side].before
        keep, gain = self.plan.factors(index, side, 0, before.shape[1])
        direction = _directions(self.recorded[index], side)
        return (keep.unsqueeze(-1) - 1) * before + gain.unsqueeze(-1) * direction

    def _write(self, index: int) -> None:
        """Collect what changed features write; a key side writes nothing by itself."""
        dictionary = self.linear.dictionaries[index]
        change = self.change(index, "query" if isinstance(dictionary.moved_by, HeadLoading) else "own").flatten(2)
        for site in self.linear.writes_of(dictionary):
            rows = dictionary.decoder_rows(self.plan.features[index], site).reshape(change.shape[2], -1)
            written = change @ rows.to(change)
            if site.name == "v":
                self.in_values[site.layer] = self.in_values.get(site.layer, 0) + written
                continue
            depth = write_depth(site)
            if site.name == "z":
                written = self.linear.attention[site.layer].write(written, slice(None))
            elif dictionary.before_post_norm and site.name != "resid_post":
                written = self._past_post_norm(depth, written)
            self.writes[depth] = self.writes.get(depth, 0) + written

    # --- the stream on its way up ---------------------------------------------------------------------------------

    def _pass(self, depth: int) -> None:
        """A live sublayer adds its share of the change below it; a block replaced whole lets nothing by."""
        linear = self.linear
        layer, is_mlp = divmod(depth - 1, 2)
        if is_mlp and layer in linear.replaced_blocks:
            self.stream = torch.zeros_like(self.stream)
        elif is_mlp:
            if (skip := linear.skips.get(depth)) is not None:
                below = self.below[layer] if linear.model.parallel else self.stream
                self.stream = self.stream + skip.push(below, slice(None))
        elif layer in linear.frozen_attention:
            replaced = layer in linear.replaced_values
            z = self.head_outputs(layer, self.in_values.get(layer) if replaced else self.value_change(layer))
            self.stream = self.stream + linear.attention[layer].write(z, slice(None))

    def _past_post_norm(self, depth: int, out: Tensor) -> Tensor:
        """A sublayer's own output (B, S, D) as it enters the stream: through the post-norm that the family may have."""
        layer, is_mlp = divmod(depth - 1, 2)
        recording = self.linear.recording
        norms = recording.mlp_post_norms if is_mlp else recording.attention_post_norms
        return norms[layer].apply(out, slice(None)) if norms else out

    def _normed(self, read: ReadSite, x: Tensor) -> Tensor:
        """The stream (B, S, D) through the frozen norm of a read site."""
        if read.norm == "none":
            return x
        return self.linear.recording.norm_at(read.site.name, read.site.layer).apply(
            x, slice(None), gain=read.norm == "full"
        )

    def value_change(self, layer: int) -> Tensor:
        """Change of the values (B, S, K x E) by the stream below a layer."""
        return self.linear.attention[layer].read_values(self.stream, biases=False)

    def head_outputs(self, layer: int, values: Tensor | None) -> Tensor:
        """Change of the head outputs (B, S, H x E) by a change of the values, and of patterns that are patched."""
        attention, width = self.linear.attention[layer], self.linear.model.shape.d_head
        if values is None:
            values = self.stream.new_zeros(*self.stream.shape[:2], attention.weights.w_v.shape[:2].numel())
        recorded = attention.pattern.expand(self.plan.n_rows, -1, -1, -1)
        if layer not in self.plan.patterns:
            return through_heads(recorded, values, width)
        now = attention.read_values(self.linear.recording.resid_pre[layer])
        patched = changed_pattern(recorded, self.plan.patterns[layer])
        return through_heads(patched, now + values, width) - through_heads(recorded, now[None].expand_as(values), width)

    # --- readers --------------------------------------------------------------------------------------------------

    def _read(self, depth: int) -> None:
        """Features that are watched and read below `depth` see the change."""
        for index, watched in self.plan.watched.items():
            dictionary = self.linear.dictionaries[index]
            if self._reads_below(dictionary) != depth:
                continue
            own = self._seen(index, dictionary)
            sides: dict[Side, Tensor] = {"own": own}
            if isinstance(dictionary.moved_by, HeadLoading):
                sides = {"key": own, "query": self._arrived(index, dictionary.moved_by, dictionary.layer)}
            for node in watched:
                self._keep(index, node, sides[node.side])

    def _reads_below(self, dictionary: Dictionary) -> int:
        """The depth of a dictionary's readers; in a parallel block MLP and attention read the same stream."""
        site = dictionary.read.site
        return 2 * site.layer + (2 if site.name == "resid_mid" and not self.linear.model.parallel else 1)

    def _seen(self, index: int, dictionary: Dictionary) -> Tensor:
        """Change of the pre-activations (B, S, n, r), where a feature is read."""
        layer, site = dictionary.layer, dictionary.read.site.name
        attention, features = self.linear.attention[layer], self.plan.features[index]
        if site in ("z", "attn_out"):
            x = self.head_outputs(layer, self.value_change(layer))
            x = x if site == "z" else attention.write(x, slice(None), below_post=dictionary.before_post_norm)
        elif site == "v":
            x = self.value_change(layer)
        else:
            x = self._normed(dictionary.read, self.stream)
        rows = dictionary.encoder_rows(features).reshape(-1, dictionary.d_read)
        seen = (x @ rows.to(x).T).view(*x.shape[:2], len(features), dictionary.rank)
        if isinstance(dictionary.moved_by, OwnAttention):
            patterns = self.linear.own_patterns(index)[dictionary.moved_by.group.to(x.device)[features]]
            seen = torch.einsum("nps,bsnr->bpnr", patterns, seen)
        return seen

    def _arrived(self, index: int, movement: HeadLoading, layer: int) -> Tensor:
        """Change of what arrives at query sides from their key sides, (B, S, n, r)."""
        sent = self.recorded[index].sides["key"].before.expand(self.plan.n_rows, -1, -1, -1).double()
        now = sent + self.change(index, "key")
        loading = movement.weights.to(self.stream.device)[self.plan.features[index]]
        pattern = self.linear.recording.patterns[layer].expand(self.plan.n_rows, -1, -1, -1)
        if layer not in self.plan.patterns:
            return move(now - sent, loading, pattern).float()
        patched = changed_pattern(pattern, self.plan.patterns[layer])
        return (move(now, loading, patched) - move(sent, loading, pattern)).float()

    def _keep(self, index: int, node: Watched, change: Tensor) -> None:
        """A node's new pre-activation, and its activation: in proportion, its gate as recorded, then changed itself."""
        side, at = self.recorded[index].sides[node.side], (node.position, node.column)
        direction = node_direction(self.recorded[index], node, side.pre[:, *at])
        pre = (side.pre[:, *at] * direction).sum(-1)
        active = (side.before[:, *at] * direction).sum(-1)
        now = pre + (change[:, *at] * direction).sum(-1)
        keep, gain = self.plan.factors(index, node.side, node.position, 1)
        share = torch.where(active != 0, active / torch.where(pre == 0, 1.0, pre), 0.0)
        self.values[0, :, node.number] = now
        self.values[1, :, node.number] = keep[:, 0, node.column] * share * now + gain[:, 0, node.column]


def _directions(recorded: Step, side: Side) -> Tensor:
    """Unit vectors (1, S, n, r) of features on the recording; where one is inactive, that of its pre-activation."""
    values = recorded.sides[side]
    if values.pre.shape[-1] == 1:
        return torch.ones_like(values.pre)
    return unit(torch.where(values.before.norm(dim=-1, keepdim=True) > 0, values.before, values.pre))
