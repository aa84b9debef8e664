"""Attention value SAEs: sparse autoencoders on the value vectors of all heads of one layer, or of several layers.

*Progress on Attention*, "Attention Value SAE's": "SAE's trained on the concatenated value vectors of multiple attention
heads", of one layer or of two at once, where fewer active features at the same error speak for representations that
attention layers share.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from circuits.replacements.coder import Coder, CoderSettings, Layout
from circuits.replacements.dictionary import Dictionary
from circuits.replacements.errors import ReplacementError
from circuits.replacements.sites import ReadSite, Site


class AttentionValueSAE(Coder):
    """One SAE a layer, trained side by side, or one on the values of all the layers together.

        a   = activation(W_enc v + b_enc)       v: values of all key-value heads, (K x E,), of several layers in a row
        v.l ~ b_dec_l + W_dec_l^T a

    One of a single layer stands for the layer's values in a trace: its features are moved by each head's own pattern.
    One of several layers reads what one layer has not computed yet at the time of another, so it writes nothing to the
    stream and is for analysis.

    Parameters
    ----------
    layers
        Which layers.
    d_values
        Key-value heads x head width.
    together
        One dictionary on the values of all of `layers`.

    Example
    -------
    >>> sae = AttentionValueSAE([1, 3], 16, CoderSettings(n_features=64, k=4), together=True)
    >>> [(str(read), sae.d_read) for read in sae.reads], [str(site) for site in sae.writes]
    ([('v.1+3:none', 32)], ['v.1', 'v.3'])
    """

    def __init__(
        self, layers: Sequence[int], d_values: int, settings: CoderSettings, *, together: bool = False
    ) -> None:
        groups = [tuple(layers)] if together else [(layer,) for layer in layers]
        if not layers or len(set(layers)) != len(layers):
            raise ReplacementError(f"layers are {tuple(layers)}; expected at least one, each once")
        layouts = tuple(
            Layout(
                name="value-sae." + "+".join(map(str, group)),
                kind="value-sae",
                read=ReadSite(Site("v", group[0]), "none", group[1:]),
                writes=tuple(Site("v", layer) for layer in group),
            )
            for group in groups
        )
        super().__init__(layouts, d_values * len(groups[0]), d_values, settings)


def head_loadings_of_values(dictionary: Dictionary, n_kv_heads: int) -> Tensor:
    """(F, layers x K): the norm of each feature's decoder on each head, "the norm of the decoder vector (per head) as a
    measure of head loading"."""
    rows = torch.cat([dictionary.decoders[site].all() for site in dictionary.writes], dim=1)
    norms: Tensor = rows.view(len(rows), len(dictionary.writes) * n_kv_heads, -1).norm(dim=-1)
    return norms
