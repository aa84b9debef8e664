"""Every model family: what runs with hooks and without changes is the model itself, prompt and generated text.

That changes do what they should in every family is in the tests over all cases, `test_frozen.py`, `test_real.py` and
`test_generation.py`.
"""

import pytest
import torch
from tiny_models import Case, build

from circuits.generation import generate
from circuits.interventions import Bench, Change, capped

IDS = [3, 7, 1, 3, 10, 2]


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma2", "gemma3", "olmo2", "neox", "neox_sequential"])
def test_without_changes_it_is_the_model_itself(family: str) -> None:
    """Logits through the final soft cap are Hugging Face's, and so are greedy tokens beyond a sliding window."""
    case = Case(family, moved=("mtc.0", "mtc-top4.1"), attention={2: "z"}, special=False, seed=91)  # type: ignore[arg-type]
    model = build(case)
    base, ids = model.base, torch.tensor([IDS])
    with torch.no_grad():
        logits = base.lm(ids).logits[0]
        own = base.lm.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
    found = Bench(model, IDS).run([[]], positions=range(len(IDS)))
    assert torch.allclose(capped(base, found.logits[0]), logits, atol=2e-6)
    assert torch.allclose(found.probabilities[0], logits.softmax(-1), atol=2e-6)
    changes = [Change(f"k{layer}_{feature}_:", "scale", -4.0) for layer in range(2) for feature in range(12)]
    text = generate(model, IDS, changes, max_new_tokens=8)
    assert list(text.baseline.token_ids) == own[0, len(IDS) :].tolist()
    assert text.changed.probabilities != text.baseline.probabilities
    again = [generate(model, IDS, changes, max_new_tokens=8, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert again[0] == again[1]
    assert again[0].changed.token_ids != again[2].changed.token_ids
