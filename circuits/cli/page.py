"""A feature page on the terminal: a histogram of blocks, and examples whose tokens are coloured by activation."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.text import Text

from circuits.cli.console import QUIET, signed
from circuits.feature_records import AUTOMATIC, Page
from circuits.graph import head_name
from circuits.graph.formats.text import visible

BLOCKS = " ▁▂▃▄▅▆▇█"
KEY_COLOUR, QUERY_COLOUR = (0, 135, 255), (255, 135, 0)
WIDEST = 60  # columns of the histogram
SHOWN_MOVES = 3
Labels = Mapping[tuple[str, int], str]


def show_page(console: Console, page: Page, labels: Labels, examples: int = 3) -> None:
    """Print a page.

    labels
        Of the features near it.
    examples
        How many of each group.
    """
    console.print(_title(page))
    if page["histogram"]["counts"]:
        console.print(_histogram(page))
    console.print(_outputs("speaks for", page["top_outputs"]))
    console.print(_outputs("and against", page["bottom_outputs"]))
    if page.get("head_loading"):
        console.print(_heads(page))
    for part in _examples(page, examples):
        console.print(part)
    for key, title in (("near_by_decoder", "Near by decoder"), ("near_by_coactivation", "Near by co-activation")):
        if page[key]:
            console.print(Text(f"\n{title}", style=QUIET))
            for name, feature, value in page[key]:
                line = Text(f"{value:.2f}  {name} #{feature}  ", no_wrap=True, overflow="ellipsis")
                console.print(line.append(visible(labels.get((name, feature), "")), style=QUIET))


def _title(page: Page) -> Text:
    text = Text(f"{page['dictionary']} #{page['feature']}  ", style="bold")
    text.append(visible(page["label"]) or "without a label", style="not bold")
    if page["label_by"] != AUTOMATIC:
        text.append(f"  (by {visible(page['label_by'])})", style=f"not bold {QUIET}")
    seen = f"\n{page['kind']}; active at {page['density']:.3%} of {page['tokens_seen']:,} tokens"
    return text.append(f"{seen}, at most {page['largest']:.4g}\n", style=f"not bold {QUIET}")


def _histogram(page: Page) -> Text:
    """Counts as blocks of eight heights, by their square root, so that rare large activations are seen."""
    edges, counts = page["histogram"]["edges"], page["histogram"]["counts"]
    highest, wide = max(counts), max(1, WIDEST // len(counts))
    bars = "".join(BLOCKS[_height(count, highest)] * wide for count in counts)
    first, last = f"{edges[0]:.3g}", f"{edges[-1]:.3g}"
    text = Text(bars, style=f"rgb({KEY_COLOUR[0]},{KEY_COLOUR[1]},{KEY_COLOUR[2]})")
    text.append("\n" + first + " " * max(1, len(bars) - len(first) - len(last)) + last, style=QUIET)
    return text.append("  activation\n", style=QUIET)


def _height(count: int, highest: int) -> int:
    return min(8, max(1, round(8 * (count / highest) ** 0.5))) if count else 0


def _outputs(title: str, outputs: list[Any]) -> Text:
    text = Text(f"{title:12}", style=QUIET)
    if not outputs:
        return text.append("nothing")
    for token, weight in outputs:
        text.append(f'"{visible(token)}" ', style="default").append_text(signed(weight)).append("  ")
    text.rstrip()
    return text


def _heads(page: Page) -> Text:
    text = Text("heads       ", style=QUIET)
    for head, weight in page["head_loading"]:
        text.append(f"{head if isinstance(head, str) else head_name(head)} ", style="default")
        text.append_text(signed(weight)).append("  ")
    text.rstrip()
    return text


def _examples(page: Page, count: int) -> list[Group | Text]:
    """The groups of examples, each with its first few."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for example in page["examples"]:
        groups.setdefault(example["group"], []).append(example)
    parts: list[Group | Text] = []
    for name, found in groups.items():
        parts.append(Text(f"\n{name[:1].upper()}{visible(name[1:])}", style=QUIET))
        parts += [_example(example, abs(page["largest"])) for example in found[:count]]
    return parts


def _example(example: dict[str, Any], largest: float) -> Group:
    """The tokens, coloured; a moving feature's a second time, as its query side sees them."""
    lines: list[Text | Padding] = [_tokens(example["tokens"], example["activations"], largest, KEY_COLOUR)]
    if "query_activations" in example:
        queries = example["query_activations"]
        lines[0] = Text("key   ", style=QUIET).append_text(_tokens(example["tokens"], example["activations"], largest,
                                                                    KEY_COLOUR))  # fmt: skip
        highest = max(map(abs, queries), default=0.0)
        lines.append(
            Text("query ", style=QUIET).append_text(_tokens(example["tokens"], queries, highest, QUERY_COLOUR))
        )
        for key, query, weight in sorted(example["moves"], key=lambda move: -abs(move[2]))[:SHOWN_MOVES]:
            source = "other tokens" if key < 0 else f'"{visible(example["tokens"][key])}"'
            move = Text(f'{source} → "{visible(example["tokens"][query])}" ', style=QUIET).append_text(signed(weight))
            lines.append(Padding(move, (0, 0, 0, 6)))
    return Group(*lines)


def _tokens(tokens: list[str], values: list[float], largest: float, colour: tuple[int, int, int]) -> Text:
    """Tokens on a background by the size of their activation; «» around the strongest, for who sees no colours."""
    peak = max(range(len(values)), key=lambda i: abs(values[i]), default=0)
    text = Text()
    for i, (token, value) in enumerate(zip(tokens, values, strict=True)):
        share = min(1.0, abs(value) / largest) if largest else 0.0
        shown = visible(token)
        if i == peak and value:
            space = shown[: len(shown) - len(shown.lstrip(" "))]
            shown = f"{space}«{shown.lstrip(' ')}»"
        if not value:
            text.append(shown)
            continue
        mixed = tuple(round(255 - (255 - part) * (0.25 + 0.75 * share)) for part in colour)
        text.append(shown, style=f"black on rgb({mixed[0]},{mixed[1]},{mixed[2]})")
    return text
