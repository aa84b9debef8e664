"""Every path from a source to a target, one at a time, in float64: what hop splits are checked against.

Takes from the plain reference what it recorded (patterns, norm denominators, readers, writers) and walks: at each
attention along the residual stream or through one head to one position, at each MLP along the stream or through the
skip connection. A path's hops are the heads that took it from one position to another.

Times: 2l is the stream below layer l, 2l + 1 that between its attention and its MLP, 2L the final one. In a parallel
block the skip connection leads from 2l to 2l + 2. A post-norm has no bias and no centring, so it is its own transpose.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from plain_reference import Key, Reference
from torch import Tensor

from circuits.replacements.movement import OwnAttention

Hop = tuple[int, int, int, int]  # layer, head, key position, query position
STAYS, OWN = -3, -2


@dataclass
class _Reader:
    """A covector of the stream at a time, or one for each head (H, E) of a layer, or one through an own pattern."""

    time: int
    position: int
    covector: Tensor | None = None
    heads: Tensor | None = None
    own: tuple[Tensor, Tensor] | None = None  # pattern (S,), covector of the normed stream


class Paths:
    """Sums over paths of one prompt."""

    def __init__(self, reference: Reference) -> None:
        self.reference, self.weights, self.parallel = reference, reference.weights, reference.weights.parallel
        self.n_heads, self.width = self.weights.n_heads, self.weights.width
        self.live = [
            layer
            for layer in range(self.weights.n_layers)
            if layer not in reference.replaced | reference.valued | reference.cuts
        ]

    def splits(self, source: Key, target: Key) -> tuple[dict[Hop, float], dict[Hop, float]]:
        """The edge by its first and by its last hop."""
        self.first: defaultdict[Hop, float] = defaultdict(float)
        self.last: defaultdict[Hop, float] = defaultdict(float)
        self.reader = self._reader(target)
        position = self.reference.sources[source].position
        for place, vector in self.reference.sources[source].writes.items():
            if place == "embedding":
                self._walk(0, position, vector, None, None)
                continue
            name, layer = place
            assert isinstance(layer, int)
            if name == "value":
                self._from_values(layer, position, vector)
            else:
                self._walk(2 * layer + (1 if name == "attention" else 2), position, vector, None, None)
        return dict(self.first), dict(self.last)

    def _walk(self, time: int, position: int, x: Tensor, first: Hop | None, last: Hop | None) -> None:
        """All ways on from a place with a vector there."""
        reader = self.reader
        if time > reader.time or position > reader.position:
            return
        if time == reader.time:
            self._read(position, x, first, last)
            return
        layer, between = divmod(time, 2)
        if between:
            self._walk(time + 1, position, x, first, last)
            if layer in self.reference.skips and not self.parallel:
                self._walk(time + 1, position, self._skip(layer, position, x), first, last)
        elif layer not in self.reference.cuts:
            self._walk(time + 1, position, x, first, last)
            if layer in self.reference.skips and self.parallel:
                self._walk(time + 2, position, self._skip(layer, position, x), first, last)
            if layer in self.live:
                normed = self._normed("attention", layer, position, x)
                for head in range(self.n_heads):
                    out = self._output(layer, head, self._value(layer, head, normed))
                    self._on(layer, head, position, out, first, last)

    def _on(self, layer: int, head: int, key: int, out: Tensor, first: Hop | None, last: Hop | None) -> None:
        """Through one head to each position."""
        for query in range(key, self.reader.position + 1):
            hop = None if query == key else (layer, head, key, query)
            moved = self.reference.patterns[layer][head, query, key] * out
            moved = self.reference.post("attention", layer, moved, position=query)
            self._walk(2 * layer + 1, query, moved, first or hop, hop or last)

    def _from_values(self, layer: int, position: int, values: Tensor) -> None:
        for head in range(self.n_heads):
            at = head // (self.n_heads * self.width // len(values))
            out = self._output(layer, head, values[at * self.width : (at + 1) * self.width])
            self._on(layer, head, position, out, None, None)

    def _read(self, position: int, x: Tensor, first: Hop | None, last: Hop | None) -> None:
        """What the target reads of a path's end."""
        reader, layer = self.reader, self.reader.time // 2
        if reader.covector is not None:
            if position == reader.position:
                self._record(float(reader.covector @ x), first, last)
            return
        normed = self._normed("attention", layer, position, x)
        if reader.own is not None:
            pattern, covector = reader.own
            amounts = {OWN: float(pattern[position] * (covector @ normed))}
        else:
            assert reader.heads is not None
            amounts = {
                head: float(
                    self.reference.patterns[layer][head, reader.position, position]
                    * (reader.heads[head] @ self._value(layer, head, normed))
                )
                for head in range(self.n_heads)
            }
        for head, amount in amounts.items():
            hop = None if position == reader.position else (layer, head, position, reader.position)
            self._record(amount, first or hop, hop or last)

    def _record(self, amount: float, first: Hop | None, last: Hop | None) -> None:
        stays = (-1, STAYS, self.reader.position, self.reader.position)
        self.first[first or stays] += amount
        self.last[last or stays] += amount

    # --- the linear maps ------------------------------------------------------------------------------------------

    def _normed(self, which: str, layer: int, position: int, x: Tensor, *, gain: bool = True) -> Tensor:
        if self.weights.centred:
            x = x - x.mean()
        x = x / self.reference.scales[which, layer][position]
        return x * self.weights.norm_weights(which, layer)[0] if gain else x

    def _value(self, layer: int, head: int, normed: Tensor) -> Tensor:
        """What a head sees: grouped queries share values."""
        weight = self.weights.projection(layer, "v")[0]
        at = head // (self.n_heads * self.width // len(weight))
        return weight[at * self.width : (at + 1) * self.width] @ normed

    def _output(self, layer: int, head: int, value: Tensor) -> Tensor:
        return self.weights.projection(layer, "o")[0][:, head * self.width : (head + 1) * self.width] @ value

    def _skip(self, layer: int, position: int, x: Tensor) -> Tensor:
        dictionary = self.reference.skips[layer]
        assert dictionary.skip is not None
        if dictionary.read.norm != "none":
            x = self._normed("mlp", layer, position, x, gain=dictionary.read.norm == "full")
        y = dictionary.skip.double() @ x
        return self.reference.post("mlp", layer, y, position=position) if dictionary.before_post_norm else y

    def _reader(self, target: Key) -> _Reader:
        kind, layer, position, feature = target
        reference = self.reference
        if kind == "attention_feature":
            dictionary = reference.owners[target]
            rows = dictionary.W_enc.double().view(-1, dictionary.rank, dictionary.W_enc.shape[1])
            row = reference._directions[target] @ rows[feature]
            if isinstance(dictionary.moved_by, OwnAttention):
                pattern = reference.own_patterns[dictionary.name][int(dictionary.moved_by.group[feature]), position]
                if dictionary.read.norm == "scale":  # paths come out of the norm with its gain
                    row = row / self.weights.norm_weights("attention", layer)[0]
                return _Reader(2 * layer, position, own=(pattern, row))
            if dictionary.read.site.name == "attn_out":
                if not dictionary.before_post_norm:
                    row = reference.post("attention", layer, row, position=position)
                row = row @ self.weights.projection(layer, "o")[0]
            return _Reader(2 * layer, position, heads=row.view(self.n_heads, self.width))
        out = reference.run({place: zeros.requires_grad_() for place, zeros in reference.nothing().items()})
        value = reference.targets[target].read(out)
        if kind == "logit":
            time, stream = 2 * self.weights.n_layers, out.pre[-1]
        elif kind == "mlp_feature" and not self.parallel:
            time, stream = 2 * layer + 1, out.mid[layer]
        else:
            time, stream = 2 * layer, out.pre[layer]
        (found,) = torch.autograd.grad(value, [stream])
        return _Reader(time, position, covector=found[position])
