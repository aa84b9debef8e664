"""Features as ends of a path whatever the prompt: their addresses, what they write, and what they read.

A path between two features does not depend on a prompt when everything on it that a prompt decides is left out: norms
keep gain and centring but have denominators one, gates are open, attention patterns are left out (they multiply a
path, they do not change it). What is left is *virtual weights*: "A Mathematical Framework for Transformer Circuits"
(Elhage et al. 2021), "Virtual Weights and the Residual Stream as a Communication Channel".

Letters of shapes: n features of rank r, F features of a dictionary, D model width, H heads, K key-value heads, E head
width.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.families import part
from circuits.graph import ID_PREFIXES, OWN_HEAD
from circuits.linearize import read_depth, write_depth
from circuits.loading import Model
from circuits.model import AttentionWeights
from circuits.recording import NormRecord
from circuits.replacements.dictionary import Dictionary
from circuits.replacements.movement import HeadLoading, OwnAttention
from circuits.replacements.sites import Site

ADDRESS = re.compile(r"([akqv]?\d+|E)_(\d+)(_.+)?(?:@(.+))?")


@dataclass(frozen=True, eq=False)
class End:
    """One side of a dictionary, or all tokens: what can stand at an end of a path.

    kind
        As of the nodes of a graph.
    prefix
        What the addresses of its features begin with, such as `a2`.
    is_first
        Whether no other dictionary has this prefix before it; those of any other end with `@` and its name.
    n_features, rank
        Of the dictionary; tokens have rank 1.
    dictionary
        None for tokens.
    """

    kind: str
    prefix: str
    layer: int
    n_features: int
    is_first: bool = True
    rank: int = 1
    dictionary: Dictionary | None = None

    def address(self, feature: int) -> str:
        """A feature as in `Graph.node_ids`, without the position."""
        behind = "" if self.is_first or self.dictionary is None else f"@{self.dictionary.name}"
        return f"{self.prefix}_{feature}{behind}"

    def is_named(self, dictionary: str) -> bool:
        """Whether it belongs to the dictionary of this name."""
        return self.dictionary is not None and self.dictionary.name == dictionary

    @property
    def writes_stream(self) -> bool:
        """Whether it adds vectors to the stream: values leave through heads, a key side through its query side."""
        return self.kind not in ("value_feature", "mtc_key", "logit")

    @property
    def reads_stream(self) -> bool:
        """Whether it reads, through heads or not; what a query side gets comes from its key side alone."""
        return self.kind not in ("mtc_query", "embedding")

    @property
    def reads_heads(self) -> bool:
        """Whether it reads the outputs of its own layer's heads."""
        return self.dictionary is not None and self.dictionary.read.site.name in ("attn_out", "z")

    @property
    def reads_own(self) -> bool:
        """Whether it reads through an attention pattern of its own."""
        return self.dictionary is not None and isinstance(self.dictionary.moved_by, OwnAttention)


class Ends:
    """A model's weights as ends of paths see them.

    Attributes
    ----------
    all : every end, tokens included, from below
    cut : layers whose whole block a dictionary replaces; nothing passes beside it
    """

    def __init__(self, model: Model) -> None:
        self.base, self.shape = model.base, model.base.shape
        offered = [d for replacement in model.replacements for d in replacement.dictionaries]
        self.cut = frozenset(s.layer for d in offered for s in d.writes if s.name == "resid_post")
        inside = ("attn_out", "z", "v", "resid_mid")
        kept = [d for d in offered if d.layer not in self.cut or d.read.site.name not in inside]
        vocabulary, top = self.shape.vocabulary, self.shape.n_layers
        self.all: tuple[End, ...] = (
            End("embedding", ID_PREFIXES["embedding"], -1, vocabulary),
            *_ends_of(sorted(kept, key=lambda d: d.layer)),
            End("logit", f"{ID_PREFIXES['logit']}{top}", top, vocabulary),
        )
        self.attention = lru_cache(maxsize=4)(self._attention)

    def find(self, address: str) -> tuple[End, int]:
        """The end and the number of a feature or token.

        Raises
        ------
        CircuitsError
            The address is none, or there is no such feature.
        """
        found = ADDRESS.fullmatch(address)
        if found is None:
            raise CircuitsError(f"{address!r} is no address of a feature. {self.grammar()}")
        if found[3]:
            raise CircuitsError(f"{address!r}: virtual weights have no position; say {found[1]}_{found[2]}")
        feature = int(found[2])
        for end in self.all:
            if end.prefix == found[1] and (end.is_named(found[4]) if found[4] else end.is_first):
                if feature >= end.n_features:
                    raise CircuitsError(
                        f"{address!r}: {end.prefix} has {end.n_features:,} features, numbered from 0 "
                        f"to {end.n_features - 1}"
                    )
                return end, feature
        what = found[1] + (f" of a dictionary {found[4]!r}" if found[4] else "")
        raise CircuitsError(f"{address!r}: this model has no features {what}. {self.grammar()}")

    def grammar(self) -> str:
        """What an address looks like, and which this model has."""
        there = ", ".join(f"{end.address(0)} to {end.address(end.n_features - 1)}" for end in self.all)
        return (
            "An address is LAYER_FEATURE with a letter in front: none for an MLP, a for attention, k and q for the key "
            "and the query side of a multitoken transcoder, v for values; @DICTIONARY behind it where several "
            "dictionaries have such features; E_TOKEN and N_LAYERS_TOKEN are tokens of the input and of the output. "
            f"Here there are {there}"
        )

    def stretch(self, depth: int) -> range:
        """Depths whose writes reach a reader of `depth` through the residual stream: none from below a cut."""
        return range(max((2 * layer + 2 for layer in self.cut if 2 * layer + 2 < depth), default=0), depth)

    def sites(self, end: End) -> tuple[tuple[int, Site | None], ...]:
        """Where an end writes to the stream: depth and site; a token's site is None."""
        if not end.writes_stream:
            return ()
        if end.dictionary is None:
            return ((0, None),)
        there = [site for site in end.dictionary.writes if site.name == "resid_post" or site.layer not in self.cut]
        return tuple((write_depth(site), site) for site in there)

    def rows(self, end: End, features: Tensor, site: Site | None) -> Tensor:
        """What one unit of features (n,) adds to the stream at a write site, (n r, D)."""
        if end.dictionary is None or site is None:
            # The module and not its weight: Gemma scales what it gives.
            embedding: Tensor = part(self.base.lm, self.base.family.embedding)(features.to(self.base.device))
            return embedding.float()
        rows = end.dictionary.decoder_rows(features, site).flatten(0, -2).to(self.base.device)
        if site.name == "z":
            rows = rows @ self.attention(site.layer).w_o.flatten(0, 1)
        post = self.post_norm(site.layer, mlp=site.name == "mlp_out")
        before = site.name == "z" or (end.dictionary.before_post_norm and site.name != "resid_post")
        return post.apply(rows, slice(None)) if before and post is not None else rows

    def writer(self, end: End, features: Tensor, depth: int) -> Tensor | None:
        """What one unit of features adds to the stream below `depth`, (n r, D): summed over its write sites there."""
        stretch = self.stretch(depth)
        parts = [self.rows(end, features, site) for at, site in self.sites(end) if at in stretch]
        return torch.stack(parts).sum(0) if parts else None

    def value_rows(self, end: End, features: Tensor) -> Tensor:
        """What one unit of value features becomes through each head of their layer, (n r, H, D), patterns left out."""
        assert end.dictionary is not None
        w_o = self.attention(end.layer).w_o
        rows = end.dictionary.decoder_rows(features, end.dictionary.writes[0]).flatten(0, -2).to(w_o)
        values = rows.reshape(len(rows), self.shape.n_kv_heads, -1).repeat_interleave(self.group, dim=1)
        post, rows = self.post_norm(end.layer), torch.einsum("nhe,hed->nhd", values, w_o)
        return rows if post is None else post.apply(rows, slice(None))

    @property
    def group(self) -> int:
        """Query heads for each key-value head."""
        return self.shape.n_heads // self.shape.n_kv_heads

    def depth_of(self, end: End) -> int:
        """A reader sees the writes of depths below this."""
        if end.dictionary is None:
            return 2 * self.shape.n_layers + 1
        return self.read_depth(end.dictionary.read.site.name, end.layer)

    def read_depth(self, site: str, layer: int) -> int:
        """As in `linearize`; the MLP of a parallel block reads what its attention reads."""
        return read_depth("resid_pre" if site == "resid_mid" and self.base.parallel else site, layer)

    def covectors(self, end: End, features: Tensor) -> Iterator[tuple[int | None, Tensor]]:
        """Readers of features (n,) as covectors of the stream: head and (n r, D), through each head of the end's layer.

        The head is None for a reader of the stream itself; a pattern of a feature's own is `OWN_HEAD`.
        """
        if end.dictionary is None:
            readers = self.base.unembedding_rows(features) - self.base.unembedding_mean
            yield None, self.final_norm.pull(readers, slice(None))
            return
        readers = end.dictionary.encoder_rows(features).flatten(0, -2).to(self.base.device)
        if end.reads_heads:
            weights, post = self.attention(end.layer), self.post_norm(end.layer)
            if end.dictionary.read.site.name == "attn_out" and post is not None and not end.dictionary.before_post_norm:
                readers = post.pull(readers, slice(None))
            for head in range(self.shape.n_heads):
                u = readers @ weights.w_o[head].T if end.dictionary.read.site.name == "attn_out" else None
                if u is None:
                    u = readers.reshape(len(readers), self.shape.n_heads, -1)[:, head]
                yield head, self.norm(end.layer).pull(u @ weights.w_v[head // self.group], slice(None))
        else:
            if end.kind == "value_feature":
                readers = readers @ self.attention(end.layer).w_v.flatten(0, 1)
            yield (OWN_HEAD if end.reads_own else None), self._pulled(end.dictionary, readers)

    def responses(self, end: End, x: Tensor) -> Iterator[tuple[int | None, Tensor]]:
        """What every feature of an end reads of stream vectors x (n, D) below it: head and (n, F r).

        The same as `covectors`, from the other side: x is pushed through the heads, so nothing of size F D H is made.
        """
        if end.dictionary is None:
            normed = self.final_norm.apply(x, slice(None))
            yield None, self.base.unembed(normed) - (normed @ self.base.unembedding_mean).unsqueeze(1)
            return
        dictionary, w_enc = end.dictionary, end.dictionary.W_enc.to(self.base.device)
        if end.reads_heads:
            for head in range(self.shape.n_heads):
                if dictionary.read.site.name == "attn_out":
                    after = not dictionary.before_post_norm
                    yield head, self.through_head(end.layer, head, x, post_norm=after) @ w_enc.T
                else:
                    part_of = w_enc.reshape(len(w_enc), self.shape.n_heads, -1)[:, head]
                    yield head, self._head_values(end.layer, head, x) @ part_of.T
            return
        if end.kind == "value_feature":
            x = self.norm(end.layer).apply(x, slice(None)) @ self.attention(end.layer).w_v.flatten(0, 1).T
        elif dictionary.read.norm != "none":
            norm = self.norm(end.layer, dictionary.read.site.name)
            x = norm.apply(x, slice(None), gain=dictionary.read.norm == "full")
        yield (OWN_HEAD if end.reads_own else None), x @ w_enc.T

    def through_head(self, layer: int, head: int, x: Tensor, *, post_norm: bool = True) -> Tensor:
        """`O_h V_h N x` for stream vectors x (n, D): what a head makes of them, its pattern left out."""
        rows = self._head_values(layer, head, x) @ self.attention(layer).w_o[head]
        post = self.post_norm(layer) if post_norm else None
        return rows if post is None else post.apply(rows, slice(None))

    def pull_head(self, layer: int, head: int, g: Tensor) -> Tensor:
        """The transpose of `through_head`: covectors (n, D) above a head become covectors below it."""
        weights, post = self.attention(layer), self.post_norm(layer)
        g = g if post is None else post.pull(g, slice(None))
        return self.norm(layer).pull(g @ weights.w_o[head].T @ weights.w_v[head // self.group], slice(None))

    def norm(self, layer: int, site: str = "resid_pre") -> NormRecord:
        """The norm that reads a stream site, its denominator one."""
        family = self.base.family
        path = family.attention_norm if site == "resid_pre" else family.mlp_norm
        return self._open(part(self.base.blocks[layer], path))

    def post_norm(self, layer: int, *, mlp: bool = False) -> NormRecord | None:
        """The norm between a sublayer and the stream, its denominator one; None in most families."""
        family = self.base.family
        path = family.mlp_post_norm if mlp else family.attention_post_norm
        return None if path is None else self._open(part(self.base.blocks[layer], path))

    @cached_property
    def final_norm(self) -> NormRecord:
        return self._open(part(self.base.lm, self.base.family.final_norm))

    def _open(self, module: torch.nn.Module) -> NormRecord:
        gain, bias, _ = self.base.norm_parameters(module)
        return NormRecord(gain, bias, torch.ones(1, device=gain.device), self.base.family.norm == "layer")

    def _attention(self, layer: int) -> AttentionWeights:
        return self.base.attention_weights(layer).to(self.base.device)

    def _head_values(self, layer: int, head: int, x: Tensor) -> Tensor:
        """`V_h N x`, (n, E)."""
        return self.norm(layer).apply(x, slice(None)) @ self.attention(layer).w_v[head // self.group].T

    def _pulled(self, dictionary: Dictionary, readers: Tensor) -> Tensor:
        read = dictionary.read
        if read.site.name == "v":
            return self.norm(dictionary.layer).pull(readers, slice(None))
        if read.norm == "none":
            return readers
        return self.norm(dictionary.layer, read.site.name).pull(readers, slice(None), gain=read.norm == "full")


def _ends_of(dictionaries: Sequence[Dictionary]) -> list[End]:
    """The ends of dictionaries: one each, or key side and query side."""
    ends: list[End] = []
    for dictionary in dictionaries:
        site = dictionary.read.site.name
        kinds = ["mlp_feature" if site == "resid_mid" else "value_feature" if site == "v" else "attention_feature"]
        if isinstance(dictionary.moved_by, HeadLoading):
            kinds = ["mtc_key", "mtc_query"]
        for kind in kinds:
            prefix = f"{ID_PREFIXES[kind]}{dictionary.layer}"
            first = all(end.prefix != prefix for end in ends)
            ends.append(End(kind, prefix, dictionary.layer, dictionary.n_features, first, dictionary.rank, dictionary))
    return ends
