"""How often a model gives the answer to held-out task prompts: in training, and for the model card."""

import random
from typing import Any

import tasks
import torch
from corpus import Corpus


def task_accuracy(lm: Any, tokenizer: Any, corpus: Corpus, count: int) -> dict[str, float]:
    """Accuracy on held-out task prompts: the answer is first (the other name before the giver, the right letter)."""
    rng = random.Random(99)
    figures = {}
    for task in tasks.TEMPLATES:
        stream, right = tasks.prompts(task, rng, held_out=True), 0
        for _ in range(count):
            prompt = next(stream)
            ids = [corpus.bos, *tokenizer(prompt.text, add_special_tokens=False)["input_ids"]]
            answer = tokenizer(prompt.answer, add_special_tokens=False)["input_ids"][0]
            right += int(lm(torch.tensor([ids])).logits[0, -1].argmax()) == answer
        figures[task] = right / count
    hits, seen = 0, 0
    for _ in range(count):
        period = rng.randint(10, 60)
        first = [rng.choice(corpus.vocabulary) for _ in range(period)]
        top = lm(torch.tensor([[corpus.bos, *first, *first]])).logits[0, period + 1 : -1].argmax(-1)
        hits += int((top == torch.tensor(first[1:])).sum())
        seen += period - 1
    figures["induction"] = hits / seen
    return figures
