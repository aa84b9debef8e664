"""Encode: from the stream to active features. Plain PyTorch on any device; Triton on a GPU (`triton_encode.py`).

Letters of shapes: T positions, F features, D width of the read site, n active entries.

    pre_TF = x_TD @ W_enc_FD^T + b_enc_F
    active = the entries that the activation function lets through

Only the active entries are returned; the dense (T, F) block is made for a bounded number of positions at a time, and in
Triton not at all.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from circuits.kernels.backend import Products, matmul, use_triton

ActivationKind = Literal["relu", "jump_relu", "topk", "batch_topk", "identity", "group_soft"]
ACTIVATION_KINDS: tuple[ActivationKind, ...] = get_args(ActivationKind)
BLOCK = 1 << 24  # entries of pre_TF in memory at once: 64 MiB of float32


@dataclass(frozen=True)
class Activation:
    """Which features count as active, and with what value.

    kind
        `relu`: pre > 0. `jump_relu`: pre > threshold_F (Rajamanoharan et al. 2024, *Jumping Ahead*). `topk`: the k
        largest of each position (Gao et al. 2024). `batch_topk`: trained with the k T largest of a batch of T
        positions; used, as here, like `jump_relu` with the threshold that training has estimated (Bussmann et al.
        2024, *BatchTopK*). `identity`: all. The value of an active feature is its pre-activation in all of these.
        `group_soft`, for features of rank r, whose pre-activation is the length of a vector: pre > threshold_F, with
        the value pre - threshold_F (the group soft threshold: the vector keeps its direction and loses so much of its
        length; Yuan & Lin 2006, *Model selection and estimation in regression with grouped variables*).
    k
        For `topk`, and for the record for `batch_topk`.
    rectify
        For `topk`: drop entries that are among the k largest but not positive. circuit-tracer keeps them, with
        their negative value, so its files are read with `rectify=False`.

    Entries whose value is exactly zero are never active.
    """

    kind: ActivationKind
    k: int | None = None
    rectify: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ACTIVATION_KINDS:
            raise ValueError(f"unknown activation {self.kind!r}, expected one of {', '.join(ACTIVATION_KINDS)}")
        if self.kind == "topk" and (self.k is None or self.k < 1):
            raise ValueError(f"activation 'topk' needs k of at least 1, got {self.k}")

    @property
    def needs_threshold(self) -> bool:
        return self.kind in ("jump_relu", "batch_topk", "group_soft")


@dataclass(frozen=True)
class InputNorm:
    """A norm with its denominator frozen, before an encoder: `(x - mean x) scale gain + bias`.

    `scale` is one over the denominator, (T,); `gain` and `bias` are (D,), None for one and zero; only a centred norm
    subtracts the mean.
    """

    scale: Tensor
    gain: Tensor | None = None
    bias: Tensor | None = None
    centred: bool = False

    def apply(self, x_TD: Tensor) -> Tensor:
        """What the norm makes of x, (T, D)."""
        mean, scale, gain, bias = self.parts(x_TD)
        return (x_TD - mean[:, None]) * scale[:, None] * gain + bias

    def parts(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean (T,), scale (T,), gain (D,) and bias (D,), where there is none zero, one and zero."""
        mean = x_TD.mean(1) if self.centred else x_TD.new_zeros(len(x_TD))
        gain = x_TD.new_ones(x_TD.shape[1]) if self.gain is None else self.gain
        return mean, self.scale, gain, x_TD.new_zeros(x_TD.shape[1]) if self.bias is None else self.bias


def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    activation: Activation,
    threshold: Tensor | None,
    *,
    norm: InputNorm | None = None,
    products: Products = "float32",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Active features of every position.

    Parameters
    ----------
    x
        (T, D) what the dictionary reads.
    W_enc, b_enc
        (F, D) and (F,).
    activation, threshold
        `threshold` is (F,) or a single number, for the activations that need one.
    norm
        Stands between `x` and the encoder, if `x` is not normalised yet.
    products
        `bfloat16` rounds what is read and the encoder to it and adds their products in float32.

    Returns
    -------
    positions, features, activations, pre_activations
        (n,) each, sorted by position, then feature.
    """
    if activation.kind in ("relu", "jump_relu", "batch_topk", "group_soft") and use_triton(x, W_enc, b_enc):
        return _encode_on_triton(x, W_enc, b_enc, activation, threshold, norm, products)
    x = x if norm is None else norm.apply(x)
    parts = [
        gate(pre_TF, activation, threshold, first_position=first)
        for first, pre_TF in _blocks(x, W_enc, b_enc, products)
    ] or [gate(x.new_zeros(0, len(W_enc)), activation, threshold)]
    positions, features, activations, pre_activations = (torch.cat(part) for part in zip(*parts, strict=True))
    return positions, features, activations, pre_activations


def gate(
    pre: Tensor, activation: Activation, threshold: Tensor | None, *, first_position: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Active entries of pre-activations (T, F) whose first row stands at `first_position`; returns as `encode`."""
    _check(activation, threshold)
    positions, features = _active(pre, activation, threshold).nonzero(as_tuple=True)
    values = pre[positions, features]
    return positions + first_position, features, _shrunk(values, features, activation, threshold), values


def _check(activation: Activation, threshold: Tensor | None) -> None:
    if activation.needs_threshold and threshold is None:
        raise ValueError(f"activation {activation.kind!r} needs a threshold")


def _shrunk(values: Tensor, features: Tensor, activation: Activation, threshold: Tensor | None) -> Tensor:
    """Activations of active entries, from their pre-activations."""
    if activation.kind != "group_soft":
        return values.clone()
    assert threshold is not None
    return values - (threshold[features] if threshold.numel() > 1 else threshold)


def _encode_on_triton(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    activation: Activation,
    threshold: Tensor | None,
    norm: InputNorm | None,
    products: Products,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from circuits.kernels.triton_encode import encode_gated

    _check(activation, threshold)
    least = x.new_zeros(1) if activation.kind == "relu" or threshold is None else threshold
    parts = None if norm is None else norm.parts(x)
    positions, features, values = encode_gated(x, W_enc, b_enc, least, parts, products)
    return positions, features, _shrunk(values, features, activation, threshold), values


def _blocks(
    x_TD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, products: Products = "float32"
) -> Iterator[tuple[int, Tensor]]:
    """(first position, pre-activations) of as many positions as fit into `BLOCK` entries."""
    step = max(1, BLOCK // max(1, len(W_enc_FD)))
    for first in range(0, len(x_TD), step):
        block = x_TD[first : first + step]
        if products == "float32":
            yield first, torch.addmm(b_enc_F, block, W_enc_FD.T)
        else:
            yield first, matmul(block, W_enc_FD.T, products).add_(b_enc_F)


def _active(pre_TF: Tensor, activation: Activation, threshold: Tensor | None) -> Tensor:
    """(T, F) of bool."""
    if activation.needs_threshold:
        assert threshold is not None
        return (pre_TF > threshold) & (pre_TF != 0)
    if activation.kind == "identity":
        return pre_TF != 0
    if activation.kind == "relu":
        return pre_TF > 0
    assert activation.k is not None
    largest = pre_TF.topk(min(activation.k, pre_TF.shape[1]), dim=1).indices
    chosen = torch.zeros_like(pre_TF, dtype=torch.bool).scatter_(1, largest, True)
    return chosen & (pre_TF > 0 if activation.rectify else pre_TF != 0)
