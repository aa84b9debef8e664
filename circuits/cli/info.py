"""`circuits info`: what a model or a replacement is."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from circuits.model import BaseModel
    from circuits.replacements.dictionary import Replacement


@click.command("info", short_help="Describe a model or a replacement.")
@click.argument("what", required=False)
def command(what: str | None) -> None:
    """Describe WHAT: a model or a replacement (folder or hub id). Default: the embedded model and its own."""
    from circuits.cli.trace import quiet_libraries
    from circuits.hub import replacement_folder
    from circuits.loading import load
    from circuits.replacements.loading import load_replacement

    quiet_libraries()
    if what is None:
        model = load()
        _describe_model(model.base)
        for replacement in model.replacements:
            _describe_replacement(replacement)
    elif _is_model(what):
        _describe_model(load(what).base)
    else:
        _describe_replacement(load_replacement(replacement_folder(what)))


def _is_model(what: str) -> bool:
    from circuits.hub import has_model
    from circuits.replacements.loading import is_replacement

    path = Path(what)
    return (path / "config.json").is_file() and not is_replacement(path) if path.is_dir() else has_model(what)


def _describe_model(model: "BaseModel") -> None:
    from rich.table import Table

    from circuits.cli.console import QUIET, console

    shape = model.shape
    table = Table(title=f"Model {model.name}", title_justify="left", box=None, show_header=False)
    table.add_column(style=QUIET)
    table.add_column()
    table.add_row("family", model.family.model_type)
    table.add_row("layers, width", f"{shape.n_layers}, {shape.d_model}")
    table.add_row("heads", f"{shape.n_heads} queries, {shape.n_kv_heads} keys and values, width {shape.d_head}")
    table.add_row("vocabulary", str(shape.vocabulary))
    table.add_row("context", str(shape.context))
    table.add_row("parameters", f"{sum(p.numel() for p in model.lm.parameters()):,}")
    table.add_row("hash", model.identity[:16])
    console.print(table)


def _describe_replacement(replacement: "Replacement") -> None:
    from rich.table import Table

    from circuits.cli.console import console

    table = Table(
        title=f"Replacement {replacement.name} ({replacement.format} format, hash {replacement.identity[:16]})",
        title_justify="left",
        box=None,
    )
    for name in ("dictionary", "reads", "writes", "features", "activation"):
        table.add_column(name)
    for d in replacement.dictionaries:
        writes = str(d.writes[0]) + (f" to {d.writes[-1]}" if len(d.writes) > 1 else "")
        kind = d.activation.kind if d.activation.k is None else f"{d.activation.kind} {d.activation.k}"
        table.add_row(d.name, str(d.read), writes, f"{d.n_features:,}", kind)
    console.print()
    console.print(table)
    if replacement.training:
        console.print("figures of its training:", style="bold")
        for name, value in replacement.training.items():
            console.print(f"  {name}: {value}")
