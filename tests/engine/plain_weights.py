"""The weights of a Hugging Face model under one name for each part, in float64, for the plain reference."""

from typing import Any

import torch
from torch import Tensor, nn

BLOCKS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}
FINAL = {"gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm"}
EMBEDDINGS = {"gpt2": "transformer.wte", "gpt_neox": "gpt_neox.embed_in"}
NORMS = {
    "gpt2": {"attention": "ln_1", "mlp": "ln_2"},
    "gemma2": {
        "attention": "input_layernorm",
        "attention_post": "post_attention_layernorm",
        "mlp": "pre_feedforward_layernorm",
        "mlp_post": "post_feedforward_layernorm",
    },
}


class Weights:
    """A Hugging Face model of any family in float64, one name for each part."""

    def __init__(self, lm: nn.Module) -> None:
        config: Any = lm.config
        self.family = config.model_type
        self.is_gpt2 = self.family == "gpt2"
        self.centred = self.family in ("gpt2", "gpt_neox")
        self.w = {name: tensor.detach().double() for name, tensor in lm.state_dict().items()}
        self.n_layers, self.n_heads = config.num_hidden_layers, config.num_attention_heads
        self.n_kv = getattr(config, "num_key_value_heads", self.n_heads)
        self.width = getattr(config, "head_dim", None) or config.hidden_size // self.n_heads
        epsilons = {"gpt2": "layer_norm_epsilon", "gpt_neox": "layer_norm_eps"}
        self.epsilon = getattr(config, epsilons.get(self.family, "rms_norm_eps"))
        rotary = None if self.is_gpt2 else config.rope_parameters
        self.theta = None if rotary is None else rotary["rope_theta"]
        self.turning = int(self.width * (rotary or {}).get("partial_rotary_factor", 1.0))
        self.scale = self.width**-0.5
        self.score_cap: float | None = None
        self.logit_cap: float | None = None
        self.windows: list[int | None] = [None] * self.n_layers
        self.parallel = self.family == "gpt_neox" and config.use_parallel_residual
        self.has_post_norms = self.family == "gemma2"
        self.embedding = self.w[EMBEDDINGS.get(self.family, "model.embed_tokens") + ".weight"]
        self.unembedding = self.w["lm_head.weight"]
        if self.family == "gemma2":
            self.embedding = self.embedding * config.hidden_size**0.5
            self.scale = config.query_pre_attn_scalar**-0.5
            self.score_cap, self.logit_cap = config.attn_logit_softcapping, config.final_logit_softcapping
            slides = [kind == "sliding_attention" for kind in config.layer_types]
            self.windows = [config.sliding_window if slide else None for slide in slides]

    def _of(self, layer: int, name: str) -> str:
        return f"{BLOCKS.get(self.family, 'model.layers')}.{layer}.{name}"

    def norm_weights(self, which: str, layer: int) -> tuple[Tensor, Tensor | float]:
        """Gain and bias of a norm."""
        usual = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
        if which == "final":
            name = FINAL.get(self.family, "model.norm")
        else:
            name = self._of(layer, NORMS.get(self.family, usual)[which])
        gain = self.w[f"{name}.weight"]
        return 1 + gain if self.family == "gemma2" else gain, self.w.get(f"{name}.bias", 0.0)

    def head_norm(self, layer: int, letter: str) -> Tensor | None:
        """Gain of the norm over each head's query or key."""
        return self.w[self._of(layer, f"self_attn.{letter}_norm.weight")] if self.family == "qwen3" else None

    def projection(self, layer: int, letter: str) -> tuple[Tensor, Tensor]:
        """Weight (out, in) and bias of the q, k, v or o projection."""
        fused = {("gpt2", False): "attn.c_attn", ("gpt2", True): "attn.c_proj"}
        fused |= {("gpt_neox", False): "attention.query_key_value", ("gpt_neox", True): "attention.dense"}
        prefix = self._of(layer, fused.get((self.family, letter == "o"), f"self_attn.{letter}_proj"))
        weight = self.w[f"{prefix}.weight"].T if self.is_gpt2 else self.w[f"{prefix}.weight"]
        bias = self.w.get(f"{prefix}.bias", torch.zeros(len(weight)).double())
        if letter == "o" or self.family not in ("gpt2", "gpt_neox"):
            return weight, bias
        size = self.n_heads * self.width
        rows = torch.arange("qkv".index(letter) * size, ("qkv".index(letter) + 1) * size)
        if self.family == "gpt_neox":
            rows = torch.cat([torch.arange(self.width) + (3 * h + "qkv".index(letter)) * self.width
                              for h in range(self.n_heads)])  # fmt: skip
        return weight[rows], bias[rows]

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        """The MLP's own output, before any post-norm."""
        if self.family in ("gpt2", "gpt_neox"):
            names = ("mlp.c_fc", "mlp.c_proj") if self.is_gpt2 else ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
            up, down = (self.w[self._of(layer, f"{name}.weight")] for name in names)
            up_bias, down_bias = (self.w[self._of(layer, f"{name}.bias")] for name in names)
            up, down = (up, down) if self.is_gpt2 else (up.T, down.T)
            approximate = "tanh" if self.is_gpt2 else "none"
            return nn.functional.gelu(x @ up + up_bias, approximate=approximate) @ down + down_bias
        gate, up, down = (self.w[self._of(layer, f"mlp.{name}_proj.weight")] for name in ("gate", "up", "down"))
        opened = x @ gate.T
        bent = nn.functional.gelu(opened, approximate="tanh") if self.family == "gemma2" else nn.functional.silu(opened)
        return (bent * (x @ up.T)) @ down.T
