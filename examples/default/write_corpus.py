"""Write the token documents that the default's replacements are trained and measured on, as .jsonl of token ids.

    python examples/default/write_corpus.py --text ../shared/data/text --model build/model --out build/corpus

Half stories and books cut into short windows, the rest repeated sequences and template prompts: what people will trace.
`train.jsonl` comes from the training side of every split, `held_out.jsonl` from the held-out side.
"""

import argparse
import json
from pathlib import Path

from corpus import Corpus
from transformers import AutoTokenizer

SHARES = {"stories": 0.38, "books": 0.32, "repeated": 0.12, "templates": 0.18}


def documents(corpus: Corpus, tokens: int, window: int) -> list[list[int]]:
    """Documents of each kind until the shares of `tokens` are reached, in random order."""
    found: list[list[int]] = []
    for kind, share in SHARES.items():
        count = 0
        while count < share * tokens:
            if kind == "repeated":
                ids, _ = corpus.repeats(window)
            elif kind == "templates":
                ids, _ = corpus.template()
            else:
                ids, _ = corpus.text(kind, window - 1)
            found.append(ids[:window])
            count += len(found[-1])
    corpus.rng.shuffle(found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=6_000_000)
    parser.add_argument("--window", type=int, default=128)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for name, held_out, tokens in (("train", False, args.tokens), ("held_out", True, 60_000)):
        corpus = Corpus(args.text, tokenizer, held_out=held_out, seed=17)
        lines = [json.dumps(ids) for ids in documents(corpus, tokens, args.window)]
        (args.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
