"""Text generated under changes: a token at a time with a cache is the whole sequence run again at each step."""

from itertools import islice

import pytest
import torch
from drawn import draw
from plain_interventions import plain
from tiny_models import CASES, MOVING, Case, build

from circuits.feature_runs import Choice
from circuits.generation import Sampling, generate, running, stepwise
from circuits.intervening import Held
from circuits.interventions import Bench, Change, capped

NEW = 3
MORE = {
    "gpt2_mctc_top3": Case("gpt2", moved=("mtc-top4.0", "mtc-rank3-top4.1", "mctc.2"), special=False, seed=61),
}
# A choice there is only where few features of a context move.
TRIED = dict(sorted((CASES | MORE).items())[::2]) | MOVING | MORE
BOTH = [(name, "anew") for name in TRIED]
BOTH += [(name, "held") for name, case in TRIED.items() if any("top4" in kind for kind in case.moved)]


@pytest.mark.parametrize(("name", "choice"), BOTH)
def test_with_a_cache_as_without(name: str, choice: Choice) -> None:
    """Greedy tokens and their logits are those of the whole sequence, run anew in float64 at each step."""
    case = (CASES | MORE)[name]
    model = build(case)
    bench = Bench(model, case.token_ids)
    (changes,) = draw(bench, case, count=1, each=4, seed=sorted(CASES | MORE).index(name))
    changes += [
        Change(change.node.rpartition("_")[0] + "_4:" + "@" + change.node.rpartition("@")[2], "scale", 1.5)
        for change in changes[:2]
        if isinstance(change, Change)
    ]
    run = running(bench, changes, NEW, Held(), choice)
    ids = list(case.token_ids)
    for token, logits in islice(stepwise(bench, run, Sampling()), NEW):
        expected, _ = plain(model, ids, changes, special=case.special, n_prompt=len(case.token_ids), choice=choice)
        expected = capped(model.base, expected[-1])
        assert torch.allclose(logits.double(), expected, atol=5e-4, rtol=5e-4), (len(ids), changes)
        assert token == int(logits.argmax())
        ids.append(token)
    text = generate(model, case.token_ids, changes, max_new_tokens=NEW, choice=choice)
    assert text.changed.token_ids == tuple(ids[len(case.token_ids) :])


def test_the_choice_of_the_context_matters() -> None:
    """With few features of a context moving, a held choice and one made anew lead to other logits."""
    case = CASES["llama_mtc_top4"]
    model = build(case)
    bench = Bench(model, case.token_ids)
    changes = [Change(f"k{layer}_{f}_:", "scale", 3.0) for layer in range(3) for f in range(12)]
    both = []
    for choice in ("anew", "held"):
        run = running(bench, changes, 8, Held(), choice)  # type: ignore[arg-type]
        both.append(torch.stack([logits for _, logits in islice(stepwise(bench, run, Sampling()), 8)]))
    assert torch.equal(both[0][0], both[1][0])
    assert float((both[0] - both[1]).abs().max()) > 1e-3
