"""Triton kernels against their PyTorch references and against float64 loops, on random ragged sizes.

Run as a program by conftest.py: prints what became of each check as JSON. Needs TRITON_INTERPRET=1 where there is no
GPU.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import plain_kernels as plain
import torch
from torch import Tensor

from circuits.kernels import move, triton_attend, triton_contract, triton_decode, triton_encode, triton_move
from circuits.kernels.attend import pull_values
from circuits.kernels.backend import Products, matmul, observed_error, use_triton
from circuits.kernels.contract import contract_spread
from circuits.kernels.decode import gather_decode
from circuits.kernels.encode import Activation, ActivationKind, InputNorm, encode

sys.path.insert(0, str(Path(__file__).parent))
DEVICE = "cuda" if torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET") else "cpu"
CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    """Adds a function to the checks."""
    CHECKS[function.__name__] = function
    return function


def random(*shape: int) -> Tensor:
    """Normal numbers, drawn on the CPU so that they are the same everywhere."""
    return torch.randn(*shape).to(DEVICE)


def on_torch(work: Callable[[], Tensor | tuple[Tensor, ...] | None]) -> Tensor | tuple[Tensor, ...] | None:
    """The result of the PyTorch reference."""
    os.environ["CIRCUITS_KERNELS"] = "torch"
    try:
        return work()
    finally:
        os.environ["CIRCUITS_KERNELS"] = "triton"


def near(got: Tensor, want: Tensor, tolerance: float = 3e-6) -> None:
    """Equal up to rounding, relative to the largest number."""
    assert got.shape == want.shape, f"{tuple(got.shape)} instead of {tuple(want.shape)}"
    if want.numel():
        gap = float((got.cpu().double() - want.cpu().double()).abs().max())
        assert gap <= tolerance * float(want.abs().max()) + 1e-30, f"off by {gap}"


def causal(n_heads: int, n: int) -> Tensor:
    """Patterns (H, n, n) of a softmax over the positions up to each."""
    above = torch.ones(n, n, dtype=torch.bool).triu(1)
    return torch.randn(n_heads, n, n).masked_fill(above, -torch.inf).softmax(-1).to(DEVICE)


def far_from(x: Tensor, W: Tensor, b: Tensor, least: Tensor) -> plain.Entries:
    """The loop's entries; no pre-activation may be so near its threshold that rounding decides."""
    entries, nearest = plain.encode(x.cpu(), W.cpu(), b.cpu(), least.cpu())
    assert nearest > 1e-5, "draw again: rounding would decide whether a feature is active"
    return entries


def encoded(activation: Activation, sizes: tuple[int, int, int], threshold: Tensor | None) -> None:
    """One random encode on Triton, against the loop and the reference."""
    n, n_features, width = sizes
    x, W, b = random(n, width), random(n_features, width), random(n_features)
    positions, features, activations, pre = encode(x, W, b, activation, threshold)
    want = far_from(x, W, b, torch.zeros(1) if threshold is None else threshold)
    assert list(zip(positions.tolist(), features.tolist(), strict=True)) == list(want)
    near(pre, torch.tensor(list(want.values()), dtype=torch.float64))
    reference = on_torch(lambda: encode(x, W, b, activation, threshold))
    assert isinstance(reference, tuple)
    assert torch.equal(positions, reference[0])
    assert torch.equal(features, reference[1])
    near(activations, reference[2])
    near(pre, reference[3])
    assert [part.dtype for part in (positions, features, activations, pre)] == [part.dtype for part in reference]


@check
def encode_relu() -> None:
    for sizes in [(1, 5, 3), (19, 70, 37), (16, 64, 32), (3, 1, 8), (67, 33, 5)]:
        encoded(Activation("relu"), sizes, None)


@check
def encode_with_thresholds() -> None:
    kinds: tuple[ActivationKind, ...] = ("jump_relu", "batch_topk", "group_soft")
    for kind in kinds:
        encoded(Activation(kind, k=4), (9, 41, 6), (torch.rand(41) - 0.2).to(DEVICE))
        encoded(Activation(kind, k=4), (9, 41, 6), torch.tensor([0.7], device=DEVICE))
        encoded(Activation(kind, k=4), (2, 20, 6), torch.tensor([1e9], device=DEVICE))


@check
def encode_takes_topk_to_torch() -> None:
    x, W, b = random(5, 4), random(30, 4), random(30)
    kinds = (Activation("topk", 3), Activation("identity"))
    for activation in kinds:
        got, want = encode(x, W, b, activation, None), on_torch(lambda a=activation: encode(x, W, b, a, None))
        assert isinstance(want, tuple)
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@check
def encode_of_nothing() -> None:
    for n, n_features in ((0, 7), (3, 0)):
        entries = encode(random(n, 4), random(n_features, 4), random(n_features), Activation("relu"), None)
        assert [len(entry) for entry in entries] == [0, 0, 0, 0]


@check
def encode_finds_room_when_it_runs_out() -> None:
    triton_encode.ROOM, room = 0, triton_encode.ROOM
    x, W, b = torch.ones(70, 2, device=DEVICE), torch.ones(1000, 2, device=DEVICE), random(1000).abs()
    entries = encode(x, W, b, Activation("relu"), None)
    triton_encode.ROOM = room
    assert len(entries[0]) == 70_000 > 1 << 16
    assert torch.equal(entries[0] * 1000 + entries[1], torch.arange(70_000, device=DEVICE))
    near(entries[3], (b + 2).repeat(70))


@check
def encode_with_norm() -> None:
    x, W, b = random(18, 37) + 3, random(50, 37), random(50)
    for gain, bias, centred in ((random(37), random(37), True), (None, None, False), (random(37), None, False)):
        norm = InputNorm(torch.rand(18).to(DEVICE) + 0.5, gain, bias, centred)
        parts = (None if part is None else part.cpu() for part in (gain, bias))
        want = far_from(plain.norm(x.cpu(), norm.scale.cpu(), *parts, centred), W, b, torch.zeros(1))
        for run in (lambda f: f(), on_torch):
            positions, features, _, pre = run(lambda n=norm: encode(x, W, b, Activation("relu"), None, norm=n))
            assert list(zip(positions.tolist(), features.tolist(), strict=True)) == list(want)
            near(pre, torch.tensor(list(want.values()), dtype=torch.float64))


def rounded(x: Tensor) -> Tensor:
    """To bfloat16's nearest and back, by the bits of float32: half an ulp is added, ties go to even."""
    bits = x.cpu().contiguous().view(torch.int32).long()
    kept = (bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF
    return torch.where(kept >= 1 << 31, kept - (1 << 32), kept).int().view(torch.float32)


@check
def encode_with_bfloat16_products() -> None:
    x, W, b = random(18, 37), random(50, 37), random(50)
    want = far_from(rounded(x), rounded(W), b, torch.zeros(1))
    for run in (lambda f: f(), on_torch):
        positions, features, _, pre = run(lambda: encode(x, W, b, Activation("relu"), None, products="bfloat16"))
        assert list(zip(positions.tolist(), features.tolist(), strict=True)) == list(want)
        near(pre, torch.tensor(list(want.values()), dtype=torch.float64))


@check
def error_of_bfloat16_is_observed() -> None:
    a, b = random(20, 64), random(64, 30)
    exact = a.cpu().double() @ b.cpu().double()
    told = observed_error(lambda products: matmul(a, b, products))
    found = rounded(a).double() @ rounded(b).double() - exact
    assert abs(told - float(found.abs().max() / exact.abs().max())) < 1e-5
    assert 1e-4 < told < 2e-2
    assert observed_error(lambda products: torch.zeros(3)) == 0


@check
def decode_sorted_entries() -> None:
    for counts, width, n_rows in (
        ([0, 40, 1, 0, 17, 0], 37, 9),
        ([5], 128, 4),
        ([0, 0], 16, 3),
        ([16, 0, 33], 200, 50),
    ):
        positions = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(DEVICE)
        features = torch.randint(n_rows, (len(positions),)).to(DEVICE)
        activations, rows = random(len(positions)), random(n_rows, width)
        for columns, held in ((features, rows), (None, rows[features])):
            want = plain.decode(
                *(y if y is None else y.cpu() for y in (positions, columns, activations, held)), len(counts)
            )
            near(gather_decode(positions, columns, activations, held, len(counts)), want)
            reference = on_torch(partial(gather_decode, positions, columns, activations, held, len(counts)))
            assert isinstance(reference, Tensor)
            near(reference, want)


@check
def decode_in_any_order() -> None:
    positions = torch.randint(7, (60,)).to(DEVICE)
    activations, rows = random(60), random(40, 60).T  # columns lie apart
    want = plain.decode(positions.cpu(), None, activations.cpu(), rows.cpu(), 9)
    near(gather_decode(positions, None, activations, rows, 9), want)


@check
def decode_leaves_gradients_to_torch() -> None:
    positions, rows = torch.zeros(3, dtype=torch.long, device=DEVICE), random(3, 4).requires_grad_()
    gather_decode(positions, None, torch.ones(3, device=DEVICE), rows, 1).sum().backward()
    assert rows.grad is not None
    assert torch.equal(rows.grad, torch.ones_like(rows))
    with torch.no_grad():
        assert use_triton(rows)
    assert not use_triton(rows.detach().double())


@check
def move_through_patterns() -> None:
    for n, n_heads, n_features, rank in ((1, 2, 3, 1), (13, 3, 9, 1), (70, 2, 5, 3), (5, 17, 4, 2)):
        active = (torch.rand(n, n_features) < 0.2).to(DEVICE)
        active[:, 1] = False  # a feature that is active nowhere
        active[-1, 0] = True
        positions, features = active.nonzero(as_tuple=True)
        values = random(len(positions)) if rank == 1 else random(len(positions), rank)
        loading, pattern = random(n_features, n_heads + 1), causal(n_heads, n)
        loading[2] = 0  # and one whose patterns carry nothing
        moved = move.move_features(positions, features, values, loading, pattern)
        dense = plain.move(*(y.cpu() for y in (positions, features, values, loading, pattern)))
        at, which = (dense != 0).any(-1).nonzero(as_tuple=True)
        assert torch.equal(moved[0].cpu(), at)
        assert torch.equal(moved[1].cpu(), which)
        near(moved[2], dense[at, which].squeeze(-1) if rank == 1 else dense[at, which], 1e-6)
        reference = on_torch(lambda p=pattern, a=(positions, features, values, loading): move.move_features(*a, p))
        assert isinstance(reference, tuple)
        assert torch.equal(moved[0], reference[0])
        assert torch.equal(moved[1], reference[1])
        near(moved[2], reference[2], 1e-6)


@check
def move_in_blocks_and_nothing() -> None:
    triton_move.BLOCK, block = 12, triton_move.BLOCK
    positions, features = torch.tensor([0, 1, 4], device=DEVICE), torch.tensor([3, 0, 3], device=DEVICE)
    values, loading, pattern = random(3), random(4, 3), causal(2, 7)
    moved = move.move_features(positions, features, values, loading, pattern)
    triton_move.BLOCK = block
    dense = plain.move(*(y.cpu() for y in (positions, features, values, loading, pattern))).squeeze(-1)
    assert torch.equal(torch.stack(moved[:2]).cpu(), dense.nonzero().T)
    near(moved[2], dense[dense != 0], 1e-6)
    for rank in ((), (2,)):
        nothing = move.move_features(positions[:0], features[:0], random(0, *rank), loading, pattern)
        assert [tuple(part.shape) for part in nothing] == [(0,), (0,), (0, *rank)]


@check
def pull_through_heads() -> None:
    for n, n_heads, n_kv, width, batch in (
        (1, 1, 1, 4, 2),
        (19, 4, 2, 24, 3),
        (70, 2, 1, 8, 2),
        (16, 6, 6, 16, 1),
        (5, 2, 2, 80, 1),
    ):
        pattern, g, w_o = causal(n_heads, n + 3), random(batch, n, 10), random(n_heads, width, 10)
        for scale in (None, torch.rand(n + 3).to(DEVICE) + 0.5):
            got = triton_attend.pull_values(pattern, g, w_o, n_kv, scale)
            parts = (pattern.cpu(), g.cpu(), w_o.cpu(), n_kv, None if scale is None else scale.cpu())
            near(got, plain.pull_values(*parts))
            reference = on_torch(lambda p=pattern, a=(g, w_o, n_kv, scale): pull_values(p, *a))
            assert isinstance(reference, Tensor)
            near(got, reference)


@check
def pull_up_to_each_reader() -> None:
    last = torch.tensor([0, 20, 7, 35], device=DEVICE)
    pattern, g, w_o = causal(3, 36), random(4, 36, 10), random(3, 8, 10)
    cut = g * (torch.arange(36, device=DEVICE) <= last[:, None]).unsqueeze(-1)
    want = plain.pull_values(pattern.cpu(), cut.cpu(), w_o.cpu(), 3, None)
    near(triton_attend.pull_values(pattern, cut, w_o, 3, last_B=last), want)
    near(triton_attend.pull_values(pattern, g, w_o, 3, last_B=last), want)  # what lies beyond is not read


@check
def pull_with_bfloat16_products() -> None:
    pattern, g, w_o = causal(2, 20), random(3, 20, 10), random(2, 8, 10)
    scale = torch.full((20,), 0.5, device=DEVICE)
    u = rounded(torch.einsum("bpd,hed->bphe", rounded(g).double(), rounded(w_o).double()).float())
    want = torch.einsum("hps,bphe->bshe", rounded(pattern).double(), u.double()).flatten(2) / 2
    # Not as near as elsewhere: u is rounded to bfloat16 after sums in another order, so a tie may fall the other way.
    near(triton_attend.pull_values(pattern, g, w_o, 2, scale, products="bfloat16"), want, 2e-3)

    def run(products: Products) -> Tensor:
        return triton_attend.pull_values(pattern, g, w_o, 2, scale, products=products)

    assert 1e-4 < observed_error(run) < 2e-2


def ragged(counts: list[int], spare: int) -> tuple[list[int], list[int], int]:
    """Starts of the writers at each position, first columns with `spare` between them, and the number of columns."""
    starts, columns, column = [0], [], 0
    for count in counts:
        starts.append(starts[-1] + count)
        columns.append(column)
        column += count + spare
    return starts, columns, column


@check
def contract_ragged_positions() -> None:
    for counts, batch, width in (([0, 70, 1, 0, 64, 0], 5, 37), ([3], 1, 8), ([0, 0], 4, 8), ([1, 130, 2], 70, 33)):
        starts, columns, n_columns = ragged(counts, 2)
        g, writers = random(batch, len(counts), width), random(starts[-1], width)
        weights = random(batch, n_columns)
        got, reference = weights.clone(), weights.clone()
        triton_contract.contract_spread(got, g, writers, starts, columns)
        near(got, plain.contract(weights.cpu(), g.cpu(), writers.cpu(), starts, columns))
        on_torch(lambda r=reference, a=(g, writers, starts, columns): contract_spread(r, *a))
        near(got, reference)


@check
def contract_fewer_positions_than_writers() -> None:
    starts, columns, n_columns = ragged([2, 3, 4], 0)
    g, writers, weights = random(3, 2, 8), random(9, 8), torch.zeros(3, n_columns, device=DEVICE)
    triton_contract.contract_spread(weights, g, writers, starts, columns)
    near(weights, plain.contract(torch.zeros(3, n_columns), g.cpu(), writers.cpu(), starts, columns))
    assert not weights[:, 5:].any()


@check
def contract_up_to_each_reader() -> None:
    starts, columns, n_columns = ragged([4, 0, 20, 7, 3], 1)
    last = torch.tensor([0] * 16 + [2, 2, 3], device=DEVICE)
    g = random(19, 5, 8) * (torch.arange(5, device=DEVICE) <= last[:, None]).unsqueeze(-1)
    writers, weights = random(34, 8), torch.zeros(19, n_columns, device=DEVICE)
    triton_contract.contract_spread(weights, g, writers, starts, columns, last_B=last)
    near(weights, plain.contract(torch.zeros(19, n_columns), g.cpu(), writers.cpu(), starts, columns))


@check
def contract_with_bfloat16_products() -> None:
    starts, columns, n_columns = ragged([4, 0, 20], 0)
    g, writers, weights = random(3, 3, 40), random(24, 40), torch.zeros(3, n_columns, device=DEVICE)
    triton_contract.contract_spread(weights, g, writers, starts, columns, products="bfloat16")
    near(weights, plain.contract(torch.zeros(3, n_columns), rounded(g), rounded(writers), starts, columns))


def main() -> None:
    """Run every check, or those named on the command line."""
    outcomes = {}
    assert triton_decode.__name__ in sys.modules
    for name, function in CHECKS.items():
        if not sys.argv[1:] or name in sys.argv[1:]:
            torch.manual_seed(0)
            try:
                function()
                outcomes[name] = ""
            except Exception:
                outcomes[name] = traceback.format_exc()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
