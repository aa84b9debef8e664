"""What makes features sparse: activation functions as they are trained, penalties, and the choice of active entries.

Letters of shapes: B tokens of a batch, F features, D width of the read site, n entries.
"""

from typing import Any

import torch
from torch import Tensor

SAMPLE = 128  # tokens from which the threshold of the candidates of a BatchTopK is estimated
BLOCK = 1 << 20  # entries of a block of pre-activations that stays in the cache between product and choice
MARGIN = 1.5  # candidates taken for each entry that is wanted


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        return grads[0] * (pre > threshold), -(threshold / ctx.bandwidth) * grads[0] * near, None


def jump_relu(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """`a = pre H(pre - theta)` with a straight-through gradient of the threshold.

    The step has no gradient of its own; a rectangle of width `bandwidth` e around the threshold stands for it
    (Rajamanoharan et al. 2024, *Jumping Ahead*, eq. 11):

        da/dpre   = H(pre - theta)
        da/dtheta = -(theta / e) [|pre - theta| < e / 2]

    `threshold` is broadcast against `pre`: (F,) against (B, F), or one for each of (n,) entries.
    """
    result: Tensor = _JumpReLU.apply(pre, threshold.expand_as(pre), bandwidth)  # type: ignore[no-untyped-call]
    return result


def tanh_penalty(activations: Tensor, decoder_norms: Tensor, steepness: float) -> Tensor:
    """`sum_f tanh(c |W_dec,f| a_f)` over all entries given: a smooth count of active features.

    Ameisen et al. 2025, *Circuit Tracing*, methods. Entries that are not active add nothing and may be left out.
    `decoder_norms` has the norm of each entry's feature over all its write sites together, so that a feature cannot
    get cheaper by a smaller activation and a larger decoder.
    """
    return torch.tanh(steepness * decoder_norms * activations).sum()


def pre_activation_penalty(pre: Tensor, threshold: Tensor, decoder_norms: Tensor) -> Tensor:
    """`mean over tokens of sum_f relu(theta_f - pre_f) |W_dec,f|`.

    Lifts the pre-activations of features that never reach their threshold, and so get no other gradient. Give it
    the columns of dead features only.
    """
    return (torch.relu(threshold - pre) * decoder_norms).sum(1).mean()


def choose_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest positive pre-activations of each token (Gao et al. 2024).

    Returns (rows, features), (n,) each, sorted by row, then feature.
    """
    rows, features = [], []
    step = max(1, BLOCK // len(W_enc))
    for first in range(0, len(x), step):
        pre_BF = torch.addmm(b_enc, x[first : first + step], W_enc.T)
        values, chosen = pre_BF.topk(min(k, pre_BF.shape[1]), dim=1, sorted=False)
        chosen, order = chosen.sort(dim=1)
        where = (values.gather(1, order) > 0).nonzero(as_tuple=True)
        rows.append(where[0] + first)
        features.append(chosen[where])
    return torch.cat(rows), torch.cat(features)


def choose_candidates(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Entries among which the k B largest positive ones of the whole batch are: about 1.5 times as many.

    The product is made in bfloat16 (two to three times as fast as float32 on a CPU that has it), and the candidates'
    threshold read off some hundred tokens of the batch. The margin is many times the error of both; the caller
    computes the candidates' values in float32 and takes the exact k B largest of these.

    Returns (rows, features), (n,) each, sorted by row, then feature.
    """
    x, weights, bias = x.bfloat16(), W_enc.bfloat16().T, b_enc.bfloat16()
    sample = torch.addmm(bias, x[:: max(1, len(x) // SAMPLE)], weights).float().view(-1)
    wanted = min(len(sample), int(MARGIN * k / len(W_enc) * len(sample)) + 1)
    threshold = max(0.0, float(sample.topk(wanted, sorted=False).values.min()))
    found = _above(x, weights, bias, threshold)
    if len(found) < k * len(x) and threshold > 0:  # the sample was not like the batch: take all positive ones
        found = _above(x, weights, bias, 0.0)
    return found // len(W_enc), found % len(W_enc)


def choose_above(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """All entries whose pre-activation is above `threshold` (F,); (rows, features), (n,) each, sorted."""
    found = _above(x, W_enc.T, b_enc - threshold, 0.0)
    return found // len(W_enc), found % len(W_enc)


def _above(x_BD: Tensor, W_DF: Tensor, b_F: Tensor, threshold: float) -> Tensor:
    """(n,) places in the flat (B, F) block of pre-activations that are greater than `threshold`, at least zero."""
    found = []
    step = max(1, BLOCK // len(b_F))
    for first in range(0, len(x_BD), step):
        pre_BF = torch.addmm(b_F, x_BD[first : first + step], W_DF)
        if pre_BF.dtype == torch.bfloat16:
            # Bits of positive floats are ordered as integers, and those of negative ones are negative integers:
            # the same comparison, four times as fast on a CPU.
            bits = torch.tensor(threshold, dtype=torch.bfloat16).view(torch.int16).item()
            mask = (pre_BF.view(torch.int16) > bits).view(-1)
        else:
            mask = (pre_BF > threshold).view(-1)
        # NumPy finds the few set ones among many several times as fast as torch does on a CPU.
        here = mask.nonzero().squeeze(1) if mask.is_cuda else torch.from_numpy(mask.numpy().nonzero()[0])
        found.append(here + first * len(b_F))
    return torch.cat(found)


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest positive of `values` (n,): a mask (n,), and the smallest value that is let through.

    BatchTopK (Bussmann et al. 2024): a batch of B tokens shares k B active entries, so that a token that needs more
    features gets more. The smallest one, averaged over training, is the threshold that takes the place of the
    batch when there is none.
    """
    if not len(values):
        return torch.zeros(0, dtype=torch.bool, device=values.device), values.new_zeros(())
    cut = values.kthvalue(max(1, len(values) - count + 1)).values
    chosen = (values >= cut) & (values > 0)
    smallest = values[chosen].min() if bool(chosen.any()) else values.new_zeros(())
    return chosen, smallest
