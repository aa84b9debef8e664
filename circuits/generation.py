"""Text that the base model goes on with while features are changed, beside the text that it goes on with alone.

The prompt is run once, then every token with a cache of keys and values. Changes with an open range act on generated
positions too. A multitoken transcoder moves the k strongest features of a context, and a context that grows has more to
choose from: the positions of the prompt share the prompt's choice; a generated position has the choice of all up to
itself (`anew`), or still that of the prompt (`held`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from circuits.changes import Change, PatternChange
from circuits.errors import CircuitsError
from circuits.feature_runs import Choice
from circuits.intervening import Held, RealRun
from circuits.interventions import Bench, capped, checked_layers
from circuits.loading import Model
from circuits.prompt import Prompt


@dataclass(frozen=True)
class Continuation:
    """Generated tokens: their ids, their text, and the probability that each had."""

    token_ids: tuple[int, ...]
    text: str
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class GeneratedText:
    """What the model goes on with under changes, and alone."""

    prompt: Prompt
    changed: Continuation
    baseline: Continuation


@dataclass(frozen=True)
class Sampling:
    """How a token is taken: the most probable one at temperature 0, else drawn."""

    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise CircuitsError(f"temperature is {self.temperature}, expected 0 or more")


def generate(
    model: Model,
    prompt: str | Sequence[int] | Prompt,
    changes: Sequence[Change | PatternChange],
    *,
    max_new_tokens: int,
    layers: range | None = None,
    choice: Choice = "anew",
    temperature: float = 0.0,
    seed: int = 0,
) -> GeneratedText:
    """Go on with a prompt under changes, and without.

    Parameters
    ----------
    changes
        As for `Bench.run`. One with an open range, such as `2_17_5:` or `2_17_:`, acts on generated tokens too.
    max_new_tokens
        Fewer if the tokenizer's end of text comes before.
    layers
        Constrained patching at the prompt's positions: what is generated has no recording to be held at.
    choice
        `anew` or `held`: which features of an MTC with a top-k of the context move at generated positions.
    temperature, seed
        Greedy at temperature 0.

    Example
    -------
    >>> generate(circuits.load(), "Once upon a time", [Change("2_17_:", "set", 8.0)], max_new_tokens=20).changed.text

    Raises
    ------
    CircuitsError
        As `Bench.run`; or the text would be longer than the model's context.
    """
    bench = Bench(model, prompt)
    if choice not in ("anew", "held"):
        raise CircuitsError(f"unknown choice {choice!r}; expected anew or held")
    room = model.base.shape.context - bench.recording.n_positions
    if not 1 <= max_new_tokens <= room:
        raise CircuitsError(
            f"max_new_tokens is {max_new_tokens}; expected 1 to {room}: the prompt has {bench.recording.n_positions} "
            f"tokens, and {model.base.name} has a context of {model.base.shape.context}"
        )
    sampling, held = Sampling(temperature, seed), checked_layers(bench.linear, layers)
    runs = (running(bench, changes, max_new_tokens, held, choice), running(bench, (), max_new_tokens, Held(), choice))
    changed, baseline = (_continuation(bench, run, max_new_tokens, sampling) for run in runs)
    return GeneratedText(bench.prepared, changed, baseline)


def running(
    bench: Bench, changes: Sequence[Change | PatternChange], max_new_tokens: int, held: Held, choice: Choice
) -> RealRun:
    """A run of one row over the prompt and what comes after it."""
    plan = bench.planner.plan([changes], longest=bench.recording.n_positions + max_new_tokens)
    nothing = bench.recording.embedding.new_zeros(2, 1, 0)
    return RealRun(bench.linear, plan, bench.on_recording(plan), nothing, held, choice)


def stepwise(bench: Bench, run: RealRun, sampling: Sampling) -> Iterator[tuple[int, Tensor]]:
    """Tokens one after the other, each with the logits (V,), after a final soft cap, that it was taken from."""
    from transformers import DynamicCache

    generator = torch.Generator().manual_seed(sampling.seed)
    cache: Any = DynamicCache()
    ids = bench.recording.token_ids[None]
    unembedding = bench.model.base.unembedding.float()
    while True:
        with torch.no_grad():
            final = run.forward(ids, cache)[0, -1].to(unembedding.device)
            logits = capped(bench.model.base, unembedding @ final)
        if sampling.temperature > 0:
            shares = (logits / sampling.temperature).softmax(-1).cpu()
            token = int(torch.multinomial(shares, 1, generator=generator))
        else:
            token = int(logits.argmax())
        yield token, logits
        ids = torch.tensor([[token]], device=ids.device)


def _continuation(bench: Bench, run: RealRun, max_new_tokens: int, sampling: Sampling) -> Continuation:
    tokenizer = bench.model.base.tokenizer
    end = None if tokenizer is None else tokenizer.eos_token_id
    ids, probabilities = [], []
    for token, logits in islice(stepwise(bench, run, sampling), max_new_tokens):
        ids.append(token)
        probabilities.append(float(logits.softmax(-1)[token]))
        if token == end:
            break
    text = " ".join(f"<{i}>" for i in ids) if tokenizer is None else str(tokenizer.decode(ids))
    return Continuation(tuple(ids), text, tuple(probabilities))
