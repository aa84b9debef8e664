"""One run of the base model, all of it recomputed, in which the rows of a batch have their features changed.

Hooks go with the forward pass: at each site they read what dictionaries read there, and add what changed features,
errors and tokens write there. What reads an attention output reads it before anything is added to it, so nothing that
is written there reaches its own reader. Patterns are changed inside the attention function.

Letters of shapes: B rows, T positions of this piece, S positions so far, D model width, H heads, K key-value heads, E
head width.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from circuits.changes import Plan, changed_pattern
from circuits.families import part
from circuits.feature_runs import Choice, FeatureRun, Step, node_direction
from circuits.linearize import LinearizedModel, write_depth
from circuits.recording import cast_up
from circuits.replacements.dictionary import Dictionary
from circuits.replacements.sites import ReadSite, Site

IMPLEMENTATION = "circuits-intervening"
Change = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Held:
    """What a run does not recompute at the recording's positions.

    layers
        MLP and attention outputs of these layers stay as recorded, but for what changes write.
    patterns
        Every attention pattern stays as recorded.
    """

    layers: range = range(0)
    patterns: bool = False


@dataclass
class RealRun:
    """A run of a plan over the prompt, and on over generated tokens.

    Parameters
    ----------
    recorded
        Each dictionary's chosen features on the recording.
    values
        (2, B, F): pre-activations and activations of what is watched, filled in as the run gets there.
    keep_written
        Keep what is added in a piece, (B, T, width) by site and whether before its post-norm, in `written`.
    """

    linear: LinearizedModel
    plan: Plan
    recorded: dict[int, Step]
    values: Tensor
    held: Held = field(default_factory=Held)
    choice: Choice = "anew"
    keep_written: bool = False

    def __post_init__(self) -> None:
        self.runs = {index: self._feature_run(index) for index in self.plan.features}
        watched = [i for i in self.plan.watched if self.linear.dictionaries[i].layer in self.held.layers]
        self.watchers = {index: self._feature_run(index) for index in watched}
        self.first = 0
        self.resid_pre: Tensor = torch.zeros(0)
        self.patterns: dict[int, Tensor] = {}
        self.added: dict[tuple[Site, bool], Tensor] = {}
        self.value_changes: dict[int, Tensor] = {}
        self.head_changes: dict[int, Tensor] = {}
        self.raw_changes: dict[Site, Tensor] = {}
        self.decoders: dict[tuple[int, Site], Tensor] = {}
        self.written: dict[tuple[Site, bool], Tensor] = {}

    def _feature_run(self, index: int) -> FeatureRun:
        dictionary, recorded = self.linear.dictionaries[index], self.recorded[index]
        return FeatureRun(dictionary, index, self.plan, recorded, self.linear.recording.n_positions, self.choice)

    @torch.no_grad()
    def forward(self, token_ids: Tensor, cache: Any = None) -> Tensor:
        """`resid_final` (B, T, D) of the next tokens (B, T)."""
        model = self.linear.model
        self.added, self.patterns = {}, {}
        with self._hooks(), self._attention(), cast_up(model):
            embedding = part(model.lm, model.family.embedding)(token_ids).float()
            trunk = part(model.lm, model.family.trunk)
            # transformers 5.24 renamed it
            name = "cache" if "cache" in signature(trunk.forward).parameters else "past_key_values"
            output = trunk(inputs_embeds=embedding, use_cache=cache is not None, **{name: cache})
        self.first += token_ids.shape[1]
        final: Tensor = output.last_hidden_state.to(model.device).float()
        return final

    # --- what is added, and when ----------------------------------------------------------------------------------

    def _read(self, layer: int, name: str, x: Tensor, pattern: Tensor | None = None, *, raw: bool = False) -> None:
        """Dictionaries that read site `name` of a layer have their turn; x (B, T, width) is what stands there.

        `raw`: before the post-norm of the site; those that were trained there read and write there.
        """
        for index, run in self.runs.items():
            read = self.linear.dictionaries[index].read
            if read.site != Site(name, layer) or raw != self._is_raw(run.dictionary, read.site):
                continue
            here = self._normed(read, x)
            step = run.step(self._held_input(run.dictionary, here), pattern)
            for site in self.linear.writes_of(run.dictionary) if index in self.plan.changes else ():
                key = site, self._is_raw(run.dictionary, site)
                written = step.delta.flatten(2) @ self._rows(index, site).to(x)
                self.added[key] = self.added[key] + written if key in self.added else written
            if index in self.plan.watched:
                seen = self.watchers[index].step(here, pattern) if index in self.watchers else step
                self._keep_watched(index, seen)

    def _rows(self, index: int, site: Site) -> Tensor:
        """Decoder rows (n x r, D) of the chosen features, read once."""
        if (index, site) not in self.decoders:
            dictionary, features = self.linear.dictionaries[index], self.plan.features[index]
            rows = dictionary.decoder_rows(features, site)
            self.decoders[index, site] = rows.reshape(len(features) * dictionary.rank, -1)
        return self.decoders[index, site]

    def _held_input(self, dictionary: Dictionary, here: Tensor) -> Tensor:
        """Where a layer is held its features are as recorded: that is what its outputs are held at."""
        if not (m := self._held_length(dictionary.layer, here.shape[1])):
            return here
        recorded = self.linear.input_of(dictionary)[self.first : self.first + m]
        return torch.cat([recorded.expand(len(here), -1, -1), here[:, m:]], 1)

    def _normed(self, read: ReadSite, x: Tensor) -> Tensor:
        """The stream as a dictionary reads it: through the norm of its site, computed anew."""
        if read.norm == "none":
            return x
        model = self.linear.model
        path = model.family.attention_norm if read.site.name == "resid_pre" else model.family.mlp_norm
        module = part(model.blocks[read.site.layer], path)
        gain, bias, _ = model.norm_parameters(module)
        scale = model.norm_scale(module, x).unsqueeze(-1)
        x = (x - x.mean(-1, keepdim=True) if model.family.norm == "layer" else x) * scale
        if read.norm == "scale":
            return x
        return x * gain if bias is None else x * gain + bias

    def _is_raw(self, dictionary: Dictionary, site: Site) -> bool:
        """Whether a dictionary's site is the sublayer's own output, before a post-norm that the family has there."""
        family = self.linear.model.family
        post = {"attn_out": family.attention_post_norm, "mlp_out": family.mlp_post_norm}.get(site.name)
        return dictionary.before_post_norm and post is not None

    def _raw_written(self, site: Site, like: Tensor) -> Tensor:
        """What features write before the post-norm of a site, (B, T, D)."""
        self.raw_changes[site] = self.added.pop((site, True), torch.zeros_like(like))
        if self.keep_written:
            self.written[site, True] = self.raw_changes[site]
        return self.raw_changes[site]

    def _written(self, site: Site, like: Tensor) -> Tensor:
        """All that is added at a site in this piece, (B, T, width): features' writes, errors and tokens."""
        total = self.added.pop((site, False), torch.zeros_like(like))
        at = {"v": -1, "z": -1, "resid_pre": 0}.get(site.name, write_depth(site))
        for vector in self.plan.vectors:
            here = vector.layer == site.layer if vector.in_values else vector.depth == at
            here = here and vector.in_values == (site.name == "v")
            if here and self.first <= vector.position < self.first + like.shape[1]:
                total[vector.row, vector.position - self.first] += vector.vector.to(total)
        if self.keep_written:
            self.written[site, False] = total
        return total

    def _keep_watched(self, index: int, step: Step) -> None:
        for watched in self.plan.watched[index]:
            at = watched.position - self.first
            side = step.sides[watched.side]
            if 0 <= at < side.pre.shape[1]:
                current = side.pre[:, at, watched.column]
                direction = node_direction(self.recorded[index], watched, current)
                for kept, value in zip(self.values, (side.pre, side.after), strict=True):
                    kept[:, watched.number] = (value[:, at, watched.column] * direction).sum(-1)

    # --- hooks ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        family, home = self.linear.model.family, self.linear.model.device
        before: dict[str, Change] = {"": self._enter, family.attention_output: self._head_outputs,
                                     family.mlp_norm: self._middle}  # fmt: skip
        after: list[tuple[str, Change]] = [
            (family.attention, self._raw_attention), (family.attention_out, self._attention_output),
            (family.mlp, self._raw_mlp), (family.mlp_out, self._mlp_output), ("", self._leave),
        ]  # fmt: skip
        handles = []
        for layer, block in enumerate(self.linear.model.blocks):
            for path, change in before.items():
                module = part(block, path) if path else block
                handles.append(module.register_forward_pre_hook(_on_input(layer, change, home), with_kwargs=True))
            for path, change in after:
                module = part(block, path) if path else block
                handles.append(module.register_forward_hook(_on_output(layer, change, home)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, layer: int, x: Tensor) -> Tensor:
        x = x + self._written(Site("resid_pre", 0), x) if layer == 0 else x
        self.resid_pre = x
        return x

    def _head_outputs(self, layer: int, z: Tensor) -> Tensor:
        shape = z.shape
        z = z.reshape(*shape[:2], -1)
        self._read(layer, "z", z.float())
        self.head_changes[layer] = self._written(Site("z", layer), z)
        return (z + self.head_changes[layer]).view(shape)

    def _raw_attention(self, layer: int, out: Tensor) -> Tensor:
        self._read(layer, "attn_out", out.float(), raw=True)
        self._read(layer, "resid_pre", self.resid_pre.float(), self.patterns[layer])
        return out + self._raw_written(Site("attn_out", layer), out)

    def _attention_output(self, layer: int, out: Tensor) -> Tensor:
        self._read(layer, "attn_out", out.float())
        if m := self._held_length(layer, out.shape[1]):
            recorded = self.linear.recording.attn_out[layer][self.first : self.first + m]
            out = torch.cat([recorded + self._held_changes(layer, m), out[:, m:]], 1)
        return out + self._written(Site("attn_out", layer), out)

    def _middle(self, layer: int, x: Tensor) -> Tensor:
        self._read(layer, "resid_mid", x.float())
        return x

    def _raw_mlp(self, layer: int, out: Tensor) -> Tensor:
        flat = out.reshape(len(self.resid_pre), -1, out.shape[-1])
        return (flat + self._raw_written(Site("mlp_out", layer), flat)).view(out.shape)

    def _mlp_output(self, layer: int, out: Tensor) -> Tensor:
        flat = out.reshape(len(self.resid_pre), -1, out.shape[-1])
        if m := self._held_length(layer, flat.shape[1]):
            recorded, norms = self.linear.recording, self.linear.recording.mlp_post_norms
            change = self.raw_changes[Site("mlp_out", layer)][:, :m]
            change = norms[layer].apply(change, slice(self.first, self.first + m)) if norms else change
            flat = torch.cat([recorded.mlp_out[layer][self.first : self.first + m] + change, flat[:, m:]], 1)
        if layer not in self.linear.replaced_blocks:
            flat = flat + self._written(Site("mlp_out", layer), flat)
        return flat.view(out.shape)

    def _leave(self, layer: int, x: Tensor) -> Tensor:
        return x + self._written(Site("resid_post", layer), x) if layer in self.linear.replaced_blocks else x

    # --- attention ------------------------------------------------------------------------------------------------

    @contextmanager
    def _attention(self) -> Iterator[None]:
        """Within the context every attention layer computes with changed values and patterns.

        Transformers lets an attention function of one's own be registered; ours calls the family's eager one.
        """
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask

        home = self.linear.model.device

        def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
            eager = sys.modules[type(module).__module__].eager_attention_forward
            layer = module.layer_idx
            value = self._changed_values(layer, value.to(home), query.shape[2]).to(value.device)
            output, pattern = eager(module, query, key, value, mask, **options)
            before = pattern.to(home)
            whole = self._changed_patterns(layer, before)
            self.patterns[layer] = whole.float()
            if whole is not before:
                pattern = whole.to(value)
                values = value.repeat_interleave(whole.shape[1] // value.shape[1], dim=1)
                output = (pattern @ values).transpose(1, 2).contiguous()
            return output, pattern

        AttentionInterface.register(IMPLEMENTATION, attend)
        AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)
        config: Any = self.linear.model.lm.config
        before = config._attn_implementation
        config._attn_implementation = IMPLEMENTATION
        try:
            yield
        finally:
            config._attn_implementation = before

    def _changed_values(self, layer: int, value: Tensor, length: int) -> Tensor:
        """Values (B, K, S, E) with the changes of this piece and of all before it."""
        here = value[:, :, -length:].transpose(1, 2).flatten(2)
        self._read(layer, "v", here.float())
        change = self._written(Site("v", layer), here)
        if layer not in self.value_changes and not bool(change.any()):
            return value
        past = self.value_changes.get(layer)
        if past is None:
            past = change.new_zeros(len(change), self.first, change.shape[2])
        self.value_changes[layer] = torch.cat([past, change], 1)
        whole = self.value_changes[layer]
        return value + whole.view(*whole.shape[:2], value.shape[1], -1).transpose(1, 2).to(value)

    def _changed_patterns(self, layer: int, pattern: Tensor) -> Tensor:
        """Patterns (B, H, T, S) held where they are to be held, then changed."""
        length = pattern.shape[2]
        m = self._inside(length) if self.held.patterns or layer in self.held.layers else 0
        if m:
            recorded = self.linear.recording.patterns[layer][:, self.first : self.first + m, : pattern.shape[3]]
            pattern = pattern.clone()
            pattern[:, :, :m] = 0.0
            pattern[:, :, :m, : recorded.shape[2]] = recorded.to(pattern)
        changes = self.plan.patterns.get(layer, ())
        return changed_pattern(pattern, changes, self.first) if changes else pattern

    def _held_length(self, layer: int, length: int) -> int:
        """How many positions of this piece are held in a layer."""
        return self._inside(length) if layer in self.held.layers else 0

    def _inside(self, length: int) -> int:
        return max(0, min(length, self.linear.recording.n_positions - self.first))

    def _held_changes(self, layer: int, m: int) -> Tensor:
        """What changed values, patterns and head outputs add to a held attention output, (B, m, D)."""
        attention, n = self.linear.attention[layer], self.first + m
        z, width = self.head_changes[layer][:, :m], self.linear.model.shape.d_head
        if layer in self.value_changes or layer in self.plan.patterns:
            recorded = attention.read_values(self.linear.recording.resid_pre[layer])[:n]
            values = recorded.expand(len(z), -1, -1)
            before = through_heads(attention.pattern[None, :, self.first : n, :n], recorded[None], width)
            if layer in self.value_changes:
                values = values + self.value_changes[layer][:, :n]
            z = z + through_heads(self.patterns[layer][:, :, :m, :n], values, width) - before
        change = attention.write(z, slice(None), below_post=True) + self.raw_changes[Site("attn_out", layer)][:, :m]
        norms = self.linear.recording.attention_post_norms
        return norms[layer].apply(change, slice(self.first, n)) if norms else change


def through_heads(pattern: Tensor, values: Tensor, head_width: int) -> Tensor:
    """Head outputs (B, T, H x E) of patterns (B, H, T, S) and values (B, S, K x E), which heads may share."""
    n_rows, n_heads, length, n_keys = pattern.shape
    per_head = values.reshape(len(values), n_keys, -1, head_width)
    per_head = per_head.transpose(1, 2).repeat_interleave(n_heads // per_head.shape[2], dim=1)
    return (pattern.to(values) @ per_head).transpose(1, 2).reshape(n_rows, length, -1)


def _on_input(layer: int, change: Change, home: torch.device) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        changed = change(layer, x.to(home)).to(x.device)
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

    return hook


def _on_output(layer: int, change: Change, home: torch.device) -> Callable[..., Any]:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        changed = change(layer, x.to(home)).to(x.device)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook
