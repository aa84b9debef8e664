"""Attention replaced as well, the whole graph: what circuit-tracer cannot do, beside the rows that it does compute.

python benchmarks/attention_too.py --case DIR [--tokens 16] [--active 100]

DIR is a case of ../shared/golden/make_case.py. Every attention output gets a random SAE of 8,192 features, of which
about `--active` are active at a position (what they write is small and random: the ledger closes whatever they do).
Then every feature of MLPs and attention is expanded, nothing left out. Prints JSON; times are as in run_case.py.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import torch

import circuits
from circuits.kernels.encode import Activation
from circuits.prompt import prepare
from circuits.recording import Recording, record
from circuits.replacements import Decoder, Dictionary, ReadSite, Replacement, Site
from circuits.replacements.weights import HeldTensor
from circuits.targets import TopTokens
from circuits.tracing import lay_out

FEATURES = 8192


def attention_sae(recording: Recording, layer: int, active: int) -> Dictionary:
    """A random SAE of one attention output, its bias such that `active` features are on average above zero."""
    x = recording.attn_out[layer]
    site = Site("attn_out", layer)
    W_enc = torch.randn(FEATURES, x.shape[1]) / x.shape[1] ** 0.5
    pre = x @ W_enc.T
    cut = pre.flatten().kthvalue(int(pre.numel() * (1 - active / FEATURES))).values
    return Dictionary(
        name=f"attention-sae.{layer}",
        kind="attention-sae",
        read=ReadSite(site, "none"),
        writes=(site,),
        activation=Activation("relu"),
        W_enc=W_enc,
        b_enc=torch.full((FEATURES,), -float(cut)),
        decoders={site: Decoder(HeldTensor("W_dec", 0.1 * torch.randn(FEATURES, x.shape[1])))},
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--active", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    ids = json.loads((args.case / "prompt.json").read_text())["token_ids"][: args.tokens]
    model = circuits.load(args.case / "model", args.case / "transcoders")
    recording = record(model.base, torch.tensor(ids))
    saes = tuple(attention_sae(recording, layer, args.active) for layer in range(model.base.shape.n_layers))
    attention = Replacement("random", Path("memory"), "memory", saes)
    model = circuits.Model(model.base, (*model.replacements, attention))
    begin = time.perf_counter()
    sweep = lay_out(model, prepare(model.base, ids), [TopTokens()])
    swept = sweep.run(0.0)
    seconds = time.perf_counter() - begin
    report = {
        "case": args.case.name,
        "tokens": args.tokens,
        "attribute_s": seconds,
        "nodes": len(sweep.table),
        "rows": int(swept.expanded.sum()),
        "worst_ledger_gap": swept.max_relative_gap,
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
