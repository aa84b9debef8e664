"""All kinds of replacement on the embedded default, side by side, for the page that kinds_page.py writes.

    MEASURE="python examples/default/compare.py --text ../shared/data/text --corpus build/corpus/held_out.jsonl"
    $MEASURE --out circuits/default --trained build/short build/mctc
    $MEASURE --out circuits/default --graphs clt attention-sae mtc weakly-causal build/mctc

Writes `comparison.json`; what stands there of other kinds and sets is kept. Every kind is measured on the same held-out
documents, of at most 64 tokens.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import torch
from corpus import Corpus
from evaluate import graph_prompts

import circuits
from circuits.loading import DEFAULT, EMBEDDED
from circuits.moved_sae import moved_sae_figures
from circuits.replacements import Replacement, load_replacement
from circuits.text import Document, read_documents
from circuits.training import measure


def scores(replacement: list[Path | str], corpus: Corpus, count: int) -> dict[str, Any]:
    """Replacement and completeness scores and ledger gaps over held-out prompts, half of them plain text."""
    model = circuits.load(None, replacement)
    rows, plain = [], []
    for kind, ids in graph_prompts(corpus, model.base.tokenizer, count):
        graph = circuits.trace(model, ids, settings=circuits.TraceSettings(left_out=0.0))
        rows.append((*graph.metadata["scores"].values(), graph.metadata["ledger"]["max_relative_gap"]))
        if kind in ("stories", "books"):
            plain.append(rows[-1])
    return {
        "prompts": len(rows),
        "replacement_median": median(row[0] for row in rows),
        "completeness_median": median(row[1] for row in rows),
        "replacement_median_plain_text": median(row[0] for row in plain),
        "completeness_median_plain_text": median(row[1] for row in plain),
        "worst_ledger_gap": max(row[2] for row in rows),
    }


def figures_of(replacement: Replacement, documents: list[Document]) -> dict[str, Any]:
    """One kind's figures, with how it was trained."""
    model = circuits.load(None, [])
    figures = measure(model.base, [replacement], documents)
    named = {name: replacement.training.get(name) for name in ("tokens", "steps")}
    n_features = sorted({d.n_features for d in replacement.dictionaries})
    return figures | named | {"features": n_features}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--trained", type=Path, nargs="*", default=[], help="Folders of further replacements.")
    parser.add_argument("--graphs", nargs="*", default=[], help="Names of embedded sets, or folders.")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    base = circuits.load(None, []).base
    documents = read_documents(base, [args.corpus], 64)[:200]
    corpus = Corpus(args.text, base.tokenizer, held_out=True, seed=3)
    embedded = dict.fromkeys(name for names in EMBEDDED.values() for name in names)
    folders = [] if args.graphs else [DEFAULT / name for name in embedded]
    folders += [path.parent for folder in args.trained for path in sorted(folder.glob("**/manifest.json"))]
    path = args.out / "comparison.json"
    result: dict[str, Any] = {"kinds": {}, "moved_sae": {}, "graphs": {}}
    if path.is_file():
        result |= json.loads(path.read_text(encoding="utf-8"))
    with torch.no_grad():
        for folder in folders:
            replacement = load_replacement(folder)
            name = folder.name if folder.parent == DEFAULT else f"{folder.name}, briefly"
            result["kinds"][name] = figures_of(replacement, documents)
            for sae in replacement.dictionaries:
                if sae.kind == "residual-sae":
                    for through in ("most", "all"):
                        found = moved_sae_figures(base, sae, sae.layer, documents[:60], through)
                        result["moved_sae"][f"{sae.name}, {through}"] = found
        for name in args.graphs:
            given = name if name in EMBEDDED else Path(name)
            result["graphs"][Path(name).name] = scores([given], corpus, args.prompts)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
