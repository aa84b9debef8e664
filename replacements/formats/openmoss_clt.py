"""OpenMOSS cross-layer transcoders: the dictionaries of all layers from one checkpoint.

With L layers, the decoders of an output layer m from all layers l <= m in one tensor:

    W_E (L, D, F)   b_E (L, F)   W_D.<m> (m + 1, F, D)   b_D.<m> (D,)
    activation_function.log_jumprelu_threshold (L, F)

    pre_l = f_in,l x_l W_E,l + b_E,l     a_l = act(pre_l n_l) / n_l
    y_m   = (sum_{l <= m} a_l W_D,m[l] + b_D,m) / f_out,m

n_l is the norm of a feature's decoder rows for all layers together, 1 without `sparsity_include_decoder_norm`; a top-k
takes positive entries of one layer. Source: OpenMOSS/Language-Model-SAEs, `src/lm_saes/models/clt.py`, `encode`,
`decode`, `decoder_norm_per_feature`.
"""

import torch
from torch import Tensor

from circuits.replacements.dictionary import Decoder, Dictionary
from circuits.replacements.errors import ReplacementError
from circuits.replacements.formats.openmoss_config import Config, inverse, make_gate, weights_of
from circuits.replacements.formats.openmoss_rows import Checkpoint, squares
from circuits.replacements.formats.openmoss_sae import THRESHOLDS
from circuits.replacements.weights_views import Scaled, Stored, Transposed, part

Factors = tuple[list[float], list[float]]


def dictionaries(config: Config, device: str) -> tuple[Dictionary, ...]:
    """One dictionary for each layer."""
    n_layers = len(config.hooks_in)
    if len(config.hooks_out) != n_layers:
        raise ReplacementError(
            f"{config.path}: {n_layers} hook points are read and {len(config.hooks_out)} written; expected as many"
        )
    checkpoint = Checkpoint(weights_of(config), device)
    factors = config.factors(checkpoint)
    thresholds = None
    if str(config.values.get("act_fn")).lower() == "jumprelu":
        thresholds = checkpoint.whole(THRESHOLDS[0], (n_layers, config.n_features))
    return tuple(
        _layer(config, checkpoint, index, factors, None if thresholds is None else thresholds[index])
        for index in range(n_layers)
    )


def _layer(
    config: Config, checkpoint: Checkpoint, index: int, factors: Factors, log_threshold: Tensor | None
) -> Dictionary:
    n_layers, n_features, width = len(config.hooks_in), config.n_features, config.d_model
    decoders: list[Stored] = [
        part(checkpoint.stored(f"W_D.{target}", (target + 1, n_features, width)), index)
        for target in range(index, n_layers)
    ]
    norms = None
    b_enc = checkpoint.whole("b_E", (n_layers, n_features))[index]
    if config.includes_decoder_norm:
        norms = torch.stack([squares(decoder) for decoder in decoders]).sum(0).sqrt().float().to(b_enc.device)
    gate = make_gate(config, config.gate(rectify=True), norms, log_threshold)
    unit = gate.unit.to(b_enc.device)
    encoder = Transposed(part(checkpoint.stored("W_E", (n_layers, width, n_features)), index))
    writes = tuple(config.write_site(target) for target in range(index, n_layers))
    f_in, f_out = factors
    read = config.read_site(index)
    return Dictionary(
        name=f"clt.{read.site.layer}",
        kind="clt",
        read=read,
        writes=writes,
        activation=gate.activation,
        W_enc=Scaled(encoder, unit * f_in[index]),
        b_enc=b_enc * unit,
        decoders={
            site: Decoder(Scaled(decoder, inverse(unit) / f_out[target]))
            for site, decoder, target in zip(writes, decoders, range(index, n_layers), strict=True)
        },
        output_biases={writes[0]: checkpoint.whole(f"b_D.{index}", (width,)) / f_out[index]},
        threshold=gate.threshold,
        source=str(checkpoint.path),
    )
