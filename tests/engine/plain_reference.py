"""The linearized model written a second time, as a float64 forward pass whose edges autograd finds.

Shares nothing with the engine but the weights. A replaced sublayer puts its recorded output into the stream with its
gradient cut, a frozen one runs with its recorded pattern and norm denominator; a zero tensor is added at every place
where nodes write, and the gradient of a target's pre-activation with respect to that zero is the target's covector
there. Slow (one backward pass a target), and short enough to be checked by eye.

Places where nodes write: "embedding", ("attention", l), ("mlp", l), ("block", l) for what stands for a whole block,
(D,) each; ("value", l), the values of all key-value heads (K E,); ("moved", dictionary), what the base layer's heads
carry, (F r,), read by the query side of that dictionary only. What dictionaries do is in `plain_attention.py`.
Shapes: S positions, D model width, H heads, K key-value heads, E head width, F features of rank r.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from plain_attention import (
    Place,
    arrived,
    cut_layers,
    encoded,
    gated,
    kept,
    kind_of,
    own_patterns,
    strongest,
    with_identity,
)
from plain_weights import Weights
from torch import Tensor, nn

from circuits.replacements import Dictionary, Replacement, Site
from circuits.replacements.movement import HeadLoading, OwnAttention

Key = tuple[str, int, int, int]


@dataclass
class Source:
    """A node as a writer: place -> vector, all at one position."""

    position: int
    writes: dict[Place, Tensor]


@dataclass
class Target:
    """A node as a reader: what it reads from a forward pass, and its recorded pre-activation."""

    read: Callable[["Pass"], Tensor]
    pre_activation: float


@dataclass
class Pass:
    """What one forward pass of the linearized model has at every place, (S, D) each; the values (S, K E).

    `pre[l]` is the stream below layer l, and after the last one; the attention inputs are normed. Values are the base
    model's for that stream, whatever replaces them. `added` is what was added to the recording.
    """

    added: dict[Place, Tensor]
    pre: list[Tensor]
    attention_input: list[Tensor]
    attention_scaled: list[Tensor]
    values: list[Tensor]
    mid: list[Tensor]
    mid_normed: list[Tensor]
    mid_scaled: list[Tensor]
    final: Tensor


class Reference:
    """Nodes, edges and forward passes of one prompt."""

    def __init__(
        self, lm: nn.Module, replacements: Iterable[Replacement], token_ids: Iterable[int], *, special: bool
    ) -> None:
        self.weights = Weights(lm)
        self.ids = list(token_ids)
        self.first = 1 if special else 0
        given = [d for replacement in replacements for d in replacement.dictionaries]
        self.cuts = cut_layers(given)
        self.dictionaries = kept(given)
        written = [site for _, writes in self.dictionaries.values() for site in writes]
        self.replaced = {site.layer for site in written if site.name in ("attn_out", "z")}
        self.valued = {site.layer for site in written if site.name == "v"}
        assert not self.replaced & self.valued
        self.skips = {d.layer: d for d, _ in self.dictionaries.values() if d.skip is not None}
        self.moved: dict[str, Tensor] = {}
        self.own_patterns: dict[str, Tensor] = {}
        self.owners: dict[Key, Dictionary] = {}
        self._directions: dict[Key, Tensor] = {}
        self.sources: dict[Key, Source] = {}
        self.targets: dict[Key, Target] = {}
        self._record()
        self._nodes()

    # --- the base model -------------------------------------------------------------------------------------------

    def _record(self) -> None:
        """Run the base model once; keep denominators, patterns and outputs."""
        weights = self.weights
        self.scales: dict[tuple[str, int], Tensor] = {}
        self.patterns: list[Tensor] = []
        self.outputs: dict[tuple[str, int], Tensor] = {}
        x = self.embedded()
        for layer in range(weights.n_layers):
            normed = self.norm(x, "attention", layer, record=True)
            self.patterns.append(self.pattern(layer, normed))
            values = self.outputs["value", layer] = self.values(layer, normed)
            attention = self.output(layer, self.head_outputs(layer, values))
            attention = self.outputs["attention", layer] = self.post("attention", layer, attention, record=True)
            mid = x if weights.parallel else x + attention
            mlp = weights.mlp(layer, self.norm(mid, "mlp", layer, record=True))
            mlp = self.outputs["mlp", layer] = self.post("mlp", layer, mlp, record=True)
            x = self.outputs["block", layer] = x + attention + mlp
        self.logits = self._capped(self.norm(x, "final", 0, record=True) @ weights.unembedding.T, weights.logit_cap)

    def embedded(self) -> Tensor:
        x = self.weights.embedding[self.ids]
        if self.weights.is_gpt2:
            x = x + self.weights.w["transformer.wpe.weight"][: len(self.ids)]
        return x

    def _capped(self, x: Tensor, cap: float | None) -> Tensor:
        return x if cap is None else cap * (x / cap).tanh()

    def post(
        self, sublayer: str, layer: int, x: Tensor, *, record: bool = False, position: int | None = None
    ) -> Tensor:
        """What a sublayer's output (S, D), or vectors (..., D) at one position, add to the stream: through a post-norm,
        which is linear (RMS, no bias)."""
        if not self.weights.has_post_norms:
            return x
        which = f"{sublayer}_post"
        if position is None:
            return self.norm(x, which, layer, record=record)
        return x / self.scales[which, layer][position] * self.weights.norm_weights(which, layer)[0]

    def norm(self, x: Tensor, which: str, layer: int, *, record: bool = False, gain: bool = True) -> Tensor:
        """The norm with its recorded denominator; `gain=False` leaves out gain and bias."""
        if self.weights.centred:
            x = x - x.mean(-1, keepdim=True)
        if record:
            self.scales[which, layer] = (x.pow(2).mean(-1, keepdim=True) + self.weights.epsilon).sqrt()
        x = x / self.scales[which, layer]
        weight, bias = self.weights.norm_weights(which, layer)
        return x * weight + bias if gain else x

    def _heads(self, x: Tensor) -> Tensor:
        """Queries, keys or values side by side, one of each for every query head: (H, S, E)."""
        x = x.unflatten(-1, (-1, self.weights.width)).transpose(0, 1)
        return x.repeat_interleave(self.weights.n_heads // len(x), dim=0)

    def _rotated(self, x: Tensor) -> Tensor:
        """Rotary embedding: each pair (i, i + R/2) of the first R turned by position times theta^(-2i/R)."""
        if self.weights.theta is None:
            return x
        half = self.weights.turning // 2
        speed = self.weights.theta ** (-torch.arange(half).double() / half)
        angle = torch.arange(len(self.ids)).double()[:, None] * speed
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], -1)

    def _queries_or_keys(self, layer: int, letter: str, normed: Tensor) -> Tensor:
        """(H, S, E), after their norm and turned."""
        x = self._heads(self._projected(layer, letter, normed))
        if (gain := self.weights.head_norm(layer, letter)) is not None:
            x = x / (x.pow(2).mean(-1, keepdim=True) + self.weights.epsilon).sqrt() * gain
        return self._rotated(x)

    def pattern(self, layer: int, normed: Tensor) -> Tensor:
        """(H, S, S) [query, key]."""
        q, k = (self._queries_or_keys(layer, letter, normed) for letter in "qk")
        scores = self._capped(q @ k.transpose(1, 2) * self.weights.scale, self.weights.score_cap)
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        if (window := self.weights.windows[layer]) is not None:
            hidden |= torch.ones_like(hidden).tril(-window)
        return scores.masked_fill(hidden, -torch.inf).softmax(-1)

    def _projected(self, layer: int, letter: str, x: Tensor) -> Tensor:
        weight, bias = self.weights.projection(layer, letter)
        return x @ weight.T + bias

    def values(self, layer: int, normed: Tensor) -> Tensor:
        """The values of all key-value heads side by side, (S, K * E)."""
        return self._projected(layer, "v", normed)

    def head_outputs(self, layer: int, values: Tensor, pattern: Tensor | None = None) -> Tensor:
        """Concatenated head outputs (S, H * E) under a pattern, by default the recorded one."""
        pattern = self.patterns[layer] if pattern is None else pattern
        return (pattern @ self._heads(values)).transpose(0, 1).flatten(1)

    def output(self, layer: int, z: Tensor) -> Tensor:
        """What the heads write, before a post-norm."""
        return self._projected(layer, "o", z)

    # --- the linearized model -------------------------------------------------------------------------------------

    def run(self, added: dict[Place, Tensor], value_patterns: dict[int, Tensor] | None = None) -> Pass:
        """The linearized model with something added to what is written at some places.

        `value_patterns` are other patterns under which the values of some layers move.
        """
        x = self.embedded() + added.get("embedding", 0)
        out = Pass(added, [], [], [], [], [], [], [], x)
        for layer in range(self.weights.n_layers):
            out.pre.append(x)
            out.attention_input.append(self.norm(x, "attention", layer))
            out.attention_scaled.append(self.norm(x, "attention", layer, gain=False))
            out.values.append(self.values(layer, out.attention_input[layer]))
            x = x + self._attention(layer, out, (value_patterns or {}).get(layer)) + added.get(("attention", layer), 0)
            mid = out.pre[layer] if self.weights.parallel else x
            out.mid.append(mid)
            out.mid_normed.append(self.norm(mid, "mlp", layer))
            out.mid_scaled.append(self.norm(mid, "mlp", layer, gain=False))
            x = x + self.outputs["mlp", layer]
            if layer in self.skips and added:
                x = x + self._skip(layer, out) - self._skip(layer, self.recorded)
            x = x + added.get(("mlp", layer), 0)
            if layer in self.cuts:
                x = self.outputs["block", layer] + added.get(("block", layer), 0)
        out.pre.append(x)
        out.final = self.norm(x, "final", 0)
        return out

    def _attention(self, layer: int, out: Pass, pattern: Tensor | None) -> Tensor:
        """The recorded output, the recorded values moved by the heads, or all of attention live."""
        if layer in self.replaced:
            return self.outputs["attention", layer]
        values = out.values[layer]
        if layer in self.valued:
            values = self.outputs["value", layer] + out.added.get(("value", layer), 0)
        return self.post("attention", layer, self.output(layer, self.head_outputs(layer, values, pattern)))

    @property
    def recorded(self) -> Pass:
        """The linearized model with nothing added: the recording itself."""
        if not hasattr(self, "_recorded"):
            self._recorded = self.run({})
        return self._recorded

    def _skip(self, layer: int, out: Pass) -> Tensor:
        dictionary = self.skips[layer]
        assert dictionary.skip is not None
        y = self._read(dictionary, out) @ dictionary.skip.double().T
        return self.post("mlp", layer, y) if dictionary.before_post_norm else y

    def _read(self, dictionary: Dictionary, out: Pass, pattern: Tensor | None = None) -> Tensor:
        """What a dictionary reads; attention outputs are computed anew from the stream below."""
        layer, norm = dictionary.layer, dictionary.read.norm
        match dictionary.read.site.name:
            case "resid_mid":
                return {"full": out.mid_normed, "scale": out.mid_scaled, "none": out.mid}[norm][layer]
            case "resid_pre":
                return {"full": out.attention_input, "scale": out.attention_scaled, "none": out.pre}[norm][layer]
            case "v":
                return out.values[layer]
            case name:
                z = self.head_outputs(layer, out.values[layer], pattern)
                if name == "z":
                    return z
                y = self.output(layer, z)
                return y if dictionary.before_post_norm else self.post("attention", layer, y)

    def _encoded(self, dictionary: Dictionary, out: Pass, pattern: Tensor | None = None) -> Tensor:
        """Pre-activations (S, F, r) in a pass, moved by its own patterns as recorded or as given."""
        if isinstance(dictionary.moved_by, OwnAttention):
            own = self.own_patterns[dictionary.name] if pattern is None else pattern
            return encoded(dictionary, self._read(dictionary, out), own)
        return encoded(dictionary, self._read(dictionary, out, pattern))

    def _arrived(self, dictionary: Dictionary, out: Pass, pattern: Tensor | None = None) -> Tensor:
        """What the base layer's heads and the identity carry to each position, (S, F, r)."""
        assert isinstance(dictionary.moved_by, HeadLoading)
        here = self.moved[dictionary.name]
        if (added := out.added.get(("moved", dictionary.name))) is not None:
            here = here + added.view_as(here)
        pattern = with_identity(self.patterns[dictionary.layer]) if pattern is None else pattern
        return arrived(dictionary.moved_by, here, pattern)

    def pre_activation(self, key: Key, out: Pass, pattern: Tensor | None = None) -> Tensor:
        """A feature's pre-activation in a pass, moved there by other patterns than `carriers` if they are given."""
        kind, _, position, feature = key
        read = self._arrived if kind == "mtc_query" else self._encoded
        return self._directions[key] @ read(self.owners[key], out, pattern)[position, feature]

    def carriers(self, key: Key) -> Tensor:
        """The patterns that bring a node what it reads: the base layer's, identity last, or its dictionary's own."""
        dictionary = self.owners[key]
        if isinstance(dictionary.moved_by, OwnAttention):
            return self.own_patterns[dictionary.name]
        pattern = self.patterns[dictionary.layer]
        return with_identity(pattern) if key[0] == "mtc_query" else pattern

    # --- nodes ----------------------------------------------------------------------------------------------------

    def _nodes(self) -> None:
        for position, token in enumerate(self.ids):
            self.sources["embedding", -1, position, token] = Source(
                position, {"embedding": self.weights.embedding[token]}
            )
        rebuilt: dict[Place, Tensor] = {}
        for dictionary, writes in self.dictionaries.values():
            self._features(dictionary, self._written(dictionary, writes), rebuilt)
        for layer in range(self.weights.n_layers):
            if layer in self.cuts:
                self._errors("block", layer, rebuilt)
                continue
            self._errors("mlp", layer, rebuilt)
            if layer in self.replaced | self.valued:
                self._errors("attention" if layer in self.replaced else "value", layer, rebuilt)

    def _written(self, dictionary: Dictionary, writes: tuple[Site, ...]) -> dict[Place, tuple[Tensor, Tensor]]:
        """Place -> decoder rows (S, F, r, width) and output bias (S, width) there, as they enter at each position."""
        found: dict[Place, tuple[Tensor, Tensor]] = {}
        names = {"attn_out": "attention", "z": "attention", "v": "value", "mlp_out": "mlp", "resid_post": "block"}
        for site in writes:
            rows, bias = dictionary.decoders[site].rows.all().double(), dictionary.output_biases[site].double()
            if site.name == "z":
                rows, bias = rows @ self.weights.projection(site.layer, "o")[0].T, self.output(site.layer, bias)
            rows, name = rows.view(-1, dictionary.rank, rows.shape[1]), names[site.name]
            before = site.name == "z" or (dictionary.before_post_norm and name in ("attention", "mlp"))
            entered = [
                tuple(self.post(name, site.layer, x, position=p) if before else x for x in (rows, bias))
                for p in range(len(self.ids))
            ]
            all_rows, all_biases = zip(*entered, strict=True)
            found[name, site.layer] = torch.stack(all_rows), torch.stack(all_biases)
        return found

    def _features(
        self, dictionary: Dictionary, written: dict[Place, tuple[Tensor, Tensor]], rebuilt: dict[Place, Tensor]
    ) -> None:
        """Nodes of one dictionary, and what it rebuilds; moved features stand twice, key side and query side."""
        if isinstance(dictionary.moved_by, OwnAttention):
            read = self._read(dictionary, self.recorded)
            self.own_patterns[dictionary.name] = own_patterns(dictionary.moved_by, read)
        pre = self._encoded(dictionary, self.recorded)
        activations = gated(dictionary, pre)
        if isinstance(dictionary.moved_by, HeadLoading):
            activations = self.moved[dictionary.name] = strongest(dictionary.moved_by, activations)
            n = dictionary.W_enc.shape[0]
            one_each = torch.eye(n, dtype=torch.float64).view(-1, dictionary.rank, n).expand(len(self.ids), -1, -1, -1)
            self._add_nodes("mtc_key", dictionary, pre, activations, {("moved", dictionary.name): one_each})
            pre = activations = self._arrived(dictionary, self.recorded)
        rows = {place: rows for place, (rows, _) in written.items()}
        self._add_nodes(kind_of(dictionary), dictionary, pre, activations, rows)
        for place, (decoder, bias) in written.items():
            rebuilt[place] = rebuilt.get(place, 0) + torch.einsum("sfr,sfrd->sd", activations, decoder) + bias
        if dictionary.skip is not None:
            place = ("mlp", dictionary.layer)
            rebuilt[place] = rebuilt[place] + self._skip(dictionary.layer, self.recorded)

    def _add_nodes(
        self, kind: str, dictionary: Dictionary, pre: Tensor, activations: Tensor, rows: dict[Place, Tensor]
    ) -> None:
        """A node for each feature that is not zero, except at a special first token."""
        for position, feature in activations.abs().sum(-1).nonzero().tolist():
            if position < self.first:
                continue
            key = (kind, dictionary.layer, position, feature)
            assert key not in self.sources, f"two dictionaries have {key}"
            activation, read = activations[position, feature], pre[position, feature]
            writes = {place: activation @ decoder[position, feature] for place, decoder in rows.items()}
            self.sources[key] = Source(position, writes)
            self.owners[key] = dictionary
            self._directions[key] = torch.ones(1).double() if dictionary.rank == 1 else read / read.norm()
            read_again = lambda out, key=key: self.pre_activation(key, out)  # noqa: E731
            self.targets[key] = Target(read_again, float(self._directions[key] @ read))

    def _errors(self, name: str, layer: int, rebuilt: dict[Place, Tensor]) -> None:
        error = self.outputs[name, layer] - rebuilt.get((name, layer), 0)
        for position in range(self.first, len(self.ids)):
            self.sources[f"{name}_error", layer, position, -1] = Source(position, {(name, layer): error[position]})

    def add_token_target(self, token: int, position: int) -> None:
        """A logit less the mean over the vocabulary."""
        reader = self.weights.unembedding[token] - self.weights.unembedding.mean(0)
        value = float(self.recorded.final[position] @ reader)
        key = ("logit", self.weights.n_layers, position, token)
        self.targets[key] = Target(lambda out: out.final[position] @ reader, value)

    # --- edges ----------------------------------------------------------------------------------------------------

    def nothing(self) -> dict[Place, Tensor]:
        """Zeros for every place where nodes write."""
        widths: dict[Place, int] = {"embedding": self.weights.embedding.shape[1]}
        for source in self.sources.values():
            widths |= {place: len(vector) for place, vector in source.writes.items()}
        return {place: torch.zeros(len(self.ids), width, dtype=torch.float64) for place, width in widths.items()}

    def adjacency(self, targets: list[Key], sources: list[Key]) -> Tensor:
        """Edge weights (targets, sources), one backward pass a target."""
        added = {place: zeros.requires_grad_() for place, zeros in self.nothing().items()}
        out = self.run(added)
        writers: dict[Place, list[tuple[int, int, Tensor]]] = {place: [] for place in added}
        for j, key in enumerate(sources):
            for place, vector in self.sources[key].writes.items():
                writers[place].append((j, self.sources[key].position, vector))
        rows = torch.zeros(len(targets), len(sources), dtype=torch.float64)
        for i, target in enumerate(targets):
            value = self.targets[target].read(out)
            found = torch.autograd.grad(value, list(added.values()), retain_graph=True, allow_unused=True)
            for place, covector in zip(added, found, strict=True):
                if covector is not None and writers[place]:
                    columns, positions, vectors = zip(*writers[place], strict=True)
                    rows[i, list(columns)] += (covector[list(positions)] * torch.stack(vectors)).sum(-1)
        return rows

    def without(self, sources: Iterable[Key], value_patterns: dict[int, Tensor] | None = None) -> Pass:
        """The linearized model with the writes of some nodes taken out."""
        added = self.nothing()
        for key in sources:
            source = self.sources[key]
            for place, vector in source.writes.items():
                added[place][source.position] -= vector
        return self.run(added, value_patterns)
