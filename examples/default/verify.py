"""Is the default's graph of a prompt true? Ablations, over held-out prompts of each behaviour and each replacement.

    python examples/default/verify.py --text ../shared/data/text --prompts 50 --out build/verification_0.json --part 0/2
    python examples/default/verify.py --merge build/verification_*.json --out circuits/default/verification.json

Goes on where a stopped run left off. The first form writes one row a prompt, the second the figures.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tasks
from corpus import Corpus
from rich.progress import Progress

import circuits
from circuits.graph.formats.whole_file import write_whole
from circuits.statistics import agreement, median_interval
from circuits.verification import verify

REPLACEMENTS = ("clt", "attention-sae", "mtc", "weakly-causal")
BEHAVIOURS = ("stories", "books", "induction", *tasks.TEMPLATES)


def behaviour_prompts(corpus: Corpus, tokenizer: Any, behaviour: str, count: int) -> Iterator[list[int]]:
    """Held-out prompts of one behaviour: 12 to 24 tokens of text, a repeated sequence, or a task's text."""
    rng = random.Random(f"verify {behaviour}")
    stream = tasks.prompts(behaviour, rng, held_out=True) if behaviour in tasks.TEMPLATES else None
    for _ in range(count):
        if stream is not None:
            yield [corpus.bos, *tokenizer(next(stream).text, add_special_tokens=False)["input_ids"]]
        elif behaviour == "induction":
            first = [rng.choice(corpus.vocabulary) for _ in range(rng.randint(5, 12))]
            yield [corpus.bos, *first, *first[: rng.randint(2, len(first) - 1)]]
        else:
            yield [corpus.bos, *rng.choice(corpus.shelves[behaviour]).tolist()[: rng.randint(12, 24)]]


def row_of(model: circuits.Model, ids: list[int], nodes: int) -> dict[str, Any]:
    """One prompt's verification with its nodes' predicted and measured effects."""
    graph = verify(model, circuits.trace(model, ids), nodes=nodes)
    tested = ~np.isnan(graph.nodes.measured)
    found: dict[str, Any] = graph.metadata["verification"]
    return found | {
        "predicted": graph.nodes.predicted[tested].round(5).tolist(),
        "measured": graph.nodes.measured[tested].round(5).tolist(),
        "scores": graph.metadata["scores"],
    }


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over prompts with bootstrap intervals; correlations are within a prompt, and one of all nodes pooled."""
    found: dict[str, Any] = {"prompts": len(rows)}
    for group, figure in (
        ("nodes", "spearman"), ("nodes", "slope"), ("nodes", "median_effect"), ("random", "spearman"),
        ("random", "median_effect"), ("patterns", "spearman"), ("patterns", "slope"),
    ):  # fmt: skip
        values = [row[group][figure] for row in rows if row[group][figure] is not None]
        found[f"{group} {figure}"] = _median(values)
    for figure in ("sufficiency", "necessity"):
        found[figure] = _median([row[figure] for row in rows if row[figure] is not None])
    pooled = [np.concatenate([row[side] for row in rows]) for side in ("predicted", "measured")]
    together = agreement(*pooled, seed=0, draws=200)
    found["pooled spearman"] = [round(value, 4) for value in (together["spearman"], *together["spearman_interval"])]
    above = [row["nodes"]["median_effect"] > row["random"]["median_effect"] for row in rows
             if row["random"]["median_effect"] is not None]  # fmt: skip
    found["top above random"] = sum(above) / max(len(above), 1)
    return found


def _median(values: list[float]) -> list[float] | None:
    """Median and its 95 % interval."""
    if not values:
        return None
    low, high = median_interval(np.array(values), seed=0, draws=2000)
    return [round(value, 4) for value in (median(values), low, high)]


def merge(paths: list[Path]) -> dict[str, Any]:
    """Figures of each replacement, over all prompts and by behaviour."""
    every = [row for path in paths for row in json.loads(path.read_text(encoding="utf-8"))]
    rows = list({(row["replacement"], row["behaviour"], row["number"]): row for row in every}.values())
    result: dict[str, Any] = {}
    for name in REPLACEMENTS:
        mine = [row for row in rows if row["replacement"] == name]
        if mine:
            behaviours = {b: figures(some) for b in BEHAVIOURS if (some := [r for r in mine if r["behaviour"] == b])}
            result[name] = {"all": figures(mine), "behaviours": behaviours}
    return result


def run(args: argparse.Namespace) -> None:
    """Verify this part's prompts, one row each, kept as they come."""
    part, parts = map(int, args.part.split("/"))
    rows: list[dict[str, Any]] = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else []
    done = {(row["replacement"], row["behaviour"], row["number"]) for row in rows}
    models = {name: circuits.load(None, name) for name in REPLACEMENTS}
    tokenizer = models["clt"].base.tokenizer
    corpus = Corpus(args.text, tokenizer, held_out=True, seed=3)
    jobs = [
        (name, behaviour, number, ids)
        for behaviour in BEHAVIOURS
        for number, ids in enumerate(behaviour_prompts(corpus, tokenizer, behaviour, args.prompts))
        if number % parts == part
        for name in REPLACEMENTS
    ]
    jobs.sort(key=lambda job: job[2])
    with Progress() as progress:
        for name, behaviour, number, ids in progress.track(jobs, description="verifying"):
            if (name, behaviour, number) not in done:
                row = row_of(models[name], ids, args.nodes)
                rows.append({"replacement": name, "behaviour": behaviour, "number": number, "tokens": len(ids)} | row)
                write_whole(args.out, (json.dumps(rows) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--nodes", type=int, default=40, help="Strongest nodes that are ablated, and as many random.")
    parser.add_argument("--part", default="0/1", help="Which part of the prompts, such as 0/2 and 1/2.")
    parser.add_argument("--merge", type=Path, nargs="*", help="Rows to put together instead of a run.")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.merge:
        args.out.write_text(json.dumps(merge(args.merge), indent=1) + "\n", encoding="utf-8")
    else:
        run(args)


if __name__ == "__main__":
    main()
