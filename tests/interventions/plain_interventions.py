"""Interventions written a second time: one document, float64, position by position, whole sequences without a cache.

What dictionaries do is in tests/engine/plain_attention.py. Shapes: S positions, D model width, F features, r rank.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from plain_attention import arrived, encoded, gated, kept, own_patterns, strongest, with_identity
from plain_weights import Weights
from torch import Tensor

from circuits.interventions import Change, PatternChange
from circuits.loading import Model
from circuits.replacements import Dictionary
from circuits.replacements.movement import HeadLoading, OwnAttention

PREFIXES = {"": "mlp", "a": "attention", "k": "key", "q": "query", "v": "value"}
PLACES = {"mlp_out": "mlp", "attn_out": "attention", "z": "z", "v": "value", "resid_post": "block"}


@dataclass
class Plain:
    """One run. `activations[name, side]` (S, F, r) are those after changes, `pre` what is before the gate."""

    model: Model
    changes: list[Change | PatternChange]
    n_prompt: int
    choice: str = "anew"
    recorded: "Plain | None" = None
    vectors: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    freeze_attention: bool = False

    def __post_init__(self) -> None:
        self.weights = Weights(self.model.base.lm)
        self.dictionaries = kept([d for r in self.model.replacements for d in r.dictionaries])
        self.pre: dict[tuple[str, str], Tensor] = {}
        self.before: dict[tuple[str, str], Tensor] = {}
        self.activations: dict[tuple[str, str], Tensor] = {}
        self.patterns: list[Tensor] = []
        self.added: dict[tuple[str, int], Any] = defaultdict(float)

    def run(self, ids: list[int]) -> Tensor:
        """Logits (S, V)."""
        w = self.weights
        for place, vector in self.vectors.items():
            grown = torch.zeros(len(ids), vector.shape[1], dtype=torch.float64)
            grown[: len(vector)] = vector
            self.added[place] = grown
        x = w.embedding[ids] + self.added["embedding", 0]
        if w.is_gpt2:
            x = x + w.w["transformer.wpe.weight"][: len(ids)]
        for layer in range(w.n_layers):
            x = self._block(layer, x)
        return self._norm(x, "final", 0) @ w.unembedding.T

    def _block(self, layer: int, x: Tensor) -> Tensor:
        w = self.weights
        normed = self._norm(x, "attention", layer)
        values = self._projected(layer, "v", normed)
        self._features(layer, "v", values)
        values = values + self.added["value", layer]
        self.patterns.append(self._patched(layer, self._pattern(layer, normed)))
        per_head = values.unflatten(-1, (-1, w.width)).transpose(0, 1)
        per_head = per_head.repeat_interleave(w.n_heads // len(per_head), dim=0)
        z = (self.patterns[layer] @ per_head).transpose(0, 1).flatten(1)
        self._features(layer, "z", z)
        raw = self._projected(layer, "o", z + self.added["z", layer])
        self._features(layer, "attn_out", raw, raw=True)
        self._features(layer, "resid_pre", x)
        attention = self._post("attention", layer, raw + self.added["raw attention", layer])
        self._features(layer, "attn_out", attention)
        above = x + attention + self.added["attention", layer]
        mid = x if w.parallel else above
        self._features(layer, "resid_mid", mid)
        mlp = w.mlp(layer, self._norm(mid, "mlp", layer)) + self.added["raw mlp", layer]
        return above + self._post("mlp", layer, mlp) + self.added["mlp", layer] + self.added["block", layer]

    def _post(self, sublayer: str, layer: int, x: Tensor) -> Tensor:
        return self._norm(x, f"{sublayer}_post", layer) if self.weights.has_post_norms else x

    def _norm(self, x: Tensor, which: str, layer: int, *, gain: bool = True) -> Tensor:
        if self.weights.centred:
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + self.weights.epsilon).sqrt()
        weight, bias = self.weights.norm_weights(which, layer)
        return x * weight + bias if gain else x

    def _projected(self, layer: int, letter: str, x: Tensor) -> Tensor:
        weight, bias = self.weights.projection(layer, letter)
        return x @ weight.T + bias

    def _pattern(self, layer: int, normed: Tensor) -> Tensor:
        if self.freeze_attention:
            assert self.recorded is not None
            return self.recorded.patterns[layer]
        w, found = self.weights, torch.zeros(self.weights.n_heads, len(normed), len(normed), dtype=torch.float64)
        q, k = (self._projected(layer, letter, normed).unflatten(-1, (-1, w.width)) for letter in "qk")
        for head in range(w.n_heads):
            queries = self._turned(self._head_normed(layer, "q", q[:, head]))
            keys = self._turned(self._head_normed(layer, "k", k[:, head // (w.n_heads // w.n_kv)]))
            for p in range(len(normed)):
                first = max(0, p + 1 - (w.windows[layer] or p + 1))
                scores = keys[first : p + 1] @ queries[p] * w.scale
                scores = scores if w.score_cap is None else w.score_cap * (scores / w.score_cap).tanh()
                found[head, p, first : p + 1] = scores.softmax(0)
        return found

    def _head_normed(self, layer: int, letter: str, x: Tensor) -> Tensor:
        gain = self.weights.head_norm(layer, letter)
        return x if gain is None else x / (x.pow(2).mean(-1, keepdim=True) + self.weights.epsilon).sqrt() * gain

    def _turned(self, x: Tensor) -> Tensor:
        if self.weights.theta is None:
            return x
        half = self.weights.turning // 2
        x, rest = x[:, : 2 * half], x[:, 2 * half :]
        angle = torch.outer(torch.arange(len(x)).double(), self.weights.theta ** (-torch.arange(half).double() / half))
        turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag, rest], -1)

    def _patched(self, layer: int, pattern: Tensor) -> Tensor:
        pattern = pattern.clone()
        for change in self.changes:
            if not isinstance(change, PatternChange) or change.layer != layer:
                continue
            for p in range(len(pattern[0])) if change.query is None else [change.query]:
                row = pattern[change.head, p]
                keys = [s for s in range(p + 1) if change.key in (None, s)]
                if not keys:
                    continue
                others = [s for s in range(p + 1) if s not in keys]
                if change.how == "row":
                    row[:] = 0
                for s in keys:
                    row[s] = row[s] * change.value if change.how == "scale" else change.value
                rest = others if change.key is not None else keys
                if change.renormalize and float(row[rest].sum()) != 0:
                    total = 1 - (float(row[keys].sum()) if change.key is not None else 0.0)
                    row[rest] = row[rest] * (total / float(row[rest].sum()))
        return pattern

    # --- features -------------------------------------------------------------------------------------------------

    def _features(self, layer: int, site: str, x: Tensor, *, raw: bool = False) -> None:
        """Dictionaries that read here: what they are, what they become, and what more they then write, and where."""
        for dictionary, writes in self.dictionaries.values():
            if (dictionary.read.site.name, dictionary.layer) != (site, layer):
                continue
            if site == "attn_out" and raw != dictionary.before_post_norm:
                continue
            read = x
            if dictionary.read.norm != "none":
                which = "attention" if site == "resid_pre" else "mlp"
                read = self._norm(x, which, layer, gain=dictionary.read.norm == "full")
            if isinstance(dictionary.moved_by, HeadLoading):
                written = self._loaded(dictionary, dictionary.moved_by, read)
            else:
                own = None
                if isinstance(dictionary.moved_by, OwnAttention):
                    own = own_patterns(dictionary.moved_by, read)
                pre = encoded(dictionary, read, own)
                written = self._change(dictionary, "own", pre, gated(dictionary, pre))
            for write in writes:
                rows = dictionary.decoders[write].rows.all().double().view(len(written[0]), dictionary.rank, -1)
                vectors = torch.einsum("sfr,frd->sd", written, rows)
                is_raw = dictionary.before_post_norm and write.name in ("attn_out", "mlp_out")
                place = "raw " * is_raw + PLACES[write.name], write.layer
                self.added[place] = self.added[place] + vectors

    def _loaded(self, dictionary: Dictionary, movement: HeadLoading, read: Tensor) -> Tensor:
        """Each query has its own context to choose from: the prompt, or all up to it."""
        pre = encoded(dictionary, read)
        active = gated(dictionary, pre)
        pattern = with_identity(self.patterns[dictionary.layer])
        total, came = torch.zeros_like(active), torch.zeros_like(active)
        shown, changed = torch.zeros_like(active), torch.zeros_like(active)
        for p in range(len(read)):
            seen = self.n_prompt if p < self.n_prompt or self.choice == "held" else p + 1
            chosen = strongest(movement, active[: min(seen, len(read))])
            alive = chosen.abs().amax((0, 2)) > 0 if movement.context_k is not None else torch.ones(active.shape[1]) > 0
            here = active * alive[None, :, None]
            new = self._change(dictionary, "key", pre, here) + here
            total[p] = arrived(movement, new, pattern)[p]
            came[p] = arrived(movement, here, pattern)[p]
            shown[p], changed[p] = here[p], new[p]
        self.before[dictionary.name, "key"], self.activations[dictionary.name, "key"] = shown, changed
        return total - came + self._change(dictionary, "query", total, total)

    def _change(self, dictionary: Dictionary, side: str, pre: Tensor, active: Tensor) -> Tensor:
        """New less current activations (S, F, r)."""
        new = active.clone()
        for change in self.changes:
            if isinstance(change, PatternChange):
                continue
            name, _, wanted = change.node.partition("@")
            place, feature, where = name.split("_")
            prefix, layer = place.rstrip("0123456789"), place.lstrip("akqvrE")
            of_side = {"key": "key", "query": "query"}.get(PREFIXES.get(prefix, ""), "own")
            if feature == "error" or prefix == "E" or of_side != side or int(layer or -1) != dictionary.layer:
                continue
            sites = {"mlp": ("resid_mid",), "value": ("v",), "attention": ("attn_out", "z", "resid_pre")}
            if side == "own" and dictionary.read.site.name not in sites[PREFIXES[prefix]]:
                continue
            if wanted not in ("", dictionary.name):
                continue
            start, colon, stop = where.partition(":")
            last = len(new) if colon else int(start) + 1
            for p in range(int(start or 0), min(int(stop or last), len(new))):
                if p == 0 and self.special:
                    continue
                u = self._direction(dictionary, side, pre, p, int(feature))
                at = (p, int(feature))
                if change.how == "ablate":
                    new[at] = 0
                elif change.how == "scale":
                    new[at] = new[at] * change.value
                else:
                    new[at] = change.value * u + (new[at] if change.how == "add" else 0)
        self.pre[dictionary.name, side], self.before[dictionary.name, side] = pre, active
        self.activations[dictionary.name, side] = new
        return new - active

    special = False

    def _direction(self, dictionary: Dictionary, side: str, pre: Tensor, p: int, feature: int) -> Tensor:
        if dictionary.rank == 1:
            return torch.ones(1, dtype=torch.float64)
        if self.recorded is not None:
            values = self.recorded.before[dictionary.name, side]
            if p < len(values) and float(values[p, feature].norm()) > 0:
                return values[p, feature] / values[p, feature].norm()
        length = pre[p, feature].norm()
        return pre[p, feature] / length if length > 0 else pre[p, feature]


def plain(
    model: Model,
    ids: list[int],
    changes: list[Change | PatternChange],
    *,
    special: bool,
    n_prompt: int = 0,
    choice: str = "anew",
    vectors: dict[tuple[str, int], Tensor] | None = None,
    freeze_attention: bool = False,
) -> tuple[Tensor, Plain]:
    """Logits (S, V) of a run with changes, and the run. The first `n_prompt` ids are the recorded prompt."""
    n_prompt = n_prompt or len(ids)
    recorded = Plain(model, [], n_prompt)
    recorded.run(ids[:n_prompt])
    run = Plain(model, changes, n_prompt, choice, recorded, vectors or {}, freeze_attention)
    run.special = special
    return run.run(ids), run
