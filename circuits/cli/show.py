"""`circuits show`: a saved graph as tables, without the model."""

from pathlib import Path

import click


@click.command("show", short_help="Show a saved graph as tables.")
@click.argument("graph", type=click.Path(path_type=Path))
@click.option("--features", default=12, show_default=True, help="How many features to list.")
@click.option("--edges", default=15, show_default=True, help="How many steps between tokens to list.")
def command(graph: Path, features: int, edges: int) -> None:
    """Show the prediction, the strongest features and steps of a saved GRAPH (.json or .npz), and its ledger."""
    from circuits.cli.console import show_graph
    from circuits.graph import Graph

    show_graph(Graph.load(graph), features=features, edges=edges)
