"""`circuits render`: a saved graph in another format, without the model."""

from pathlib import Path

import click

FORMATS = ("svg", "html", "dot", "graphml", "json", "npz")


@click.command("render", short_help="Write a saved graph as SVG, HTML, DOT, GraphML, JSON or npz.")
@click.argument("graph", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path),
              help="The file to write; its suffix is the format. Default: the graph's name with .svg.")  # fmt: skip
@click.option("--format", "suffix", type=click.Choice(FORMATS), help="The format, when no file is named.")
@click.option("--layout", type=click.Choice(["columns", "dot"]), default="columns", show_default=True,
              help="Of an SVG: a column for each token, or Graphviz's own.")  # fmt: skip
@click.option("--features", "store", type=click.Path(path_type=Path),
              help="Feature store, for the pages in HTML. Default: the embedded model's.")  # fmt: skip
@click.option("--node-threshold", type=float, help="Prune again, tighter.")
@click.option("--edge-threshold", type=float, help="Prune again, tighter.")
def command(
    graph: Path,
    output: Path | None,
    suffix: str | None,
    layout: str,
    store: Path | None,
    node_threshold: float | None,
    edge_threshold: float | None,
) -> None:
    """Write a saved GRAPH (.json or .npz) as .svg, .html, .dot, .graphml, .json or .npz."""
    if output is not None and suffix is not None and output.suffix.lower() != f".{suffix}":
        raise click.UsageError(f"--format {suffix} and the file {output.name} do not agree; give one of them")
    from circuits.cli.console import console
    from circuits.cli.files import save
    from circuits.feature_store import store_of
    from circuits.graph import Graph
    from circuits.graph.formats.svg_file import to_svg
    from circuits.graph.formats.whole_file import write_whole

    loaded = Graph.load(graph)
    if node_threshold is not None or edge_threshold is not None:
        settings = loaded.metadata.get("settings", {})
        loaded = loaded.prune(
            settings.get("node_threshold", 0.8) if node_threshold is None else node_threshold,
            settings.get("edge_threshold", 0.98) if edge_threshold is None else edge_threshold,
        )
    path = output or graph.with_suffix(f".{suffix or 'svg'}")
    if layout == "dot" and path.suffix == ".svg":
        write_whole(path, to_svg(loaded, layout="dot").encode("utf-8"))
    else:
        save(loaded, path, store_of(loaded, store) if path.suffix.lower() == ".html" else None)
    console.print(f"wrote {path}")
