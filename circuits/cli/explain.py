"""`circuits explain`: what a node reads, what an edge carries, by which heads, and why they looked there."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from circuits.cli.options import graph_model_options

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from circuits.explaining import Explanation, Look, Meeting, Part
    from circuits.graph import Graph


PAIRS = 5


@click.command("explain", short_help="Say what a node reads, what an edge carries, and why heads looked there.")
@click.argument("graph", type=click.Path(path_type=Path))
@click.argument("what", required=False)
@graph_model_options
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the explanation as JSON too.")
def command(
    graph: Path,
    what: str | None,
    model: str | None,
    replacements: tuple[str, ...],
    device: str,
    device_map: Any,
    output: Path | None,
) -> None:
    """Explain WHAT in a saved GRAPH: a node, or an edge as SOURCE->TARGET. Default: its strongest output.

    \b
    circuits explain out/graph.json a1_1360_14
    circuits explain out/graph.json "E_273_2->a1_1360_14"
    """
    from circuits.cli.console import console, progress_bar
    from circuits.cli.trace import quiet_libraries
    from circuits.graph import Graph

    loaded = Graph.load(graph)
    what = what if what is not None else _strongest(loaded)
    from circuits.explaining import explain, subject_of
    from circuits.loading import model_of

    subject_of(loaded, what)  # before the model is loaded for nothing
    quiet_libraries()
    with progress_bar("explaining"):
        found = model_of(loaded, model, replacements or None, device=device, device_map=device_map)
        explanation = explain(found, loaded, what)
    if output is not None:
        from circuits.graph.formats.whole_file import write_whole

        write_whole(output, (json.dumps(explanation.to_json(), indent=1) + "\n").encode())
    show(loaded, explanation)
    if output is not None:
        console.print(f"wrote {output}")


def _strongest(graph: "Graph") -> str:
    """The id of the target that the trace starts from with the most weight."""
    if not len(graph.nodes):
        raise click.UsageError("the graph has no nodes; name a graph that circuits trace has written")
    return graph.node_ids()[int(graph.nodes.target_weight.argmax())]


def show(graph: "Graph", explanation: "Explanation") -> None:
    """Print an explanation: in words, then its tables."""
    from rich.text import Text

    from circuits.cli.console import QUIET, console

    console.print(Text(explanation.subject, style="bold"))
    facts = Text()
    for name, value in explanation.facts.items():
        facts.append(f"{name} ", style=QUIET)
        facts.append(f"{value:.3g}  ")
    console.print(facts)
    console.print()
    for sentence in explanation.words:
        console.print(Text(sentence))
    console.print()
    for table in _edge_tables(graph, explanation):
        console.print(table)
        console.print()
    for look in explanation.looks:
        console.print(_look_table(graph, look))
        if look.qk_features:
            console.print(Text("  in trained QK features: ", style=QUIET) + _list(look.qk_features[:PAIRS]))
        console.print()
    console.print(_chain(graph, explanation))


def _edge_tables(graph: "Graph", explanation: "Explanation") -> "list[Table]":
    from circuits.cli.console import new_table, signed

    tables = []
    for title, lines in (("Reads", explanation.reads), ("Is read by", explanation.writes)):
        table = new_table(title, "node", "weight>", "share>", "heads")
        for line in lines:
            table.add_row(_part(graph, line.part), signed(line.weight), f"{line.share:.0%}", _list(line.heads, "\n"))
        tables.append(table)
    for title, hops in (("Leaves its position by", explanation.first_hops), ("Arrives by", explanation.last_hops)):
        table = new_table(title, "head, from and to position", "weight>")
        for name, weight in hops:
            table.add_row(name, signed(weight))
        tables.append(table)
    return [table for table in tables if table.row_count]


def _look_table(graph: "Graph", look: "Look") -> "Table":
    from circuits.cli.console import new_table, signed
    from circuits.story import position_name

    title = (
        f"Why {look.head} looked from {position_name(graph, look.query)} at {position_name(graph, look.key)}: "
        f"attention {look.attention:.3f}, score {look.score:.2f}, {look.lead:+.2f} above the other keys"
    )
    table = new_table(title, "query side", "key side", "at key", "part>")
    for pair in look.pairs[:PAIRS]:
        at = "" if pair.at == look.key else position_name(graph, pair.at)
        table.add_row(
            _side(graph, pair, look.query, "query"), _side(graph, pair, pair.at, "key"), at, signed(pair.weight)
        )
    return table


def _side(graph: "Graph", pair: "Meeting", position: int, side: str) -> "Text":
    from rich.text import Text

    from circuits.cli.console import QUIET
    from circuits.story import part_name, position_name

    part: Part = getattr(pair, side)
    text = Text(part_name(graph, part.id))
    if part.origin >= 0 and not part.id.startswith("E_"):
        text.append(f"\n  from {position_name(graph, part.origin)} {part.share:.0%}", style=QUIET)
    elif part.position != position:
        text.append(f"\n  at {position_name(graph, part.position)}", style=QUIET)
    return text


def _part(graph: "Graph", part: "Part") -> "Text":
    from rich.text import Text

    from circuits.cli.console import QUIET
    from circuits.story import part_name, position_name

    text = Text(part_name(graph, part.id))
    text.append(f"\n  at {position_name(graph, part.position)}  {part.id}", style=QUIET)
    return text


def _list(named: "tuple[tuple[str, float], ...]", between: str = "  ") -> "Text":
    from rich.text import Text

    from circuits.cli.console import signed

    text = Text()
    for name, weight in named:
        text.append((between if text else "") + name + " ")
        text.append_text(signed(weight))
    return text


def _chain(graph: "Graph", explanation: "Explanation") -> "Text":
    """The chain from a token to an output, a node a line."""
    from rich.text import Text

    from circuits.cli.console import QUIET, signed
    from circuits.story import part_name, position_name

    text = Text("Chain from token to output", style="italic")
    for link in explanation.chain:
        text.append("\n  " if link is explanation.chain[0] else "\n  -> ", style="not italic")
        line = Text(part_name(graph, link.part.id), style="not italic")
        line.append(f" at {position_name(graph, link.part.position)} ", style=QUIET)
        if link.weight:
            line.append_text(signed(link.weight))
        if link.heads:
            line.append(f"  by {link.heads[0][0]}", style=QUIET)
        text.append_text(line)
    return text
