"""A page as it is stored, a *record*, and as it is handed out.

A record is a page in fewer letters: tokens are numbers of the store's texts, an example is a stretch of a stored
document with the activations that are not zero, and a histogram is its first edge, its width and its counts.

    {"density", "largest", "histogram": [edge, width, counts], "outputs": [[number, weight], ...], "bottom": the same,
     "heads": [[head, weight], ...], "decoder" and "together": [[dictionary, feature, weight], ...], "tokens_seen": only
     where it is not the dictionary's,
     "examples": [[group, document, start, length, [offset, activation, ...]], ...]}, of features that move with
     [query offset, activation, ...] and [key, query, weight, ...] behind
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isfinite, log10
from typing import Any

Record = dict[str, Any]
Page = dict[str, Any]
AUTOMATIC, PERSON = "automatic", "person"
SHOWN = 3  # tokens, and outputs, in an automatic label
LONGEST = 200  # letters of a label


@dataclass(frozen=True)
class Words:
    """What numbers of a record stand for: token texts, and the texts' numbers of each document."""

    texts: dict[int, str]
    documents: dict[int, list[int]]

    def stretch(self, document: int, start: int, length: int) -> list[str]:
        """The token texts of a stretch of a document."""
        return [self.texts[number] for number in self.documents[document][start : start + length]]


def rounded(values: Sequence[float], scale: float) -> list[float]:
    """Values to the third significant digit of `scale`, the largest that they stand beside."""
    if not scale or not isfinite(scale):
        return [0.0 for _ in values]
    digits = 3 - ceil(log10(abs(scale)) + 1e-9)
    return [round(value, digits) + 0.0 for value in values]


def shortened(value: float, digits: int = 4) -> float:
    """A number to so many significant digits."""
    return float(f"{value:.{digits - 1}e}")


def page_of(record: Record, words: Words, head: Page) -> Page:
    """The page of a record.

    head
        What the record does not hold: dictionary, feature, kind, label, label_by, tokens_seen.
    """
    edge, width, counts = record["histogram"]
    page = {
        **head,
        "tokens_seen": record.get("tokens_seen", head["tokens_seen"]),
        "density": record["density"],
        "largest": record["largest"],
        "histogram": {"edges": [edge + i * width for i in range(len(counts) + 1)] if counts else [], "counts": counts},
        "examples": [_example(example, words) for example in record["examples"]],
        "top_outputs": [[words.texts[number], weight] for number, weight in record["outputs"]],
        "bottom_outputs": [[words.texts[number], weight] for number, weight in record["bottom"]],
    }
    if record.get("heads"):
        page["head_loading"] = record["heads"]
    page["near_by_decoder"], page["near_by_coactivation"] = record["decoder"], record["together"]
    return page


def _example(example: list[Any], words: Words) -> dict[str, Any]:
    group, document, start, length, active, *moving = example
    found = {
        "group": group,
        "tokens": words.stretch(document, start, length),
        "activations": _dense(active, length),
        "document": document,
        "start": start,
    }
    if moving:
        found["query_activations"] = _dense(moving[0], length)
        flat = moving[1]
        found["moves"] = [flat[i : i + 3] for i in range(0, len(flat), 3)]
    return found


def _dense(pairs: list[float], length: int) -> list[float]:
    values = [0.0] * length
    for offset, value in zip(pairs[::2], pairs[1::2], strict=True):
        values[int(offset)] = value
    return values


def sparse(values: Sequence[float]) -> list[float]:
    """[offset, value, ...] of what is not zero."""
    return [part for offset, value in enumerate(values) if value for part in (offset, value)]


def automatic_label(record: Record, words: Words) -> str:
    """The tokens that a feature is strongest at, and the outputs that it speaks for: `Mary, John → said, told`.

    Of examples those of the top count, each token by its activations; outputs only where they are positive. Empty for a
    feature that was never active and writes nothing.
    """
    strength: dict[str, float] = {}
    for group, document, start, length, active, *_ in record["examples"]:
        if group != "top":
            continue
        tokens = words.stretch(document, start, length)
        for offset, value in zip(active[::2], active[1::2], strict=True):
            name = _shown(tokens[int(offset)])
            strength[name] = strength.get(name, 0.0) + abs(value)
    strongest = sorted(strength, key=lambda name: (-strength[name], name))[:SHOWN]
    if strongest:
        strongest = [name for name in strongest if strength[name] >= 0.1 * strength[strongest[0]]]
    outputs = [_shown(words.texts[number]) for number, weight in record["outputs"] if weight > 0]
    said = list(dict.fromkeys(outputs))[:SHOWN]
    return tidy(", ".join(strongest) + (" → " if strongest and said else "→ " if said else "") + ", ".join(said))


def _shown(text: str) -> str:
    """A token without the space before it; punctuation and what would not be seen in quotes."""
    bare = text.strip()
    return bare if any(letter.isalnum() for letter in bare) and bare.isprintable() else repr(bare or text)


def tidy(label: str) -> str:
    """A label on one line, without control characters, at most `LONGEST` letters."""
    words = "".join(letter if letter.isprintable() else " " for letter in label).split()
    text = " ".join(words)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
