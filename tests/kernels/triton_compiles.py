"""Compiles every Triton kernel for cards that need not be there, down to machine code.

Run as a program by test_triton.py, without TRITON_INTERPRET: prints registers, spilled octets and shared memory of each
kernel and mode as JSON. The interpreter knows numpy's semantics; this shows that the compiler takes the same code.
"""

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from circuits.kernels import triton_attend, triton_contract, triton_decode, triton_encode, triton_move

INTEGERS = "*i64"
NUMBERS = "*fp32"


def arguments(pointers: dict[str, str], kernel: Any, constants: dict[str, Any]) -> dict[str, str]:
    """The type of each argument: pointers as given, other arguments plain integers."""
    return {
        name: "constexpr" if name in constants else pointers.get(name, "i32")
        for name in (parameter.name for parameter in kernel.params)
    }


def cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Name, kernel, types of its pointers, and constants, as the launches have them on large inputs."""
    encode = dict.fromkeys(("x", "mean", "scale", "gain", "offset", "weights", "bias", "threshold", "values"), NUMBERS)
    encode |= {"count": INTEGERS, "keys": INTEGERS}
    decode = dict.fromkeys(("starts", "order", "features"), INTEGERS)
    decode |= dict.fromkeys(("activations", "rows", "out"), NUMBERS)
    contract = {"weights": NUMBERS, "g": NUMBERS, "writers": NUMBERS, "tiles": INTEGERS, "last": INTEGERS}
    pull = {"pattern": NUMBERS, "u": NUMBERS, "scale": NUMBERS, "last": INTEGERS, "out": NUMBERS}
    move = {"starts": INTEGERS, "positions": INTEGERS, "values": NUMBERS, "loading": "*fp64", "pattern": NUMBERS}
    move |= {"out": "*fp64"}
    found: list[tuple[str, Any, dict[str, str], dict[str, Any]]] = [
        ("decode", triton_decode._decode, decode, {"HAS_FEATURES": True, "BLOCK_N": 16, "BLOCK_D": 128}),
        ("move", triton_move._move, move, {"BLOCK_P": 64, "BLOCK_H": 16, "BLOCK_R": 1}),
    ]
    for mode in ("ieee", "bfloat16"):
        tiles = {"MODE": mode, "BLOCK_T": 64, "BLOCK_F": 64, "BLOCK_D": 32}
        found.append((f"encode {mode}", triton_encode._encode, encode, {"NORM": True, **tiles}))
        tiles = {"MODE": mode, "BLOCK_B": 64, "BLOCK_N": 64, "BLOCK_D": 32}
        found.append((f"contract {mode}", triton_contract._contract, contract, {"HAS_LAST": True, **tiles}))
        tiles = {"MODE": mode, "BLOCK_S": 64, "BLOCK_E": 64}
        flags = {"GROUP": 4, "HAS_SCALE": True, "HAS_LAST": True}
        found.append((f"pull {mode}", triton_attend._pull, pull, {**flags, **tiles}))
    return found


def main(capability: int) -> None:
    """Compile every case for compute capability `capability` (90 is an H100 or H200)."""
    outcomes = {}
    for name, kernel, pointers, constants in cases():
        places = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
        source = ASTSource(kernel, arguments(pointers, kernel, constants), places)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        ptx = made.asm["ptx"]
        outcomes[name] = {"shared": made.metadata.shared, "octets": len(made.asm["cubin"])}
        outcomes[name] |= {"tensor_cores": "mma" in ptx, "tf32": "tf32" in ptx}
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 90)
