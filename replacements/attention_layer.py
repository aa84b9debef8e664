"""Attention replacement layers: many simple heads with queries and keys of their own; Lorsa is a case of them.

*Progress on Attention*, "Attention Replacement Layer": "form a wide (many-head) attention layer and train it to mimic
the behavior of an attention layer in the base model [...] regularized to be simple, in the sense of the QK and OV
circuits being low-rank. In some variants we also regularized to make the attention pattern sparse. With this approach,
an attention feature is a single head in the replacement layer." On normalised activations u = (x - mean) / scale,
t = y / scale_y with x = N(resid_pre.l) and y = attn_out.l:

    A_g[p, s] = softmax over s <= p of E^-1/2 R_p(W_q,g u_p + b_q,g) . R_s(W_k,g u_s + b_k,g)       R: rotary, if any
    z_f[p]    = sum_s A_g(f)[p, s] (W_enc,f u_s + b_enc,f)                                          (r,)
    t^[p]     = b_dec + sum_f act(z_f[p]) . W_dec,f
    loss      = mean (t - t^)^2 + penalty sum_f [L_nuc(W_QK,g(f)) L_nuc(W_OV,f)]^beta
                                + pattern_sparsity mean_p sum_f |act(z_f[p]) W_dec,f| (1 - sum_s A_g(f)[p, s]^2) / |t|

The plain layer has `act` the identity, and each head has a QK of its own. Lorsa (He et al. 2025, *Towards Understanding
the Nature of Attention with Low-Rank Sparse Decomposition*) has rank-1 OV, one QK for a group of heads, and a TopK over
the heads at each destination.

Letters of shapes: C contexts of S positions, N scored positions of a batch, G patterns, E rank of QK, F features
(heads), r rank of their OV, D width of the model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from circuits.kernels.encode import Activation
from circuits.replacements.attention_layer_heads import AttentionLayerSettings, OwnHeads
from circuits.replacements.attention_layer_penalty import pattern_spread, simplicity, written_norms
from circuits.replacements.attention_layer_start import CAPTURES, begin_as_base, turned_back
from circuits.replacements.dictionary import Decoder, Dictionary
from circuits.replacements.errors import ReplacementError
from circuits.replacements.movement import OwnAttention
from circuits.replacements.sites import ReadSite, Site
from circuits.replacements.sparsity import largest
from circuits.replacements.weights import HeldTensor

Batch = dict[str, Tensor]
RAMP = 0.5  # share of the training over which the penalties rise from zero to their weights
FIRES = 0.01  # an identity head is active where it writes more than this share of the outputs' root mean square norm


class AttentionReplacementLayer(nn.Module):
    """Attention replacement layers (or Lorsas) of one or several layers, trained side by side.

    Parameters
    ----------
    layers
        Which layers of the base model get one.
    d_model
        D.

    Example
    -------
    >>> lorsa = AttentionReplacementLayer([1], 16, AttentionLayerSettings.lorsa(64, groups=8, k=4, qk_rank=4))
    >>> [str(read) for read in lorsa.reads], [str(site) for site in lorsa.writes], lorsa.names
    (['resid_pre.1:full'], ['attn_out.1'], ('lorsa.1',))
    """

    in_context = True
    in_mean: Tensor
    in_scale: Tensor
    out_scale: Tensor
    out_norm: Tensor
    unfired: Tensor
    threshold: Tensor
    progress: Tensor

    def __init__(self, layers: Sequence[int], d_model: int, settings: AttentionLayerSettings) -> None:
        super().__init__()
        self.settings, self.d_model, n = settings, d_model, len(layers)
        self.reads = tuple(ReadSite(Site("resid_pre", layer), "full") for layer in layers)
        self.writes = tuple(Site("attn_out", layer) for layer in layers)
        captures = CAPTURES if settings.start == "base" else ()
        self.extra = tuple(f"{name}.{layer}" for layer in layers for name in captures)
        self.names = tuple(f"{settings.kind}.{layer}" for layer in layers)
        random = torch.Generator().manual_seed(settings.seed)
        self.heads = nn.ModuleList(OwnHeads(d_model, settings, random) for _ in layers)
        self.register_buffer("in_mean", torch.zeros(n, d_model))
        self.register_buffer("in_scale", torch.ones(n))
        self.register_buffer("out_scale", torch.ones(n))
        self.register_buffer("out_norm", torch.ones(n))
        self.register_buffer("unfired", torch.zeros(n, settings.n_heads, dtype=torch.int64))
        self.register_buffer("threshold", torch.full((n,), -1.0))
        self.register_buffer("progress", torch.zeros(()))

    @torch.no_grad()
    def calibrate(self, batches: list[Batch]) -> None:
        """Set scales, output biases and first decoders from the first batches.

        With start `base` the heads are set from the base layer's. Otherwise a decoder row begins as the regression of t
        on its own z. Then all decoders are multiplied by the one number that makes their sum fit best.
        """
        for i, (read, site) in enumerate(zip(self.reads, self.writes, strict=True)):
            x = torch.cat([self._held(batch, str(read))[scored(batch)] for batch in batches])
            y = torch.cat([self._held(batch, str(site))[scored(batch)] for batch in batches])
            self.in_mean[i] = x.mean(0)
            self.in_scale[i] = (x - x.mean(0)).square().mean().sqrt().clamp(min=1e-8)
            self.out_scale[i] = (y - y.mean(0)).square().mean().sqrt().clamp(min=1e-8)
            t, heads = y / self.out_scale[i], self._heads(i)
            self.out_norm[i] = (t - t.mean(0)).square().sum(1).mean().sqrt()
            heads.b_dec.copy_(t.mean(0))
            if self.settings.start == "base":
                self._begin_as_base(i, batches, t)
            inputs = [(self._input(batch, i), scored(batch)) for batch in batches]
            z = torch.cat([heads.moved(u, heads.patterns(u))[rows] for u, rows in inputs])
            if self.settings.activation != "identity":  # gates open at what is above the mean
                heads.b_enc.sub_(z.mean(0))
                z = z - z.mean(0)
            if self.settings.start == "random":
                centred = z - z.mean(0)
                heads.W_dec.copy_(centred.T @ t / centred.square().sum(0).clamp(min=1e-8).unsqueeze(1))
            fit = self._activate(z, i)[0] @ heads.W_dec
            mean, t = fit.mean(0), t - t.mean(0)
            factor = ((fit - mean) * t).sum() / (fit - mean).square().sum().clamp(min=1e-8)
            heads.W_dec.mul_(factor)
            heads.b_dec.sub_(mean * factor)

    def _begin_as_base(self, i: int, batches: list[Batch], t: Tensor) -> None:
        held: dict[str, Tensor] = {}
        for name in CAPTURES:
            key = f"{name}.{self.writes[i].layer}"
            if any(key not in batch for batch in batches):
                raise ReplacementError(
                    f"start 'base' needs {key!r} in the batches; capture what the module has in `extra`"
                )
            theta = self.settings.rotary_theta if name in "qk" else None
            parts = [turned_back(batch[key], self.settings.qk_rank, theta)[scored(batch)] for batch in batches]
            held[name] = torch.cat(parts)
        u = torch.cat([self._input(batch, i)[scored(batch)] for batch in batches])
        random = torch.Generator().manual_seed(self.settings.seed + 1)
        begin_as_base(self._heads(i), u, t, held, random)

    def begin_step(self, progress: float) -> None:
        """Tell how far the training is, 0 to 1; the penalties rise linearly over its first half."""
        self.progress.fill_(progress)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The loss of one batch, and the figures of that batch.

        Figures: `nmse/<site>` `sum |y - y^|^2 / sum |y - mean y|^2` over scored positions, `l0/<dictionary>` active
        heads a destination, `dead/<dictionary>` share of heads that are dead, `penalty/<dictionary>` the sum over heads
        of `[L_nuc(W_QK) L_nuc(W_OV)]^beta` without its weight, `spread/<dictionary>` the same of pattern sparsity.
        """
        figures: dict[str, float] = {}
        rows = scored(batch)
        total = torch.zeros((), device=rows.device)
        for i, site in enumerate(self.writes):
            t = self._held(batch, str(site))[rows] / self.out_scale[i]
            total = total + self._layer_loss(i, self._input(batch, i), rows, t, figures)
        return total, figures

    def _layer_loss(self, i: int, u: Tensor, rows: Tensor, t: Tensor, figures: dict[str, float]) -> Tensor:
        """The loss of one layer: u (C, S, D), rows (C, S) the scored positions, t (N, D)."""
        settings, heads, name = self.settings, self._heads(i), self.names[i]
        patterns = heads.patterns(u)
        z = heads.moved(u, patterns)[rows]
        a, smallest = self._activate(z, i)
        error = t - torch.addmm(heads.b_dec, a, heads.W_dec)
        loss, ramp = error.square().mean(), min(1.0, float(self.progress) / RAMP)
        simple = simplicity(*heads.norms(), settings.beta)
        loss = loss + settings.penalty * ramp * simple
        with torch.no_grad():
            share = written_norms(a, heads.W_dec, settings.ov_rank) / self.out_norm[i]
            fired = ((share > FIRES) if settings.activation == "identity" else a != 0).sum(0)
            if self.training:
                self.unfired[i] = torch.where(fired > 0, 0, self.unfired[i] + len(t))
                if smallest is not None:
                    old = self.threshold[i]
                    self.threshold[i] = torch.where(old < 0, smallest, 0.99 * old + 0.01 * smallest)
            spread_of = (t - t.mean(0)).square().sum()
        if settings.pattern_sparsity > 0:
            share = share.view(len(t), settings.n_patterns, -1).sum(2)
            spread = (pattern_spread(patterns).transpose(1, 2)[rows] * share).sum() / len(t)
            loss = loss + settings.pattern_sparsity * ramp * spread
            figures[f"spread/{name}"] = float(spread.detach())
        figures[f"nmse/{self.writes[i]}"] = float(error.detach().square().sum() / spread_of)
        figures[f"l0/{name}"] = float(fired.sum()) / len(t)
        figures[f"dead/{name}"] = float(self._dead(i).float().mean())
        figures[f"penalty/{name}"] = float(simple.detach())
        return loss + self._auxiliary(i, z, error.detach())

    def _activate(self, z: Tensor, i: int) -> tuple[Tensor, Tensor | None]:
        """Activations of z (N, F * r), and with `batch_topk` the smallest one that was let through."""
        if self.settings.activation == "identity":
            return z, None
        with torch.no_grad():
            if self.settings.activation == "topk":
                active, smallest = _topk(z, self.settings.k), None
            else:
                chosen, smallest = largest(z.flatten(), self.settings.k * len(z))
                active = chosen.view_as(z)
        return z * active, smallest

    def _auxiliary(self, i: int, z: Tensor, error: Tensor) -> Tensor:
        """AuxK: the strongest dead heads rebuild the error that is left."""
        dead = self._dead(i).nonzero().squeeze(1)
        if self.settings.activation == "identity" or self.settings.aux_weight == 0 or not len(dead):
            return error.new_zeros(())
        some = z[:, dead]
        part = (some * _topk(some, self.settings.aux_k)) @ self._heads(i).W_dec[dead]
        share = (error - part).square().sum() / error.square().sum().clamp(min=1e-12)
        return self.settings.aux_weight * share

    @torch.no_grad()
    def predict(self, x: Tensor, i: int = 0) -> Tensor:
        """(C, S, D) raw outputs from raw inputs x (C, S, D) of layer number `i`; `batch_topk` uses its threshold."""
        u, heads = (x - self.in_mean[i]) / self.in_scale[i], self._heads(i)
        z = heads.moved(u, heads.patterns(u))
        if self.settings.activation == "batch_topk":
            a = z * (z > self.threshold[i].clamp(min=0.0))
        else:
            a = self._activate(z.flatten(0, 1), i)[0].view_as(z)
        return (a @ heads.W_dec + heads.b_dec) * self.out_scale[i]

    def _heads(self, i: int) -> OwnHeads:
        heads = self.heads[i]
        assert isinstance(heads, OwnHeads)
        return heads

    def _dead(self, i: int) -> Tensor:
        return self.unfired[i] > self.settings.dead_after

    def _held(self, batch: Batch, key: str) -> Tensor:
        if "mask" not in batch or key not in batch or batch[key].shape != (*batch["mask"].shape, self.d_model):
            shapes = {name: tuple(tensor.shape) for name, tensor in batch.items() if name in (key, "mask")}
            raise ReplacementError(
                f"the batch should hold {key!r} of shape (contexts, positions, {self.d_model}) and 'mask' of shape "
                f"(contexts, positions), but has {shapes or 'neither'}; give batches of a ContextStream"
            )
        return batch[key].detach()

    def _input(self, batch: Batch, i: int) -> Tensor:
        """(C, S, D) normalised input, zero at padding."""
        u = (self._held(batch, str(self.reads[i])) - self.in_mean[i]) / self.in_scale[i]
        return u.masked_fill(~batch["mask"].unsqueeze(-1), 0.0)

    @torch.no_grad()
    def to_dictionaries(self) -> tuple[Dictionary, ...]:
        """The layers as they act on raw activations: means and scales folded into weights and biases."""
        return tuple(self._folded(i) for i in range(len(self.names)))

    def _folded(self, i: int) -> Dictionary:
        settings, heads, site = self.settings, self._heads(i), self.writes[i]
        mean, scale, out_scale = self.in_mean[i], self.in_scale[i], self.out_scale[i]
        (W_q, b_q), (W_k, b_k), (W_enc, b_enc) = (
            ((W / scale).detach().clone(), (b - W @ mean / scale).detach().clone())
            for W, b in ((heads.W_q, heads.b_q), (heads.W_k, heads.b_k), (heads.W_enc, heads.b_enc))
        )
        group = torch.arange(settings.n_heads, device=W_enc.device) // (settings.n_heads // settings.n_patterns)
        batch_topk = settings.activation == "batch_topk"
        return Dictionary(
            name=self.names[i],
            kind=settings.kind,
            read=self.reads[i],
            writes=(site,),
            activation=Activation(settings.activation, None if settings.activation == "identity" else settings.k),  # type: ignore[arg-type]
            W_enc=W_enc,
            b_enc=b_enc,
            decoders={site: Decoder(HeldTensor(f"W_dec.{site}", (heads.W_dec * out_scale).detach().clone()))},
            output_biases={site: (heads.b_dec * out_scale).detach().clone()},
            threshold=self.threshold[i].clamp(min=0.0).detach().clone().reshape(1) if batch_topk else None,
            rank=settings.ov_rank,
            moved_by=OwnAttention(W_q, b_q, W_k, b_k, group, heads.scale, settings.rotary_theta),
        )


def scored(batch: Batch) -> Tensor:
    """(C, S) the positions that count: real tokens but the first of each context."""
    rows = batch["mask"].clone()
    rows[:, 0] = False
    return rows


def _topk(z: Tensor, k: int) -> Tensor:
    """(N, F) whether an entry is among the k largest of its row and positive."""
    chosen = z.topk(min(k, z.shape[1]), dim=1, sorted=False).indices
    return torch.zeros_like(z, dtype=torch.bool).scatter_(1, chosen, True) & (z > 0)
