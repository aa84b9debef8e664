"""The type checker and the linter find nothing."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
CHECKED = ["circuits", "graph", "kernels", "replacements", "tests", "examples", "benchmarks"]


def test_types(tmp_path: Path) -> None:
    """`mypy --strict` on the package as it is imported.

    Type checkers run no import hooks, so the four folders are linked into one package first.
    """
    pytest.importorskip("mypy", reason="mypy is not installed; install the extra 'dev'")
    package = tmp_path / "circuits"
    package.mkdir()
    for file in (CHECKOUT / "circuits").iterdir():
        if file.suffix == ".py" or (file.is_dir() and list(file.glob("*.py"))):
            (package / file.name).symlink_to(file)
    for part in ("graph", "kernels", "replacements"):
        (package / part).symlink_to(CHECKOUT / part)
    shutil.copy(CHECKOUT / "pyproject.toml", tmp_path)
    command = [sys.executable, "-m", "mypy", "--strict", "-p", "circuits", "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no issues found" in done.stdout


def test_lint() -> None:
    """`ruff check` with the settings of pyproject.toml."""
    pytest.importorskip("ruff", reason="ruff is not installed; install the extra 'dev'")
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", *CHECKED]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=CHECKOUT)
    assert done.returncode == 0, done.stdout + done.stderr
