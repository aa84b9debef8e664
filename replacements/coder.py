"""The parameters and the loss that CLT and attention output SAEs share.

A coder is a row of dictionaries that are trained together: each reads one site, and writes to one or several.
Everything is learned on normalised activations,

    u   = (x - mean) / scale                      per read site, estimated from the first batches
    pre = W_enc u + b_enc                         W_enc (F, D)
    t_s = y_s / scale_s                           per write site; scale_s: root mean square of y_s - mean
    t^_s = b_dec_s + sum over dictionaries that write to s, sum_f a_f W_dec_f,s
    loss = sum_s mean (t_s - t^_s)^2 + what keeps features sparse and alive

so that a site counts by its normalized MSE, and one learning rate suits every model. `to_dictionaries` folds means
and scales into the weights; pre-activations, and so thresholds, are the same before and after.

Letters of shapes: B tokens of a batch, F features, D width of the read site, E width of the write sites.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from circuits.kernels.encode import Activation
from circuits.replacements.dictionary import Decoder, Dictionary
from circuits.replacements.errors import ReplacementError
from circuits.replacements.sites import ReadSite, Site
from circuits.replacements.sparse import Pattern, decode_at, encode_at
from circuits.replacements.sparsity import (
    choose_above,
    choose_candidates,
    choose_topk,
    jump_relu,
    largest,
    pre_activation_penalty,
    tanh_penalty,
)
from circuits.replacements.weights import HeldTensor

Batch = dict[str, Tensor]
ACTIVATIONS = ("topk", "batch_topk", "jump_relu")


@dataclass(frozen=True)
class Layout:
    """One dictionary of a coder before it has weights."""

    name: str
    kind: str
    read: ReadSite
    writes: tuple[Site, ...]


@dataclass(frozen=True)
class JumpSettings:
    """For `jump_relu`: the recipe of Ameisen et al. 2025, *Circuit Tracing*.

    sparsity, steepness
        Weight of the tanh penalty, raised linearly from zero over the whole training, and its c.
    pre_activation
        Weight of the penalty on dead features' pre-activations.
    bandwidth
        Of the straight-through gradient, in units of normalised pre-activations.
    initial_l0
        Thresholds begin where this many features are active on an average token.
    """

    sparsity: float = 2e-3
    steepness: float = 4.0
    pre_activation: float = 3e-5
    bandwidth: float = 0.5
    initial_l0: int = 60


@dataclass(frozen=True)
class CoderSettings:
    """How a coder is built and kept alive.

    n_features
        F of each dictionary.
    activation, k
        `batch_topk` (k a token on average), `topk` (exactly k at most), or `jump_relu` (then k is unused).
    dead_after
        A feature that has not fired in this many tokens is dead.
    aux_k, aux_weight, aux_tokens
        Remedies for dead features look at `aux_tokens` tokens of each batch. With `topk` and `batch_topk` the `aux_k`
        strongest dead features rebuild what the live ones left over, with this weight in the loss (AuxK, Gao et al.
        2024).
    seed
        Of the initial weights.
    """

    n_features: int
    activation: str = "batch_topk"
    k: int = 20
    dead_after: int = 250_000
    aux_k: int = 64
    aux_weight: float = 1 / 32
    aux_tokens: int = 512
    jump: JumpSettings = field(default_factory=JumpSettings)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ReplacementError(f"cannot train activation {self.activation!r}; choose {', '.join(ACTIVATIONS)}")
        if not 0 < self.k <= self.n_features:
            raise ReplacementError(f"k is {self.k} with {self.n_features} features; choose 1 <= k <= features")


class Coder(nn.Module):
    """Dictionaries trained together; see the head of this file.

    Parameters
    ----------
    layouts
        What each dictionary reads and writes.
    d_read, d_write
        D and E, the same for all of them.
    """

    in_mean: Tensor
    in_scale: Tensor
    out_scale: Tensor
    unfired: Tensor
    threshold: Tensor
    progress: Tensor

    def __init__(self, layouts: tuple[Layout, ...], d_read: int, d_write: int, settings: CoderSettings) -> None:
        super().__init__()
        self.layouts, self.settings = layouts, settings
        self.d_read, self.d_write = d_read, d_write
        self.reads = tuple(layout.read for layout in layouts)
        self.writes = tuple(dict.fromkeys(site for layout in layouts for site in layout.writes))
        F, n = settings.n_features, len(layouts)
        random = torch.Generator().manual_seed(settings.seed)
        rows = [torch.randn(F, d_read, generator=random) for _ in layouts]
        self.W_enc = nn.ParameterList(nn.Parameter(row / row.norm(dim=1, keepdim=True)) for row in rows)
        self.b_enc = nn.ParameterList(nn.Parameter(torch.zeros(F)) for _ in layouts)
        self.W_dec = nn.ModuleList(
            nn.ParameterList(nn.Parameter(torch.zeros(F, d_write)) for _ in layout.writes) for layout in layouts
        )
        self.b_dec = nn.ParameterList(nn.Parameter(torch.zeros(d_write)) for _ in self.writes)
        if settings.activation == "jump_relu":
            self.log_threshold = nn.ParameterList(nn.Parameter(torch.zeros(F)) for _ in layouts)
        self.register_buffer("in_mean", torch.zeros(n, d_read))
        self.register_buffer("in_scale", torch.ones(n))
        self.register_buffer("out_scale", torch.ones(len(self.writes)))
        self.register_buffer("unfired", torch.zeros(n, F, dtype=torch.int64))
        self.register_buffer("threshold", torch.full((n,), -1.0))
        self.register_buffer("progress", torch.zeros(()))

    @torch.no_grad()
    def calibrate(self, batches: list[Batch]) -> None:
        """Set scales, output biases and first decoders from the first batches.

        A feature's first decoder to each layout's first write site, and to those that it reads, is half of what the
        least-squares map from u to t makes of its encoder row: the encoder's transpose for an SAE, a linear model of
        the MLP for a CLT. Decoders to all other sites begin at zero.
        """
        for place, site in enumerate(self.writes):
            y = torch.cat([target(batch, site) for batch in batches])
            mean = y.mean(0)
            self.out_scale[place] = (y - mean).square().mean().sqrt().clamp(min=1e-8)
            self.b_dec[place].copy_(mean / self.out_scale[place])
        for i, layout in enumerate(self.layouts):
            x = torch.cat([batch[str(layout.read)] for batch in batches])
            self.in_mean[i] = x.mean(0)
            self.in_scale[i] = (x - x.mean(0)).square().mean().sqrt().clamp(min=1e-8)
            u = (x - self.in_mean[i]) / self.in_scale[i]
            ridge = 1e-3 * len(u) * torch.eye(self.d_read, device=u.device)
            for site, W_dec in zip(layout.writes, self._decoders(i), strict=True):
                if site == layout.writes[0] or site in layout.read.sites:
                    own = self.writes.index(site)
                    t = torch.cat([self._target(batch, own) for batch in batches]) - self.b_dec[own]
                    W_dec.copy_(0.5 * self.W_enc[i] @ torch.linalg.solve(u.T @ u + ridge, u.T @ t))
            if self.settings.activation == "jump_relu":
                pre = (u[:: max(1, len(u) // 512)] @ self.W_enc[i].T).view(-1)
                share = min(0.5, self.settings.jump.initial_l0 / self.settings.n_features)
                start = pre.kthvalue(max(1, round((1 - share) * len(pre)))).values
                self.log_threshold[i].fill_(float(start.clamp(min=1e-3).log()))

    def begin_step(self, progress: float) -> None:
        """Tell how far the training is, 0 to 1; the sparsity penalty of `jump_relu` rises with it."""
        self.progress.fill_(progress)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The loss of one batch, and the figures of that batch.

        Figures: `nmse/<site>` `sum |y - y^|^2 / sum |y - mean y|^2`, `l0/<dictionary>` active features a token,
        `dead/<dictionary>` share of features that are dead.
        """
        figures: dict[str, float] = {}
        inputs = [self._input(batch, i) for i in range(len(self.layouts))]
        outputs: list[Tensor] = [bias.expand(len(inputs[0]), -1) for bias in self.b_dec]
        loss = inputs[0].new_zeros(())
        for i, (layout, u) in enumerate(zip(self.layouts, inputs, strict=True)):
            writer = self._jumping if self.settings.activation == "jump_relu" else self._chosen
            parts, penalty, fired = writer(i, u)
            for site, part in zip(layout.writes, parts, strict=True):
                place = self.writes.index(site)
                outputs[place] = outputs[place] + part
            loss = loss + penalty
            figures[f"l0/{layout.name}"] = float(fired.sum()) / len(u)
            if self.training:
                self.unfired[i] = torch.where(fired > 0, 0, self.unfired[i] + len(u))
            figures[f"dead/{layout.name}"] = float(self._dead(i).float().mean())
        errors = []
        for place, site in enumerate(self.writes):
            t = self._target(batch, place)
            error = t - outputs[place]
            loss = loss + error.square().mean()
            spread = t.detach().square().sum() - len(t) * t.detach().mean(0).square().sum()
            figures[f"nmse/{site}"] = float(error.detach().square().sum() / spread)
            errors.append(error.detach())
        return loss + self._auxiliary(inputs, errors), figures

    def _chosen(self, i: int, u: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """What dictionary `i` writes, its penalty (none), and (F,) how often each feature fired."""
        with torch.no_grad():
            pattern = self._choose(i, u)
        values = encode_at(u, self.W_enc[i], self.b_enc[i], pattern)
        parts = [decode_at(values, W_dec, pattern) for W_dec in self._decoders(i)]
        fired = torch.bincount(pattern.features, minlength=self.settings.n_features)
        return parts, u.new_zeros(()), fired

    def _choose(self, i: int, u: Tensor) -> Pattern:
        """The active entries of dictionary `i`; keeps the running threshold of `batch_topk`."""
        k, F = self.settings.k, self.settings.n_features
        W_enc, b_enc = self.W_enc[i], self.b_enc[i]
        if self.settings.activation == "topk":
            return Pattern.build(*choose_topk(u, W_enc, b_enc, k), len(u), F)
        rows, features = choose_candidates(u, W_enc, b_enc, k)
        candidates = Pattern.build(rows, features, len(u), F)
        chosen, smallest = largest(encode_at(u, W_enc, b_enc, candidates), k * len(u))
        if self.training:
            old = self.threshold[i]
            self.threshold[i] = torch.where(old < 0, smallest, 0.99 * old + 0.01 * smallest)
        return Pattern.build(rows[chosen], features[chosen], len(u), F)

    def _jumping(self, i: int, u: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """The same for `jump_relu`: entries near the threshold carry gradient too, though they write nothing."""
        jump, decoders, F = self.settings.jump, self._decoders(i), self.settings.n_features
        W_enc, b_enc, threshold = self.W_enc[i], self.b_enc[i], self.log_threshold[i].exp()
        with torch.no_grad():
            pattern = Pattern.build(*choose_above(u, W_enc, b_enc, threshold - jump.bandwidth / 2), len(u), F)
        values = encode_at(u, W_enc, b_enc, pattern)
        activations = jump_relu(values, threshold[pattern.features], jump.bandwidth)
        norms = torch.stack([W_dec.square().sum(1) for W_dec in decoders]).sum(0).add(1e-12).sqrt()
        weight = jump.sparsity * float(self.progress) / len(u)
        penalty = weight * tanh_penalty(activations, norms[pattern.features], jump.steepness)
        dead = self._dead(i).nonzero().squeeze(1)
        if len(dead):
            some = u[:: max(1, len(u) // self.settings.aux_tokens)]
            pre = torch.addmm(b_enc[dead], some, W_enc[dead].T)
            lift = pre_activation_penalty(pre, threshold[dead].detach(), norms[dead].detach())
            penalty = penalty + jump.pre_activation * lift
        fired = torch.bincount(pattern.features[activations.detach() > 0], minlength=F)
        return [decode_at(activations, W_dec, pattern) for W_dec in decoders], penalty, fired

    def _auxiliary(self, inputs: list[Tensor], errors: list[Tensor]) -> Tensor:
        """AuxK: the strongest dead features rebuild the error that is left, on some of the tokens."""
        nothing = errors[0].new_zeros(())
        if self.settings.activation == "jump_relu" or self.settings.aux_weight == 0:
            return nothing
        step = max(1, len(inputs[0]) // self.settings.aux_tokens)
        rebuilt: dict[int, Tensor] = {}
        for i, layout in enumerate(self.layouts):
            dead = self._dead(i).nonzero().squeeze(1)
            if not len(dead):
                continue
            u, W_enc, b_enc = inputs[i][::step], self.W_enc[i], self.b_enc[i]
            with torch.no_grad():
                rows, places = choose_topk(u, W_enc[dead], b_enc[dead], self.settings.aux_k)
                pattern = Pattern.build(rows, dead[places], len(u), self.settings.n_features)
            values = encode_at(u, W_enc, b_enc, pattern)
            for site, W_dec in zip(layout.writes, self._decoders(i), strict=True):
                place = self.writes.index(site)
                part = decode_at(values, W_dec, pattern)
                rebuilt[place] = rebuilt[place] + part if place in rebuilt else part
        total = nothing
        for place, part in rebuilt.items():
            error = errors[place][::step]
            total = total + (error - part).square().sum() / error.square().sum().clamp(min=1e-12)
        return self.settings.aux_weight * total

    def _decoders(self, i: int) -> list[nn.Parameter]:
        decoders = self.W_dec[i]
        assert isinstance(decoders, nn.ParameterList)
        return list(decoders)

    def _dead(self, i: int) -> Tensor:
        return self.unfired[i] > self.settings.dead_after

    def _input(self, batch: Batch, i: int) -> Tensor:
        key = str(self.layouts[i].read)
        if key not in batch or batch[key].shape[-1] != self.d_read:
            shape = tuple(batch[key].shape) if key in batch else "none"
            raise ReplacementError(f"the batch should hold {key!r} of shape (n, {self.d_read}), but has {shape}")
        return (batch[key].detach() - self.in_mean[i]) / self.in_scale[i]

    def _target(self, batch: Batch, place: int) -> Tensor:
        return target(batch, self.writes[place]).detach() / self.out_scale[place]

    @torch.no_grad()
    def to_dictionaries(self) -> tuple[Dictionary, ...]:
        """The dictionaries as they act on raw activations: means and scales folded into weights and biases."""
        owners: dict[Site, int] = {}
        for first in (True, False):  # a bias belongs to the dictionary whose first write site it is, else to any
            for i, layout in enumerate(self.layouts):
                for site in layout.writes[:1] if first else layout.writes:
                    owners.setdefault(site, i)
        return tuple(self._folded(i, owners) for i in range(len(self.layouts)))

    def _folded(self, i: int, owners: dict[Site, int]) -> Dictionary:
        layout, activation = self.layouts[i], self.settings.activation
        W_enc = (self.W_enc[i] / self.in_scale[i]).detach().clone()
        scales = {site: self.out_scale[self.writes.index(site)] for site in layout.writes}
        decoders = {
            site: Decoder(HeldTensor(f"W_dec.{site}", (W_dec * scales[site]).detach().clone()))
            for site, W_dec in zip(layout.writes, self._decoders(i), strict=True)
        }
        biases = {
            site: (self.b_dec[self.writes.index(site)] * scales[site]).detach().clone()
            for site in layout.writes
            if owners[site] == i
        }
        threshold = None
        if activation == "batch_topk":
            threshold = self.threshold[i].clamp(min=0.0).detach().clone().reshape(1)
        elif activation == "jump_relu":
            threshold = self.log_threshold[i].exp().detach().clone()
        return Dictionary(
            name=layout.name,
            kind=layout.kind,
            read=layout.read,
            writes=layout.writes,
            activation=Activation(activation, None if activation == "jump_relu" else self.settings.k),  # type: ignore[arg-type]
            W_enc=W_enc,
            b_enc=(self.b_enc[i] - W_enc @ self.in_mean[i]).detach().clone(),
            decoders=decoders,
            output_biases=biases,
            threshold=threshold,
        )


def target(batch: Batch, site: Site) -> Tensor:
    """What should be rebuilt at `site`; an SAE's raw input serves as its target where the batch has no other."""
    for key in (str(site), f"{site}:none"):
        if key in batch:
            return batch[key]
    raise ReplacementError(f"the batch should hold a target {str(site)!r}; it has {', '.join(sorted(batch))}")
