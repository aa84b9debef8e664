"""What TransformerLens 3.2.1 computes on a tiny random GPT-2 under several processings: `activations.npz`.

python make.py     in an environment with transformer-lens 3.2.1; writes `model/` and `activations.npz` beside itself
"""

from pathlib import Path

import numpy as np
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import gpt2
from transformers import GPT2Config, GPT2LMHeadModel

HERE = Path(__file__).resolve().parent
IDS = [0, 5, 3, 8, 2, 7]

torch.manual_seed(0)
config = GPT2Config(vocab_size=13, n_positions=8, n_embd=12, n_layer=2, n_head=3, bos_token_id=0, eos_token_id=0)
lm = GPT2LMHeadModel(config).eval()
with torch.no_grad():
    for name, parameter in lm.named_parameters():
        one = 1.0 if "ln" in name and name.endswith("weight") else 0.0
        parameter.copy_(one + 0.4 * torch.randn(parameter.shape))
lm.save_pretrained(HERE / "model")
lm = GPT2LMHeadModel.from_pretrained(HERE / "model").eval()
settings = {
    "d_model": 12, "d_head": 4, "n_heads": 3, "d_mlp": 48, "n_layers": 2, "n_ctx": 8, "d_vocab": 13, "device": "cpu",
    "eps": config.layer_norm_epsilon, "act_fn": config.activation_function, "use_attn_scale": True,
    "normalization_type": "LN", "positional_embedding_type": "standard", "init_weights": False,
    "original_architecture": "GPT2LMHeadModel",
}  # fmt: skip
steps = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
processings = {
    "default": (True, True, True, True),
    "not_centred": (True, False, True, True),
    "values_only": (False, False, False, True),
    "plain": (False, False, False, False),
}
hooks = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_z",
         "ln2.hook_normalized")  # fmt: skip
found = {"ids": np.array(IDS)}
for name, flags in processings.items():
    lens = HookedTransformerConfig(**settings)  # one for each: folding changes it
    model = HookedTransformer(lens, move_to_device=False)
    model.load_and_process_state_dict(gpt2.convert_gpt2_weights(lm, lens), **dict(zip(steps, flags, strict=True)))
    _, cache = model.run_with_cache(torch.tensor([IDS]))
    for layer in range(2):
        for hook in hooks:
            value = cache[f"blocks.{layer}.{hook}"][0]
            found[f"{name}/{layer}/{hook}"] = value.flatten(1).detach().numpy().astype(np.float32)
np.savez_compressed(HERE / "activations.npz", **found)
