"""Every figure of the default's model card, measured on held-out text and prompts.

    python examples/default/evaluate.py --text ../shared/data/text --corpus build/corpus/held_out.jsonl \\
        --out circuits/default

Writes `figures.json` and `MODEL_CARD.md` into the folder of the embedded default.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import tasks
import torch
from accuracy import task_accuracy
from corpus import Corpus
from model_card import write_card

import circuits
from circuits.text import read_documents
from circuits.training import measure

SENTENCES = (
    "Once upon a time, there was a little", "The little girl went to the park and", "One day, the dog found a big",
    "The king went out of the castle and rode away on his", "She opened the door and saw", "The old man sat down and",
    "Tom was very happy because", "It was a dark night, and the", "The boy asked his mother if he could",
    "They walked along the road until they came to", "The bird flew up into the", "He took the book from the table and",
    "In the morning the sun was", "The two friends played with the", "She was so tired that she",
    "The farmer had a", "When the rain stopped, the children", "The cat looked at the", "He did not know what to",
    "At last they came to a great",
)  # fmt: skip


def text_loss(model: circuits.Model, corpus: Corpus) -> dict[str, float]:
    """Mean loss a token, in nats, on held-out stories and books, in windows of 255 tokens after BOS."""
    figures = {}
    for shelf, parts in corpus.shelves.items():
        total, count = 0.0, 0
        for part in parts[:150]:
            ids = torch.tensor([[corpus.bos, *part[:255].tolist()]])
            losses = torch.nn.functional.cross_entropy(model.base.lm(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
            total, count = total + float(losses), count + ids.shape[1] - 1
        figures[shelf] = total / count
    return figures


def continuations(model: circuits.Model) -> list[str]:
    """Greedy continuations of twenty plain-sentence prompts."""
    tokenizer, found = model.base.tokenizer, []
    for text in SENTENCES:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        out = model.base.lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=14, do_sample=False)
        found.append(f"{text} | {tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()}")
    return found


def graph_prompts(corpus: Corpus, tokenizer: object, count: int) -> Iterator[tuple[str, list[int]]]:
    """Held-out prompts to trace: half story and book text of 8 to 40 tokens, the rest the four tasks."""
    rng = random.Random(5)
    streams = {task: tasks.prompts(task, rng, held_out=True) for task in tasks.TEMPLATES}
    for i in range(count):
        if i % 2 == 0:
            shelf = ("stories", "books")[i // 2 % 2]
            part = rng.choice(corpus.shelves[shelf]).tolist()
            yield shelf, [corpus.bos, *part[: rng.randint(8, 40)]]
        elif (kind := (*streams, "induction")[i // 2 % 4]) == "induction":
            first = [rng.choice(corpus.vocabulary) for _ in range(rng.randint(5, 15))]
            yield kind, [corpus.bos, *first, *first[: rng.randint(2, len(first))]]
        else:
            text = next(streams[kind]).text
            yield kind, [corpus.bos, *tokenizer(text, add_special_tokens=False)["input_ids"]]  # type: ignore[operator]


def graph_figures(model: circuits.Model, corpus: Corpus, count: int) -> dict[str, object]:
    """Scores, ledger gaps and mean L0 over held-out prompts, and the medians of each kind."""
    rows = []
    for kind, ids in graph_prompts(corpus, model.base.tokenizer, count):
        graph = circuits.trace(model, ids, settings=circuits.TraceSettings(left_out=0.0))
        scores, loadings = graph.metadata["scores"], torch.zeros(len(graph.edges), dtype=torch.float64)
        loadings.index_add_(0, torch.tensor(graph.heads.edge.copy()).long(), torch.tensor(graph.heads.weight).double())
        weight = torch.tensor(graph.edges.weight).double()
        named = torch.zeros(len(weight), dtype=torch.bool)
        named[torch.tensor(graph.heads.edge.copy()).long()] = True
        gap = float(((loadings - weight).abs() / weight.abs())[named].max()) if named.any() else 0.0
        l0 = graph.metadata["active_features"] / (4 * 2 * (len(ids) - 1))
        rows.append(
            (kind, scores["replacement"], scores["completeness"], graph.metadata["ledger"]["max_relative_gap"], gap, l0)
        )
    kinds = sorted({row[0] for row in rows})
    return {
        "prompts": len(rows),
        "replacement_median": median(row[1] for row in rows),
        "completeness_median": median(row[2] for row in rows),
        "worst_ledger_gap": max(row[3] for row in rows),
        "worst_head_loading_gap": max(row[4] for row in rows),
        "mean_l0": sum(row[5] for row in rows) / len(rows),
        "by_kind": {
            kind: [round(median(row[i] for row in rows if row[0] == kind), 3) for i in (1, 2)] for kind in kinds
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--model-tokens", required=True, help="Tokens that the model was trained on, for the card.")
    parser.add_argument("--clt-options", default="", help="Options of `circuits train clt`, for the card.")
    parser.add_argument("--sae-options", default="", help="Options of `circuits train attention-sae`, for the card.")
    args = parser.parse_args()
    model = circuits.load(args.out / "model", [args.out / "clt", args.out / "attention-sae"], dtype="float32")
    corpus = Corpus(args.text, model.base.tokenizer, held_out=True, seed=3)
    with torch.no_grad():
        figures = {
            "tasks": task_accuracy(model.base.lm, model.base.tokenizer, corpus, args.prompts),
            "text_loss": text_loss(model, corpus),
            "replacements": measure(model.base, model.replacements, read_documents(model.base, [args.corpus], 128)),
            "graphs": graph_figures(model, corpus, args.prompts),
            "continuations": continuations(model),
        }
    (args.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    settings = {name: getattr(args, name) for name in ("model_tokens", "clt_options", "sae_options")}
    for name, replacement in zip(("clt_features", "sae_features"), model.replacements, strict=True):
        settings[name] = f"{replacement.dictionaries[0].n_features:,}"
    write_card(figures, settings, args.out / "MODEL_CARD.md")


if __name__ == "__main__":
    main()
