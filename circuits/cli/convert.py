"""`circuits convert`: a replacement of any format that is read, written as ours or as circuit-tracer's."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from circuits.replacements.dictionary import Replacement

FORMATS = ("circuits", "circuit-tracer")


@click.command("convert", short_help="Write a replacement in our format or circuit-tracer's.")
@click.argument("source")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The directory to write.")
@click.option("--format", "wanted", type=click.Choice(FORMATS), default="circuits", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True,
              help="Of matrices; vectors are always float32.")  # fmt: skip
@click.option("--model", help="Folder or hub id of its model: checks that they fit, and undoes the processing of its "
              "weights that a replacement was trained under.")  # fmt: skip
def command(source: str, output: Path, wanted: str, dtype: str, model: str | None) -> None:
    """Write the replacement SOURCE (directory or hub id) of any known format to another.

    The directory is written whole or not at all. A replacement that was trained on processed weights, as
    TransformerLens makes them, needs its --model; what is written then belongs to the model as it is.
    """
    from circuits.cli.console import console, progress_bar
    from circuits.cli.trace import quiet_libraries

    quiet_libraries()
    with progress_bar("loading"):
        replacement = _read(source, output, model)
    with progress_bar("writing"):
        _write(replacement, output, wanted, dtype)
    _show(replacement, wanted, dtype)
    console.print(f"wrote {output}", soft_wrap=True, markup=False)


def _read(source: str, output: Path, model: str | None) -> "Replacement":
    from circuits.errors import CircuitsError
    from circuits.hub import name_of, replacement_folder
    from circuits.loading import load
    from circuits.replacements.formats import qk_format
    from circuits.replacements.loading import load_replacement

    folder = replacement_folder(source)
    if folder.is_dir() and qk_format.is_qk(folder):
        raise CircuitsError(f"{source}: is a QK diagonalization, for which there is only our own format")
    if output.resolve() == folder.resolve():
        raise CircuitsError(f"{output}: is what is read; name another directory")
    if model is not None:
        replacement = load(model, folder).replacements[0]
    else:
        replacement = load_replacement(folder, memory=0)
        if replacement.name == folder.name:
            replacement.name = name_of(folder) or replacement.name
    steps = {} if replacement.processing is None else asdict(replacement.processing)
    if any(steps.values()):
        named = ", ".join(name for name, taken in steps.items() if taken)
        raise CircuitsError(
            f"{source}: was trained on a model whose weights TransformerLens had processed ({named}), which no other "
            "format can say; name the model with --model, and it is undone"
        )
    return replacement


def _write(replacement: "Replacement", output: Path, wanted: str, dtype: str) -> None:
    from importlib import import_module

    module = "native" if wanted == "circuits" else "circuit_tracer_writer"
    import_module(f"circuits.replacements.formats.{module}").save(replacement, output, dtype)


def _show(replacement: "Replacement", wanted: str, dtype: str) -> None:
    """A table of what was converted."""
    from circuits.cli.console import console, new_table

    title = f"{replacement.name}: {replacement.format} to {wanted}, {dtype}"
    table = new_table(title, "dictionary", "kind", "reads", "writes", "features>", "activation", "with")
    for d in replacement.dictionaries:
        activation = d.activation.kind if d.activation.k is None else f"{d.activation.kind} {d.activation.k}"
        writes = str(d.writes[0]) + (f" to {d.writes[-1]}" if len(d.writes) > 1 else "")
        parts = {"skip": d.skip is not None, "post-norm": d.before_post_norm, "movement": d.moved_by is not None}
        added = ", ".join(name for name, there in parts.items() if there)
        table.add_row(d.name, d.kind, str(d.read), writes, f"{d.n_features:,}", activation, added)
    console.print(table)
