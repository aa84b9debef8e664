"""What the commands print: one console, one progress bar, and the tables of a graph that read well in 80 columns."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from circuits.graph import STAYS, Graph, head_name
from circuits.graph.formats.rows import loadings
from circuits.graph.formats.text import visible
from circuits.story import KIND_NAMES, position_name

POSITIVE, NEGATIVE, QUIET = "dodger_blue2", "dark_orange3", "grey50"

LABEL = 40  # characters of a feature's label that are shown

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, gone when the work is done; yields the function to report (done, in all)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def signed(weight: float) -> Text:
    """A weight with its sign as a colour and as a character."""
    return Text(f"{weight:+.3g}", style=POSITIVE if weight > 0 else NEGATIVE)


def node_name(graph: Graph, node: int) -> str:
    """A node in words: `attention L2 #153`, `token " Mary"`, `output " Mary"`."""
    nodes = graph.nodes
    kind = str(nodes.kind[node])
    if kind in ("embedding", "logit"):
        return f'{KIND_NAMES[kind]} "{visible(str(nodes.label[node]))}"'
    place = f"{KIND_NAMES[kind]} L{nodes.layer[node]}"
    return place if nodes.feature[node] < 0 else f"{place} #{nodes.feature[node]}"


def new_table(title: str, *columns: str) -> Table:
    """An open table; a column whose name ends with `>` is set flush right."""
    table = Table(title=title, title_justify="left", box=None, header_style=QUIET)
    for name in columns:
        table.add_column(name.rstrip(">"), justify="right" if name.endswith(">") else "left")
    return table


def prediction_table(graph: Graph) -> Table:
    """The graph's targets with their probabilities and pre-activations."""
    table = new_table("Prediction", "target", "position", "probability>", "value>")
    nodes = graph.nodes
    for node in sorted(np.flatnonzero(nodes.is_target).tolist(), key=lambda i: -nodes.target_weight[i]):
        probability = nodes.probability[node]
        table.add_row(
            Text(node_name(graph, node), style="bold"),
            position_name(graph, int(nodes.position[node])),
            "" if np.isnan(probability) else f"{probability:.3f}",
            "" if np.isnan(nodes.pre_activation[node]) else f"{nodes.pre_activation[node]:.3f}",
        )
    return table


def feature_table(graph: Graph, limit: int) -> Table:
    """The features with the largest influence on the targets."""
    table = new_table("Strongest features", "feature", "position", "activation>", "influence>")
    nodes = graph.nodes
    features = np.flatnonzero(nodes.is_feature)
    for node in features[np.argsort(-nodes.influence[features], kind="stable")][:limit]:
        name = Text(node_name(graph, node), style="" if nodes.kind[node] == "mlp_feature" else "medium_purple1")
        if label := visible(str(nodes.label[node])):
            name.append("\n  " + (label if len(label) <= LABEL else label[: LABEL - 1] + "…"), style=QUIET)
        table.add_row(
            name,
            position_name(graph, int(nodes.position[node])),
            f"{nodes.activation[node]:.2f}",
            f"{nodes.influence[node]:.4f}",
        )
    return table


def edge_table(graph: Graph, limit: int) -> Table:
    """The edges that carry most between two tokens, with the heads that carried them.

    Of an edge through frozen attention these are the heads of its last hop, which bring it to the target's position.
    """
    table = new_table("Strongest steps between tokens", "from", "to", "weight>", "heads")
    nodes, edges = graph.nodes, graph.edges
    rows = [own or hops for own, hops in zip(loadings(graph), loadings(graph, "last_hops"))]
    size = np.abs(edges.weight)
    total = np.bincount(edges.target, weights=size, minlength=len(nodes))
    score = size / np.maximum(total[edges.target], 1e-30)
    score = score * (nodes.influence + nodes.target_weight)[edges.target]
    crossing = np.flatnonzero(nodes.position[edges.source] != nodes.position[edges.target])
    for edge in crossing[np.argsort(-score[crossing], kind="stable")][:limit]:
        table.add_row(
            _end(graph, int(edges.source[edge])),
            _end(graph, int(edges.target[edge])),
            signed(float(edges.weight[edge])),
            _heads(rows[edge]),
        )
    return table


def summary(graph: Graph) -> Text:
    """One line each: what the graph holds, its scores, its ledger."""
    data = graph.metadata
    scores, ledger = data.get("scores", {}), data.get("ledger", {})
    text = Text()
    text.append(f"{len(graph.nodes)} nodes, {len(graph.edges)} edges, {len(np.unique(graph.heads.edge))} through ")
    text.append("replaced attention\n")
    for name, value in scores.items():
        text.append(f"{name} ", style=QUIET)
        text.append(f"{value:.3f}  ", style="bold")
    if "max_relative_gap" in ledger:
        text.append("ledger gap ", style=QUIET)
        text.append(f"{ledger['max_relative_gap']:.1e}  ", style="bold")
    if "left_out_influence" in data:
        text.append("left out ", style=QUIET)
        text.append(f"{data['left_out_influence']:.0e}", style="bold")
    if rounded := data.get("products"):
        text.append(f"\nsearched with {rounded['products']} products, which change an edge by {rounded['error']:.0e} ")
        text.append("of the largest; edges here are float32")
    frozen = [str(layer) for layer, state in enumerate(data.get("attention", [])) if state == "frozen"]
    if frozen:
        text.append(f"\nattention frozen in layers {', '.join(frozen)}: heads are those of an edge's last hop")
    if doubtful := len(data.get("ambiguous_links", ())):
        text.append(f"\n{doubtful} links of the file name a feature and an error alike, and are shown as the error's")
    return text


def show_graph(graph: Graph, *, features: int = 8, edges: int = 10) -> None:
    """Print a graph's tables."""
    console.print(Text(visible(graph.prompt), style="italic"))
    console.print()
    for table in (prediction_table(graph), feature_table(graph, features), edge_table(graph, edges)):
        if table.row_count:
            console.print(table)
            console.print()
    console.print(summary(graph))


def _end(graph: Graph, node: int) -> Text:
    text = Text(node_name(graph, node))
    text.append(f"\n  at {position_name(graph, int(graph.nodes.position[node]))}", style=QUIET)
    return text


def _heads(rows: list[list[float]]) -> Text:
    text = Text()
    sums: dict[tuple[int, int], float] = {}
    for layer, head, _, _, weight in rows:
        if head <= STAYS:
            continue
        sums[int(layer), int(head)] = sums.get((int(layer), int(head)), 0.0) + weight
    for (layer, head), weight in sorted(sums.items(), key=lambda item: -abs(item[1]))[:2]:
        text.append(("\n" if text else "") + head_name(head, layer=layer) + " ")
        text.append_text(signed(weight))
    return text
