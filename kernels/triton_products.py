"""The product of two tiles, as the Triton kernels share it; and the sizes of tiles."""

import triton
import triton.language as tl


@triton.jit
def _rounded(x):
    """float32 to the nearest bfloat16 and back, by bits, ties to even, as a card does (the interpreter cuts off)."""
    bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def product(a, b, total, MODE: tl.constexpr):
    """`total + a @ b`, summed in float32; MODE as `backend.dot_mode` says."""
    if MODE == "bfloat16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
    if MODE == "rounded":
        a = _rounded(a)
        b = _rounded(b)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")


def tile(size: int, most: int) -> int:
    """A power of two from 16, the least that `tl.dot` takes, to `most`, that holds `size` if it can."""
    return max(16, min(most, int(triton.next_power_of_2(max(1, size)))))
