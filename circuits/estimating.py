"""Before a trace: what it will take, from headers and configurations alone (`circuits trace --estimate`).

`benchmarks/estimates.py` compares estimates with traces on a CPU. Seven traces of the embedded default, whose
dictionaries are trained and say their L0, took 0.8 to 1.1 times the nodes, 0.9 to 1.2 times the memory and 0.7 to 1.1
times the time of the usual estimate. Ten with random dictionaries, whose L0 is assumed, had up to 1.9 times the nodes,
and took 0.7 to 1.8 times the memory and 0.5 to 1.4 times the time of the estimate at most. The formulas are in
`estimating_costs.py`.
"""

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch

from circuits.base_models import check_device
from circuits.errors import CircuitsError
from circuits.estimating_costs import Costs, DictionarySize, Speeds, Work, costs, peak
from circuits.headers import load_headers
from circuits.kernels.backend import matmul, products_of
from circuits.linearize import write_depth
from circuits.loading import Model
from circuits.prompt import Prompt, prepare
from circuits.replacements.dictionary import Dictionary, Replacement
from circuits.replacements.memory import free_memory
from circuits.replacements.movement import HeadLoading, OwnAttention
from circuits.replacements.weights import HeldTensor, LazyTensor
from circuits.settings import TraceSettings
from circuits.targets import AUTOMATIC_COUNT, Target, TopTokens

WITHIN = (
    "On CPUs, trained dictionaries took 0.9 to 1.2 times the usual memory and 0.7 to 1.1 times the usual time; random "
    "ones, whose L0 was assumed, up to 1.8 times the most memory and 1.4 times the most time."
)
ASSUMED = 100.0  # active features of a dictionary at a position where nothing says how many
ASSUMED_BASIS = "assumed"
TRIED = 0.2  # seconds for which the machine's speed is measured
FEWER, SMALLER = 512, 1000  # targets, and features of a graph, that are advised
NOTABLE = 0.98  # of what is needed, that is left by what is worth advising
USUAL_RESIDENT = 450 * 2**20  # bytes of Python with torch and transformers
Change = tuple[str, Callable[[Work], Work]]  # in words, and what it makes of a trace


@dataclass(frozen=True)
class Estimate:
    """What a trace is expected to take.

    How large a graph will be is not known before: trained dictionaries have less influence scattered than random ones.

    work
        Its sizes: `work.nodes`, `work.targets` (at most: those without influence are left out), `work.every`.
    usual, most
        Memory and time, where the graph is of the size that trained dictionaries give, and where it is as large as that
        of random ones.
    advice
        Changes, each on top of those before it, and the peak that they leave, in bytes: until it fits.
    """

    model: str
    device: str
    work: Work
    usual: Costs
    most: Costs
    advice: tuple[tuple[str, float], ...] = ()

    @property
    def room(self) -> int:
        """Bytes that there are: what is free, and what the program has already."""
        return self.work.free + self.work.resident

    @property
    def fits(self) -> bool:
        """Whether there is room however large the graph."""
        return self.most.peak <= self.room

    @property
    def should_fit(self) -> bool:
        """Whether there is room for the usual graph."""
        return self.usual.peak <= self.room


def estimate(
    model: str | Path | None,
    prompt: str | Sequence[int] | Prompt,
    targets: Sequence[Target] | None = None,
    settings: TraceSettings | None = None,
    *,
    replacement: str | Path | Sequence[str | Path] | None = None,
    device: str = "cpu",
    dtype: str | None = None,
) -> Estimate:
    """What loading a model and tracing a prompt will take in nodes, memory and time; no weight is read.

    Parameters
    ----------
    model, replacement, device, dtype
        As for `circuits.load`.
    prompt, targets, settings
        As for `circuits.trace`. Explanations of scores (`settings.explain`) are not counted.

    Raises
    ------
    CircuitsError, ReplacementError
        As for `circuits.load`; or the headers of a format do not tell enough.

    Example
    -------
    >>> found = circuits.estimate("gpt2", "The capital of France is", replacement="path/to/transcoders")
    >>> found.work.nodes, found.usual.peak, found.usual.total_seconds, found.fits
    """
    check_device(device)
    start = time.perf_counter()
    headers = load_headers(model, replacement, dtype=dtype)
    started = time.perf_counter() - start
    return estimate_headers(headers, prompt, targets, settings, device=device, started=started)


def estimate_headers(
    headers: Model,
    prompt: str | Sequence[int] | Prompt,
    targets: Sequence[Target] | None = None,
    settings: TraceSettings | None = None,
    *,
    device: str = "cpu",
    started: float = 0.0,
) -> Estimate:
    """The same of a model that `load_headers` gave; `started` are the seconds that this took, and loading takes too."""
    prepared = prompt if isinstance(prompt, Prompt) else prepare(headers.base, prompt)
    if targets is not None and not targets:
        raise CircuitsError("no target was given; leave targets out for the top tokens")
    outputs = sum(AUTOMATIC_COUNT if isinstance(target, TopTokens) else 1 for target in targets or [TopTokens()])
    settings = settings or TraceSettings()
    work = _work(headers, prepared, settings, device, outputs)
    before = {"imports, configurations": started} if started else {}
    speeds = Speeds(matrix_speed(device), matrix_speed(device, settings.products), hash_speed())
    usual, most = (costs(sized, speeds, before) for sized in (work, replace(work, largest=True)))
    found = Estimate(headers.base.name, device, work, usual, most)
    return replace(found, advice=_advice(replace(work, largest=found.should_fit), found.room))


def l0_of(dictionary: Dictionary, replacement: Replacement) -> tuple[float, str]:
    """Active features at a position, and where the figure is from: the gate's k, figures of the training, a folder's
    name such as average_l0_72; else an assumption."""
    activation = dictionary.activation
    if activation.kind == "topk" and activation.k is not None:
        return float(min(activation.k, dictionary.n_features)), "top-k"
    figures = replacement.training.get("dictionaries")
    figure = figures.get(dictionary.name, {}).get("l0") if isinstance(figures, dict) else None
    if isinstance(figure, int | float):
        return float(figure), "its training"
    if activation.k is not None:
        return float(min(activation.k, dictionary.n_features)), f"{activation.kind} k"
    if named := re.search(r"average_l0_(\d+)", dictionary.source):
        return float(named[1]), "folder's name"
    return min(ASSUMED, float(dictionary.n_features)), ASSUMED_BASIS


def matrix_speed(device: str = "cpu", products: str = "float32") -> float:
    """Operations a second of a matrix product on this machine as it is now, the best of `TRIED` seconds."""
    a, how = torch.ones(512, 512, device=device), products_of(products)
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < TRIED:
        start = time.perf_counter()
        matmul(a, a, how, round_sum=True)
        if device != "cpu":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return float(2 * 512**3 / best)


def hash_speed() -> float:
    """Bytes a second of SHA-256, the best of three."""
    block, best = bytes(1 << 22), float("inf")
    for _ in range(3):
        start = time.perf_counter()
        hashlib.sha256(block).digest()
        best = min(best, time.perf_counter() - start)
    return len(block) / best


def _work(headers: Model, prompt: Prompt, settings: TraceSettings, device: str, outputs: int) -> Work:
    base, shape, n = headers.base, headers.base.shape, len(prompt.token_ids)
    parameters = list(base.lm.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    weight_bytes = sum(parameter.numel() * parameter.itemsize for parameter in parameters)
    blocks = {s.layer for r in headers.replacements for d in r.dictionaries for s in d.writes if s.name == "resid_post"}
    taking = [[d for d in r.dictionaries if not _inside(d, blocks)] for r in headers.replacements]
    sites = [site for dictionaries in taking for d in dictionaries for site in d.writes]
    depths = {write_depth(site) for site in sites if site.name not in ("v", "resid_post")}
    layers = [layer for layer in range(shape.n_layers) if layer not in blocks]
    replaced = sum(2 * layer + 1 in depths for layer in layers)
    values = len({site.layer for site in sites if site.name == "v"})
    files = [*base.files, *(file for one in headers.replacements for file in one.files)]
    return Work(
        settings=settings,
        n=n,
        positions=n - prompt.first_is_special,
        n_layers=shape.n_layers,
        d_model=shape.d_model,
        n_heads=shape.n_heads,
        n_kv_heads=shape.n_kv_heads,
        d_head=shape.d_head,
        vocabulary=shape.vocabulary,
        parameters=count,
        weight_size=round(weight_bytes / count),
        live=len(layers) - replaced,
        errors=len(layers) + replaced + values + len(blocks),
        outputs=outputs,
        dictionaries=tuple(
            tuple(_size(d, one) for d in dictionaries)
            for dictionaries, one in zip(taking, headers.replacements, strict=True)
        ),
        file_bytes=sum(file.stat().st_size for file in files) + (0 if base.files else weight_bytes),
        resident=_resident() if device == "cpu" else 0,
        free=free_memory(device),
        on_cpu=device == "cpu",
    )


def _inside(dictionary: Dictionary, blocks: set[int]) -> bool:
    """Whether it reads inside a block that is replaced whole, and takes no part."""
    return dictionary.read.site.name in ("attn_out", "z", "v", "resid_mid") and dictionary.layer in blocks


def _size(dictionary: Dictionary, replacement: Replacement) -> DictionarySize:
    l0, basis = l0_of(dictionary, replacement)
    encoder = dictionary.encoder
    moved, decoder = dictionary.moved_by, dictionary.decoders[dictionary.writes[0]]
    return DictionarySize(
        name=dictionary.name,
        kind=dictionary.kind,
        n_features=dictionary.n_features,
        rank=dictionary.rank,
        d_read=dictionary.d_read,
        d_write=decoder.width,
        n_writes=len(dictionary.writes),
        l0=l0,
        basis=basis,
        moves=isinstance(moved, HeadLoading),
        moving=moved.context_k if isinstance(moved, HeadLoading) else None,
        patterns=len(moved.W_q) if isinstance(moved, OwnAttention) else 0,
        encoder_held=dictionary.is_held,
        encoder_mapped=isinstance(encoder, LazyTensor) and encoder.reads_as_stored,
        decoder_held=isinstance(decoder.rows, HeldTensor),
    )


def _resident() -> int:
    """Bytes that this process has in memory: Python, torch and transformers, which a trace has too."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096
    except (OSError, ValueError):
        return USUAL_RESIDENT


def _advice(work: Work, room: int) -> tuple[tuple[str, float], ...]:
    """Changes that make it fit, each on top of those before it: the most harmless first, and none that can be spared.

    All that help, where it never fits.
    """
    asked = work.settings
    fewer, smaller = min(FEWER, asked.max_targets or FEWER), min(SMALLER, asked.max_feature_nodes or SMALLER)
    changes: tuple[Change, ...] = (
        ("a pruned graph (without --unpruned)", partial(_with, unpruned=False)),
        ("no hop splits (--no-hops)", partial(_with, hops=False)),
        (f"a graph of fewer features (--max-feature-nodes {smaller})", partial(_with, max_feature_nodes=smaller)),
        ("weights in half precision (--dtype bfloat16)", partial(replace, weight_size=min(2, work.weight_size))),
        (f"fewer rows (--max-targets {fewer})", partial(_with, max_targets=fewer)),
        ("a prompt half as long", partial(replace, n=(work.n + 1) // 2, positions=(work.positions + 1) // 2)),
    )

    def left(chosen: Sequence[Change]) -> float:
        return peak(reduce(lambda smaller, change: change[1](smaller), chosen, work))

    chosen: list[Change] = []
    for change in changes:
        now, then = (left(some) - work.resident for some in (chosen, [*chosen, change]))
        if now > room - work.resident and then < NOTABLE * now:
            chosen.append(change)
    for change in chosen[:-1]:
        if left(others := [other for other in chosen if other is not change]) <= room:
            chosen = others
    return tuple((text, left(chosen[: i + 1])) for i, (text, _) in enumerate(chosen))


def _with(work: Work, **settings: Any) -> Work:
    return replace(work, settings=replace(work.settings, **settings))
