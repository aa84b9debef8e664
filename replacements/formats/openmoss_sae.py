"""OpenMOSS SAEs and transcoders: one dictionary from one checkpoint.

    W_E (D, F)   b_E (F,)   W_D (F, D)   b_D (D,) if use_decoder_bias   activation_function.log_jumprelu_threshold (F,)

    x' = f_in x     pre = x' W_E + b_E     a = act(pre |W_D|) / |W_D|     y = (a W_D + b_D) / f_out

with f the factors of the activation norms, and |W_D| = 1 without `sparsity_include_decoder_norm`. Source:
OpenMOSS/Language-Model-SAEs, `src/lm_saes/models/sae.py`, `encode`, `decode`. JumpReLU and ReLU activations are a;
under a top-k they are a |W_D|, so that the largest are those that are kept, whatever their sign (`utils/math.py`).

Checkpoints until 2025 (Llama Scope) have torch's `encoder.weight` (F, D), `encoder.bias`, `decoder.weight` (D, F) and
`decoder.bias`. Those with `hyperparams.json` are meant as `SparseAutoEncoder.from_config` of then loads them:
activation norms folded in so that activations have the stream's scale, decoder rows then made unit vectors, and one
threshold for all features of the result (`jump_relu_threshold`, with which a top-k is a JumpReLU too):

    n = |W_D| f_in / f_out     pre = n (x W_E + b_E / f_in)     a = pre where pre > threshold
    y = a W_D / |W_D| + b_D / f_out
"""

import torch
from torch import Tensor

from circuits.kernels.encode import Activation
from circuits.replacements.dictionary import Decoder, Dictionary
from circuits.replacements.errors import ReplacementError
from circuits.replacements.formats.openmoss_config import Config, Gate, inverse, make_gate, weights_of
from circuits.replacements.formats.openmoss_rows import Checkpoint, squares
from circuits.replacements.sites import Site
from circuits.replacements.weights import Rows
from circuits.replacements.weights_views import Scaled, Transposed

THRESHOLDS = ("activation_function.log_jumprelu_threshold", "log_jumprelu_threshold")


def dictionaries(config: Config, device: str) -> tuple[Dictionary, ...]:
    """The dictionary of one checkpoint."""
    if config.values.get("use_glu_encoder"):
        raise ReplacementError(
            f"{config.path}: use_glu_encoder: pre-activations are products of two linear maps, which no dictionary has"
        )
    checkpoint = Checkpoint(weights_of(config), device)
    n_features, width, old = config.n_features, config.d_model, "encoder.weight" in checkpoint
    encoder: Rows
    decoder: Rows
    if old:
        encoder = checkpoint.stored("encoder.weight", (n_features, width))
        decoder = Transposed(checkpoint.stored("decoder.weight", (width, n_features)))
    else:
        encoder = Transposed(checkpoint.stored("W_E", (width, n_features)))
        decoder = checkpoint.stored("W_D", (n_features, width))
    biases = ("encoder.bias", "decoder.bias") if old else ("b_E", "b_D")
    b_enc = checkpoint.whole(biases[0], (n_features,))
    b_dec = checkpoint.whole(biases[1], (width,)) if config.has_output_bias else None
    (f_in,), (f_out,) = config.factors(checkpoint)
    norms = squares(decoder).sqrt().float().to(device) if config.includes_decoder_norm else None
    if old and config.path.name != "config.json":
        return (_until_2025(config, (encoder, decoder), (b_enc, b_dec), norms, (f_in, f_out)),)
    gate = make_gate(config, config.gate(rectify=old), norms, _log_threshold(config, checkpoint))
    unit = gate.unit.to(device)
    if b_dec is not None and config.values.get("apply_decoder_bias_to_pre_encoder"):
        b_enc = b_enc - encoder.all().to(device) @ b_dec
    made = _dictionary(
        config,
        gate,
        Scaled(encoder, unit * f_in),
        b_enc * unit,
        Scaled(decoder, inverse(unit) / f_out),
        None if b_dec is None else b_dec / f_out,
    )
    return (made,)


def _until_2025(
    config: Config,
    weights: tuple[Rows, Rows],
    biases: tuple[Tensor, Tensor | None],
    norms: Tensor | None,
    factors: tuple[float, float],
) -> Dictionary:
    """What the loader of Llama Scope's time makes of encoder, decoder and their biases."""
    (encoder, decoder), (b_enc, b_dec), (f_in, f_out) = weights, biases, factors
    ratio = f_in / f_out
    n = torch.ones_like(b_enc) if norms is None else norms * ratio
    unit = inverse(n) * ratio
    b_dec = None if b_dec is None else b_dec / f_out
    b_enc = n * b_enc / f_in
    if b_dec is not None and config.values.get("apply_decoder_bias_to_pre_encoder"):
        b_enc = b_enc - n * (encoder.all().to(b_enc) @ b_dec)
    activation = config.gate(rectify=True)
    threshold = float(config.values.get("jump_relu_threshold") or 0.0)
    if activation.kind == "topk" and threshold > 0:
        activation = Activation("jump_relu")
    held = torch.tensor([threshold], device=b_enc.device) if activation.needs_threshold else None
    gate = Gate(activation, held, n)
    return _dictionary(config, gate, Scaled(encoder, n), b_enc, Scaled(decoder, unit), b_dec)


def _log_threshold(config: Config, checkpoint: Checkpoint) -> Tensor | None:
    if str(config.values.get("act_fn")).lower() != "jumprelu":
        return None
    name = next((name for name in THRESHOLDS if name in checkpoint), THRESHOLDS[0])
    return checkpoint.whole(name, (config.n_features,))


def _dictionary(
    config: Config, gate: Gate, encoder: Rows, b_enc: Tensor, decoder: Rows, b_dec: Tensor | None
) -> Dictionary:
    read, site = config.read_site(0), config.write_site(0)
    kind = _kind(read.site, site)
    return Dictionary(
        name=f"{kind}.{read.site.layer}",
        kind=kind,
        read=read,
        writes=(site,),
        activation=gate.activation,
        W_enc=encoder,
        b_enc=b_enc,
        decoders={site: Decoder(decoder)},
        output_biases={} if b_dec is None else {site: b_dec},
        threshold=gate.threshold,
        source=str(config.folder),
    )


def _kind(read: Site, site: Site) -> str:
    if read != site:
        return "transcoder"
    return {"attn_out": "attention-sae", "z": "attention-sae", "mlp_out": "mlp-sae"}.get(site.name, "residual-sae")
