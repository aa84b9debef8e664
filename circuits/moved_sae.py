"""SAE features moved through attention heads: the comparison for multitoken transcoders, with no training of its own.

*Progress on Attention*, "QK/OV Coupling", compares MTC features "against SAE features run through the single attention
head that most-moves that feature in a given context", and would like to see "SAE features moved through all attention
heads". An SAE of the stream (or of an attention output below) has features a_f with decoders D_f; layer l's heads carry

    y[p] = bias + sum_f sum over its heads h, sum_s A_lh[p, s] a_f[s] O_h V_h N(D_f)[s]

where N is the layer's norm with its denominator frozen, `bias` what the layer's biases and the SAE's own output bias
become, and a feature's heads are all of them, or in each context the one with the largest
`sum_p |sum_s A_lh[p, s] a_f[s] O_h V_h N(D_f)[s]|`.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.evaluation import Fit
from circuits.frozen import FrozenAttention
from circuits.model import BaseModel
from circuits.recording import Recording, record
from circuits.replacements.dictionary import Active, Dictionary
from circuits.text import Document

Through = Literal["most", "all"]


@torch.no_grad()
def moved_sae_figures(
    model: BaseModel, sae: Dictionary, layer: int, documents: Sequence[Document], through: Through
) -> dict[str, float]:
    """Normalized MSE of layer `layer`'s attention output as moved features rebuild it, L0 and dead share of the SAE.

    Parameters
    ----------
    sae
        Reads and writes `resid_pre.layer`, or an attention output below the layer.
    through
        `all` heads, or in each context the head that moves a feature `most`.

    Raises
    ------
    CircuitsError
        The SAE's decoders are not in the stream below the layer.
    """
    (site, *more) = sae.writes
    below = (site.name == "resid_pre" and site.layer == layer) or (site.name == "attn_out" and site.layer < layer)
    if more or not below or sae.moved_by is not None:
        raise CircuitsError(
            f"{sae.source}: {sae.name} writes {', '.join(map(str, sae.writes))}; to be moved by the heads of layer "
            f"{layer} its features must write resid_pre.{layer} or an attention output below"
        )
    fit = Fit()
    for document in documents:
        recording = record(model, torch.tensor(document, device=model.device))
        active = sae.encode(recording.read(sae.read))
        rebuilt = moved_output(model, recording, sae, active, layer, through)
        scored = active.take(active.positions > 0)
        fit.add(recording.attn_out[layer][1:], rebuilt[1:], scored, sae.n_features)
    return fit.figures()


def moved_output(
    model: BaseModel, recording: Recording, sae: Dictionary, active: Active, layer: int, through: Through
) -> Tensor:
    """(S, D): the attention output of a layer as moved features rebuild it on one recorded document."""
    attention = FrozenAttention(
        model.attention_weights(layer).to(model.device),
        recording.patterns[layer],
        recording.attention_norms[layer],
        recording.post_norm(layer, mlp=False),
    )
    n = recording.n_positions
    bias = sae.output_bias(sae.writes[0])
    output = attention.output_bias
    if bias is not None:
        output = output + attention.push(bias.expand(1, n, -1))[0]
    if not len(active):
        return output
    features, place = torch.unique(active.features, return_inverse=True)
    rows = sae.decoder_rows(active.features, sae.writes[0]) * active.activations.unsqueeze(1)
    values = attention.values(rows, active.positions)
    moved = torch.zeros_like(output)
    for head in range(attention.n_heads):
        written = values[:, head] @ attention.weights.w_o[head]
        if through == "most":
            if head == 0:
                strongest = _strongest_heads(attention, values, active, place, len(features), n)
            written = written * (strongest[place] == head).unsqueeze(1)
        here = torch.zeros_like(output).index_add_(0, active.positions, written)
        moved = moved + attention.pattern[head] @ here
    return output + (moved if attention.post is None else attention.post.apply(moved, slice(None)))


def _strongest_heads(
    attention: FrozenAttention, values: Tensor, active: Active, place: Tensor, n_features: int, n: int
) -> Tensor:
    """(F',): the head that moves each active feature most on this document."""
    amounts = []
    for head in range(attention.n_heads):
        here = values.new_zeros(n, n_features, values.shape[2])
        here[active.positions, place] = values[:, head]
        arrived, w_o = (attention.pattern[head] @ here.flatten(1)).view_as(here), attention.weights.w_o[head]
        if attention.post is not None:
            arrived, w_o = arrived * attention.post.scale[:, None, None], w_o * attention.post.gain
        gram = w_o @ w_o.T
        amounts.append(torch.einsum("pfe,eg,pfg->pf", arrived, gram, arrived).clamp(min=0).sqrt().sum(0))
    return torch.stack(amounts).argmax(0)
