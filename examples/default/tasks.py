"""The text that the embedded default model is trained on, and the held-out prompts that it is tested on.

Five sources: plain text (stories and books), repeated random tokens (induction), indirect objects, successions, and
questions with lettered choices. Every template draws from `random.Random`, so a seed gives the same prompts anywhere.

A template prompt is *held out* when the checksum of its content falls in one of ten classes; the training generator
throws such prompts away, so the test generator, which keeps only those, never shows a prompt that training made.
The prompt of the README ("When Mary and John ...") is held out by name.
"""

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

NAMES = [
    "Mary",
    "John",
    "Tom",
    "Anna",
    "Ben",
    "Lily",
    "Jack",
    "Emma",
    "Sam",
    "Lucy",
    "Tim",
    "Sara",
    "Max",
    "Mia",
    "Peter",
    "Jane",
    "Paul",
    "Kate",
    "James",
    "Alice",
    "Henry",
    "Rose",
    "George",
    "Ellen",
    "Robert",
    "Helen",
    "William",
    "Grace",
    "David",
    "Clara",
    "Daniel",
    "Ruth",
    "Frank",
    "Martha",
    "Charles",
    "Julia",
    "Arthur",
    "Edith",
    "Fred",
    "Nancy",
    "Harry",
    "Susan",
    "Joe",
    "Laura",
    "Mark",
    "Amy",
    "Luke",
    "Sophie",
    "Leo",
    "Eva",
]
PLACES = [
    "store",
    "park",
    "school",
    "garden",
    "market",
    "house",
    "river",
    "beach",
    "farm",
    "zoo",
    "kitchen",
    "library",
    "church",
    "hospital",
    "station",
    "forest",
    "castle",
    "office",
    "shop",
    "lake",
]
OBJECTS = [
    "drink",
    "ball",
    "book",
    "flower",
    "cake",
    "letter",
    "ring",
    "box",
    "apple",
    "hat",
    "toy",
    "key",
    "cup",
    "bone",
    "kite",
    "coat",
    "basket",
    "picture",
    "coin",
    "stick",
]
VERBS = ["gave", "handed", "passed", "sent", "offered", "brought"]
INDIRECT_OBJECT = (
    "When {a} and {b} went to the {place}, {s} {verb} a {thing} to",
    "When {a} and {b} got to the {place}, {s} {verb} the {thing} to",
    "After {a} and {b} went to the {place}, {s} {verb} a {thing} to",
    "Then {a} and {b} went to the {place}. {s} {verb} a {thing} to",
    "Then {a} and {b} had a long talk at the {place}, and {s} {verb} a {thing} to",
    "{a} and {b} were at the {place}. There {s} {verb} the {thing} to",
    "One day {a} met {b} at the {place}, and {s} {verb} a {thing} to",
    "While {a} and {b} were walking to the {place}, {s} {verb} a {thing} to",
)
ENDINGS = (".", " and smiled.", ", and they were happy.", " and said goodbye.", ".")

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
NUMBERS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
]
SUCCESSION = (
    "{items}",
    "{name} said: {items}",
    "{name} began to count: {items}",
    "They come in order: {items}",
    "First {items}",
    "At the {place} we learn {items}",
)

KINDS = {
    "animal": ["dog", "cat", "horse", "cow", "pig", "bird", "fish", "mouse", "bear", "lion"],
    "fruit": ["apple", "pear", "plum", "orange", "lemon", "cherry", "grape", "peach", "berry", "banana"],
    "color": ["red", "blue", "green", "yellow", "black", "white", "brown", "pink", "gray", "purple"],
    "tool": ["hammer", "saw", "knife", "spade", "axe", "rope", "ladder", "needle", "broom", "bucket"],
    "dress": ["hat", "coat", "shoe", "shirt", "glove", "sock", "cloak", "belt", "scarf", "boot"],
    "food": ["bread", "cheese", "soup", "rice", "meat", "butter", "honey", "cake", "milk", "egg"],
}
LETTERS = "ABCD"
CHOICE = ("Choices", "Answers", "Options", "Here are four things")
ASK = ("Where is the {}?", "Which letter has the {}?", "Find the {}?")


@dataclass(frozen=True)
class Prompt:
    """A template prompt: `text` ends just before `answer`; `ending` may follow in training."""

    text: str
    answer: str
    ending: str = ""

    @property
    def held_out(self) -> bool:
        return zlib.crc32(self.text.encode()) % 10 == 0 or self.text.startswith("When Mary and John went to the store")


def indirect_object(rng: random.Random) -> Prompt:
    a, b = rng.sample(NAMES, 2)
    giver = rng.choice((a, b))
    other = b if giver == a else a
    fields = {
        "a": a,
        "b": b,
        "s": giver,
        "place": rng.choice(PLACES),
        "thing": rng.choice(OBJECTS),
        "verb": rng.choice(VERBS),
    }
    return Prompt(rng.choice(INDIRECT_OBJECT).format(**fields), " " + other, rng.choice(ENDINGS))


def succession(rng: random.Random) -> Prompt:
    items = rng.choice((DAYS, MONTHS, NUMBERS))
    length = rng.randint(2, 6)
    start = rng.randrange(len(items) - length if items is NUMBERS else len(items))
    run = [items[(start + i) % len(items)] for i in range(length + 1)]
    text = rng.choice(SUCCESSION).format(
        items=", ".join(run[:-1]) + ",", name=rng.choice(NAMES), place=rng.choice(PLACES)
    )
    return Prompt(text, " " + run[-1])


def lettered_choice(rng: random.Random) -> Prompt:
    options = [rng.choice(KINDS[kind]) for kind in rng.sample(sorted(KINDS), len(LETTERS))]
    right = rng.randrange(len(LETTERS))
    listed = ", ".join(f"{option} {letter}" for letter, option in zip(LETTERS, options))
    text = f"{rng.choice(CHOICE)}: {listed}. {rng.choice(ASK).format(options[right])}"
    return Prompt(text, " " + LETTERS[right], ".")


TEMPLATES: dict[str, Callable[[random.Random], Prompt]] = {
    "indirect object": indirect_object,
    "succession": succession,
    "lettered choice": lettered_choice,
}


def prompts(task: str, rng: random.Random, *, held_out: bool) -> Iterator[Prompt]:
    """An endless stream of one task's prompts from the training side or the held-out side of the split."""
    while True:
        prompt = TEMPLATES[task](rng)
        if prompt.held_out == held_out:
            yield prompt


def repeated(rng: random.Random, vocabulary: range, length: int) -> tuple[list[int], list[bool]]:
    """Random tokens that come again: (tokens, whether each can be told from what stands before it).

    Half of the time one period repeats to the end, else spans of the first part come back in any order. Periods and
    spans have any length: with a few fixed ones a model learns to look back so many tokens, not to look for the match.
    """
    period = rng.randint(4, max(5, length // 2)) if rng.random() < 0.5 else rng.randint(4, max(5, length // 4))
    first = [rng.choice(vocabulary) for _ in range(period)]
    if rng.random() < 0.5:
        return [first[i % period] for i in range(length)], [i > period for i in range(length)]
    tokens, known = list(first), [False] * period
    while len(tokens) < length:
        size = rng.randint(3, max(4, period // 2))
        start = rng.randrange(max(1, period - size))
        span = first[start : start + size]
        tokens += span
        known += [False] + [True] * (len(span) - 1)
    return tokens[:length], known[:length]


def documents(folder: Path, *, held_out: bool) -> dict[str, list[str]]:
    """Stories and books of `shared/data/text`: every twentieth story and two books of each shelf are held out."""
    shelves: dict[str, list[str]] = {"stories": [], "books": []}
    for name, shelf, every in (
        ("tinystories_train.txt", "stories", 20),
        ("tinystories_extra_truecased.txt", "stories", 20),
        ("books_children_train.txt", "books", 18),
        ("books_general_train.txt", "books", 16),
    ):
        texts = (folder / name).read_text(encoding="utf-8").split("<|endoftext|>")
        kept = [text.strip() for i, text in enumerate(texts) if (i % every == every - 1) == held_out]
        shelves[shelf] += [text for text in kept if text]
    return shelves
