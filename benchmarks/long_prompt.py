"""A prompt of thousands of tokens on a case of ../shared/golden/make_case.py, in a process of its own; prints JSON.

python benchmarks/long_prompt.py --case DIR [--tokens 4000] [--max-targets 512]

The context is lengthened in a copy of the configuration (positions are rotary), and the prompt is random. Says
how long it took to the pruned graph, the peak of the resident set, and the influence left out: what the rows that were
not computed would have carried on.
"""

import argparse
import json
import resource
import shutil
import tempfile
import time
from pathlib import Path

import torch

import circuits


def lengthened(case: Path, tokens: int, folder: Path) -> Path:
    """A copy of the case's model whose context holds the prompt; the weights are linked."""
    model = folder / "model"
    model.mkdir()
    for file in (case / "model").iterdir():
        if file.name == "config.json":
            config = json.loads(file.read_text())
            config["max_position_embeddings"] = max(tokens, config["max_position_embeddings"])
            (model / file.name).write_text(json.dumps(config))
        elif file.suffix == ".safetensors":
            (model / file.name).symlink_to(file.resolve())
        else:
            shutil.copy(file, model / file.name)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--max-targets", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    prompt = json.loads((args.case / "prompt.json").read_text())
    vocabulary = json.loads((args.case / "model" / "config.json").read_text())["vocab_size"]
    random = torch.randint(3, vocabulary, (args.tokens - 1,), generator=torch.Generator().manual_seed(0)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        model = circuits.load(lengthened(args.case, args.tokens, Path(folder)), args.case / "transcoders")
        begin = time.perf_counter()
        graph = circuits.trace(
            model, [prompt["bos"], *random], settings=circuits.TraceSettings(max_targets=args.max_targets, hops=False)
        )
        seconds = time.perf_counter() - begin
    data = graph.metadata
    report = {
        "case": args.case.name,
        "tokens": args.tokens,
        "graph_s": seconds,
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "active_features": data["active_features"],
        "rows": data["ledger"]["targets"],
        "search": data["settings"]["search"],
        "left_out": data["left_out_influence"],
        "of_influence": data["influence_total"],
        "worst_ledger_gap": data["ledger"]["max_relative_gap"],
        "nodes": len(graph.nodes),
        "edges": len(graph.edges),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
