"""Where transcoders of several formats read, by the names of modules and of TransformerLens's hooks.

The norm before an MLP has different names in different models of transformers. What is read in front of it is
`resid_mid` as it is, what it gives is `resid_mid` through the whole norm. TransformerLens's `ln2.hook_normalized` lies
before the gain of an RMSNorm, but up to version 2 behind gain and bias of a LayerNorm (`components/rms_norm.py`,
`layer_norm.py`), so what it holds depends on the model.
"""

import re
from pathlib import Path

from circuits.replacements.errors import ReplacementError
from circuits.replacements.sites import Norm

NORMS_BEFORE_MLP = ("ln_2", "post_attention_layernorm", "pre_feedforward_layernorm")
RMS_NORM = re.compile(r"llama|qwen|gemma|mistral|mixtral|olmo-?2|phi-?3|deepseek|gpt-oss|(?<![a-z])yi-", re.IGNORECASE)
LAYER_NORM = re.compile(
    r"pythia|neox|gpt-?2|gpt-?j|gpt-neo|bloom|stablelm|phi-?[12](?!\d)|(?<![a-z])(?:opt|gelu|solu)-", re.IGNORECASE
)


def norm_of_hook_normalized(*names: str) -> Norm | None:
    """What `hook_normalized` holds in TransformerLens 2, told by the first of the names that names a model for sure:
    `scale` with an RMSNorm, `full` with a LayerNorm, None if no name tells or one speaks for both."""
    for text in names:
        rms, layer = RMS_NORM.search(text), LAYER_NORM.search(text)
        if rms and layer:
            return None
        if rms or layer:
            return "scale" if rms else "full"
    return None


def norm_of_ln2(config: Path, model_name: object) -> Norm:
    """The same of a configuration that says `model_name`; a `ReplacementError` where that names no known model."""
    found = norm_of_hook_normalized(str(model_name or ""))
    if found is None:
        raise ReplacementError(
            f"{config}: reads ln2.hook_normalized, which a LayerNorm has behind its gain and an RMSNorm before it, and "
            f"model_name {model_name!r} names no known model; write its Hugging Face name there"
        )
    return found
