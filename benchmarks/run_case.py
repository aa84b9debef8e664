"""One attribution by circuits on a case of ../shared/golden/make_case.py, in a process of its own; prints JSON.

python benchmarks/run_case.py --case DIR --tokens 16 --max-targets 512 [--out OUT.npz]

Times in seconds: `attribute_s` from the token ids to the rows and influences (recording, encoding, ranking and rows;
what circuit-tracer's `attribute` does), `graph_s` the same to the pruned graph, without hop splits. Memory is the peak
of the resident set, in GiB, as circuit-tracer's runner reports it: of the attribution, and of all to the graph (`end`).
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

started = time.perf_counter()

import numpy as np  # noqa: E402
import torch  # noqa: E402

import circuits  # noqa: E402
from circuits.best_first import BestFirst  # noqa: E402
from circuits.kernels.backend import products_of  # noqa: E402
from circuits.prompt import prepare  # noqa: E402
from circuits.sweep import Sweep, Swept  # noqa: E402
from circuits.targets import TopTokens  # noqa: E402
from circuits.tracing import lay_out  # noqa: E402


def peak() -> float:
    """Largest resident set of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@torch.no_grad()
def attribute(model: circuits.Model, ids: list[int], args: argparse.Namespace) -> tuple[Sweep, Swept]:
    """Record, encode, rank and compute rows."""
    sweep = lay_out(model, prepare(model.base, ids), [TopTokens()])
    sweep.linear.products = products_of(args.products)
    if args.max_targets is None:
        return sweep, sweep.run(args.left_out)
    return sweep, BestFirst(sweep).run(args.max_targets)


def answer(sweep: Sweep, swept: Swept, features: np.ndarray | None) -> dict[str, np.ndarray]:
    """Node identities, and the rows of the features asked for: dense, targets x sources, by their identities."""
    table = sweep.table
    nodes = np.stack([table.layer, table.position, table.feature], axis=1)
    found = {"nodes": nodes, "kind": table.kind, "influence": swept.influence, "expanded": swept.expanded}
    if features is None:
        return found
    wanted = np.zeros(len(swept.influence), dtype=bool)
    wanted[len(table) :] = True
    place = {tuple(node): i for i, node in enumerate(nodes.tolist()) if table.dictionary[i] >= 0}
    wanted[[place[tuple(key)] for key in features.tolist() if tuple(key) in place]] = True
    rows, targets = [], []
    with torch.no_grad():
        for block in sweep.rows_of(wanted):
            dense = np.zeros((len(block.targets), len(table)), dtype=np.float32)
            dense[:, block.sources.numpy()] = block.weights.numpy()
            rows.append(dense)
            targets.append(block.targets.nodes.numpy())
    return {**found, "rows": np.concatenate(rows), "targets": np.concatenate(targets)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--max-targets", type=int)
    parser.add_argument("--left-out", type=float, default=1e-3)
    parser.add_argument("--products", default="float32", help="float32 or bfloat16, of the search")
    parser.add_argument("--replacement", action="append", default=[], help="further replacements, for attention")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--no-graph", action="store_true")
    parser.add_argument("--features", type=Path, help="circuit-tracer's answer: whose rows to write")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ids = json.loads((args.case / "prompt.json").read_text())["token_ids"][: args.tokens]
    report: dict[str, Any] = {"case": args.case.name, "tokens": args.tokens, "import_s": time.perf_counter() - started}
    begin = time.perf_counter()
    model = circuits.load(args.case / "model", [args.case / "transcoders", *args.replacement])
    report["load_s"] = time.perf_counter() - begin
    times = []
    for _ in range(args.repeat):
        begin = time.perf_counter()
        sweep, swept = attribute(model, ids, args)
        times.append(time.perf_counter() - begin)
        report.setdefault("peak_rss_gib", peak())
    features = len(sweep.table) - int((sweep.table.dictionary < 0).sum())
    report |= {
        "attribute_s": times[0],
        "attribute_s_again": times[1:],
        "active_features": features,
        "rows": int(swept.expanded.sum()) - sweep.targets.n_outputs,
        "left_out": swept.left_out,
        "worst_ledger_gap": swept.max_relative_gap,
        "replacement_score": swept.replacement_score,
        "completeness_score": swept.completeness_score,
    }
    if not args.no_graph:
        settings = circuits.TraceSettings(max_targets=args.max_targets, left_out=args.left_out, hops=False)
        begin = time.perf_counter()
        graph = circuits.trace(model, ids, settings=settings)
        report |= {"graph_s": time.perf_counter() - begin, "nodes": len(graph.nodes), "edges": len(graph.edges)}
        report["peak_rss_end_gib"] = peak()
    if args.out is not None:
        wanted = None
        if args.features is not None:
            with np.load(args.features) as archive:
                wanted = archive["active_features"][archive["selected_features"]]
        np.savez(args.out, allow_pickle=False, **answer(sweep, swept, wanted))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
