"""`circuits label`: what is known of a saved graph's features, from a feature store or from Neuronpedia."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from circuits.graph import Graph
    from circuits.labels import LabelSource


@click.command("label", short_help="Label a saved graph's features, from feature pages or from Neuronpedia.")
@click.argument("graph", type=click.Path(path_type=Path))
@click.option("--features", type=click.Path(path_type=Path), help="A feature store. Default: the embedded model's.")
@click.option("--model-id", help="Neuronpedia's name of the model, such as gemma-2-2b.")
@click.option("--source-set", help="Its name of the dictionaries, such as gemmascope-transcoder-16k.")
@click.option("--key", envvar="NEURONPEDIA_API_KEY", help="Your key; public dictionaries need none.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the graph here. Default: where it was.")
def command(
    graph: Path,
    features: Path | None,
    model_id: str | None,
    source_set: str | None,
    key: str | None,
    output: Path | None,
) -> None:
    """Give the features of a saved GRAPH their labels.

    They are those of the feature store named with --features, or of the one that comes with the embedded model if the
    graph is of it; of any other graph the explanations that Neuronpedia has, which are kept in ~/.cache/circuits once
    they are fetched. Pictures and tables then show them.
    """
    from circuits.cli.console import console, feature_table, progress_bar
    from circuits.graph import Graph
    from circuits.labels import label

    if features is not None and (model_id or source_set):
        raise click.UsageError("give --features, or Neuronpedia's names with --model-id and --source-set, not both")
    loaded = Graph.load(graph)
    source = _source(loaded, features, model_id, source_set, key)
    with progress_bar("labelling") as progress:
        done = label(loaded, source, progress)
    done.graph.save(output or graph)
    console.print(feature_table(done.graph, 12))
    console.print()
    if done.unreachable is not None:
        console.print(f"labels on disk only: {done.unreachable}", soft_wrap=True, markup=False)
    console.print(
        f"{done.found} of {done.features} features have a label; wrote {output or graph}", soft_wrap=True, markup=False
    )


def _source(
    graph: "Graph", features: Path | None, model_id: str | None, source_set: str | None, key: str | None
) -> "LabelSource":
    """Who is asked: a feature store that fits the graph, unless Neuronpedia's names are given."""
    from circuits.feature_store import store_of
    from circuits.neuronpedia import Server
    from circuits.neuronpedia_labels import NeuronpediaLabels

    store = None if model_id or source_set else store_of(graph, features)
    return store or NeuronpediaLabels(Server(key=key), model_id, source_set)
