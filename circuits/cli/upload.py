"""`circuits upload`: a saved graph to Neuronpedia."""

from pathlib import Path

import click


@click.command("upload", short_help="Upload a saved graph to Neuronpedia.")
@click.argument("graph", type=click.Path(path_type=Path))
@click.option("--key", envvar="NEURONPEDIA_API_KEY",
              help="Your key, from neuronpedia.org/account. Better in the variable NEURONPEDIA_API_KEY.")  # fmt: skip
@click.option("--model-id", help="Neuronpedia's name of the model, such as gemma-2-2b.")
@click.option("--source-set", help="Its name of the dictionaries, such as gemmascope-transcoder-16k, if it has them.")
@click.option("--slug", help="The graph's name in its address. Default: from the prompt.")
def command(graph: Path, key: str | None, model_id: str | None, source_set: str | None, slug: str | None) -> None:
    """Upload a saved GRAPH (.json or .npz) to Neuronpedia with your key; everybody can then see it."""
    from circuits.cli.console import console, progress_bar
    from circuits.graph import Graph
    from circuits.neuronpedia import Server, upload

    loaded = Graph.load(graph)
    with progress_bar("uploading"):
        address = upload(loaded, Server(key=key), model=model_id, source_set=source_set, name=slug)
    said = f"uploaded {len(loaded.nodes)} nodes and {len(loaded.edges)} edges: {address}"
    console.print(said, soft_wrap=True, markup=False)
