"""Runs the Triton checks of this folder once, in a process of its own, and lets the tests share helper modules.

Triton decides between compiling and interpreting when it is first imported, and something else in this process may have
imported it; so the checks run elsewhere, interpreted where there is no GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def triton_checks() -> dict[str, str]:
    """What became of each check: empty if it passed, else what went wrong."""
    pytest.importorskip("triton", reason="triton is not installed; install the extra 'gpu'")
    environment = {**os.environ, "CIRCUITS_KERNELS": "triton", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, str(HERE / "triton_checks.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return outcomes
