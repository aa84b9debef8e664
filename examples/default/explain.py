"""Are QK attributions of the default true? Their first pairs, tested by ablating them (issue 4, "What it must show").

    python examples/default/explain.py --text ../shared/data/text --prompts 50 --out circuits/default/explanations.json

Two questions, for each of the default's replacements of attention:

- *Induction*: on repeated sequences, for every head that looks from the last token at what followed its earlier
  occurrence: is the first pair the current token meeting a feature that carries the token before the key? And does the
  attention fall when the pair's features are ablated?
- *Pairs*: for the strongest attention-mediated edges of every behaviour: does ablating the features of the first
  feature-feature pair lower the attention more than ablating random features at the same positions whose contributions
  to the stream have the same norms within 20 %? Edges count whose ten strongest pairs, which a graph keeps, have such a
  pair; those where it comes later (the embeddings' pairs come first) are counted apart. Measured is the log odds of the
  attention, which a saturated head still shows; the QK attributions predict them.
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import Corpus
from rich.progress import track
from scipy.stats import spearmanr
from verify import BEHAVIOURS, behaviour_prompts

import circuits
from circuits.graph import ERROR_KINDS, Graph
from circuits.head_steps import strongest_heads
from circuits.interventions import Bench, Change
from circuits.origins import token_origins
from circuits.prompt import prepare
from circuits.qk_attribution import Explained, HeadStep, QKAttribution
from circuits.sweep import Sweep
from circuits.targets import TopTokens
from circuits.tracing import lay_out
from circuits.verification import addresses

REPLACEMENTS = ("attention-sae", "mtc", "weakly-causal", "clt")
EDGES = 6
LOOKS = 0.3  # attention from which on a head is said to look
LISTED = 10  # pairs that a graph keeps
RANDOM = 5  # random pairs for each edge; the first is compared with one to one


@dataclass(frozen=True)
class Looked:
    """One step with its pairs in the order of the relative form: query and key part, position, part of the lead."""

    step: HeadStep
    explained: Explained
    number: int
    pairs: list[tuple[int, int, int, float]]

    def predicted(self, query: int, key: int) -> float:
        """What the QK attribution says that ablating a query part and a key part does to the lead."""
        block = self.explained.block
        shares = self.explained.lead_shares[self.number].float()[block.key_of]
        parts = block.pairs(int(self.explained.circuit[self.number]), slice(None)) * shares
        row = block.query.sources == query
        column = (block.key_sources == key) & (block.key_of == self.step.key)
        return -float(parts[row].sum() + parts[:, column].sum() - parts[row][:, column].sum())


def looked(sweep: Sweep, steps: list[HeadStep], top: int = 200) -> Iterator[Looked]:
    """The steps with their pairs."""
    for explained in QKAttribution.of(sweep).explain(steps):
        _, leads = explained.strongest_pairs(top)
        columns = (leads.query, leads.key, leads.place, leads.weight)
        for i, step in enumerate(explained.steps):
            pairs = list(zip(*(column[i].tolist() for column in columns), strict=True))
            yield Looked(step, explained, i, pairs)


def log_odds(attention: torch.Tensor, key: int) -> torch.Tensor:
    """(B,) `log A[key] / (1 - A[key])` of patterns (B, S), without the cancellation in 1 - A."""
    attention = attention.double().clamp(min=1e-40)
    others = attention.clone()
    others[:, key] = 0.0
    return (attention[:, key] / others.sum(1).clamp(min=1e-40)).log()


def norms_at(sweep: Sweep, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes that write at their own position below a layer's attention, and the norm of what they write there."""
    depth = 2 * layer + 1
    written = sweep.rows.stretch(sweep.linear.floor(depth), depth)
    return written.nodes.numpy(), written.vectors.norm(dim=1).numpy()


def matched(sweep: Sweep, layer: int, node: int, rng: random.Random) -> list[int]:
    """Other features at the node's position whose contributions to the stream below the layer have about its norm:
    `RANDOM` of them, the same again where there are fewer, none where there is none."""
    nodes, norms = norms_at(sweep, layer)
    own = norms[nodes == node]
    if not len(own):
        return []
    table = sweep.table
    alike = (table.position[nodes] == table.position[node]) & (table.dictionary[nodes] >= 0) & (nodes != node)
    alike &= np.abs(norms - own[0]) <= 0.2 * own[0]
    others: list[int] = nodes[alike].tolist()
    rng.shuffle(others)
    return [others[i % len(others)] for i in range(RANDOM)] if others else []


def change(bench: Bench, sweep: Sweep, step: HeadStep, groups: list[list[int]]) -> list[float]:
    """How the log odds of a step's attention change when each group of nodes is ablated."""
    batch = [[Change(address, "ablate") for address in addresses(sweep, np.array(group))] for group in groups]
    outcome = bench.run(batch, attention=[(step.layer, step.head, step.query)])
    before = log_odds(outcome.baseline_attention, step.key)
    return (log_odds(outcome.attention[:, 0], step.key) - before).tolist()


def strongest_steps(graph: Graph, count: int) -> list[HeadStep]:
    """The heads of the strongest edges between tokens that are carried by a head of the base model above layer 0."""
    heads = strongest_heads(graph.heads if len(graph.heads) else graph.last_hops, 1)
    target = graph.edges.target[heads.edge]
    total = np.bincount(graph.edges.target, weights=np.abs(graph.edges.weight), minlength=len(graph.nodes))
    score = np.abs(heads.weight) / np.maximum(total[target], 1e-30) * graph.nodes.influence[target]
    able = (heads.layer > 0) & (heads.head >= 0) & (heads.key != heads.query) & (heads.key > 0)
    order = np.flatnonzero(able)[np.argsort(-score[able], kind="stable")]
    columns = (heads.layer, heads.head, heads.query, heads.key)
    steps = (HeadStep(*(int(column[row]) for column in columns)) for row in order)
    return list(dict.fromkeys(steps))[:count]


def test_pairs(model: circuits.Model, ids: list[int], rng: random.Random) -> list[dict[str, Any]]:
    """One prompt's edges: what ablating the first feature-feature pair does, and a matched random pair."""
    graph = circuits.trace(model, ids)
    steps = strongest_steps(graph, EDGES)
    if not steps:
        return []
    sweep = lay_out(model, prepare(model.base, ids), [TopTokens()])
    bench, rows = Bench(model, ids), []
    is_feature = np.append(sweep.table.dictionary >= 0, False)
    for found in looked(sweep, steps):
        step = found.step
        first = next(
            ((rank, q, k) for rank, (q, k, place, w) in enumerate(found.pairs)
             if w > 0 and place == step.key and min(q, k) >= 0 and is_feature[q] and is_feature[k]), None,
        )  # fmt: skip
        others = [matched(sweep, step.layer, node, rng) for node in first[1:]] if first is not None else [[]]
        if first is None or not all(others):
            rows.append({"tested": False, "pair": first is not None})
            continue
        random_pairs = [list(pair) for pair in zip(*others, strict=True)]
        pair, *drawn = change(bench, sweep, step, [list(first[1:]), *random_pairs])
        rows.append(
            {"tested": True, "listed": first[0] < LISTED, "pair_change": pair, "random_change": drawn[0],
             "more": pair < drawn[0], "typical": pair < float(np.median(drawn)),
             "predicted": found.predicted(*first[1:]), "random_predicted": found.predicted(*random_pairs[0])}
        )  # fmt: skip
    return rows


def test_induction(model: circuits.Model, ids: list[int]) -> list[dict[str, Any]]:
    """One repeated sequence: the heads that look at what followed the last token before, and their first pairs."""
    sweep = lay_out(model, prepare(model.base, ids), [TopTokens()])
    query = len(ids) - 1
    earlier = [p for p in range(1, query) if ids[p] == ids[query]]
    keys = [p + 1 for p in earlier]
    patterns = sweep.linear.recording.patterns
    steps = [
        HeadStep(layer, head, query, key)
        for layer in range(1, patterns.shape[0]) for head in range(patterns.shape[1]) for key in keys
        if float(patterns[layer, head, query, key]) >= LOOKS
    ]  # fmt: skip
    if not steps:
        return []
    origins, bench, rows = token_origins(sweep)[:, :-1], Bench(model, ids), []
    is_error = np.append(np.isin(sweep.table.kind, ERROR_KINDS), True)  # constants, numbered from the end, count too
    for one in looked(sweep, steps):
        found = [(q, k) for q, k, place, w in one.pairs if w > 0 and place == one.step.key]
        named = [pair for pair in found if not any(node < 0 or is_error[node] for node in pair)]
        row: dict[str, Any] = {"layer": one.step.layer}
        for label, some in (("first", found), ("named", named)):
            carried = [int(origins[node].argmax()) if node >= 0 else -1 for node in (some[0] if some else (-1, -1))]
            current, previous = carried[0] == one.step.query, carried[1] == one.step.key - 1
            row |= {f"{label} current": current, f"{label} previous": previous,
                    f"{label} both": current and previous, f"{label} either": current or previous}  # fmt: skip
        features = [node for node in (named[0] if named else ()) if sweep.table.dictionary[node] >= 0]
        if features:
            row["change"] = change(bench, sweep, one.step, [features])[0]
        rows.append(row)
    return rows


def share(rows: list[dict[str, Any]], name: str) -> float:
    return round(sum(bool(row[name]) for row in rows) / max(len(rows), 1), 4)


def summary(pairs: dict[str, list[dict[str, Any]]], induction: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares and medians of both tests."""
    moved = [row["change"] for row in induction if "change" in row]
    told = ("both", "either", "current", "previous")
    result: dict[str, Any] = {
        "induction": {
            "heads": len(induction),
            "first pair": {name: share(induction, f"first {name}") for name in told},
            "first pair without errors and biases": {name: share(induction, f"named {name}") for name in told},
            "tested by ablation": len(moved),
            "attention falls": round(sum(value < 0 for value in moved) / max(len(moved), 1), 4),
            "median change of log odds": round(float(np.median(moved)), 4) if moved else None,
        },
        "pairs": {},
    }
    everything = [row for rows in pairs.values() for row in rows]
    for name, rows in [("all", everything), *pairs.items()]:
        tested = [row for row in rows if row["tested"]]
        listed = [row for row in tested if row["listed"]]
        result["pairs"][name] = {
            "edges": len(rows),
            "no pair": sum(not row["tested"] and not row["pair"] for row in rows),
            "no match": sum(not row["tested"] and row["pair"] for row in rows),
            "listed": _figures(listed),
            "later": _figures([row for row in tested if not row["listed"]]),
        }
    return result


def _figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How often the pair lowers the attention more than the random one, by how much, and as predicted."""
    if not rows:
        return {"tested": 0}
    columns = {
        name: np.array([row[name] for row in rows]) for name in rows[0] if name.endswith(("change", "predicted"))
    }
    predicted = np.concatenate([columns["predicted"], columns["random_predicted"]])
    measured = np.concatenate([columns["pair_change"], columns["random_change"]])
    return {
        "tested": len(rows),
        "more than random": share(rows, "more"),
        "more than the median of five": share(rows, "typical"),
        "lowers": round(float((columns["pair_change"] < 0).mean()), 4),
        "median change": round(float(np.median(columns["pair_change"])), 4),
        "median random change": round(float(np.median(columns["random_change"])), 4),
        "rank correlation of predicted and measured": round(float(spearmanr(predicted, measured).statistic), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--replacements", nargs="*", default=REPLACEMENTS)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    result: dict[str, Any] = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    for name in args.replacements:
        model = circuits.load(None, name)
        corpus = Corpus(args.text, model.base.tokenizer, held_out=True, seed=3)
        pairs: dict[str, list[dict[str, Any]]] = defaultdict(list)
        induction: list[dict[str, Any]] = []
        rng = random.Random(11)
        for behaviour in BEHAVIOURS:
            prompts = list(behaviour_prompts(corpus, model.base.tokenizer, behaviour, args.prompts))
            for ids in track(prompts, description=f"{name}, {behaviour}"):
                pairs[behaviour] += test_pairs(model, ids, rng)
                if behaviour == "induction":
                    induction += test_induction(model, ids)
        result[name] = summary(pairs, induction)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
