"""The linearized model written a second time, as a float64 forward pass whose edges autograd finds.

Shares nothing with the engine but the weights. A replaced sublayer puts its recorded output into the stream with its
gradient cut, a frozen one runs with its recorded pattern and norm denominator; a zero tensor is added at every place
where nodes write, and the gradient of a target's pre-activation with respect to that zero is the target's covector
there. Slow (one backward pass a target), and short enough to be checked by eye.

Places in the stream: "embedding", ("attention", l), ("mlp", l). Shapes: S positions, D model width, H heads.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from circuits.replacements import Dictionary, Replacement

Place = str | tuple[str, int]
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
    """What one forward pass of the linearized model has at every place, (S, D) each.

    `pre[l]` is the stream below layer l, and after the last one; the attention inputs are normed.
    """

    pre: list[Tensor]
    attention_input: list[Tensor]
    mid: list[Tensor]
    mid_normed: list[Tensor]
    mid_scaled: list[Tensor]
    final: Tensor


class Weights:
    """A Hugging Face GPT-2 or Llama in float64, one name for each part."""

    def __init__(self, lm: nn.Module) -> None:
        config: Any = lm.config
        self.is_gpt2 = config.model_type == "gpt2"
        self.w = {name: tensor.detach().double() for name, tensor in lm.state_dict().items()}
        self.n_layers, self.n_heads = config.num_hidden_layers, config.num_attention_heads
        self.n_kv = self.n_heads if self.is_gpt2 else config.num_key_value_heads
        self.width = config.hidden_size // self.n_heads if self.is_gpt2 else config.head_dim
        self.epsilon = config.layer_norm_epsilon if self.is_gpt2 else config.rms_norm_eps
        self.theta = None if self.is_gpt2 else config.rope_parameters["rope_theta"]
        self.embedding = self.w["transformer.wte.weight" if self.is_gpt2 else "model.embed_tokens.weight"]
        self.unembedding = self.w["lm_head.weight"]

    def norm_weights(self, which: str, layer: int) -> tuple[Tensor, Tensor | float]:
        if self.is_gpt2:
            name = {"attention": f"h.{layer}.ln_1", "mlp": f"h.{layer}.ln_2", "final": "ln_f"}[which]
            return self.w[f"transformer.{name}.weight"], self.w[f"transformer.{name}.bias"]
        inside = f"layers.{layer}."
        names = {"attention": inside + "input_layernorm", "mlp": inside + "post_attention_layernorm", "final": "norm"}
        return self.w[f"model.{names[which]}.weight"], 0.0

    def projection(self, layer: int, letter: str) -> tuple[Tensor, Tensor]:
        """Weight (out, in) and bias of the q, k, v or o projection."""
        if self.is_gpt2 and letter == "o":
            prefix = f"transformer.h.{layer}.attn.c_proj"
            return self.w[f"{prefix}.weight"].T, self.w[f"{prefix}.bias"]
        if self.is_gpt2:
            fused, bias = (self.w[f"transformer.h.{layer}.attn.c_attn.{part}"] for part in ("weight", "bias"))
            d = fused.shape[0]
            columns = slice("qkv".index(letter) * d, ("qkv".index(letter) + 1) * d)
            return fused.T[columns], bias[columns]
        prefix = f"model.layers.{layer}.self_attn.{letter}_proj"
        weight = self.w[f"{prefix}.weight"]
        return weight, self.w.get(f"{prefix}.bias", torch.zeros(len(weight)).double())

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        if self.is_gpt2:
            up, up_bias, down, down_bias = (
                self.w[f"transformer.h.{layer}.mlp.{name}"]
                for name in ("c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias")
            )
            return nn.functional.gelu(x @ up + up_bias, approximate="tanh") @ down + down_bias
        gate, up, down = (
            self.w[f"model.layers.{layer}.mlp.{name}.weight"] for name in ("gate_proj", "up_proj", "down_proj")
        )
        return (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


class Reference:
    """Nodes, edges and forward passes of one prompt."""

    def __init__(
        self, lm: nn.Module, replacements: Iterable[Replacement], token_ids: Iterable[int], *, special: bool
    ) -> None:
        self.weights = Weights(lm)
        self.ids = list(token_ids)
        self.first = 1 if special else 0
        self.dictionaries = [d for replacement in replacements for d in replacement.dictionaries]
        self.reads_of = {(d.read.site.name, d.layer): d for d in self.dictionaries}
        self.replaced = {d.layer for d in self.dictionaries if d.read.site.name in ("attn_out", "z")}
        self.skips = {d.layer: d for d in self.dictionaries if d.skip is not None}
        self._record()
        self.sources: dict[Key, Source] = {}
        self.targets: dict[Key, Target] = {}
        self._nodes()

    # --- the base model -------------------------------------------------------------------------------------------

    def _record(self) -> None:
        """Run the base model once; keep denominators, patterns and outputs."""
        weights = self.weights
        self.scales: dict[tuple[str, int], Tensor] = {}
        self.patterns: list[Tensor] = []
        self.attention_outputs: list[Tensor] = []
        self.mlp_outputs: list[Tensor] = []
        self.z: list[Tensor] = []
        x = self._embedded()
        for layer in range(weights.n_layers):
            normed = self._norm(x, "attention", layer, record=True)
            self.patterns.append(self._pattern(layer, normed))
            self.z.append(self.head_outputs(layer, normed))
            self.attention_outputs.append(self._output(layer, self.z[layer]))
            x = x + self.attention_outputs[layer]
            self.mlp_outputs.append(weights.mlp(layer, self._norm(x, "mlp", layer, record=True)))
            x = x + self.mlp_outputs[layer]
        self.logits = self._norm(x, "final", 0, record=True) @ weights.unembedding.T

    def _embedded(self) -> Tensor:
        x = self.weights.embedding[self.ids]
        if self.weights.is_gpt2:
            x = x + self.weights.w["transformer.wpe.weight"][: len(self.ids)]
        return x

    def _norm(self, x: Tensor, which: str, layer: int, *, record: bool = False, gain: bool = True) -> Tensor:
        """The norm with its recorded denominator; `gain=False` leaves out gain and bias."""
        if self.weights.is_gpt2:
            x = x - x.mean(-1, keepdim=True)
        if record:
            self.scales[which, layer] = (x.pow(2).mean(-1, keepdim=True) + self.weights.epsilon).sqrt()
        x = x / self.scales[which, layer]
        weight, bias = self.weights.norm_weights(which, layer)
        return x * weight + bias if gain else x

    def _heads(self, layer: int, letter: str, normed: Tensor) -> Tensor:
        """Queries, keys or values of every query head, (H, S, E)."""
        weight, bias = self.weights.projection(layer, letter)
        x = (normed @ weight.T + bias).unflatten(-1, (-1, self.weights.width)).transpose(0, 1)
        return x.repeat_interleave(self.weights.n_heads // len(x), dim=0)

    def _rotated(self, x: Tensor) -> Tensor:
        """Rotary embedding: each pair (i, i + E/2) turned by position times theta^(-2i/E)."""
        if self.weights.theta is None:
            return x
        half = self.weights.width // 2
        speed = self.weights.theta ** (-torch.arange(half).double() / half)
        angle = torch.arange(len(self.ids)).double()[:, None] * speed
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def _pattern(self, layer: int, normed: Tensor) -> Tensor:
        q, k = (self._rotated(self._heads(layer, letter, normed)) for letter in "qk")
        scores = q @ k.transpose(1, 2) / self.weights.width**0.5
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        return scores.masked_fill(future, -torch.inf).softmax(-1)

    def head_outputs(self, layer: int, normed: Tensor, pattern: Tensor | None = None) -> Tensor:
        """Concatenated head outputs (S, H * E) under a pattern, by default the recorded one."""
        pattern = self.patterns[layer] if pattern is None else pattern
        return (pattern @ self._heads(layer, "v", normed)).transpose(0, 1).flatten(1)

    def _output(self, layer: int, z: Tensor) -> Tensor:
        weight, bias = self.weights.projection(layer, "o")
        return z @ weight.T + bias

    # --- the linearized model -------------------------------------------------------------------------------------

    def run(self, added: dict[Place, Tensor]) -> Pass:
        """The linearized model with something added to what is written at some places."""
        x = self._embedded()
        if "embedding" in added:
            x = x + added["embedding"]
        out = Pass([], [], [], [], [], x)
        for layer in range(self.weights.n_layers):
            out.pre.append(x)
            out.attention_input.append(self._norm(x, "attention", layer))
            if layer in self.replaced:
                x = x + self.attention_outputs[layer]
            else:
                x = x + self._output(layer, self.head_outputs(layer, out.attention_input[layer]))
            x = x + added.get(("attention", layer), 0)
            out.mid.append(x)
            out.mid_normed.append(self._norm(x, "mlp", layer))
            out.mid_scaled.append(self._norm(x, "mlp", layer, gain=False))
            x = x + self.mlp_outputs[layer]
            if layer in self.skips and added:
                x = x + self._skip(layer, out) - self._skip(layer, self.recorded)
            x = x + added.get(("mlp", layer), 0)
        out.pre.append(x)
        out.final = self._norm(x, "final", 0)
        return out

    @property
    def recorded(self) -> Pass:
        """The linearized model with nothing added: the recording itself."""
        if not hasattr(self, "_recorded"):
            self._recorded = self.run({})
        return self._recorded

    def _skip(self, layer: int, out: Pass) -> Tensor:
        dictionary = self.skips[layer]
        assert dictionary.skip is not None
        return self._read(dictionary, out) @ dictionary.skip.double().T

    def _read(self, dictionary: Dictionary, out: Pass, pattern: Tensor | None = None) -> Tensor:
        """What a dictionary reads; attention outputs are computed anew from the stream below."""
        layer = dictionary.layer
        if dictionary.read.site.name == "resid_mid":
            return {"full": out.mid_normed, "scale": out.mid_scaled, "none": out.mid}[dictionary.read.norm][layer]
        z = self.head_outputs(layer, out.attention_input[layer], pattern)
        return z if dictionary.read.site.name == "z" else self._output(layer, z)

    def pre_activation(self, key: Key, out: Pass, pattern: Tensor | None = None) -> Tensor:
        """A feature's pre-activation in a pass, its attention read under another pattern if one is given."""
        kind, layer, position, feature = key
        dictionary = self._owner(kind, layer)
        read = self._read(dictionary, out, pattern)[position]
        return dictionary.W_enc[feature].double() @ read + dictionary.b_enc[feature].double()

    def _owner(self, kind: str, layer: int) -> Dictionary:
        names = ("resid_mid",) if kind == "mlp_feature" else ("attn_out", "z")
        return next(self.reads_of[name, layer] for name in names if (name, layer) in self.reads_of)

    # --- nodes ----------------------------------------------------------------------------------------------------

    def _nodes(self) -> None:
        for position, token in enumerate(self.ids):
            self.sources["embedding", -1, position, token] = Source(
                position, {"embedding": self.weights.embedding[token]}
            )
        rebuilt: dict[Place, Tensor] = {}
        for dictionary in self.dictionaries:
            self._features(dictionary, rebuilt)
        for layer in range(self.weights.n_layers):
            self._errors("mlp_error", ("mlp", layer), self.mlp_outputs[layer], rebuilt)
            if layer in self.replaced:
                self._errors("attention_error", ("attention", layer), self.attention_outputs[layer], rebuilt)

    def _features(self, dictionary: Dictionary, rebuilt: dict[Place, Tensor]) -> None:
        read = self._read(dictionary, self.recorded)
        pre = read @ dictionary.W_enc.double().T + dictionary.b_enc.double()
        kind = "mlp_feature" if dictionary.read.site.name == "resid_mid" else "attention_feature"
        activations = torch.where(_active(dictionary, pre), pre, 0.0)
        for site in dictionary.writes:
            place = ("mlp" if site.name == "mlp_out" else "attention", site.layer)
            rows, bias = dictionary.decoders[site].rows.all().double(), dictionary.output_biases[site].double()
            if site.name == "z":
                weight, output_bias = self.weights.projection(site.layer, "o")
                rows, bias = rows @ weight.T, bias @ weight.T + output_bias
            rebuilt[place] = rebuilt.get(place, 0) + activations @ rows + bias
            for position, feature in activations.nonzero().tolist():
                if position >= self.first:
                    key = (kind, dictionary.layer, position, feature)
                    source = self.sources.setdefault(key, Source(position, {}))
                    source.writes[place] = activations[position, feature] * rows[feature]
                    read_again = lambda out, key=key: self.pre_activation(key, out)  # noqa: E731
                    self.targets[key] = Target(read_again, float(pre[position, feature]))
        if dictionary.skip is not None:
            rebuilt["mlp", dictionary.layer] = rebuilt["mlp", dictionary.layer] + self._skip(
                dictionary.layer, self.recorded
            )

    def _errors(self, kind: str, place: tuple[str, int], output: Tensor, rebuilt: dict[Place, Tensor]) -> None:
        error = output - rebuilt.get(place, 0)
        for position in range(self.first, len(self.ids)):
            self.sources[kind, place[1], position, -1] = Source(position, {place: error[position]})

    def add_token_target(self, token: int, position: int) -> None:
        """A logit less the mean over the vocabulary."""
        reader = self.weights.unembedding[token] - self.weights.unembedding.mean(0)
        value = float(self.recorded.final[position] @ reader)
        key = ("logit", self.weights.n_layers, position, token)
        self.targets[key] = Target(lambda out: out.final[position] @ reader, value)

    # --- edges ----------------------------------------------------------------------------------------------------

    def adjacency(self, targets: list[Key], sources: list[Key]) -> Tensor:
        """Edge weights (targets, sources), one backward pass a target."""
        like = self._embedded()
        places: list[Place] = ["embedding"]
        places += [(name, layer) for layer in range(self.weights.n_layers) for name in ("attention", "mlp")]
        added = {place: torch.zeros_like(like, requires_grad=True) for place in places}
        out = self.run(added)
        rows = torch.zeros(len(targets), len(sources), dtype=torch.float64)
        for i, target in enumerate(targets):
            value = self.targets[target].read(out)
            found = torch.autograd.grad(value, list(added.values()), retain_graph=True, allow_unused=True)
            covectors = dict(zip(added, found, strict=True))
            for j, source in enumerate(sources):
                for place, vector in self.sources[source].writes.items():
                    if (covector := covectors[place]) is not None:
                        rows[i, j] += covector[self.sources[source].position] @ vector
        return rows

    def without(self, sources: Iterable[Key]) -> Pass:
        """The linearized model with the writes of some nodes taken out."""
        added: dict[Place, Tensor] = {}
        for key in sources:
            source = self.sources[key]
            for place, vector in source.writes.items():
                added.setdefault(place, torch.zeros_like(self._embedded()))[source.position] -= vector
        return self.run(added)


def _active(dictionary: Dictionary, pre: Tensor) -> Tensor:
    """Which features are active, (S, F)."""
    activation = dictionary.activation
    if activation.kind == "topk":
        assert activation.k is not None
        cut = pre.sort(dim=1, descending=True).values[:, activation.k - 1, None]
        return (pre >= cut) & (pre > 0)
    threshold = 0.0 if dictionary.threshold is None else dictionary.threshold.double()
    return pre > threshold
