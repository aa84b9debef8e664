"""Estimates beside traces: what `circuits.estimate` says of nodes, memory and time, and what loading and tracing took.

python benchmarks/estimates.py [--cases DIR] [--only llama6] [-o OUT.json]

Each estimate and each trace is a process of its own. With one thread (the default) time is that of the processor, so
that a machine which others use too gives the same figures; with more it is that of a clock. Memory is the peak of the
resident set. Random cases are made where they are not there yet (`make_case.py` of the golden cases). A cell has the
estimate, of memory and time the usual one and that at most, and what was measured. The last lines have how many times
the estimate that was: the usual one of the embedded default, which is trained, and the most of random cases.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent
TEXT = (
    "One day Tom went to the park with his dog. The dog saw a big red ball and ran to it. Tom was happy and said that "
    "they would play with the ball all day. Then the rain came and they went home to eat cake and read a book. "
)
FIGURES = ("nodes", "memory", "time")


@dataclass(frozen=True)
class Line:
    """One line of the table: a case of `SHAPES`, or "default"; what replaces it; tokens; settings; type of weights."""

    case: str
    replacement: str
    tokens: int
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: str | None = None

    @property
    def name(self) -> str:
        settings = [f"{name} {value}" for name, value in self.settings.items()]
        return " ".join([self.case, self.replacement, f"{self.tokens} tokens", *settings, self.dtype or ""]).strip()


SHAPES = {"gpt2s": ("gpt2", 12, 768), "llama6": ("llama", 6, 512)}
LINES = (
    Line("default", "attention-sae", 20),
    Line("default", "mtc", 20),
    Line("default", "mtc", 40),
    Line("default", "weakly-causal", 40),
    Line("default", "clt", 40),
    Line("default", "clt", 160),
    Line("default", "attention-sae", 160),
    Line("llama6", "plt", 16),
    Line("llama6", "plt", 16, dtype="bfloat16"),
    Line("llama6", "plt", 16, {"node_threshold": 0.6}),
    Line("llama6", "plt", 48, {"hops": False}),
    Line("llama6", "plt", 8, {"unpruned": True}),
    Line("gpt2s", "plt", 16, {"max_targets": 512}),
    Line("gpt2s", "plt", 64, {"max_targets": 512}),
    Line("gpt2s", "clt", 16, {"max_targets": 512}),
    Line("gpt2s", "plt", 16, {"hops": False}),
    Line("gpt2s", "plt", 16),
)


def folder_of(line: Line, args: argparse.Namespace) -> Path | None:
    """The folder of a random case, made where it is not there; None for the embedded default."""
    if line.case == "default":
        return None
    folder: Path = args.cases / f"{line.case}_{line.replacement}"
    if not (folder / "prompt.json").is_file():
        arch, layers, width = SHAPES[line.case]
        command = [sys.executable, str(args.golden / "make_case.py"), "--arch", arch, "--kind", line.replacement]
        command += ["--layers", str(layers), "--d-model", str(width), "--features", "8192", "--l0", "100"]
        subprocess.run([*command, "--seed", "0", "--out", str(folder)], check=True, stdout=subprocess.DEVNULL)
    return folder


def both(line: Line, args: argparse.Namespace) -> dict[str, Any]:
    """Estimate and measurement of one line, each in a process of its own."""
    folder = folder_of(line, args)
    job = asdict(line) | {"folder": None if folder is None else str(folder), "threads": args.threads}
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": str(CHECKOUT)}
    found: dict[str, Any] = {"line": asdict(line) | {"name": line.name}}
    for what in ("estimate", "trace"):
        command = [sys.executable, __file__, "--job", json.dumps(job | {"what": what})]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(f"{line.name}: {what} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        found[what] = json.loads(done.stdout.splitlines()[-1])
    return found


def work(job: dict[str, Any]) -> dict[str, Any]:
    """What one of these processes does: the figures of an estimate, or of a trace."""
    import torch

    import circuits

    torch.set_num_threads(job["threads"])
    clock = time.process_time if job["threads"] == 1 else time.perf_counter
    names = (None, job["replacement"])
    if job["folder"] is not None:
        names = (job["folder"] + "/model", job["folder"] + "/transcoders")
    settings = circuits.TraceSettings(**job["settings"])
    return (estimated if job["what"] == "estimate" else traced)(job, names, settings, clock)


def estimated(
    job: dict[str, Any], names: tuple[Any, Any], settings: Any, clock: Callable[[], float]
) -> dict[str, Any]:
    """What an estimate says."""
    from circuits.estimating import estimate_headers
    from circuits.headers import load_headers

    start = clock()
    model = load_headers(*names, dtype=job["dtype"])
    started = clock() - start
    found = estimate_headers(model, token_ids(job, model), settings=settings, started=started)
    usual, most = found.usual, found.most
    return {
        "nodes": [found.work.nodes, found.work.nodes],
        "memory": [usual.peak, most.peak],
        "time": [usual.total_seconds, most.total_seconds],
        "parts": most.memory,
        "steps": most.seconds,
    }


def traced(job: dict[str, Any], names: tuple[Any, Any], settings: Any, clock: Callable[[], float]) -> dict[str, Any]:
    """What loading and tracing take; nodes are counted afterwards."""
    import torch

    import circuits
    from circuits.prompt import prepare
    from circuits.targets import TopTokens
    from circuits.tracing import lay_out

    start = clock()
    model = circuits.load(*names, dtype=job["dtype"])
    ids = token_ids(job, model)
    graph = circuits.trace(model, ids, settings=settings)
    length, memory = clock() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with torch.no_grad():
        nodes = len(lay_out(model, prepare(model.base, ids), [TopTokens()]).table)
    about = {"targets": graph.metadata["ledger"]["targets"], "kept": len(graph.nodes), "edges": len(graph.edges)}
    return {"nodes": nodes, "memory": memory, "time": length} | about


def token_ids(job: dict[str, Any], model: Any) -> list[int]:
    """The prompt of a line."""
    from circuits.prompt import prepare

    if job["folder"] is not None:
        ids = json.loads((Path(job["folder"]) / "prompt.json").read_text())["token_ids"]
    else:
        ids = prepare(model.base, 3 * TEXT).token_ids
    return list(ids[: job["tokens"]])


def cell(result: dict[str, Any], figure: str) -> str:
    """Usual estimate, that at most where it is another, and measured."""
    shown = {"nodes": "{:,.0f}", "memory": "{:,.2f}", "time": "{:,.1f}"}[figure]
    unit = 1e9 if figure == "memory" else 1.0
    says = [shown.format(value / unit) for value in dict.fromkeys(result["estimate"][figure])]
    return f"{' to '.join(dict.fromkeys(says))}   [bold]{shown.format(result['trace'][figure] / unit)}[/bold]"


def ratios(results: list[dict[str, Any]], figure: str, *, trained: bool) -> str:
    """How many times the estimate was measured, from the least to the most."""
    of = [r for r in results if (r["line"]["case"] == "default") == trained]
    found = [r["trace"][figure] / r["estimate"][figure][0 if trained else 1] for r in of]
    return f"{min(found):.2f} to {max(found):.2f}" if found else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", type=Path, default=CHECKOUT.parent / "shared" / "golden")
    parser.add_argument("--cases", type=Path, default=Path("benchmark-cases"))
    parser.add_argument("--only", default="", help="lines whose name begins so")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, help="write the figures there as JSON")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job is not None:
        print(json.dumps(work(args.job)))
        return
    args.cases.mkdir(parents=True, exist_ok=True)
    wanted = [line for line in LINES if line.name.startswith(args.only)]
    results = [both(line, args) for line in track(wanted, console=Console(stderr=True))]
    table = Table(title=f"estimate, and measured; {args.threads} thread{'s' if args.threads > 1 else ''}")
    for name in ("trace", "nodes", "memory, GB", "time, s"):
        table.add_column(name, justify="left" if name == "trace" else "right")
    for result in results:
        table.add_row(result["line"]["name"], *(cell(result, figure) for figure in FIGURES))
    for name, trained in (("trained: times the usual", True), ("random: times the most", False)):
        table.add_row(name, *(ratios(results, figure, trained=trained) for figure in FIGURES))
    Console(width=120).print(table)
    if args.output is not None:
        args.output.write_text(json.dumps({"threads": args.threads, "results": results}, indent=1))


if __name__ == "__main__":
    main()
