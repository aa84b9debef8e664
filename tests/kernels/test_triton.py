"""The Triton kernels: each check against a plain float64 loop and the PyTorch reference, and compiled for an H100.

The checks (`triton_checks.py`) run in Triton's interpreter where there is no GPU, all in one process of their own.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
CHECKS = [
    node.name
    for node in ast.parse((HERE / "triton_checks.py").read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and any(getattr(d, "id", "") == "check" for d in node.decorator_list)
]


def test_the_checks_are_found() -> None:
    """Every kernel has checks: their names begin with what it does."""
    assert {name.split("_")[0] for name in CHECKS} >= {"encode", "decode", "move", "pull", "contract"}


@pytest.mark.parametrize("name", CHECKS)
def test_kernel(name: str, triton_checks: dict[str, str]) -> None:
    """One check of one kernel."""
    assert not triton_checks[name], triton_checks[name]


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
def test_kernels_compile_for_a_card() -> None:
    """Down to machine code of an H100: float32 products without TF32, bfloat16 ones on the tensor cores, and little
    enough shared memory for one program."""
    pytest.importorskip("triton", reason="triton is not installed; install the extra 'gpu'")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "triton_compiles.py"), "90"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads(done.stdout.splitlines()[-1])
    assert len(made) == 8
    for name, kernel in made.items():
        assert kernel["tensor_cores"] == name.endswith("bfloat16"), name
        assert not kernel["tf32"], name
        assert kernel["shared"] < 227 * 1024, name


def test_the_backend_is_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU PyTorch, unless Triton is forced, and then only in its interpreter; float64 is PyTorch's."""
    from circuits.kernels import backend

    monkeypatch.delenv("CIRCUITS_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(2)
    assert not backend.use_triton(x)
    monkeypatch.setenv("CIRCUITS_KERNELS", "triton")
    assert not backend.use_triton(x.double())
    with pytest.raises(RuntimeError, match=r"TRITON_INTERPRET|it is missing"):
        backend.use_triton(x)
    monkeypatch.setenv("CIRCUITS_KERNELS", "cuda")
    with pytest.raises(ValueError, match="expected triton or torch"):
        backend.use_triton(x)


def test_bfloat16_products_and_their_error() -> None:
    """Operands are rounded, sums are not: the error is what rounding makes, and it is reported."""
    from circuits.kernels.backend import matmul, observed_error

    torch.manual_seed(0)
    a, b = torch.randn(40, 300), torch.randn(300, 30)
    expected = a.bfloat16().double() @ b.bfloat16().double()
    torch.testing.assert_close(matmul(a, b, "bfloat16").double(), expected, rtol=1e-5, atol=1e-4)
    error = observed_error(lambda products: matmul(a, b, products))
    assert 1e-4 < error < 1e-2
