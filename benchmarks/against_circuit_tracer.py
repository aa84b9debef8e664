"""circuits and circuit-tracer 0.5.0 on the same cases, in one run, one after the other, with the same threads.

python benchmarks/against_circuit_tracer.py --circuit-tracer PYTHON [--only llama6] [-o OUT.json]

PYTHON is an interpreter that has circuit-tracer 0.5.0 (its pins are not ours). For each case the model and the
transcoders are made if they are not there (`make_case.py`), circuit-tracer's runner and ours are started as processes
of their own, in turn, and the answers compared: the rows of the features that circuit-tracer chose, and the share of
these that we chose too. A line is printed only if they agree; beneath it the same search with bfloat16 products, whose
rows are off by what is said there. Ratios are theirs / ours. `limit` is how long the
arithmetic alone would take at the rate that this machine multiplies matrices with, measured in the same run.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent
CLOSE = 1e-4  # rows, of the largest edge


@dataclass(frozen=True)
class Case:
    """One line of the table: `rows` feature rows of `tokens` tokens; `left_out` also to the same left-out bound."""

    name: str
    arch: str
    layers: int
    d_model: int
    kind: str
    tokens: int
    rows: int
    left_out: bool = False

    @property
    def folder(self) -> str:
        return f"{self.name}_{self.kind}"


CASES = (
    Case("gpt2s", "gpt2", 12, 768, "plt", 16, 512),
    Case("gpt2s", "gpt2", 12, 768, "plt", 64, 512),
    Case("gpt2s", "gpt2", 12, 768, "clt", 16, 512),
    Case("llama6", "llama", 6, 512, "plt", 16, 7500, left_out=True),
)


def run(command: list[str], threads: int) -> dict[str, Any]:
    """A process's last JSON object on stdout, with its wall time."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-2000:]}")
    text = done.stdout
    report: dict[str, Any] = json.loads(text[text.rindex('{"case"') :].splitlines()[0])
    return report


def make(case: Case, args: argparse.Namespace) -> Path:
    """The folder of a case, made with `make_case.py` where it is not there yet."""
    folder: Path = args.cases / case.folder
    if not (folder / "prompt.json").is_file():
        command = [args.circuit_tracer, str(args.golden / "make_case.py"), "--arch", case.arch, "--kind", case.kind]
        command += ["--layers", str(case.layers), "--d-model", str(case.d_model), "--features", "8192", "--l0", "100"]
        subprocess.run([*command, "--seed", "0", "--out", str(folder)], check=True, stdout=subprocess.DEVNULL)
    return folder


def read(folder: Path) -> None:
    """Read a case's files once: neither engine then waits for the disk."""
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass


def compare(theirs: Path, ours: Path) -> dict[str, float]:
    """Worst difference of an edge, relative to the largest, over the rows that both have; and overlap of the choice."""
    with np.load(theirs) as a, np.load(ours) as b:
        chosen = a["active_features"][a["selected_features"]]
        n_layers, n_pos = int(a["n_layers"]), int(a["n_pos"])
        features = [("f", *key) for key in chosen.tolist()]
        errors = [("e", layer, position, -1) for layer in range(n_layers) for position in range(n_pos)]
        tokens = [("t", -1, position, token) for position, token in enumerate(a["input_tokens"].tolist())]
        number = {key: i for i, key in enumerate([*features, *errors, *tokens])}
        kinds = {"mlp_feature": "f", "mlp_error": "e", "embedding": "t"}
        keys = [(kinds[kind], *node) for kind, node in zip(b["kind"].tolist(), b["nodes"].tolist(), strict=True)]
        place = np.array([number.get(key, -1) for key in keys])
        column = np.flatnonzero(place >= 0)
        is_feature = b["targets"] < len(keys)
        targets = place[b["targets"][is_feature]]
        mine, his = b["rows"][is_feature][:, column], a["adjacency"][targets][:, place[column]]
        expanded = {keys[i] for i in np.flatnonzero(b["expanded"][: len(keys)])}
        return {
            "worst": float(np.abs(mine - his).max() / np.abs(his).max()),
            "rows compared": len(targets),
            "chosen by both": len(expanded & set(features)) / len(features),
        }


def rate(threads: int) -> float:
    """Multiplications and additions a second of a large float32 product on this machine."""
    torch.set_num_threads(threads)
    a, b = torch.randn(2048, 768), torch.randn(768, 768)
    best = np.inf
    for _ in range(20):
        begin = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - begin)
    return float(2 * 2048 * 768 * 768 / best)


def arithmetic(case: Case, ours: Path, rows: np.ndarray, folder: Path) -> float:
    """Multiplications and additions that the rows need: every hop through values and outputs at each position that can
    be reached, and every product with a writer. Nothing saved by structure is taken off."""
    config = json.loads((folder / "model" / "config.json").read_text())
    d_model = case.d_model
    heads = config.get("n_head") or config["num_attention_heads"]
    kv = config.get("num_key_value_heads") or heads
    hop = 2 * d_model * (d_model + d_model * kv // heads)
    layers, positions = rows[:, 0], rows[:, 1]
    hops = float(((layers + 1) * (positions + 1)).sum()) * hop
    with np.load(ours) as archive:
        nodes = archive["nodes"]
        below = np.zeros((case.layers + 1, case.tokens + 1))
        np.add.at(below, (np.clip(nodes[:, 0], 0, case.layers - 1) + 1, nodes[:, 1] + 1), 1)
    writers = 1 if case.kind == "plt" else case.layers / 2
    counts = below.cumsum(0).cumsum(1)[layers, positions + 1]
    return hops + float(counts.sum()) * 2 * d_model * writers


def measure(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Both engines on one case."""
    folder = make(case, args)
    theirs, ours = (args.cases / f"{case.folder}_{case.tokens}_{who}.npz" for who in ("theirs", "ours"))
    runner = [args.circuit_tracer, str(args.golden / "run_circuit_tracer.py"), "--batch-size", "64"]
    runner += ["--threads", str(args.threads), "--max-feature-nodes", str(case.rows)]
    read(folder)
    his = run([*runner, "--case", str(folder), "--tokens", str(case.tokens), "--out", str(theirs)], args.threads)
    read(folder)
    command = [sys.executable, str(HERE / "run_case.py"), "--case", str(folder), "--tokens", str(case.tokens)]
    command += ["--threads", str(args.threads)]
    chosen = ["--max-targets", str(case.rows), "--features", str(theirs), "--out", str(ours)]
    mine = run([*command, *chosen], args.threads)
    found = compare(theirs, ours)
    if found["worst"] > CLOSE:
        sys.exit(f"{case.folder}, {case.tokens} tokens: rows differ by {found['worst']:.1e} of the largest edge")
    with np.load(theirs) as archive:
        limit = arithmetic(case, ours, archive["active_features"][archive["selected_features"]], folder)
    rounded = run([*command, *chosen, "--products", "bfloat16", "--no-graph"], args.threads)
    rounded |= {"worst": compare(theirs, ours)["worst"]}
    bound = {}
    if case.left_out:
        bound = run([*command, "--left-out", str(max(mine["left_out"], 1e-6)), "--no-graph"], args.threads)
    answers = {"theirs": his, "ours": mine, "rounded": rounded, "bound": bound}
    return {"case": case, **answers, "found": found, "limit": limit / args.rate}


def line(result: dict[str, Any]) -> list[str]:
    """One result as the cells of a table."""
    his, mine, found = result["theirs"], result["ours"], result["found"]
    to_graph = his["attribute_s"] + his["prune_s"]
    return [
        f"{result['case'].folder} {result['case'].tokens}",
        f"{result['case'].rows}",
        f"{his['attribute_s']:.1f}",
        f"{mine['attribute_s']:.2f}",
        f"{his['attribute_s'] / mine['attribute_s']:.0f}",
        f"{to_graph / mine['graph_s']:.0f}",
        f"{his['peak_rss_gib'] / mine['peak_rss_gib']:.1f}",
        f"{result['limit']:.2f}",
        f"{found['worst']:.0e}",
        f"{100 * found['chosen by both']:.1f}",
    ]


COLUMNS = ("case", "rows", "theirs", "ours", "ratio", "graph", "GiB", "limit", "worst", "both")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--circuit-tracer", required=True, metavar="PYTHON")
    parser.add_argument("--golden", type=Path, default=CHECKOUT.parent / "shared" / "golden")
    parser.add_argument("--cases", type=Path, default=Path("benchmark-cases"))
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--tokens", type=int, help="cases with so many tokens")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("-o", "--output", type=Path, help="write the figures there as JSON")
    args = parser.parse_args()
    args.cases.mkdir(parents=True, exist_ok=True)
    args.rate = rate(args.threads)
    console = Console()
    wanted = [case for case in CASES if case.folder.startswith(args.only) and args.tokens in (None, case.tokens)]
    results = [measure(case, args) for case in track(wanted, console=Console(stderr=True))]
    title = f"circuit-tracer 0.5.0 / circuits, {args.threads} threads, {args.rate / 1e9:.0f} Gflop/s"
    table = Table(title=title, padding=(0, 0))
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "case" else "right", no_wrap=True)
    for result in results:
        table.add_row(*line(result))
        his, rounded = result["theirs"], result["rounded"]
        ratio, error = his["attribute_s"] / rounded["attribute_s"], f"{rounded['worst']:.0e}"
        seconds = f"{rounded['attribute_s']:.2f}"
        table.add_row("  bfloat16", "", "", seconds, f"{ratio:.0f}", "", "", "", error)
        if result["bound"]:
            bound = result["bound"]
            name = f"  less {bound['left_out']:.0e}"
            ratio = his["attribute_s"] / bound["attribute_s"]
            table.add_row(name, str(bound["rows"]), "", f"{bound['attribute_s']:.2f}", f"{ratio:.0f}")
    console.print(table)
    if args.output is not None:
        for result in results:
            result["case"] = result["case"].__dict__
        args.output.write_text(json.dumps({"rate": args.rate, "threads": args.threads, "results": results}, indent=1))


if __name__ == "__main__":
    main()
