"""Where the time of one trace goes on the embedded default: import, load, record, encode, sweep, and the rest.

python benchmarks/trace_phases.py [--tokens 20] [--repeat 5] [--replacement clt]

Prints milliseconds of each phase in one run, the ratio of sweeping to importing and loading, and those of hop splits
and of explaining the graph's scores to the whole trace.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

started = time.perf_counter()

import numpy as np  # noqa: E402
import torch  # noqa: E402

import circuits  # noqa: E402
from circuits.assemble import with_hops  # noqa: E402
from circuits.head_steps import with_scores  # noqa: E402
from circuits.linearize import LinearizedModel  # noqa: E402
from circuits.nodes import build_nodes  # noqa: E402
from circuits.prompt import prepare  # noqa: E402
from circuits.recording import record  # noqa: E402
from circuits.sweep import Sweep, TargetList  # noqa: E402
from circuits.targets import TopTokens, expand, output_readers  # noqa: E402
from circuits.tracing import lay_out  # noqa: E402

TEXT = (
    "One day Tom went to the park with his dog. The dog saw a big red ball and ran to it. Tom was happy and said that "
    "they would play with the ball all day. Then the rain came and they went home to eat cake and read a book"
)


def timed(times: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    """The result of some work; its milliseconds go into `times`."""
    begin = time.perf_counter()
    result = work()
    times[name] = 1000 * (time.perf_counter() - begin)
    return result


def one_trace(model: circuits.Model, n_tokens: int, times: dict[str, float]) -> None:
    """The phases of a trace, one after the other."""
    prompt = prepare(model.base, prepare(model.base, TEXT).token_ids[:n_tokens])
    with torch.no_grad():
        recording = timed(times, "record", lambda: record(model.base, torch.tensor(prompt.token_ids)))
        linear = LinearizedModel(model.base, model.replacements, recording)
        table = timed(times, "encode and lay out", lambda: build_nodes(linear, first_is_special=True))
        outputs = output_readers(linear, prompt, expand(linear, [TopTokens()]))
        start = np.concatenate([np.zeros(len(table)), *[readers.weights for readers in outputs]])
        sweep = Sweep(linear, table, TargetList(outputs, start))
        timed(times, "sweep, 1e-3 left out", lambda: sweep.run(1e-3))
        timed(times, "sweep, everything", lambda: sweep.run(0.0))
        graph = timed(times, "whole trace", lambda: circuits.trace(model, prompt))
        laid_out = lay_out(model, prompt, [TopTokens()])
        timed(times, "of it hop splits", lambda: with_hops(graph, laid_out))
        timed(times, "explain its scores", lambda: with_scores(graph, laid_out))
        times["scores explained"] = len(with_scores(graph, laid_out).scores)
        times["nodes"] = len(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--replacement", default="attention-sae")
    args = parser.parse_args()
    times: dict[str, float] = {"import torch and circuits": 1000 * (time.perf_counter() - started)}
    model = timed(times, "load", lambda: circuits.load(None, args.replacement))
    runs: list[dict[str, float]] = []
    for _ in range(args.repeat):
        runs.append({})
        one_trace(model, args.tokens, runs[-1])
    times |= {name: float(np.median([run[name] for run in runs])) for name in runs[0]}
    for name, value in times.items():
        print(f"{name:28s}{value:10.1f}" + ("" if name in ("nodes", "scores explained") else " ms"))
    before = times["import torch and circuits"] + times["load"]
    print(f"sweep / (import and load)   {times['sweep, everything'] / before:10.3f}")
    for name in ("of it hop splits", "explain its scores"):
        print(f"{name + ' / trace':28s}{times[name] / times['whole trace']:10.3f}")


if __name__ == "__main__":
    main()
