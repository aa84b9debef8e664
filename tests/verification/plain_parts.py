"""A part of a graph kept alone, written a second time: one row, float64, node by node.

What dictionaries do is in tests/engine/plain_attention.py, the base model's sublayers in tests/interventions. Shapes:
S positions, D model width, F features, r rank.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from plain_attention import arrived, encoded, gated, own_patterns, strongest, with_identity
from plain_interventions import Plain
from torch import Tensor

from circuits.replacements import Dictionary, Site
from circuits.replacements.movement import HeadLoading, OwnAttention

SIDES = {"mtc_key": "key", "mtc_query": "query"}
Node = tuple[str, str, int, int]  # dictionary, side, position, feature
Error = tuple[str, int, int]  # kind, layer, position


@dataclass
class PlainParts(Plain):
    """One run that keeps `nodes` and `errors`; `logits` is all that it is for."""

    nodes: set[Node] = field(default_factory=set)
    errors: set[Error] = field(default_factory=set)
    first_is_special: bool = True

    def logits(self, ids: list[int]) -> Tensor:
        """(S, V)."""
        self.whole: dict[Site, Tensor] = defaultdict(lambda: torch.zeros(()).double())
        self.part: dict[Site, Tensor] = defaultdict(lambda: torch.zeros(()).double())
        self.owned = {site for _, writes in self.dictionaries.values() for site in writes}
        return self.run(ids)

    def _block(self, layer: int, x: Tensor) -> Tensor:
        w = self.weights
        normed = self._norm(x, "attention", layer)
        values = self._projected(layer, "v", normed)
        self._features(layer, "v", values)
        if Site("v", layer) in self.owned:
            values = self._put_together([Site("v", layer)], "value_error", values)
        self.patterns.append(self._pattern(layer, normed))
        per_head = values.unflatten(-1, (-1, w.width)).transpose(0, 1)
        per_head = per_head.repeat_interleave(w.n_heads // len(per_head), dim=0)
        z = (self.patterns[layer] @ per_head).transpose(0, 1).flatten(1)
        self._features(layer, "z", z)
        raw = self._projected(layer, "o", z)
        self.raw_base = {"attention": raw}
        self._features(layer, "attn_out", raw, raw=True)
        self._features(layer, "resid_pre", x)
        attention = self._post("attention", layer, raw)
        self._features(layer, "attn_out", attention)
        is_whole = Site("resid_post", layer) in self.owned
        sites = [site for site in (Site("z", layer), Site("attn_out", layer)) if site in self.owned]
        if sites:
            attention = self._put_together(sites, "attention_error", attention)
        mid = x if w.parallel else x + attention
        self._features(layer, "resid_mid", mid)
        self.raw_base["mlp"] = w.mlp(layer, self._norm(mid, "mlp", layer))
        mlp = self._post("mlp", layer, self.raw_base["mlp"])
        if is_whole:
            return self._put_together([Site("resid_post", layer)], "block_error", x + attention + mlp)
        sites = [site for site in (Site("mlp_out", layer),) if site in self.owned]
        return x + attention + self._put_together(sites, "mlp_error", mlp, layer)

    def _put_together(self, sites: list[Site], kind: str, base: Tensor, layer: int = -1) -> Tensor:
        whole, part = torch.zeros_like(base), torch.zeros_like(base)
        for site in sites:
            layer = site.layer
            whole = whole + self._behind(site, self.whole[site])
            part = part + self._behind(site, self.part[site])
        out = part.clone()
        for p in range(len(base)):
            if (kind, layer, p) in self.errors:
                out[p] += base[p] - whole[p]
            if p == 0 and self.first_is_special:
                out[p] = base[p]
        return out

    def _behind(self, site: Site, written: Tensor) -> Tensor:
        """What was written at a site as it enters the stream: a post-norm divides by what it divides by in the base."""
        if site.name == "z":
            written = self._projected(site.layer, "o", written)
        raw = site.name == "z" or self._trained_before(site)
        if not raw or site.name == "v" or not self.weights.has_post_norms:
            return written
        sublayer = "mlp" if site.name == "mlp_out" else "attention"
        base = self.raw_base[sublayer]
        gain, _ = self.weights.norm_weights(f"{sublayer}_post", site.layer)
        return written / (base.pow(2).mean(-1, keepdim=True) + self.weights.epsilon).sqrt() * gain

    def _trained_before(self, site: Site) -> bool:
        return site.name in ("attn_out", "mlp_out") and any(
            d.before_post_norm for d, writes in self.dictionaries.values() if site in writes
        )

    def _features(self, layer: int, site: str, x: Tensor, *, raw: bool = False) -> None:
        """Dictionaries that read here, and what they write, whole and in part, wherever they do."""
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
                pattern = with_identity(self.patterns[layer])
                sent = strongest(dictionary.moved_by, gated(dictionary, encoded(dictionary, read)))
                whole = arrived(dictionary.moved_by, sent, pattern)
                part = arrived(dictionary.moved_by, self._only(dictionary, "key", sent), pattern)
                part = self._only(dictionary, "query", part)
            else:
                own = None
                if isinstance(dictionary.moved_by, OwnAttention):
                    own = own_patterns(dictionary.moved_by, read)
                whole = gated(dictionary, encoded(dictionary, read, own))
                part = self._only(dictionary, "own", whole)
            for write in writes:
                rows = dictionary.decoders[write].rows.all().double().view(whole.shape[1], dictionary.rank, -1)
                constant = dictionary.output_biases[write].double()
                if dictionary.skip is not None and write == dictionary.writes[0]:
                    constant = constant + read @ dictionary.skip.double().T
                for total, activations in ((self.whole, whole), (self.part, part)):
                    total[write] = total[write] + torch.einsum("sfr,frd->sd", activations, rows) + constant

    def _only(self, dictionary: Dictionary, side: str, activations: Tensor) -> Tensor:
        found = torch.zeros_like(activations)
        for p in range(len(activations)):
            for f in range(activations.shape[1]):
                if (dictionary.name, side, p, f) in self.nodes or (p == 0 and self.first_is_special):
                    found[p, f] = activations[p, f]
        return found
