"""Cross-layer attention features, weakly causal: two kinds of features that rebuild MLP and attention outputs together.

*Progress on Attention*, "Attention Output SAEs", describes them as cross-layer variants of attention output SAEs that
integrate with a cross-layer transcoder, and says why the second kind is only weakly causal: "attention layer outputs
are not fully predictable from the preceding residual stream at a single token position".
"""

from circuits.replacements.coder import Coder, CoderSettings, Layout
from circuits.replacements.sites import ReadSite, Site


class WeaklyCausalTranscoder(Coder):
    """Type 1 and type 2 features of every layer, trained together.

        type 1   a_l = activation(W_enc_l N(resid_mid.l) + b_enc_l)     writes mlp_out.m, m >= l, and attn_out.m, m > l
        type 2   a_l = activation(W_enc_l attn_out.l + b_enc_l)         writes attn_out.m, m >= l, and, if asked for,
                                                                        mlp_out.m, m >= l
        site     ~ b_dec_site + sum over all dictionaries that write there of W_dec^T a

    A type 2 feature of layer l reads the very output that it rebuilds; what earlier layers have written to that output
    is not taken off it.

    Parameters
    ----------
    n_layers, d_model
        Of the base model.
    type1_writes_attention
        Whether type 1 features write to later attention outputs. Without, they are a plain CLT.
    type2_writes_mlp
        Whether type 2 features write to MLP outputs of their own and later layers too.

    Example
    -------
    >>> both = WeaklyCausalTranscoder(2, 16, CoderSettings(n_features=64, k=4))
    >>> [(layout.name, [str(site) for site in layout.writes]) for layout in both.layouts]
    [('type1.0', ['mlp_out.0', 'mlp_out.1', 'attn_out.1']), ('type2.0', ['attn_out.0', 'attn_out.1']), \
('type1.1', ['mlp_out.1']), ('type2.1', ['attn_out.1'])]
    """

    def __init__(
        self,
        n_layers: int,
        d_model: int,
        settings: CoderSettings,
        *,
        type1_writes_attention: bool = True,
        type2_writes_mlp: bool = False,
    ) -> None:
        layouts = []
        for layer in range(n_layers):
            mlp = tuple(Site("mlp_out", later) for later in range(layer, n_layers))
            attention = tuple(Site("attn_out", later) for later in range(layer, n_layers))
            layouts.append(
                Layout(
                    name=f"type1.{layer}",
                    kind="cross-layer-type-1",
                    read=ReadSite(Site("resid_mid", layer), "full"),
                    writes=mlp + (attention[1:] if type1_writes_attention else ()),
                )
            )
            layouts.append(
                Layout(
                    name=f"type2.{layer}",
                    kind="cross-layer-type-2",
                    read=ReadSite(Site("attn_out", layer), "none"),
                    writes=attention + (mlp if type2_writes_mlp else ()),
                )
            )
        super().__init__(tuple(layouts), d_model, d_model, settings)
