"""Checkpoints as OpenMOSS's `lm_saes` saves them, and its formulas in float64, line by line after its source.

github.com/OpenMOSS/Language-Model-SAEs, `src/lm_saes/models/{sparse_dictionary,sae,clt,lorsa}.py`; for Llama Scope
`src/lm_saes/sae.py` and `post_processing.py` as of 2024. F features, D width, T positions.
"""

import json
from math import pi, sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

F, D, T = 24, 16, 7
NORM_IN, NORM_OUT = 7.0, 2.5
LORSA = {
    "sae_type": "lorsa",
    "n_qk_heads": 4,
    "d_qk_head": 6,
    "rotary_dim": 6,
    "rotary_base": 100,
    "rotary_adjacent_pairs": True,
    "rotary_scale": 1,
    "positional_embedding_type": "rotary",
    "use_post_qk_ln": False,
    "normalization_type": None,
    "eps": 1e-6,
    "attn_scale": None,
    "n_ctx": 8,
    "act_fn": "topk",
}
NTK = {
    "use_NTK_by_parts_rope": True,
    "NTK_by_parts_factor": 8.0,
    "NTK_by_parts_low_freq_factor": 1.0,
    "NTK_by_parts_high_freq_factor": 4.0,
    "old_context_len": 64,
}
Tensors = dict[str, Tensor]
Values = dict[str, Any]


def draw(seed: int, **shapes: tuple[int, ...]) -> Tensors:
    """Random tensors by name; a dot in a name is written as two underscores."""
    random = torch.Generator().manual_seed(seed)
    return {name.replace("__", "."): torch.randn(shape, generator=random) * 0.5 for name, shape in shapes.items()}


def common(hook_in: str, hook_out: str, **more: Any) -> Values:
    """What every configuration has."""
    given: Values = {"hook_point_in": hook_in, "hook_point_out": hook_out, "d_model": D, "expansion_factor": F / D}
    given |= {"act_fn": "relu", "top_k": 4, "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True}
    return given | {"use_decoder_bias": True, "dtype": "torch.float32"} | more


def write(folder: Path, values: Values, tensors: Tensors, model: str = "Qwen/Qwen3-tiny", container: str = "") -> Path:
    """One checkpoint with the average norms of its hook points."""
    folder.mkdir(parents=True, exist_ok=True)
    ins = values.get("hook_points_in") or [values["hook_point_in"]]
    outs = values.get("hook_points_out") or [values["hook_point_out"]]
    norms = {hook: norm for hooks, norm in ((outs, NORM_OUT), (ins, NORM_IN)) for hook in hooks}
    held = tensors | {f"dataset_average_activation_norm.{hook}": torch.tensor(norm) for hook, norm in norms.items()}
    if container == ".pt":
        torch.save({"sae": held, "version": "2.0.0b28"}, folder / "sae_weights.pt")
    else:
        save_file(held, folder / "sae_weights.safetensors", {"version": "2.0.0b28"})
    (folder / "config.json").write_text(json.dumps(values))
    if model:
        (folder / "lm_config.json").write_text(json.dumps({"model_name": model, "prepend_bos": True}))
    return folder


def sae(seed: int, **values: Any) -> Tensors:
    """An SAE's parameters."""
    found = draw(seed, W_E=(D, F), b_E=(F,), W_D=(F, D), b_D=(D,))
    if values.get("act_fn") == "jumprelu":
        found |= draw(seed + 1, activation_function__log_jumprelu_threshold=(F,))
    return found


def lorsa(seed: int, heads: int, width: int, **values: Any) -> Tensors:
    """A Lorsa's parameters, and the buffers that its state has too."""
    found = draw(
        seed, W_Q=(heads, D, width), W_K=(heads, D, width), b_Q=(heads, width), b_K=(heads, width),
        W_V=(F, D), b_V=(F,), W_O=(F, D), b_D=(D,), ln_q__w=(heads, width), ln_k__w=(heads, width),
    )  # fmt: skip
    if not values.get("use_post_qk_ln"):
        del found["ln_q.w"], found["ln_k.w"]
    if values.get("act_fn") == "jumprelu":
        found |= draw(seed + 1, activation_function__log_jumprelu_threshold=(F,))
    return found | {"mask": torch.ones(8, 8, dtype=torch.bool).tril()}


def cross_layer(n_layers: int, **more: Any) -> tuple[Values, Tensors]:
    """Configuration and parameters of a CLT."""
    layers = range(n_layers)
    values = common("", "", sae_type="clt", **more)
    del values["hook_point_in"], values["hook_point_out"]
    values["hook_points_in"] = [f"blocks.{n}.ln2.hook_normalized" for n in layers]
    values["hook_points_out"] = [f"blocks.{n}.hook_mlp_out" for n in layers]
    tensors = draw(6, W_E=(n_layers, D, F), b_E=(n_layers, F), **{f"W_D__{n}": (n + 1, F, D) for n in layers})
    tensors |= draw(7, **{f"b_D__{n}": (D,) for n in layers})
    if values["act_fn"] == "jumprelu":
        tensors |= draw(8, activation_function__log_jumprelu_threshold=(n_layers, F))
    return values, tensors


def write_llama_scope(folder: Path, name: str, seed: int, values: Values) -> Tensors:
    """A checkpoint of 2024, for Llama 3.1: torch's linear layers, and average norms in `hyperparams.json`."""
    drawn = draw(seed, encoder__weight=(F, D), encoder__bias=(F,), decoder__weight=(D, F), decoder__bias=(D,))
    (folder / name / "checkpoints").mkdir(parents=True)
    save_file(drawn, folder / name / "checkpoints" / "final.safetensors")
    (folder / name / "hyperparams.json").write_text(json.dumps(values))
    return drawn


def llama_scope_values(hook_in: str, hook_out: str, **more: Any) -> Values:
    """Its configuration: one threshold for all features."""
    norms = {"in": NORM_IN, "out": NORM_OUT}
    more |= {"d_sae": F, "expansion_factor": 8, "jump_relu_threshold": 0.4, "dataset_average_activation_norm": norms}
    return common(hook_in, hook_out, **more)


def write_all(folder: Path, name: str, **more: Any) -> Path:
    """A transcoder and a Lorsa for each of two layers, one directory each, as in a Hugging Face repository."""
    for layer in range(2):
        block = f"blocks.{layer}"
        values = common(f"{block}.ln2.hook_normalized", f"{block}.hook_mlp_out", sae_type="sae", act_fn="topk")
        write(folder / f"layer{layer}_transcoder_8x_k64", values, sae(20 + layer, **values), name)
        values = common(f"{block}.ln1.hook_normalized", f"{block}.hook_attn_out") | LORSA | more
        write(folder / f"layer{layer}_lorsa_8x_k64", values, lorsa(30 + layer, 4, 6, **values), name)
    return folder


def factors(values: Values) -> tuple[float, float]:
    """`compute_norm_factor` of the input and of the label."""
    if values["norm_activation"] == "inference":
        return 1.0, 1.0
    same = "hook_point_in" in values and values["hook_point_in"] == values["hook_point_out"]
    return sqrt(D) / NORM_IN, sqrt(D) / (NORM_IN if same else NORM_OUT)


def acts(values: Values, pre: Tensor, norms: Tensor, log_threshold: Tensor | None, *, rectify: bool = False) -> Tensor:
    """`encode` from the pre-activations (T, F) on."""
    gated = pre * norms if values["sparsity_include_decoder_norm"] else pre
    match values["act_fn"]:
        case "relu":
            found = gated * (gated > 0)
        case "jumprelu":
            assert log_threshold is not None
            found = gated * (gated > log_threshold.double().exp())
        case _:
            gated = gated * (gated > 0) if rectify else gated
            best = gated.topk(values["top_k"], dim=-1)
            found = torch.zeros_like(gated).scatter(-1, best.indices, best.values)
    return found / norms if values["sparsity_include_decoder_norm"] else found


def sae_formula(values: Values, tensors: Tensors, x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations (T, F) and what is rebuilt (T, D) of x (T, D), denormalised."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    f_in, f_out = factors(values)
    pre = x.double() * f_in @ t["W_E"] + t["b_E"]
    a = acts(values, pre, t["W_D"].norm(dim=1), t.get("activation_function.log_jumprelu_threshold"))
    y = a @ t["W_D"]
    return a, (y + t["b_D"] if values["use_decoder_bias"] else y) / f_out


def llama_scope_formula(values: Values, tensors: Tensors, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a checkpoint of 2024: `standardize_parameters_of_dataset_activation_scaling`, then
    `transform_to_unit_decoder_norm`, then `encode`."""
    enc, b_enc, dec, b_dec = (tensors[f"{a}.{b}"].double() for a in ("encoder", "decoder") for b in ("weight", "bias"))
    norm = values["dataset_average_activation_norm"]
    f_in, f_out = sqrt(D) / norm["in"], sqrt(D) / norm["out"]
    b_enc, b_dec, dec = b_enc / f_in, b_dec / f_out, dec * f_in / f_out
    size = dec.norm(dim=0)
    dec, enc, b_enc = dec / size, enc * size[:, None], b_enc * size
    x = x.double()
    if values["apply_decoder_bias_to_pre_encoder"]:
        x = x - b_dec
    pre = x @ enc.T + b_enc
    a = torch.where(pre > values["jump_relu_threshold"], pre, 0.0)
    return a, a @ dec.T + b_dec


def clt_formula(values: Values, tensors: Tensors, xs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Activations and outputs of every layer of a CLT."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    f_in, f_out = factors(values)
    n = len(xs)
    every = []
    for layer in range(n):
        norms = sum(t[f"W_D.{to}"][layer].square().sum(-1) for to in range(layer, n))
        log_threshold = t.get("activation_function.log_jumprelu_threshold")
        pre = xs[layer].double() * f_in @ t["W_E"][layer] + t["b_E"][layer]
        mine = None if log_threshold is None else log_threshold[layer]
        every.append(acts(values, pre, torch.as_tensor(norms).sqrt(), mine, rectify=True))
    outputs = [
        (sum(every[layer] @ t[f"W_D.{to}"][layer] for layer in range(to + 1)) + t[f"b_D.{to}"]) / f_out
        for to in range(n)
    ]
    return every, outputs


def lorsa_formula(values: Values, tensors: Tensors, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Activations (T, F), patterns (Q, T, T) and what is rebuilt (T, D) of one context x (T, D)."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    f_in, f_out = factors(values)
    x, heads = x.double() * f_in, values["n_qk_heads"]
    sides = []
    for side in ("Q", "K"):
        made = torch.einsum("sd,Qdq->sQq", x, t[f"W_{side}"]) + t[f"b_{side}"]
        made = made.repeat_interleave(heads // made.shape[1], dim=1)
        if values["use_post_qk_ln"]:
            gain = t[f"ln_{side.lower()}.w"].repeat_interleave(heads // len(t[f"ln_{side.lower()}.w"]), dim=0)
            made = made / (made.pow(2).mean(-1, keepdim=True) + values["eps"]).sqrt() * gain
        sides.append(turned(values, made) if values["positional_embedding_type"] == "rotary" else made)
    scale = values["attn_scale"] or sqrt(values["d_qk_head"])
    scores = torch.einsum("qnd,knd->nqk", *sides) / scale
    causal = torch.ones(len(x), len(x), dtype=torch.bool).tril()
    pattern = torch.where(causal, scores, -torch.inf).softmax(-1)
    v = (x @ t["W_V"].T + t["b_V"]).T.reshape(heads, F // heads, len(x))
    pre = torch.einsum("hqk,hrk->hrq", pattern, v).flatten(0, 1).T
    a = acts(values, pre, t["W_O"].norm(dim=1), t.get("activation_function.log_jumprelu_threshold"))
    y = a @ t["W_O"]
    return a, pattern, (y + t["b_D"] if values["use_decoder_bias"] else y) / f_out


def turned(values: Values, x: Tensor) -> Tensor:
    """`_apply_rotary` of x (T, Q, E)."""
    x = x.repeat_interleave(values.get("rotary_scale", 1), dim=-1)
    n, adjacent = values["rotary_dim"], values["rotary_adjacent_pairs"]
    freq = frequencies(values, n)
    freq = freq.repeat_interleave(2) if adjacent else freq.repeat(2)
    angles = torch.arange(len(x)).double()[:, None] / freq[None, :]
    rot, rest = x[..., :n], x[..., n:]
    flip = rot.clone()
    if adjacent:
        flip[..., ::2], flip[..., 1::2] = -rot[..., 1::2], rot[..., ::2]
    else:
        flip[..., : n // 2], flip[..., n // 2 :] = -rot[..., n // 2 :], rot[..., : n // 2]
    return torch.cat([rot * angles.cos()[:, None] + flip * angles.sin()[:, None], rest], dim=-1)


def frequencies(values: Values, n: int) -> Tensor:
    """`_calculate_sin_cos_rotary` up to the wavelengths over two pi, (n / 2,)."""
    base = values["rotary_base"]
    if not values.get("use_NTK_by_parts_rope"):
        return torch.as_tensor(base ** (torch.arange(n // 2).double() / (n / 2)))
    inverse = 1.0 / (base ** (torch.arange(0, n, 2).double() / n))
    factor, old = values["NTK_by_parts_factor"], values["old_context_len"]
    low, high = values["NTK_by_parts_low_freq_factor"], values["NTK_by_parts_high_freq_factor"]
    wavelen = 2 * pi / inverse
    scaled = torch.where(wavelen > old / low, inverse / factor, inverse)
    smooth = (old / wavelen - low) / (high - low)
    smoothed = (1 - smooth) * scaled / factor + smooth * scaled
    medium = ~(wavelen < old / high) * ~(wavelen > old / low)
    return 1 / torch.where(medium, smoothed, scaled)
