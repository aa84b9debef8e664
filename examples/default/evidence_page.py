"""Writes EVIDENCE.md, the page on whether the default's graphs are true, from what verify.py and explain.py measured.

python examples/default/evidence_page.py --out circuits/default
"""

import argparse
import json
from pathlib import Path
from typing import Any

NAMES = {
    "clt": "CLT alone (attention frozen)",
    "attention-sae": "CLT and attention output SAEs",
    "mtc": "CLT and multitoken transcoders",
    "weakly-causal": "weakly causal set",
}

HEAD = """# Are the default's graphs true?

What a graph predicts is tested in the base model, everything recomputed. Held-out prompts of six behaviours, {prompts}
of each, traced with the defaults. Commands (about half an hour on two CPU cores):

```
python examples/default/verify.py --text ../shared/data/text --prompts 50 --out build/verification.json
python examples/default/verify.py --merge build/verification.json --out circuits/default/verification.json
python examples/default/explain.py --text ../shared/data/text --prompts 50 --out circuits/default/explanations.json
python examples/default/evidence_page.py --out circuits/default
```

## Ablations

Of each prompt the {nodes} nodes with the largest influence (features and errors) are ablated one by one, and as many
random active nodes that are not in the graph, of the same kinds and layers. Predicted is the signed sum over all
paths of the unpruned graph; measured is the change of the target, the probability-weighted sum of the graph's logits,
each less the mean over the vocabulary. Medians over prompts with 95 % bootstrap intervals; the rank correlation
(Spearman) and the slope through the origin are within a prompt, *pooled* is the correlation of all prompts' nodes.
"""

HEADS = """Heads: the source of a strong edge is ablated with the pattern as it is and with the entry of the edge's
strongest head set to zero; the difference, what passed that head, is compared with the head's loading (last hops where
attention is frozen). What goes from the key side to the query side of an MTC feature is its loading by definition.
Sufficiency and necessity: the pruned graph kept alone, and removed (`circuits/faithfulness.py`)."""


def interval(value: list[float] | None) -> str:
    """Median and interval."""
    return "-" if value is None else f"{value[0]:.2f} ({value[1]:.2f} to {value[2]:.2f})"


def ablations(found: dict[str, Any]) -> list[str]:
    """One table over all prompts, and one of correlations by behaviour."""
    lines = [
        "| replacement | rank correlation | pooled | slope | median change, top nodes | random nodes "
        "| top above random |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, figures in found.items():
        row = figures["all"]
        cells = [interval(row[key]) for key in ("nodes spearman", "pooled spearman", "nodes slope")]
        cells += [_small(row["nodes median_effect"]), _small(row["random median_effect"])]
        lines.append(f"| {NAMES[name]} | {' | '.join(cells)} | {row['top above random']:.1%} of prompts |")
    behaviours = list(next(iter(found.values()))["behaviours"])
    lines += [
        "", "Rank correlation by behaviour:", "",
        f"| replacement | {' | '.join(behaviours)} |", "|---" * (len(behaviours) + 1) + "|",
    ]  # fmt: skip
    for name, figures in found.items():
        cells = [interval(figures["behaviours"][b]["nodes spearman"]) for b in behaviours]
        lines.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
    lines += [
        "", HEADS, "",
        "| replacement | heads: rank correlation | slope | sufficiency | necessity |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, figures in found.items():
        keys = ("patterns spearman", "patterns slope", "sufficiency", "necessity")
        lines.append(f"| {NAMES[name]} | {' | '.join(interval(figures['all'][key]) for key in keys)} |")
    return lines


def _small(value: list[float] | None) -> str:
    return "-" if value is None else f"{value[0]:.4f} ({value[1]:.4f} to {value[2]:.4f})"


INDUCTION = """
## Why heads looked: induction

On repeated random sequences, every head above layer 0 that gives at least 0.3 of its attention, from the last token, to
what followed an earlier occurrence of it. The first pair of its QK attribution, in the order of the relative form, should
be the current token meeting a feature that carries the token before the key (most of what the feature reads comes from
there, `circuits/origins.py`). With frozen attention it is that token itself. An error node that carries it does not count. Ablated are the
features of the first pair without errors; the attention should fall.

| replacement | heads | first pair: both sides right | either | without errors and biases: both | either | attention falls | median change of log odds |
|---|---|---|---|---|---|---|---|
"""  # noqa: E501

PAIRS = """
## Why heads looked: first feature-feature pairs

For the six strongest edges of each prompt that a head above layer 0 carries between two tokens: the features of the
first feature-feature pair of the relative form are ablated, against random features at the same positions whose
contributions to the stream have the same norms within 20 %. (Such a random feature may well be another cause: several
features of a key often carry the same token.) *Listed*: the pair is among the ten strongest, which a graph keeps;
*later*: pairs of embeddings, errors and biases fill the list. Predicted and measured changes of the log odds of the
attention, of the pairs and the random pairs together, are correlated in rank. Edges without a match are left out.

| replacement | edges | | tested | more than random | than the median of five | attention falls | median change | random | rank correlation |
|---|---|---|---|---|---|---|---|---|---|
"""  # noqa: E501


def explanations(found: dict[str, Any]) -> list[str]:
    """The two tables of explain.py."""
    lines = [INDUCTION.rstrip("\n")]
    for name in (n for n in NAMES if n in found):
        row = found[name]["induction"]
        first, named = row["first pair"], row["first pair without errors and biases"]
        cells = [str(row["heads"])]
        cells += [f"{pair[key]:.1%}" for pair in (first, named) for key in ("both", "either")]
        change = row["median change of log odds"]
        cells += ["-", "-"] if change is None else [f"{row['attention falls']:.1%}", f"{change:+.2f}"]
        lines.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
    lines.append(PAIRS.rstrip("\n"))
    for name in (n for n in NAMES if n in found):
        row = found[name]["pairs"]["all"]
        for which in ("listed", "later"):
            part = row[which]
            if part["tested"]:
                cells = [
                    str(row["edges"]), which, str(part["tested"]), f"{part['more than random']:.1%}",
                    f"{part['more than the median of five']:.1%}",
                    f"{part['lowers']:.1%}", f"{part['median change']:+.2f}", f"{part['median random change']:+.2f}",
                    f"{part['rank correlation of predicted and measured']:.2f}",
                ]  # fmt: skip
                lines.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--nodes", type=int, default=40)
    args = parser.parse_args()
    verified = json.loads((args.out / "verification.json").read_text(encoding="utf-8"))
    explained = json.loads((args.out / "explanations.json").read_text(encoding="utf-8"))
    prompts = next(iter(next(iter(verified.values()))["behaviours"].values()))["prompts"]
    lines = [HEAD.format(prompts=prompts, nodes=args.nodes), *ablations(verified), *explanations(explained), ""]
    (args.out / "EVIDENCE.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
