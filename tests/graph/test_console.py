"""The tables that the commands print name every kind of node and every sort of head."""

from __future__ import annotations

from hand_graph import mixed_hand_graph
from rich.console import Console

from circuits.cli.console import edge_table, feature_table, node_name
from circuits.graph import KINDS


def printed(table: object) -> str:
    """The text of a table in 80 columns."""
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_every_kind_has_a_name() -> None:
    """Different for each kind."""
    graph = mixed_hand_graph()
    names = {node_name(graph, graph.nodes.kind.tolist().index(kind)) for kind in KINDS}
    assert names == {
        'token " a"', 'output " a"', "value L0 #5", "value error L0", "MTC key L1 #7", "MTC query L1 #7",
        "block error L1", "attention L2 #8", "attention error L2", "MLP L2 #9", "MLP error L2",
    }  # fmt: skip


def test_tables_name_the_heads() -> None:
    """Steps between tokens with the two strongest heads of each, summed over positions; features with their side."""
    steps = printed(edge_table(mixed_hand_graph(), 10))
    lines = [line.strip() for line in steps.splitlines()]
    assert any(line.startswith("MTC key L1 #7") and line.endswith("L1H0 +1.5") for line in lines)
    assert any(line.endswith("L1H1 -0.5") for line in lines)
    assert any(line.endswith("L2 own -2") for line in lines)
    assert "MTC query L1 #7" in printed(feature_table(mixed_hand_graph(), 8))
