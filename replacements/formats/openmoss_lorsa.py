"""OpenMOSS Lorsas (low-rank sparse attention): one dictionary with patterns of its own from one checkpoint.

Q query-key heads of width E, F features (heads of rank one), F / Q of them on each:

    W_Q, W_K (Q, D, E)   b_Q, b_K (Q, E)   W_V (F, D)   b_V (F,)   W_O (F, D)   b_D (D,) if use_decoder_bias
    ln_q.w, ln_k.w (Q, E) if use_post_qk_ln             activation_function.log_jumprelu_threshold (F,)

    q_p = R_p n(f_in x_p W_Q + b_Q)     A = softmax over s <= p of q_p . k_s / attn_scale     k_s likewise
    z_f[p] = sum_s A[p, s] (f_in W_V,f . x_s + b_V,f)     a = act(z |W_O|) / |W_O|     y = (a W_O + b_D) / f_out

n is an RMSNorm of each head's queries and keys, R rotary position on the first `rotary_dim` of them: neighbours
(`rotary_adjacent_pairs`) or halves are turned against each other. Our pairs are always (i, i + E / 2), so rows of W_Q
and W_K change places, which no score notices; what does not turn has speed zero. `rotary_scale` repeats each so often.
Frequencies: powers of `rotary_base`, or Llama 3's (`use_NTK_by_parts_rope`). Under a top-k activations are a |W_O|, and
the largest are kept whatever their sign. Source: OpenMOSS/Language-Model-SAEs, `src/lm_saes/models/lorsa.py`: `encode`,
`_compute_qkv`, `_apply_rotary`, `_calculate_sin_cos_rotary`, `load_full_state_dict`, `RMSNormPerHead`.
"""

from math import pi, sqrt
from typing import Any

import torch
from torch import Tensor

from circuits.replacements.dictionary import Decoder, Dictionary
from circuits.replacements.errors import ReplacementError
from circuits.replacements.formats.openmoss_config import Config, inverse, make_gate, weights_of
from circuits.replacements.formats.openmoss_rows import Checkpoint, squares
from circuits.replacements.formats.openmoss_sae import THRESHOLDS
from circuits.replacements.movement import OwnAttention
from circuits.replacements.weights_views import Scaled


def dictionaries(config: Config, device: str) -> tuple[Dictionary, ...]:
    """The dictionary of one checkpoint."""
    checkpoint = Checkpoint(weights_of(config), device)
    n_features, width = config.n_features, config.d_model
    (f_in,), (f_out,) = config.factors(checkpoint)
    encoder, decoder = (checkpoint.stored(name, (n_features, width)) for name in ("W_V", "W_O"))
    b_enc = checkpoint.whole("b_V", (n_features,))
    norms = squares(decoder).sqrt().float().to(device) if config.includes_decoder_norm else None
    log_threshold = None
    if str(config.values.get("act_fn")).lower() == "jumprelu":
        log_threshold = checkpoint.whole(THRESHOLDS[0], (n_features,))
    gate = make_gate(config, config.gate(rectify=False), norms, log_threshold)
    unit, read, site = gate.unit.to(device), config.read_site(0), config.write_site(0)
    biases = {site: checkpoint.whole("b_D", (width,)) / f_out} if config.has_output_bias else {}
    made = Dictionary(
        name=f"lorsa.{read.site.layer}",
        kind="lorsa",
        read=read,
        writes=(site,),
        activation=gate.activation,
        W_enc=Scaled(encoder, unit * f_in),
        b_enc=b_enc * unit,
        decoders={site: Decoder(Scaled(decoder, inverse(unit) / f_out))},
        output_biases=biases,
        threshold=gate.threshold,
        moved_by=_attention(config, checkpoint, f_in),
        source=str(checkpoint.path),
    )
    return (made,)


def _attention(config: Config, checkpoint: Checkpoint, f_in: float) -> OwnAttention:
    values, width, n_features = config.values, config.d_model, config.n_features
    n_heads, d_head = _whole(config, "n_qk_heads"), _whole(config, "d_qk_head")
    n_stored = checkpoint.n_rows("W_Q") or n_heads
    if n_heads % n_stored or n_features % n_heads:
        raise ReplacementError(
            f"{config.path}: {n_features} features on {n_heads} query-key heads, of which the checkpoint has "
            f"{n_stored}; each should be a multiple of the next"
        )
    scale = values.get("attn_scale")
    order, speeds = _turning(config, d_head * int(values.get("rotary_scale") or 1))
    weights, biases, gains = [], [], []
    for side in ("Q", "K"):
        W = checkpoint.whole(f"W_{side}", (n_stored, width, d_head)).transpose(1, 2) * f_in
        weights.append(_arranged(W, n_heads, order))
        biases.append(_arranged(checkpoint.whole(f"b_{side}", (n_stored, d_head)), n_heads, order))
        gains.append(_gain(config, checkpoint, f"ln_{side.lower()}.w", (n_stored, d_head), n_heads, order))
    return OwnAttention(
        W_q=weights[0],
        b_q=biases[0],
        W_k=weights[1],
        b_k=biases[1],
        group=torch.arange(n_features, device=weights[0].device) // (n_features // n_heads),
        scale=1 / float(scale) if scale is not None else 1 / sqrt(d_head),
        rotary_speeds=None if speeds is None else speeds.to(weights[0].device),
        q_gain=gains[0],
        k_gain=gains[1],
        norm_eps=float(values.get("eps", 1e-6)),
    )


def _gain(
    config: Config, checkpoint: Checkpoint, name: str, shape: tuple[int, int], n_heads: int, order: Tensor
) -> Tensor | None:
    """The gain of the norm of queries or keys, None without one."""
    if not config.values.get("use_post_qk_ln"):
        return None
    if config.values.get("normalization_type") != "RMS":
        raise ReplacementError(
            f"{config.path}: queries and keys have a norm of type {config.values.get('normalization_type')!r}; only "
            "'RMS' is known"
        )
    return _arranged(checkpoint.whole(name, shape), n_heads, order)


def _arranged(x: Tensor, n_heads: int, order: Tensor) -> Tensor:
    """Query-key parameters (Q', E, ...) for all heads, their rows in the order of our pairs."""
    return x.repeat_interleave(n_heads // len(x), dim=0)[:, order.to(x.device)].contiguous()


def _turning(config: Config, width: int) -> tuple[Tensor, Tensor | None]:
    """Which rows of a head's queries and keys stand where, (E,), and the speeds (E / 2,) of pairs (i, i + E / 2)."""
    repeat = width // _whole(config, "d_qk_head")
    if config.values.get("positional_embedding_type", "rotary") != "rotary":
        return torch.arange(width // repeat), None  # without rotary position nothing is repeated either
    n = _whole(config, "rotary_dim")
    if width % 2 or n % 2 or n > width:
        raise ReplacementError(
            f"{config.path}: rotary_dim {n} of queries of width {width}; rotary position turns pairs, so both should "
            "be even, and the first no larger"
        )
    turned = torch.arange(n)
    adjacent = config.values.get("rotary_adjacent_pairs", True)
    first, second = (turned[::2], turned[1::2]) if adjacent else (turned[: n // 2], turned[n // 2 :])
    still = torch.arange(n, width)
    half = (width - n) // 2
    order = torch.cat([first, still[:half], second, still[half:]])
    return order // repeat, torch.cat([_speeds(config.values, n), torch.zeros(half)])


def _speeds(values: dict[str, Any], n: int) -> Tensor:
    """(n / 2,) radians from one position to the next, of pairs by falling frequency."""
    speed = float(values.get("rotary_base", 10000)) ** (-torch.arange(0, n, 2, dtype=torch.float64) / n)
    if values.get("use_NTK_by_parts_rope"):
        factor, context = float(values.get("NTK_by_parts_factor", 1.0)), float(values.get("old_context_len", 2048))
        low = float(values.get("NTK_by_parts_low_freq_factor", 1.0))
        high = float(values.get("NTK_by_parts_high_freq_factor", 1.0))
        turns = context * speed / (2 * pi)  # in the context that the model was first trained on
        between = (turns - low) / (high - low if high != low else 1.0)
        mixed = ((1 - between) / factor + between) * speed
        speed = torch.where(turns < low, speed / factor, torch.where(turns > high, speed, mixed))
    return speed.float()


def _whole(config: Config, key: str) -> int:
    value = config.values.get(key)
    if not isinstance(value, int) or value < 1:
        raise ReplacementError(f"{config.path}: {key} is {value!r}, expected a whole number of at least 1")
    return value
