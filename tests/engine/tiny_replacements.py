"""Random dictionaries of every kind that writes to the stream, in memory: what the tiny models are given.

`moved` of a case names them, as `mtc.1` for one of layer 1; `MOVED_KINDS` says what each name is.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from circuits.kernels.encode import Activation, ActivationKind
from circuits.replacements import Decoder, Dictionary, ReadSite, Site
from circuits.replacements.movement import HeadLoading, Movement, OwnAttention
from circuits.replacements.sites import Norm
from circuits.replacements.weights import HeldTensor


@dataclass(frozen=True)
class Sizes:
    """Of the model that the dictionaries are for."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv: int
    d_head: int

    def width(self, site: Site) -> int:
        """What a site holds."""
        heads = {"z": self.n_heads, "v": self.n_kv}
        return heads[site.name] * self.d_head if site.name in heads else self.d_model


@dataclass(frozen=True)
class Maker:
    """Draws dictionaries for a case: its activation, and the norm that its MLP dictionaries read through."""

    sizes: Sizes
    generator: torch.Generator
    activation: ActivationKind
    norm: Norm = "full"
    n_features: int = 12

    def mlp(self, layer: int, kind: str) -> Dictionary:
        """A CLT layer, a transcoder, one with a skip connection, or type 1 of the weakly causal set."""
        last = self.sizes.n_layers if kind in ("clt", "type1") else layer + 1
        writes = [Site("mlp_out", later) for later in range(layer, last)]
        if kind == "type1":
            writes += [Site("attn_out", later) for later in range(layer + 1, last)]
        d = self.sizes.d_model
        skip = self._draw(d, d, scale=0.3) if kind == "skip" else None
        name = "transcoder" if kind == "skip" else kind
        made = self._dictionary(f"{name}.{layer}", ReadSite(Site("resid_mid", layer), self.norm), writes)
        return replace(made, skip=skip)

    def attention(self, layer: int, site: str) -> Dictionary:
        """An attention output SAE."""
        place = Site(site, layer)
        return self._dictionary(f"attention-sae.{layer}", ReadSite(place, "none"), [place])

    def of(self, name: str) -> Dictionary:
        """One of `MOVED_KINDS` by name and layer, such as `mtc.1`."""
        kind, layer = name.split(".")
        return MOVED_KINDS[kind](self, int(layer))

    def type_2(self, layer: int, *, mlp: bool = False) -> Dictionary:
        """Type 2 of the weakly causal set: reads an attention output, rebuilds it and all later ones."""
        writes = self._later("attn_out", layer) + (self._later("mlp_out", layer) if mlp else [])
        return self._dictionary(f"type2.{layer}", ReadSite(Site("attn_out", layer), "none"), writes)

    def multitoken(
        self,
        layer: int,
        *,
        target: str = "attn_out",
        cross: bool = False,
        mlp: bool = False,
        context_k: int | None = None,
        single_head: bool = False,
        rank: int = 1,
    ) -> Dictionary:
        """An MTC, its variants, or an MCTC (`cross`)."""
        writes = self._later(target, layer) if cross else [Site(target, layer)]
        writes += self._later("mlp_out", layer) if mlp else []
        loading = self._draw(self.n_features, self.sizes.n_heads + 1, scale=0.5)
        if single_head:
            best = loading.abs().argmax(1, keepdim=True)
            loading = torch.zeros_like(loading).scatter(1, best, loading.gather(1, best))
        read = ReadSite(Site("resid_pre", layer), "full")
        moved_by = HeadLoading(loading, context_k)
        return self._dictionary(f"mtc.{layer}", read, writes, rank=rank, moved_by=moved_by)

    def value(self, layer: int) -> Dictionary:
        """An attention value SAE of one layer."""
        place = Site("v", layer)
        return self._dictionary(f"value-sae.{layer}", ReadSite(place, "none"), [place])

    def own(self, layer: int, *, kind: ActivationKind = "topk", rank: int = 1, rotary: bool = False) -> Dictionary:
        """An attention replacement layer of three patterns; `topk` and rank 1 is Lorsa."""
        groups, width, d = 3, 4, self.sizes.d_model
        movement = OwnAttention(
            W_q=self._draw(groups, width, d, scale=0.4),
            b_q=self._draw(groups, width, scale=0.3),
            W_k=self._draw(groups, width, d, scale=0.4),
            b_k=self._draw(groups, width, scale=0.3),
            group=torch.randint(groups, (self.n_features,), generator=self.generator),
            scale=0.6,
            rotary_theta=100.0 if rotary else None,
        )
        read, writes = ReadSite(Site("resid_pre", layer), "full"), [Site("attn_out", layer)]
        made = self._dictionary(f"own.{layer}", read, writes, kind=kind, rank=rank, moved_by=movement)
        return replace(made, kind="lorsa" if kind == "topk" else "attention-layer")

    def published(self, layer: int) -> Dictionary:
        """A Lorsa as OpenMOSS has them: behind the norm without its gain, with QK-norms and speeds of its own."""
        made = self.own(layer)
        assert isinstance(made.moved_by, OwnAttention)
        q_gain, k_gain = (1 + self._draw(3, 4, scale=0.4) for _ in range(2))
        speeds = torch.tensor([0.7, 0.0])
        moved_by = replace(made.moved_by, rotary_speeds=speeds, q_gain=q_gain, k_gain=k_gain, norm_eps=0.05)
        return replace(made, read=ReadSite(Site("resid_pre", layer), "scale"), moved_by=moved_by)

    def _later(self, site: str, layer: int) -> list[Site]:
        return [Site(site, later) for later in range(layer, self.sizes.n_layers)]

    def second_block(self, layer: int) -> Dictionary:
        """A second MTC of a layer, of rank 2, whose features have other numbers than those of the first block.

        A node of these tests is known by kind, layer, position and feature, so the first twelve never fire.
        """
        made = self.multitoken(layer, rank=2)
        dead, rank = self.n_features, made.rank
        assert made.threshold is not None
        assert isinstance(made.moved_by, HeadLoading)
        loading = torch.cat([torch.ones_like(made.moved_by.weights), made.moved_by.weights])
        rows = {site: decoder.rows.rows(torch.arange(dead * rank)) for site, decoder in made.decoders.items()}
        return replace(
            made,
            name=f"mtc-second.{layer}",
            threshold=torch.cat([torch.full((dead,), 1e6), made.threshold]),
            W_enc=torch.cat([made.W_enc, made.W_enc]),
            b_enc=torch.cat([made.b_enc, made.b_enc]),
            moved_by=HeadLoading(loading, made.moved_by.context_k),
            decoders={site: Decoder(HeldTensor(f"two>{site}", torch.cat([r, r]))) for site, r in rows.items()},
        )

    def _dictionary(
        self,
        name: str,
        read: ReadSite,
        writes: list[Site],
        *,
        kind: ActivationKind | None = None,
        rank: int = 1,
        moved_by: Movement | None = None,
    ) -> Dictionary:
        width, n = self.sizes.width(read.site), self.n_features
        kind = "group_soft" if rank > 1 else kind or self.activation
        threshold = None
        if kind in ("jump_relu", "batch_topk", "group_soft"):
            threshold = 0.2 + 0.2 * torch.rand(n, generator=self.generator)
            threshold += 0.6 * (rank - 1) if rank > 1 else 0.0
        return Dictionary(
            name=name,
            kind=name.split(".")[0],
            read=read,
            writes=tuple(writes),
            activation=Activation(kind, k=5 if "topk" in kind else None),
            W_enc=self._draw(n * rank, width, scale=width**-0.5),
            b_enc=self._draw(n * rank, scale=0.3),
            decoders={
                site: Decoder(HeldTensor(f"{name}>{site}", self._draw(n * rank, self.sizes.width(site), scale=0.4)))
                for site in writes
            },
            output_biases={site: self._draw(self.sizes.width(site), scale=0.3) for site in writes},
            threshold=threshold,
            moved_by=moved_by,
            rank=rank,
        )

    def _draw(self, *shape: int, scale: float) -> Tensor:
        return scale * torch.randn(*shape, generator=self.generator)


MOVED_KINDS: dict[str, Callable[[Maker, int], Dictionary]] = {
    "type2": Maker.type_2,
    "type2-mlp": lambda maker, layer: maker.type_2(layer, mlp=True),
    "mtc": Maker.multitoken,
    "mtc-top4": lambda maker, layer: maker.multitoken(layer, context_k=4),
    "mtc-single": lambda maker, layer: maker.multitoken(layer, single_head=True),
    "mtc-rank2": lambda maker, layer: maker.multitoken(layer, rank=2),
    "mtc-rank3-top4": lambda maker, layer: maker.multitoken(layer, rank=3, context_k=4),
    "mtc-second": Maker.second_block,
    "mctc": lambda maker, layer: maker.multitoken(layer, cross=True),
    "mctc-mlp": lambda maker, layer: maker.multitoken(layer, cross=True, mlp=True),
    "residual": lambda maker, layer: maker.multitoken(layer, target="resid_post"),
    "residual-rank2": lambda maker, layer: maker.multitoken(layer, target="resid_post", rank=2),
    "value": Maker.value,
    "lorsa": Maker.own,
    "lorsa-published": Maker.published,
    "lorsa-rotary": lambda maker, layer: maker.own(layer, rotary=True),
    "own": lambda maker, layer: maker.own(layer, kind="identity", rotary=True),
    "own-rank2": lambda maker, layer: maker.own(layer, rank=2),
}
