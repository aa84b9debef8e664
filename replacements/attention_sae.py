"""Attention output SAEs (Kissane et al. 2024, *Interpreting attention layer outputs with sparse autoencoders*).

The same on the residual stream, for the comparison that *Progress on Attention*, "QK/OV Coupling", makes: features of
an SAE moved through attention heads.
"""

from collections.abc import Sequence
from typing import Literal

from circuits.replacements.coder import Coder, CoderSettings, Layout
from circuits.replacements.sites import ReadSite, Site


class AttentionSAE(Coder):
    """Sparse autoencoders on the attention outputs of one or several layers, trained side by side.

        a_l        = activation(W_enc_l attn_out.l + b_enc_l)                  (F,)
        attn_out.l ~ b_dec_l + W_dec_l^T a_l

    Parameters
    ----------
    layers
        Which layers get one.
    width
        Of the site: d_model for `attn_out`, heads x head width for `z`.
    site
        `attn_out`, or `z`, the concatenated head outputs before W_O. What is rebuilt is the site that is read.

    Example
    -------
    >>> sae = AttentionSAE([0, 2], 16, CoderSettings(n_features=64, k=4))
    >>> [str(read) for read in sae.reads]
    ['attn_out.0:none', 'attn_out.2:none']
    """

    def __init__(
        self, layers: Sequence[int], width: int, settings: CoderSettings, site: Literal["attn_out", "z"] = "attn_out"
    ) -> None:
        layouts = tuple(
            Layout(f"attention-sae.{layer}", "attention-sae", ReadSite(Site(site, layer), "none"), (Site(site, layer),))
            for layer in layers
        )
        super().__init__(layouts, width, width, settings)


class ResidualSAE(Coder):
    """Sparse autoencoders on the stream below one or several layers, trained side by side; for analysis only.

        a_l         = activation(W_enc_l resid_pre.l + b_enc_l)
        resid_pre.l ~ b_dec_l + W_dec_l^T a_l

    Example
    -------
    >>> [str(read) for read in ResidualSAE([1], 16, CoderSettings(n_features=64, k=4)).reads]
    ['resid_pre.1:none']
    """

    def __init__(self, layers: Sequence[int], d_model: int, settings: CoderSettings) -> None:
        sites = [Site("resid_pre", layer) for layer in layers]
        layouts = tuple(
            Layout(f"residual-sae.{site.layer}", "residual-sae", ReadSite(site, "none"), (site,)) for site in sites
        )
        super().__init__(layouts, d_model, d_model, settings)
