"""The page on all kinds of replacement, from the figures that compare.py has measured.

python examples/default/kinds_page.py --folder circuits/default
"""

import argparse
import json
from pathlib import Path
from typing import Any

HEAD = """# Every kind of replacement on the embedded default

Held-out text, documents of at most 64 tokens, first positions left out. A kind's normalized MSE is that of its own
output, L0 counts active features a token (of features that move: at the source). `kept` is the share of the
cross-entropy gap to zero-ablation that is kept with just this kind in place. The CLT, attention output SAEs, MTCs and
the weakly causal set come with the package; the other kinds were trained briefly, for this table alone, and are
measures of what little training gives, not of the kinds.

"""

HOW = """
## How to reproduce

With the model and the corpus that MODEL_CARD.md makes, and
`TEXT="--model build/model --text build/corpus/train.jsonl --held-out build/corpus/held_out.jsonl"`:

```
circuits train weakly-causal $TEXT -o build --features 1664 --k 18 --steps 1300 --lr 1.5e-3
circuits train mtc $TEXT -o build --features 1536 --k 18 --steps 1500 --lr 2e-3 --window 64
circuits train qk $TEXT -o build --features 512 --query-k 20 --key-k 20 --steps 500 --lr 3e-3 --window 64 \\
    --batch-tokens 2048
circuits train mctc $TEXT -o build --features 1536 --k 18 --steps 300 --lr 5e-3 --window 64
SHORT="$TEXT -o build/short --layer 1 --layer 2 --window 64 --batch-tokens 2048"
for kind in mtc single-head-mtc joint-mtc; do
    circuits train $kind $SHORT --features 1536 --k 18 --steps 120 --lr 5e-3; done
circuits train ranked-mtc $SHORT --features 1024 --steps 100 --lr 5e-3 --sparsity 0.03
for kind in value-sae residual-sae; do circuits train $kind $SHORT --features 1536 --k 18 --steps 200 --lr 2e-3; done
circuits train lorsa $SHORT --heads 512 --groups 16 --k 18 --steps 100 --lr 2e-3
circuits train attention-layer $SHORT --steps 60 --lr 1e-3
```

The two commands at the head of `examples/default/compare.py` measure, `kinds_page.py` beside it writes this page.
"""


def _header(*columns: str) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def rows_of_kinds(kinds: dict[str, Any]) -> list[str]:
    lines = [
        "| kind | features | normalized MSE, by layer | L0 | dead | kept | tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in kinds.items():
        parts = row["dictionaries"].values()
        errors = " ".join(f"{part['normalized_mse']:.3f}" for part in parts)
        l0 = sum(part["l0"] for part in parts) / len(parts)
        dead = sum(part["dead_share"] for part in parts) / len(parts)
        kept = f"{row['cross_entropy']['kept']:.1%}" if "cross_entropy" in row else "-"
        tokens = f"{row['tokens'] / 1e6:.2f} M" if row.get("tokens") else "-"
        features = ", ".join(f"{count:,}" for count in row["features"])
        lines.append(f"| {name} | {features} | {errors} | {l0:.1f} | {dead:.1%} | {kept} | {tokens} |")
    return lines


def rows_of_qk(folder: Path) -> list[str]:
    training = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["training"]
    lines = _header("layer", "normalized MSE of the pattern", "L0 query", "L0 key", "active on both")
    for name, row in training["dictionaries"].items():
        layer = name.split(".")[1]
        l0 = " | ".join(f"{row[f'l0/{name}.{side}']:.1f}" for side in ("query", "key", "product"))
        lines.append(f"| {layer} | {row[f'nmse/pattern.{layer}']:.3f} | {l0} |")
    return lines


def write_page(folder: Path) -> None:
    """`KINDS.md` in the folder of the default, from `comparison.json` and the QK dictionaries there."""
    result = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    lines = [HEAD, *rows_of_kinds(result["kinds"]), "", "## Features of residual SAEs moved through heads", ""]
    lines += ["The attention output that an SAE's features make when the heads of its layer carry them: each feature"]
    lines += ["by the head that moves it most in a context, or all by all heads.", ""]
    lines += _header("SAE, heads", "normalized MSE", "L0")
    lines += [
        f"| {name} | {row['normalized_mse']:.3f} | {row['l0']:.1f} |" for name, row in result["moved_sae"].items()
    ]
    lines += ["", "## QK diagonalization, 512 features a layer, all heads jointly (head width 32)", ""]
    lines += rows_of_qk(folder / "qk")
    lines += [
        "",
        "With `--query-k 28 --key-k 28` and 420 steps layers 1 and 2 reach 0.283 and 0.278 at an L0 of 28.8 and 27.7,",
    ]
    lines += ["and of 29.0 and 27.0: what is left sits in the sharp heads 0 to 3."]
    lines += ["", "## Graphs of held-out prompts, half of them plain text", ""]
    lines += _header("set", "prompts", "replacement", "completeness", "replacement, plain text", "worst ledger gap")
    for name, row in result["graphs"].items():
        lines.append(
            f"| {name} | {row['prompts']} | {row['replacement_median']:.3f} | {row['completeness_median']:.3f} | "
            f"{row['replacement_median_plain_text']:.3f} | {row['worst_ledger_gap']:.1e} |"
        )
    (folder / "KINDS.md").write_text("\n".join(lines) + "\n" + HOW, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    write_page(parser.parse_args().folder)


if __name__ == "__main__":
    main()
