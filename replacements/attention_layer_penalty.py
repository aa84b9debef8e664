"""What keeps the heads of an attention replacement layer simple: low rank in QK and OV, and sparse patterns.

*Progress on Attention*, "Attention Replacement Layer": "a regularization penalty of the form
[L_nuc(W_QK) L_nuc(W_OV)]^beta, 1/2 < beta < 1 has all of the theoretical properties we want in a simplicity
regularizer". Why these bounds, with n rank-1 parts of nuclear norms a (QK) and b (OV) each:

    independent skip-trigrams   n heads n (ab)^beta, one rank-n head (n a n b)^beta = n^(2 beta) (ab)^beta:
                                splitting is cheaper where beta > 1/2
    a rank-N QK that moves a    one head (N a M b)^beta; split along its OV M (N a b)^beta, along its QK
    rank-M OV (induction)       N (a M b)^beta: staying together is cheaper where beta < 1

Letters of shapes: G patterns, F features (heads), r rank of their OV, E rank of QK, D width, N scored positions, C
contexts of S positions.
"""

import torch
from torch import Tensor

SMALLEST = 1e-12  # below it a head counts as gone: the power has no finite gradient at zero


def factored_norm(left: Tensor, right: Tensor) -> Tensor:
    """`(|left|_F^2 + |right|_F^2) / 2` over the last two dimensions: the cheap proxy of `L_nuc(left^T right)`.

    The nuclear norm of a matrix is the minimum of this over all of its factorizations, reached where both factors share
    the singular values alike (Mazumder et al. 2010, *Spectral Regularization Algorithms*, lemma 6; Kunin et al. 2019,
    *Loss Landscapes of Regularized Linear Autoencoders*). The note, in a footnote: the minima of
    `L_2(W_Q)^2 + L_2(W_K)^2` "are the same as those of L_nuc(W_QK)", and so are those of functions of it.

    left, right
        (..., E, D) and (..., E, D').
    """
    return (left.square().sum((-2, -1)) + right.square().sum((-2, -1))) / 2


def simplicity(qk: Tensor, ov: Tensor, beta: float) -> Tensor:
    """`sum_f [qk_f ov_f]^beta` for (F,) norms of each head's QK and OV."""
    return (qk * ov).clamp(min=SMALLEST).pow(beta).sum()


def pattern_spread(patterns: Tensor) -> Tensor:
    """`1 - sum_s A[p, s]^2` of every row of patterns (..., S, S): 0 for one key, `1 - 1/n` for n keys alike."""
    return 1 - patterns.square().sum(-1)


def written_norms(activations: Tensor, W_dec: Tensor, rank: int) -> Tensor:
    """(N, F) norm of what each head writes: `|sum_i a_fi W_dec_fi|`, from activations (N, F * rank)."""
    decoders = W_dec.view(-1, rank, W_dec.shape[-1])
    gram = decoders @ decoders.transpose(1, 2)
    a = activations.view(len(activations), -1, rank)
    return torch.einsum("nfr,frt,nft->nf", a, gram, a).clamp(min=0).sqrt()
