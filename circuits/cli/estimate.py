"""What `circuits trace --estimate` prints: nodes, memory, time, and what to do where it does not fit."""

from collections.abc import Callable, Iterator
from itertools import groupby

from rich.table import Table
from rich.text import Text

from circuits.cli.console import NEGATIVE, POSITIVE, QUIET, console, new_table
from circuits.estimating import ASSUMED, ASSUMED_BASIS, WITHIN, Estimate
from circuits.estimating_costs import DictionarySize


def show_estimate(found: Estimate, left_out: tuple[str, ...] = ()) -> None:
    """Print an estimate; `left_out` are options whose work is not in it."""
    for table in (_nodes(found), _memory(found), _time(found)):
        console.print(table)
        console.print()
    console.print(_verdict(found))
    for text, size in found.advice:
        console.print(f"  {text}: {size_name(size)}", style=POSITIVE if size <= found.room else QUIET)
    for note in _notes(found, left_out):
        console.print(note, style=QUIET)


def size_name(size: float) -> str:
    """Bytes in words: `3.4 GB`, `120 MB`."""
    if size >= 1e9:
        return f"{size / 1e9:,.1f} GB"
    return f"{size / 1e6:.0f} MB" if size >= 1e7 else f"{size / 1e6:.2g} MB"


def time_name(seconds: float) -> str:
    """Seconds in words: `0.34 s`, `12 s`, `4 min`, `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _nodes(found: Estimate) -> Table:
    work = found.work
    table = new_table(
        f"Nodes of {found.model} on {work.n} tokens", "dictionary", "features>", "L0>", "L0 is from", "nodes>"
    )
    for sizes in _alike(work.every):
        first, last = sizes[0], sizes[-1]
        table.add_row(
            first.name if len(sizes) == 1 else f"{first.name} to {last.name}",
            f"{first.n_features:,}",
            f"{first.l0:.0f}",
            Text(first.basis, style=NEGATIVE if first.basis == ASSUMED_BASIS else ""),
            f"{sum(size.nodes(work.positions) for size in sizes):,.0f}",
        )
    table.add_row("tokens", "", "", "", f"{work.n:,}")
    table.add_row("errors", "", "", "", f"{work.errors * work.positions:,}")
    table.add_row("in all", "", "", "", f"{work.nodes:,.0f}", style="bold")
    table.add_row("targets, at most", "", "", "", f"{work.targets:,.0f}")
    return table


def _alike(sizes: tuple[DictionarySize, ...]) -> Iterator[list[DictionarySize]]:
    """Neighbours of the same kind, size and L0 together."""
    for _, group in groupby(sizes, key=lambda size: (size.kind, size.n_features, f"{size.l0:.0f}", size.basis)):
        yield list(group)


def _memory(found: Estimate) -> Table:
    usual, most = found.usual, found.most
    table = _costs(f"Memory on {found.device}", usual.memory, most.memory, size_name)
    table.add_row("at one time", size_name(usual.peak), size_name(most.peak), style="bold")
    table.add_row("there is", size_name(found.room), "")
    return table


def _time(found: Estimate) -> Table:
    usual, most = found.usual, found.most
    table = _costs("Time", usual.seconds, most.seconds, time_name)
    table.add_row("in all", time_name(usual.total_seconds), time_name(most.total_seconds), style="bold")
    return table


def _costs(title: str, usual: dict[str, float], most: dict[str, float], name: Callable[[float], str]) -> Table:
    table = new_table(title, "part", "usual>", "at most>")
    for part, value in usual.items():
        table.add_row(part, name(value), "" if most[part] == value else name(most[part]))
    return table


def _verdict(found: Estimate) -> Text:
    if found.fits:
        return Text("It fits.", style=f"bold {POSITIVE}")
    if found.should_fit:
        text = Text("It fits if the graph is no larger than usual. ", style=f"bold {POSITIVE}")
        return text.append("What makes sure, one after the other:", style="not bold default")
    text = Text("It does not fit. ", style=f"bold {NEGATIVE}")
    what = "What makes it smaller, one after the other:" if found.advice else "Nothing makes it much smaller."
    return text.append(what, style="not bold default")


def _notes(found: Estimate, left_out: tuple[str, ...]) -> Iterator[str]:
    yield WITHIN
    if any(size.basis == ASSUMED_BASIS for size in found.work.every):
        yield (
            f"Nothing says how many features are active where L0 is assumed: {ASSUMED:.0f} at a position. Nodes grow "
            "with it, edges with its square."
        )
    if left_out:
        yield f"Not counted: {', '.join(left_out)}."
