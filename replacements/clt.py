"""Cross-layer transcoder (Ameisen et al. 2025, *Circuit Tracing*; Lindsey et al. 2024, *Sparse crosscoders*)."""

from circuits.replacements.coder import Coder, CoderSettings, Layout
from circuits.replacements.sites import Norm, ReadSite, Site


class CrossLayerTranscoder(Coder):
    """MLP outputs of all layers from features that read one layer and write to it and all later ones.

        a_l      = activation(W_enc_l N(resid_mid.l) + b_enc_l)                (F,)
        mlp_out.m ~ b_dec_m + sum over l <= m of W_dec_l->m^T a_l               (d_model,)

    Parameters
    ----------
    n_layers, d_model
        Of the base model.
    norm
        What is done to `resid_mid` before it is read, see `ReadSite`.

    Example
    -------
    >>> clt = CrossLayerTranscoder(2, 16, CoderSettings(n_features=64, k=4))
    >>> [str(site) for site in clt.layouts[0].writes]
    ['mlp_out.0', 'mlp_out.1']
    """

    def __init__(self, n_layers: int, d_model: int, settings: CoderSettings, norm: Norm = "full") -> None:
        layouts = tuple(
            Layout(
                name=f"clt.{layer}",
                kind="clt",
                read=ReadSite(Site("resid_mid", layer), norm),
                writes=tuple(Site("mlp_out", later) for later in range(layer, n_layers)),
            )
            for layer in range(n_layers)
        )
        super().__init__(layouts, d_model, d_model, settings)
