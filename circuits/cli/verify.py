"""`circuits verify`: test a graph's predictions by interventions in the base model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from circuits.cli.options import graph_model_options

if TYPE_CHECKING:
    from rich.table import Table

    from circuits.graph import Graph


@click.command("verify", short_help="Test a graph's predictions by interventions.")
@click.argument("graph", type=click.Path(path_type=Path))
@click.option("--nodes", type=click.IntRange(min=1), help="Test so many nodes, the strongest first. Default: all.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of random nodes and intervals.")
@click.option("--mode", type=click.Choice(["real", "frozen"]), default="real", show_default=True,
              help="real: everything is recomputed; frozen: direct effects alone.")  # fmt: skip
@graph_model_options
@click.option("--list", "listed", type=int, default=12, show_default=True, help="How many nodes to list.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the graph here. Default: where it was.")
def command(graph: Path, **options: Any) -> None:
    """Ablate the nodes of a saved GRAPH, and compare what happens with what it predicts.

    The figures are written into the graph: into its metadata, and what each node's test found into the node.
    """
    from circuits.cli.console import console, progress_bar
    from circuits.cli.trace import quiet_libraries
    from circuits.graph import Graph

    loaded = Graph.load(graph)
    from circuits.loading import model_of
    from circuits.verification import target_of, verify

    target_of(loaded)  # before the model is loaded for nothing

    quiet_libraries()
    with progress_bar("loading"):
        model = model_of(
            loaded,
            options["model"],
            options["replacements"] or None,
            device=options["device"],
            device_map=options["device_map"],
        )
    with progress_bar("ablating") as progress:
        verified = verify(
            model, loaded, nodes=options["nodes"], seed=options["seed"], mode=options["mode"], progress=progress
        )
    output: Path = options["output"] or graph
    verified.save(output)
    show_verification(verified, options["listed"])
    console.print(f"wrote {output}")


def show_verification(graph: "Graph", count: int = 12) -> None:
    """Print what was measured: the nodes' tests, and the figures."""
    from circuits.cli.console import console

    found = graph.metadata["verification"]
    console.print(_nodes(graph, count))
    console.print()
    console.print(_figures(found))
    console.print()
    for name, label in (
        ("sufficiency", "sufficiency: the graph kept alone gives back"),
        ("necessity", "necessity: without the graph the target loses"),
    ):
        share = "-" if found[name] is None else f"{found[name]:.0%}"
        console.print(f"{label} [bold]{share}[/bold]")


def _nodes(graph: "Graph", count: int) -> "Table":
    import numpy as np

    from circuits.cli.console import new_table, node_name, signed
    from circuits.story import position_name

    table = new_table("Ablated by itself: change of the target", "node", "position", "predicted>", "measured>")
    nodes = graph.nodes
    tested = np.flatnonzero(~np.isnan(nodes.measured))
    for node in tested[np.argsort(-np.abs(nodes.predicted[tested]), kind="stable")][:count].tolist():
        table.add_row(
            node_name(graph, node),
            position_name(graph, int(nodes.position[node])),
            signed(float(nodes.predicted[node])),
            signed(float(nodes.measured[node])),
        )
    return table


def _figures(found: dict[str, Any]) -> "Table":
    from circuits.cli.console import new_table

    title = f"Predicted against measured ({found['mode']}), with 95 % intervals"
    table = new_table(title, "tested", "rank correlation>", "slope>", "median size>")
    for name, label in (("nodes", "graph's nodes"), ("random", "random nodes"), ("patterns", "heads of edges")):
        row = found[name]
        table.add_row(
            f"{row['tested']} {label}", *(_interval(row, figure) for figure in ("spearman", "slope", "median_effect"))
        )
    return table


def _interval(row: dict[str, Any], figure: str) -> str:
    value, interval = row[figure], row[f"{figure}_interval"]
    if value is None:
        return "-"
    shown = f"{value:.2f}"
    return shown if interval is None else f"{shown} ({interval[0]:.2f} {interval[1]:.2f})"
