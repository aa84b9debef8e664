"""`circuits label`: what Neuronpedia knows of a saved graph's features."""

from pathlib import Path

import click


@click.command("label", short_help="Label a saved graph's features from Neuronpedia.")
@click.argument("graph", type=click.Path(path_type=Path))
@click.option("--model-id", help="Neuronpedia's name of the model, such as gemma-2-2b.")
@click.option("--source-set", help="Its name of the dictionaries, such as gemmascope-transcoder-16k.")
@click.option("--key", envvar="NEURONPEDIA_API_KEY", help="Your key; public dictionaries need none.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the graph here. Default: where it was.")
def command(graph: Path, model_id: str | None, source_set: str | None, key: str | None, output: Path | None) -> None:
    """Give the features of a saved GRAPH the explanations that Neuronpedia has of them.

    Pictures and tables then show them. Labels once fetched are kept in ~/.cache/circuits.
    """
    from circuits.cli.console import console, feature_table, progress_bar
    from circuits.graph import Graph
    from circuits.labels import label
    from circuits.neuronpedia import Server

    loaded = Graph.load(graph)
    with progress_bar("asking Neuronpedia") as progress:
        done = label(loaded, Server(key=key), model=model_id, source_set=source_set, progress=progress)
    done.graph.save(output or graph)
    console.print(feature_table(done.graph, 12))
    console.print()
    if done.unreachable is not None:
        console.print(f"labels on disk only: {done.unreachable}", soft_wrap=True, markup=False)
    console.print(
        f"{done.found} of {done.features} features have a label; wrote {output or graph}", soft_wrap=True, markup=False
    )
