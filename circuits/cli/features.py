"""`circuits features`: pages of what every feature does, built from text, shown, labelled, imported and exported."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from circuits.cli.options import model_options

if TYPE_CHECKING:
    from circuits.feature_store import FeatureStore

STORE = click.option(
    "--features", "store", type=click.Path(path_type=Path), help="The feature store. Default: the embedded model's."
)


@click.group("features", short_help="Build, show, label, import and export feature pages.")
def command() -> None:
    """Feature pages: what every feature of a model's replacements is active on, and what it does.

    \b
    circuits features build --text books.txt
    circuits features show clt.0 123
    circuits features label clt.0 123 "names of children"
    """


@command.command("build")
@model_options
@click.option("--text", "texts", type=click.Path(path_type=Path), multiple=True, required=True,
              help="Plain text, .jsonl, .parquet or hf:NAME:SPLIT. Repeatable.")  # fmt: skip
@click.option("--field", default="text", show_default=True, help="Field that has the text.")
@click.option("-o", "--output", type=click.Path(path_type=Path),
              help="The file. Default, of the embedded model: your own in ~/.local/share/circuits.")  # fmt: skip
@click.option("--tokens", default=1_000_000, show_default=True, help="Stop after so many tokens.")
@click.option("--window", default=128, show_default=True, help="Longest document, in tokens.")
@click.option("--context", default=24, show_default=True, help="Tokens of an example.")
@click.option("--top", default=10, show_default=True, help="Examples with the largest activations.")
@click.option("--per-quantile", default=2, show_default=True, help="Examples of each fifth of all activations.")
@click.option("--outputs", default=10, show_default=True, help="Top and bottom output tokens.")
@click.option("--near", default=6, show_default=True, help="Nearest features, by decoder and by co-activation.")
@click.option("--sample", default=50_000, show_default=True, help="Tokens that co-activation is taken from.")
@click.option("--shuffle", default=20_000, show_default=True, help="Documents shuffled among one another.")
@click.option("--seed", default=0, show_default=True, help="Of the shuffling.")
@click.option("--again", is_flag=True, help="Build pages that are there already too; labels stay.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.")
def build(**options: Any) -> None:
    """Stream text through the model and its replacements, and write a page for every feature.

    The same command goes on after a stop, and ends with the same pages.
    """
    from circuits.cli.console import console, progress_bar
    from circuits.cli.trace import quiet_libraries
    from circuits.feature_building import build_features
    from circuits.feature_gathering import Settings
    from circuits.feature_store import writable
    from circuits.loading import load
    from circuits.text import open_text
    from circuits.training import set_threads

    if options["model"] is not None and options["output"] is None:
        raise click.UsageError("name the file with -o; only the embedded model has one of its own")
    quiet_libraries()
    set_threads(options["threads"])
    names = ("tokens", "window", "context", "top", "per_quantile", "outputs", "near", "sample")
    settings = Settings(**{name: options[name] for name in names})
    with progress_bar("loading"):
        model = load(
            options["model"], options["replacements"] or None, device=options["device"], dtype=options["dtype"]
        )
    settings.check(model.base.shape.context)
    source = open_text(
        model.base, options["texts"], options["window"],
        field=options["field"], buffer=options["shuffle"], seed=options["seed"],
    )  # fmt: skip
    path = options["output"] or writable(None)
    if options["output"] is None:
        path.parent.mkdir(parents=True, exist_ok=True)
    with progress_bar("building pages") as progress:
        store = build_features(model, source, path, settings, again=options["again"], progress=progress)
    pages = ", ".join(f"{name} ({one.features:,})" for name, one in store.dictionaries().items())
    console.print(f"{store.path}: pages of {pages}", soft_wrap=True, markup=False)


@command.command("show")
@click.argument("dictionary")
@click.argument("feature", type=int)
@STORE
@click.option("--examples", default=3, show_default=True, help="How many of each group.")
@click.option("--json", "as_json", is_flag=True, help="Print the page as JSON.")
def show(dictionary: str, feature: int, store: Path | None, examples: int, as_json: bool) -> None:
    """Print the page of FEATURE of DICTIONARY, such as `clt.0 123`."""
    import json

    from circuits.cli.console import console
    from circuits.cli.page import show_page

    opened = _opened(store)
    page = opened.page(dictionary, feature)
    if as_json:
        click.echo(json.dumps(page, ensure_ascii=True))
        return
    near = {(name, number) for name, number, _ in (*page["near_by_decoder"], *page["near_by_coactivation"])}
    show_page(console, page, opened.labels(near), examples)


@command.command("label")
@click.argument("dictionary")
@click.argument("feature", type=int)
@click.argument("label")
@STORE
def label(dictionary: str, feature: int, label: str, store: Path | None) -> None:
    """Call FEATURE of DICTIONARY by a LABEL of your own; an empty one takes it away."""
    from circuits.cli.console import console
    from circuits.feature_store import FeatureStore, writable

    opened = FeatureStore(writable(store))
    opened.set_label(dictionary, feature, label)
    text = f"{dictionary} #{feature}: {opened.label(dictionary, feature)}"
    console.print(text, soft_wrap=True, markup=False)
    console.print(f"wrote {opened.path}", soft_wrap=True, markup=False)


@command.command("export")
@click.argument("dictionary")
@click.argument("features", type=int, nargs=-1)
@STORE
@click.option("--model-id", help="Neuronpedia's name of the model. Default: the model's own.")
@click.option("--source", help="Neuronpedia's name of the dictionary, such as 6-res-jb. Default: DICTIONARY.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="JSON lines, one a feature.")
def export(
    dictionary: str,
    features: tuple[int, ...],
    store: Path | None,
    model_id: str | None,
    source: str | None,
    output: Path,
) -> None:
    """Write pages of DICTIONARY, of all its features or of FEATURES, in Neuronpedia's format."""
    from circuits.cli.console import console, progress_bar
    from circuits.neuronpedia_features import export_features

    opened = _opened(store)
    with progress_bar("writing") as progress:
        count = export_features(opened, dictionary, output, features or None, model_id, source, progress)
    console.print(f"wrote {count} features to {output}", soft_wrap=True, markup=False)


@command.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("dictionary")
@STORE
@click.option("--model", help="For a new store: folder or hub id of the model.")
@click.option("--replacement", "replacements", multiple=True, help="For a new store: the dictionaries, repeatable.")
def import_(file: Path, dictionary: str, store: Path | None, model: str | None, replacements: tuple[str, ...]) -> None:
    """Read Neuronpedia's features in FILE (JSON, or JSON lines, .gz too) as pages of DICTIONARY.

    With --replacement a store is made where there is none.
    """
    from circuits.cli.console import console
    from circuits.feature_store import FeatureStore, writable
    from circuits.neuronpedia_features import import_features

    if replacements:
        from circuits.cli.trace import quiet_libraries
        from circuits.feature_building import empty_store
        from circuits.loading import load

        if store is None:
            raise click.UsageError("name the new store with --features")
        quiet_libraries()
        opened = empty_store(load(model, replacements), store)
    else:
        opened = FeatureStore(writable(store))
    count = import_features(opened, dictionary, file)
    console.print(f"read {count} features of {dictionary} into {opened.path}", soft_wrap=True, markup=False)


@command.command("explain")
@click.argument("dictionary")
@click.argument("features", type=int, nargs=-1, required=True)
@STORE
@click.option("--endpoint", required=True, help="An OpenAI-compatible address, such as http://127.0.0.1:8000/v1.")
@click.option("--model", "name", required=True, help="The model to ask; it is the author of the labels.")
@click.option("--key", envvar="CIRCUITS_EXPLAIN_KEY", help="Its key. Better in the variable CIRCUITS_EXPLAIN_KEY.")
def explain(
    dictionary: str, features: tuple[int, ...], store: Path | None, endpoint: str, name: str, key: str | None
) -> None:
    """Have a language model say what FEATURES of DICTIONARY are about, from their pages, as labels.

    The pages' examples go to the endpoint. A label that a person wrote is still the one that is shown.
    """
    from circuits.cli.console import console, progress_bar
    from circuits.feature_explaining import Endpoint, explain_features
    from circuits.feature_store import FeatureStore, writable

    opened = FeatureStore(writable(store))
    with progress_bar("asking") as progress:
        found = explain_features(opened, dictionary, features, Endpoint(endpoint, name, key), progress)
    for feature, text in found.items():
        console.print(f"{dictionary} #{feature}: {text}", soft_wrap=True, markup=False)


def _opened(path: Path | None) -> "FeatureStore":
    """The store that was named, or that of the embedded model."""
    from circuits.feature_store import FeatureStore, default_store

    found = FeatureStore(path) if path is not None else default_store()
    if found is None:
        raise click.UsageError("there is no feature store here; build one with `circuits features build`")
    return found
