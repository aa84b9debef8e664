"""What a dictionary does on one prompt, by definition and in float64: encode, gate, choose, move.

The plain reference's account of DESIGN.md, section 3, for every dictionary, moved between positions or not. Shapes:
S positions, F features, r rank, H heads, G patterns of an own attention. A feature of rank 1 is a vector of length 1.
"""

from itertools import pairwise

import torch
from torch import Tensor

from circuits.replacements import Dictionary, Site
from circuits.replacements.movement import HeadLoading, OwnAttention

Place = str | tuple[str, int] | tuple[str, str]

INSIDE_A_BLOCK = ("attn_out", "z", "q", "k", "v", "resid_mid", "mlp_out")
IDENTITY, OWN = -1, -2


def kind_of(dictionary: Dictionary) -> str:
    """The kind of its nodes; of the nodes where its features arrive, if the base layer's heads move them."""
    if isinstance(dictionary.moved_by, HeadLoading):
        return "mtc_query"
    names = {"resid_mid": "mlp_feature", "v": "value_feature", "resid_pre": "attention_feature"}
    return names.get(dictionary.read.site.name, "attention_feature")


def cut_layers(dictionaries: list[Dictionary]) -> set[int]:
    """Layers whose whole block a dictionary stands for."""
    return {site.layer for d in dictionaries for site in d.writes if site.name == "resid_post"}


def kept(dictionaries: list[Dictionary]) -> dict[str, tuple[Dictionary, tuple[Site, ...]]]:
    """Name -> dictionary and where it writes, less all that a residual target cuts out of its block.

    What reads inside a block that is cut is dropped whole; of the others, writes into the block.
    """
    cuts = cut_layers(dictionaries)
    found = {}
    for dictionary in dictionaries:
        if dictionary.layer in cuts and dictionary.read.site.name in INSIDE_A_BLOCK:
            continue
        writes = tuple(s for s in dictionary.writes if not (s.layer in cuts and s.name in INSIDE_A_BLOCK))
        found[dictionary.name] = dictionary, writes
    return found


def encoded(dictionary: Dictionary, read: Tensor, patterns: Tensor | None = None) -> Tensor:
    """Pre-activations (S, F, r) for what the dictionary reads (S, D); moved by its own patterns (G, S, S) if any."""
    flat = read @ dictionary.W_enc.double().T + dictionary.b_enc.double()
    pre = flat.view(len(read), -1, dictionary.rank)
    if isinstance(dictionary.moved_by, OwnAttention):
        assert patterns is not None
        pre = torch.einsum("fps,sfr->pfr", patterns[dictionary.moved_by.group], pre)
    return pre


def own_patterns(movement: OwnAttention, read: Tensor) -> Tensor:
    """(G, S, S) [query, key]: a causal softmax over scores of its own queries and keys."""
    found = torch.zeros(len(movement.W_q), len(read), len(read), dtype=torch.float64)
    for g in range(len(movement.W_q)):
        queries, keys = (
            _turned(_normed(read @ weight[g].double().T + bias[g].double(), gain, g, movement.norm_eps), movement)
            for weight, bias, gain in (
                (movement.W_q, movement.b_q, movement.q_gain),
                (movement.W_k, movement.b_k, movement.k_gain),
            )
        )
        for p in range(len(read)):
            found[g, p, : p + 1] = (movement.scale * keys[: p + 1] @ queries[p]).softmax(0)
    return found


def _normed(x: Tensor, gain: Tensor | None, group: int, epsilon: float) -> Tensor:
    """Queries or keys of a group over their root mean square, times the gain, if there is one."""
    return x if gain is None else x / (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() * gain[group].double()


def _turned(x: Tensor, movement: OwnAttention) -> Tensor:
    """Rotary position: as complex numbers x_i + i x_{i + E/2}, multiplied by exp(i p v_i), v_i = theta^(-2i/E)."""
    half = x.shape[-1] // 2
    if movement.rotary_speeds is not None:
        speed = movement.rotary_speeds.double()
    elif movement.rotary_theta is not None:
        speed = movement.rotary_theta ** (-torch.arange(half).double() / half)
    else:
        return x
    angle = torch.outer(torch.arange(len(x)).double(), speed)
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


def gated(dictionary: Dictionary, pre: Tensor) -> Tensor:
    """Activations (S, F, r), zero where a feature is not active; the soft threshold shortens, all others pass."""
    size = pre[..., 0] if dictionary.rank == 1 else pre.norm(dim=-1)
    active = _active(dictionary, size)
    if dictionary.activation.kind == "group_soft":
        assert dictionary.threshold is not None
        pre = pre * (1 - dictionary.threshold.double() / size).unsqueeze(-1)
    return torch.where(active.unsqueeze(-1), pre, 0.0)


def _active(dictionary: Dictionary, size: Tensor) -> Tensor:
    """Which features are active, (S, F), by their pre-activation or its length."""
    activation = dictionary.activation
    if activation.kind == "identity":
        return size != 0
    if activation.kind == "topk":
        assert activation.k is not None
        cut = size.sort(dim=1, descending=True).values[:, activation.k - 1, None]
        return (size >= cut) & (size > 0)
    threshold = 0.0 if dictionary.threshold is None else dictionary.threshold.double()
    return size > threshold


def strongest(movement: HeadLoading, activations: Tensor) -> Tensor:
    """The activations (S, F, r) of the context's top-k features, by activation summed over the context; others zero."""
    total = (activations[..., 0] if activations.shape[-1] == 1 else activations.norm(dim=-1)).sum(0)
    if movement.context_k is None:
        return activations
    order = total.argsort(descending=True)
    assert all(total[a] > total[b] or total[a] == 0 for a, b in pairwise(order))
    chosen = torch.zeros_like(activations)
    chosen[:, order[: movement.context_k]] = activations[:, order[: movement.context_k]]
    return chosen


def with_identity(pattern: Tensor) -> Tensor:
    """(H + 1, S, S): one more head, the last, that looks at its own position."""
    return torch.cat([pattern, torch.eye(pattern.shape[-1]).to(pattern)[None]])


def arrived(movement: HeadLoading, activations: Tensor, pattern: Tensor) -> Tensor:
    """(S, F, r): `sum_s P_f[p, s] a_f[s]`, P_f the loaded sum of the patterns (H + 1, S, S), identity last."""
    moved_by = torch.einsum("fh,hps->fps", movement.weights.double(), pattern)
    return torch.einsum("fps,sfr->pfr", moved_by, activations)
