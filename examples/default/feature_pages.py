"""The feature pages that come with the embedded default: one store, from public-domain books alone.

    python examples/default/feature_pages.py FOLDER -o circuits/default/features.sqlite

FOLDER has the books of the training text (`books_children_train.txt`, `books_general_train.txt`). From all of them come
pieces of a few paragraphs, evenly. `circuits/default/FEATURES.md` says what is in the store.
"""

import argparse
import tempfile
import time
from pathlib import Path

from circuits.feature_building import build_features
from circuits.feature_gathering import Settings
from circuits.loading import load
from circuits.sources import SEPARATOR
from circuits.text import open_text
from circuits.training import set_threads

BOOKS = ("books_children_train.txt", "books_general_train.txt")
PIECE = 520  # letters: about 128 tokens
SETS = ("attention-sae", "mtc")


def pieces(folder: Path, count: int) -> list[str]:
    """So many pieces of whole paragraphs, evenly from all books."""
    found: list[str] = []
    for name in BOOKS:
        for book in (folder / name).read_text(encoding="utf-8").split(SEPARATOR):
            piece = ""
            for paragraph in filter(None, map(str.strip, book.split("\n\n"))):
                piece = f"{piece}\n\n{paragraph}" if piece else paragraph
                if len(piece) >= PIECE:
                    found.append(piece)
                    piece = ""
    step = max(1, len(found) // count)
    return found[step // 2 :: step][:count]


def main() -> None:
    """Build the store, one set of replacements after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=80_000)
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    set_threads(options.threads)
    settings = Settings(tokens=options.tokens, top=4, per_quantile=1, outputs=5, near=4, sample=30_000)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "books.txt"
        text.write_text(SEPARATOR.join(pieces(options.folder, options.tokens // 100)), encoding="utf-8")
        for name in options.sets:
            model, began = load(None, name), time.monotonic()
            source = open_text(model.base, [text], settings.window)
            build_features(model, source, options.output, settings)
            size = options.output.stat().st_size / 2**20
            print(f"{name}: {time.monotonic() - began:.0f} s, the store has {size:.1f} MB")


if __name__ == "__main__":
    main()
