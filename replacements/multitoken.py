"""Multitoken transcoders: encoder at the source position, attention in between, decoder at the destination.

*Progress on Attention*, "Multitoken Transcoders": an MTC reads the residual stream over a full context at the input of
a layer and predicts what attention (or the whole layer) puts out over the full context,

    u[s]    = (N(resid_pre.l)[s] - mean) / scale
    a_f[s]  = activation(E_f u[s] + b_f)                        "a token-by-token encoder on the source position"
    P_f     = sum_h alpha_fh A_lh + alpha_f,id I                "the head loading vector"
    y[p]    = b_dec + sum_f D_f sum_s P_f[p, s] a_f[s]          "a decoder on the destination position"
    loss    = sum over write sites of mean (y - y^)^2 / scale^2
            + sparsity sum_f |a_f| |alpha_f| |D_f|              L1; scale cannot hide in loading or decoder
            + negative sum_f relu(-(E_f u + b_f))               "a different L1 penalty on the negative pre-activations"

One module has them all: one head for each feature (`heads="one"`), decoders to later layers (MCTC: more write sites),
features of higher rank (`ranks`), an encoder that is trained as an SAE instead (`joint`). "For performance reasons we
only move the top-k features produced by the encoder on any given context, sorting by the summed activation across the
context": `context_k`.

Letters of shapes: C contexts, S positions, T real tokens, F features, r rank, R = F r rows, H heads, D widths, n active
entries.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from circuits.kernels.encode import Activation
from circuits.replacements.coder import Batch, target
from circuits.replacements.dictionary import Decoder, Dictionary
from circuits.replacements.movement import HeadLoading
from circuits.replacements.moving import by_query, decode_and_move
from circuits.replacements.multitoken_settings import MultiTokenLayout, MultiTokenSettings
from circuits.replacements.sites import Site
from circuits.replacements.sparse import Pattern, decode_at, encode_at
from circuits.replacements.sparsity import choose_above, choose_candidates, choose_topk, largest
from circuits.replacements.weights import HeldTensor


class MultiTokenTranscoder(nn.Module):
    """MTCs of several layers, trained side by side; see the head of this file.

    Parameters
    ----------
    layers
        (layer, its write sites), see `write_sites`.
    n_heads, d_model
        Of the base model.
    kind
        Begins the dictionaries' names: "mtc", "mctc".

    Example
    -------
    >>> mtc = MultiTokenTranscoder([(1, write_sites(1, 4, "attention", later=False, mlp=False))], 8, 16,
    ...                            MultiTokenSettings(n_features=64, k=4))
    >>> [(str(read), mtc.extra) for read in mtc.reads]
    [('resid_pre.1:full', ('pattern.1',))]
    """

    in_context = True
    in_mean: Tensor
    in_scale: Tensor
    out_scale: Tensor
    threshold: Tensor

    def __init__(
        self,
        layers: list[tuple[int, tuple[Site, ...]]],
        n_heads: int,
        d_model: int,
        settings: MultiTokenSettings,
        kind: str = "mtc",
    ) -> None:
        super().__init__()
        self.settings, self.kind, self.n_heads = settings, kind, n_heads
        blocks = settings.blocks()
        self.layouts = tuple(
            MultiTokenLayout(
                f"{kind}.{layer}" + (f".rank{rank}" if len(blocks) > 1 else ""), layer, rank, count, writes
            )
            for layer, writes in layers
            for rank, count in blocks
        )
        self.reads = tuple(dict.fromkeys(layout.read for layout in self.layouts))
        self.writes = tuple(dict.fromkeys(site for layout in self.layouts for site in layout.writes))
        self.extra = tuple(dict.fromkeys(f"pattern.{layout.layer}" for layout in self.layouts))
        random = torch.Generator().manual_seed(settings.seed)
        rows = [torch.randn(lay.n_features * lay.rank, d_model, generator=random) for lay in self.layouts]
        self.W_enc = nn.ParameterList(nn.Parameter(row / row.norm(dim=1, keepdim=True)) for row in rows)
        self.b_enc = nn.ParameterList(nn.Parameter(torch.zeros(len(row))) for row in rows)
        self.loading = nn.ParameterList(nn.Parameter(self._first_loading(lay, random)) for lay in self.layouts)
        self.W_dec = nn.ModuleList(
            nn.ParameterList(nn.Parameter(torch.zeros(len(row), d_model)) for _ in lay.writes)
            for row, lay in zip(rows, self.layouts, strict=True)
        )
        self.b_dec = nn.ParameterList(nn.Parameter(torch.zeros(d_model)) for _ in self.writes)
        if settings.activation == "group_soft":
            self.log_threshold = nn.ParameterList(nn.Parameter(torch.zeros(lay.n_features)) for lay in self.layouts)
        if settings.joint:
            self.W_sae = nn.ParameterList(nn.Parameter(0.5 * weights.detach().clone()) for weights in self.W_enc)
        self.register_buffer("in_mean", torch.zeros(len(self.reads), d_model))
        self.register_buffer("in_scale", torch.ones(len(self.reads)))
        self.register_buffer("out_scale", torch.ones(len(self.writes)))
        self.register_buffer("threshold", torch.full((len(self.layouts),), -1.0))
        for i, lay in enumerate(self.layouts):
            self.register_buffer(f"unfired_{i}", torch.zeros(lay.n_features, dtype=torch.int64))

    def _first_loading(self, layout: MultiTokenLayout, random: torch.Generator) -> Tensor:
        """Each feature begins at one head, with a little of all others."""
        loading = 0.1 * torch.randn(layout.n_features, self.n_heads + 1, generator=random)
        choices = self.n_heads + (1 if self.settings.identity else 0)
        chosen = torch.randint(choices, (layout.n_features,), generator=random)
        loading[torch.arange(layout.n_features), chosen] = 1.0
        if not self.settings.identity:
            loading[:, -1] = 0.0
        return loading

    # --- calibration ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self, batches: list[Batch]) -> None:
        """Set scales, output biases and first decoders from the first batches.

        Attention is linear in what it moves: y = b + sum_h (A_h u) M_h with the identity among the heads. The M_h are
        fitted by least squares to a layer's first write site, and a feature's first decoder there is half of what M of
        its strongest head makes of its encoder row. Decoders to later sites begin at zero.
        """
        scored = [_scored(batch) for batch in batches]
        for place, site in enumerate(self.writes):
            y = torch.cat([target(batch, site)[mask] for batch, mask in zip(batches, scored, strict=True)])
            self.out_scale[place] = (y - y.mean(0)).square().mean().sqrt().clamp(min=1e-8)
            self.b_dec[place].copy_(y.mean(0) / self.out_scale[place])
        for place, read in enumerate(self.reads):
            x = torch.cat([batch[str(read)][mask] for batch, mask in zip(batches, scored, strict=True)])
            self.in_mean[place] = x.mean(0)
            self.in_scale[place] = (x - x.mean(0)).square().mean().sqrt().clamp(min=1e-8)
        for i, layout in enumerate(self.layouts):
            maps = self._linear_maps(i, batches)
            strongest = self.loading[i].abs().argmax(1).repeat_interleave(layout.rank)
            for head, linear_map in enumerate(maps):
                mine = strongest == head
                self._decoders(i)[0][mine] = 0.5 * self.W_enc[i][mine] @ linear_map
            if self.settings.activation == "group_soft":
                u = self._input(batches[0], layout)[batches[0]["mask"]][:512]
                pre = self._sizes(u @ self.W_enc[i].T + self.b_enc[i], layout)
                cut = 1 - min(0.5, 3 * self.settings.k / self.settings.n_features)
                self.log_threshold[i].fill_(float(pre.quantile(cut, dim=0).mean().clamp(min=1e-3).log()))

    def _linear_maps(self, i: int, batches: list[Batch]) -> Tensor:
        """M (H + 1, D, D'), the identity last."""
        layout, place = self.layouts[i], self.writes.index(self.layouts[i].writes[0])
        d = self.in_mean.shape[1]
        wide = (self.n_heads + 1) * d
        gram, cross, count = torch.zeros(wide, wide), torch.zeros(wide, len(self.b_dec[place])), 0
        for batch in batches:
            u, mask = self._input(batch, layout), _scored(batch)
            moved = batch[f"pattern.{layout.layer}"] @ u.unsqueeze(1)
            x = torch.cat([moved.transpose(1, 2).flatten(2), u], dim=-1)[mask].cpu()
            t = (target(batch, layout.writes[0])[mask] / self.out_scale[place] - self.b_dec[place]).cpu()
            gram, cross, count = gram + x.T @ x, cross + x.T @ t, count + len(x)
        ridge = 1e-2 * count * torch.eye(wide)
        maps: Tensor = torch.linalg.solve(gram + ridge, cross).view(self.n_heads + 1, d, -1)
        return maps.to(self.in_mean.device)

    def begin_step(self, progress: float) -> None:
        """Nothing depends on how far the training is."""

    # --- loss -----------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The loss of one batch of contexts, and its figures: `nmse/<site>`, `l0/<name>`, `dead/<name>`, and
        `moved/<name>`, the mean number of features that a context moves; with `joint` `sae_nmse/<name>` too."""
        mask, scored = batch["mask"], _scored(batch)
        figures: dict[str, float] = {}
        outputs = [bias.expand(*mask.shape, -1) for bias in self.b_dec]
        loss = mask.new_zeros((), dtype=torch.float32)
        for i, layout in enumerate(self.layouts):
            u = self._input(batch, layout)[mask]
            entries, values, penalty = self._active(i, u)
            loss = loss + penalty
            if self.settings.joint:
                sae_loss, figures[f"sae_nmse/{layout.name}"] = self._as_sae(i, u, entries, values)
                loss, values = loss + sae_loss, values.detach()
            parts, figures[f"moved/{layout.name}"] = self._moved(i, batch, entries, values)
            for site, part in zip(layout.writes, parts, strict=True):
                place = self.writes.index(site)
                outputs[place] = outputs[place] + part
            at_scored = scored[mask][entries.rows]
            figures[f"l0/{layout.name}"] = float(at_scored.sum()) / max(1, int(scored.sum()))
            self._count(i, torch.bincount(entries.features, minlength=layout.n_features), len(u))
            figures[f"dead/{layout.name}"] = float(self._dead(i).float().mean())
        for place, site in enumerate(self.writes):
            t = target(batch, site)[scored].detach() / self.out_scale[place]
            error = t - outputs[place][scored]
            loss = loss + error.square().mean()
            spread = t.square().sum() - len(t) * t.mean(0).square().sum()
            figures[f"nmse/{site}"] = float(error.detach().square().sum() / spread)
        return loss, figures

    def _active(self, i: int, u: Tensor) -> tuple[Pattern, Tensor, Tensor]:
        """Active entries of tokens u (T, D), their values (n,) or (n, r), and the penalties."""
        layout, settings = self.layouts[i], self.settings
        W_enc, b_enc = self.W_enc[i], self.b_enc[i]
        with torch.no_grad():
            entries = self._choose(i, u)
        if layout.rank > 1:
            values = self._soft_vectors(i, u, entries)
            sizes = values.norm(dim=-1)
        else:
            values = encode_at(u, W_enc, b_enc, entries)
            if settings.activation == "group_soft":
                values = torch.relu(values - self.log_threshold[i].exp()[entries.features])
            sizes = values
        penalty = u.new_zeros(())
        if settings.sparsity:
            loading, decoders = self.effective_loading(i), torch.cat(tuple(self._decoders(i)), dim=1)
            weight = loading.norm(dim=1) * decoders.view(layout.n_features, -1).norm(dim=1)
            penalty = penalty + settings.sparsity * (sizes * weight[entries.features]).sum() / len(u)
        some = u[:: max(1, len(u) // settings.penalty_tokens)]
        if settings.negative and layout.rank == 1:
            pre = torch.addmm(b_enc, some, W_enc.T)
            penalty = penalty + settings.negative * torch.relu(-pre).sum() / len(some)
        elif settings.negative:
            threshold = self.log_threshold[i].exp().detach()
            short = threshold - self._sizes(torch.addmm(b_enc, some, W_enc.T), layout)
            penalty = penalty + settings.negative * torch.relu(short).sum() / len(some)
        dead = self._dead(i).nonzero().squeeze(1)
        if settings.lift and len(dead) and settings.activation in ("topk", "batch_topk"):
            pre = torch.addmm(b_enc[dead], some, W_enc[dead].T)
            penalty = penalty + settings.lift * torch.relu(self.threshold[i].clamp(min=0) - pre).sum() / len(some)
        return entries, values, penalty

    def _choose(self, i: int, u: Tensor) -> Pattern:
        """The active entries of tokens u; keeps the running threshold of `topk` and `batch_topk`."""
        layout, settings, (W_enc, b_enc) = self.layouts[i], self.settings, (self.W_enc[i], self.b_enc[i])
        F, k = layout.n_features, settings.k
        if settings.activation == "group_soft":
            sizes = self._sizes(torch.addmm(b_enc, u, W_enc.T), layout) if layout.rank > 1 else u @ W_enc.T + b_enc
            rows, features = (sizes > self.log_threshold[i].exp()).nonzero(as_tuple=True)
            return Pattern.build(rows, features, len(u), F)
        if settings.activation == "relu":
            return Pattern.build(*choose_above(u, W_enc, b_enc, torch.zeros_like(b_enc)), len(u), F)
        rows, features = (choose_topk if settings.activation == "topk" else choose_candidates)(u, W_enc, b_enc, k)
        candidates = Pattern.build(rows, features, len(u), F)
        chosen, smallest = largest(encode_at(u, W_enc, b_enc, candidates), k * len(u))
        if self.training:
            old = self.threshold[i]
            self.threshold[i] = torch.where(old < 0, smallest, 0.99 * old + 0.01 * smallest)
        return Pattern.build(rows[chosen], features[chosen], len(u), F)

    def _soft_vectors(self, i: int, u: Tensor, entries: Pattern) -> Tensor:
        """(n, r): `pre relu(1 - theta / |pre|)`, the group soft threshold."""
        layout = self.layouts[i]
        wide = self._row_entries(layout, entries, len(u))
        pre = encode_at(u, self.W_enc[i], self.b_enc[i], wide).view(-1, layout.rank)
        threshold = self.log_threshold[i].exp()[entries.features].unsqueeze(1)
        return pre * torch.relu(1 - threshold / pre.norm(dim=1, keepdim=True).clamp(min=1e-12))

    def _row_entries(self, layout: MultiTokenLayout, entries: Pattern, n_tokens: int) -> Pattern:
        """The entries with every row of their features, r times as many."""
        rows = entries.features.unsqueeze(1) * layout.rank + torch.arange(layout.rank, device=entries.features.device)
        tokens = entries.rows.repeat_interleave(layout.rank)
        return Pattern.build(tokens, rows.flatten(), n_tokens, layout.n_features * layout.rank)

    def _as_sae(self, i: int, u: Tensor, entries: Pattern, values: Tensor) -> tuple[Tensor, float]:
        """The SAE's loss on u and its normalized MSE."""
        error = u - decode_at(values, self.W_sae[i], entries)
        spread = u.square().sum() - len(u) * u.mean(0).square().sum()
        return error.square().mean(), float(error.detach().square().sum() / spread)

    def _moved(self, i: int, batch: Batch, entries: Pattern, values: Tensor) -> tuple[list[Tensor], float]:
        """What dictionary i writes to each of its sites, (C, S, D') each; and the mean number of features moved."""
        layout, mask = self.layouts[i], batch["mask"]
        context, _ = mask.nonzero(as_tuple=True)
        kept, moved = self._kept(layout, context[entries.rows], entries.features, values)
        loading = functional.embedding(entries.features, self.effective_loading(i)) * kept.unsqueeze(1)
        weights = values.unsqueeze(-1) * (loading if layout.rank == 1 else loading.unsqueeze(1))
        places = mask.flatten().nonzero().squeeze(1)[entries.rows]
        placed = Pattern.build(places, entries.features, mask.numel(), layout.n_features)
        if layout.rank > 1:
            placed = self._row_entries(layout, placed, mask.numel())
        moves = by_query(batch[f"pattern.{layout.layer}"])
        outputs = [decode_and_move(weights.flatten(0, -2), W_dec, placed, moves) for W_dec in self._decoders(i)]
        return outputs, float(moved) / len(mask)

    def _kept(self, layout: MultiTokenLayout, context: Tensor, features: Tensor, values: Tensor) -> tuple[Tensor, int]:
        """(n,): one for entries of features that move in their context, else zero; and how many move in all."""
        sizes = values.detach() if values.ndim == 1 else values.detach().norm(dim=1)
        n_contexts = int(context.max()) + 1 if len(context) else 0
        total = sizes.new_zeros(n_contexts, layout.n_features)
        total.view(-1).index_add_(0, context * layout.n_features + features, sizes)
        count = min(self.settings.context_k, layout.n_features)
        moves = torch.zeros_like(total).scatter_(1, total.topk(count, dim=1).indices, 1.0)
        return moves[context, features], int(((total > 0) & (moves > 0)).sum())

    def effective_loading(self, i: int) -> Tensor:
        """(F, H + 1): what the features move by; one entry a feature with `heads="one"`.

        Every entry then gets the gradient that it would have if it were chosen, so that a head that would do better
        grows until it is.
        """
        loading: Tensor = self.loading[i]
        if not self.settings.identity:
            loading = torch.cat([loading[:, :-1], torch.zeros_like(loading[:, -1:])], dim=1)
        if self.settings.heads == "all":
            return loading
        chosen = loading.abs().argmax(1, keepdim=True)
        return loading - (loading * torch.ones_like(loading).scatter(1, chosen, 0.0)).detach()

    # --- bookkeeping ----------------------------------------------------------------------------------------------

    def _sizes(self, pre: Tensor, layout: MultiTokenLayout) -> Tensor:
        """(T, F): length of each feature's pre-activation, from (T, R)."""
        return pre.view(len(pre), layout.n_features, layout.rank).norm(dim=-1) if layout.rank > 1 else pre

    def _decoders(self, i: int) -> list[nn.Parameter]:
        decoders = self.W_dec[i]
        assert isinstance(decoders, nn.ParameterList)
        return list(decoders)

    def _unfired(self, i: int) -> Tensor:
        unfired: Tensor = getattr(self, f"unfired_{i}")
        return unfired

    def _count(self, i: int, fired: Tensor, tokens: int) -> None:
        if self.training:
            unfired = self._unfired(i)
            unfired.copy_(torch.where(fired > 0, 0, unfired + tokens))

    def _dead(self, i: int) -> Tensor:
        return self._unfired(i) > self.settings.dead_after

    def _input(self, batch: Batch, layout: MultiTokenLayout) -> Tensor:
        place = self.reads.index(layout.read)
        return (batch[str(layout.read)].detach() - self.in_mean[place]) / self.in_scale[place]

    # --- result ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def to_dictionaries(self) -> tuple[Dictionary, ...]:
        """The dictionaries as they act on raw activations: means and scales folded into weights and biases."""
        owners = {site: i for i in reversed(range(len(self.layouts))) for site in self.layouts[i].writes}
        return tuple(self._folded(i, owners) for i in range(len(self.layouts)))

    def _folded(self, i: int, owners: dict[Site, int]) -> Dictionary:
        layout, kind = self.layouts[i], self.settings.activation
        place = self.reads.index(layout.read)
        W_enc = (self.W_enc[i] / self.in_scale[place]).detach().clone()
        scales = {site: self.out_scale[self.writes.index(site)] for site in layout.writes}
        decoders = {
            site: Decoder(HeldTensor(f"W_dec.{site}", (W_dec * scales[site]).detach().clone()))
            for site, W_dec in zip(layout.writes, self._decoders(i), strict=True)
        }
        biases = {
            site: (self.b_dec[self.writes.index(site)] * scale).detach().clone()
            for site, scale in scales.items()
            if owners[site] == i
        }
        threshold = None
        if kind == "batch_topk":
            threshold = self.threshold[i].clamp(min=0.0).detach().clone().reshape(1)
        elif kind == "group_soft":
            threshold = self.log_threshold[i].exp().detach().clone()
        return Dictionary(
            name=layout.name,
            kind=self.kind,
            read=layout.read,
            writes=layout.writes,
            activation=Activation(kind, self.settings.k if "topk" in kind else None),
            W_enc=W_enc,
            b_enc=(self.b_enc[i] - W_enc @ self.in_mean[place]).detach().clone(),
            decoders=decoders,
            output_biases=biases,
            threshold=threshold,
            moved_by=HeadLoading(self.effective_loading(i).detach().clone(), self.settings.context_k),
            rank=layout.rank,
        )


def _scored(batch: Batch) -> Tensor:
    """(C, S): real tokens but the first, whose features and errors are no nodes."""
    scored = batch["mask"].clone()
    scored[:, 0] = False
    return scored
