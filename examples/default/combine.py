"""Put dictionaries that were trained apart into one replacement; of two with one name the last one given is taken.

    python examples/default/combine.py build/replacements/attention-sae build/middle/attention-sae -o build/all
"""

import argparse
from pathlib import Path

from circuits.replacements import Replacement, load_replacement
from circuits.replacements.formats import native


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", type=Path, nargs="+")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    replacements = [load_replacement(path) for path in args.parts]
    if any(part.model != replacements[0].model for part in replacements):
        parser.error("the parts were trained on different models")
    chosen = {d.name: d for part in replacements for d in part.dictionaries}
    figures = {name: row for part in replacements for name, row in part.training["dictionaries"].items()}
    tokens = {part.path.parent.name: part.training["tokens"] for part in replacements}
    combined = Replacement(
        name=replacements[0].name,
        path=args.out,
        format="circuits",
        dictionaries=tuple(chosen[name] for name in sorted(chosen)),
        model=replacements[0].model,
        training={"dictionaries": figures, "tokens": tokens},
    )
    native.save(combined, args.out, "float16")


if __name__ == "__main__":
    main()
