"""`circuits partners`: the features that a feature meets whatever the prompt."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from circuits.cli.options import model_options

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from circuits.loading import Model
    from circuits.virtual_weights import Of, Partner, Partners

SIDES = ("reads", "writes", "queries", "keys")
TITLES = {
    ("reads", "features"): "What {} reads",
    ("reads", "tokens"): "Tokens of the input that {} reads",
    ("writes", "features"): "What reads {}",
    ("writes", "tokens"): "Tokens of the output that {} speaks for",
    ("queries", "features"): "In the query, {} looks for",
    ("queries", "tokens"): "In the query, {} looks for tokens",
    ("keys", "features"): "In the key, {} is looked for by",
    ("keys", "tokens"): "In the key, {} is looked for by tokens",
}


@click.command("partners", short_help="List the features that a feature meets whatever the prompt.")
@click.argument("feature")
@click.option("--through", default="residual", show_default=True,
              help="residual; L2H5 or ov: OV circuits of one head or of all; qk:L2H5 or qk: QK circuits.")  # fmt: skip
@click.option("--side", type=click.Choice(SIDES), help="What FEATURE does. Default: both sides that it has there.")
@click.option("--top", type=click.IntRange(min=1), default=10, show_default=True, help="Length of a list.")
@click.option("--offset", type=int, default=0, show_default=True,
              help="Places from the key to the query, for QK circuits with rotary positions.")  # fmt: skip
@click.option("--tokens/--no-tokens", default=True, show_default=True, help="List tokens beside features.")
@model_options
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the lists to this JSON file.")
def command(feature: str, **options: Any) -> None:
    """List the strongest virtual weights of FEATURE: an address without position, such as 2_153, a2_153, k1_5, v0_3.

    E_17 is token 17 of the input, 4_17 that of the output of a model of 4 layers. z says by how many standard
    deviations a weight differs from the mean of all weights of its list: small ones are interference.

    \b
    circuits partners a2_153
    circuits partners a0_17 --through qk:L1H3 --offset 1
    """
    from circuits.cli.console import console, progress_bar
    from circuits.cli.trace import quiet_libraries
    from circuits.loading import load

    quiet_libraries()
    with progress_bar("loading"):
        model = load(
            options["model"],
            options["replacements"] or None,
            device=options["device"],
            dtype=options["dtype"],
            device_map=options["device_map"],
        )
    with progress_bar("multiplying"):
        lists = _lists(model, feature, options)
    if options["output"] is not None:
        _write(options["output"], model, feature, lists)
    for found in lists:
        console.print(_title(found))
        if found.rows:
            console.print(_table(found))
        console.print()
    if options["output"] is not None:
        console.print(f"wrote {options['output']}")


def _lists(model: "Model", feature: str, options: dict[str, Any]) -> "list[Partners]":
    from circuits.virtual_weights import partners, sides_of

    through, side = options["through"], options["side"]
    if options["offset"] and not through.startswith("qk"):
        raise click.UsageError("--offset turns queries against keys; give --through qk or --through qk:LxHy with it")
    # A feature without a side there is refused by `partners`, with the reason.
    sides = [side] if side else sides_of(model, feature, through) or [None]
    kinds: tuple[Of, ...] = ("features", "tokens") if options["tokens"] else ("features",)
    return [
        partners(model, feature, through=through, side=one, top=options["top"], offset=options["offset"], of=of)
        for one in sides
        for of in kinds
    ]


def _title(found: "Partners") -> "Text":
    from rich.text import Text

    from circuits.cli.console import QUIET

    title = Text(TITLES[found.side, found.of].format(found.feature), style="bold")
    through = f", {found.through}" + (f" at offset {found.offset}" if found.offset else "")
    count = f": {len(found.rows)} of {found.weights:,} weights" if found.rows else ": nothing"
    return title.append(through + count, style=f"not bold {QUIET}")


def _table(found: "Partners") -> "Table":
    """One list; columns that would be empty are left out."""
    from circuits.cli.console import new_table, signed

    has_heads = any(partner.head is not None for partner in found.rows)
    # Between the two sides of one feature the loadings are the weights.
    has_loadings = any(partner.loadings and partner.address[1:] != found.feature[1:] for partner in found.rows)
    columns = ["partner", "weight>", "z>", *(["head", "share>"] if has_heads else [])]
    table = new_table("", *columns, *(["moved by"] if has_loadings else []))
    table.title = None
    for partner in found.rows:
        row: list[str | Text] = [_name(partner), signed(partner.weight), f"{partner.z:+.1f}"]
        row += [partner.head_name, f"{partner.share:.0%}" if partner.head_name else ""] if has_heads else []
        row += [_loadings(partner)] if has_loadings else []
        table.add_row(*row)
    return table


def _name(partner: "Partner") -> "Text":
    from rich.text import Text

    from circuits.cli.console import QUIET
    from circuits.graph.formats.text import visible
    from circuits.story import KIND_NAMES

    name = Text(f"{partner.address} ")
    name.append(f'"{visible(partner.text)}"' if partner.text else KIND_NAMES[partner.kind], style=QUIET)
    return name


def _loadings(partner: "Partner") -> "Text":
    """The two largest head loadings of a multitoken transcoder's feature."""
    from rich.text import Text

    from circuits.cli.console import signed
    from circuits.graph import head_name

    text = Text()
    for head, alpha in sorted(partner.loadings, key=lambda entry: -abs(entry[1]))[:2]:
        text.append(f"{' ' if text else ''}{head_name(head)} ")
        text.append_text(signed(alpha))
    return text


def _write(path: Path, model: "Model", feature: str, lists: "list[Partners]") -> None:
    import json

    from circuits.graph.formats.whole_file import write_whole

    data = {
        "model": {"name": model.base.name, "hash": model.base.identity},
        "replacements": [{"name": r.name, "hash": r.identity} for r in model.replacements],
        "feature": feature,
        "lists": [asdict(found) for found in lists],
    }
    write_whole(path, (json.dumps(data, ensure_ascii=False, indent=1) + "\n").encode())
