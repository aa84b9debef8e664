"""`circuits trace --estimate`: what it prints in 80 columns, that it writes nothing, and how it refuses."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from circuits import estimating
from circuits.cli import main
from circuits.cli.console import console
from circuits.cli.estimate import size_name, time_name

CASE = Path(__file__).parents[1] / "data" / "golden" / "gpt2_clt"
PROMPT = "When Mary and John went to the store, John gave a drink to"
OF_CASE = ("--token-ids", "1,2,3,4,5", "--model", CASE / "model", "--replacement", CASE / "transcoders")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `circuits trace ARGS --estimate` in 80 columns; returns (exit code, output, error output)."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["circuits", "trace", *map(str, args), "--estimate"])
        monkeypatch.setattr(console, "_width", 80)
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_of_the_default(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes by dictionary with the basis of their L0, memory and time by part, in lines of 80; nothing is written."""
    monkeypatch.chdir(tmp_path)
    code, printed, message = run(PROMPT, "-o", tmp_path / "out", "--explain", "--verify", 3)
    assert (code, message) == (0, "")
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any(tmp_path.iterdir())
    rows = {line[:36].strip(): line[36:].split() for line in lines if line.startswith(" ")}
    nodes = {name: int(cells[-1].replace(",", "")) for name, cells in rows.items() if cells and cells[-1][0].isdigit()}
    of_dictionaries = [count for name, count in nodes.items() if name.startswith(("clt", "attention-sae"))]
    assert len(of_dictionaries) > 1
    assert nodes["tokens"] == 15
    assert sum(of_dictionaries) + 15 + nodes["errors"] == pytest.approx(nodes["in all"], abs=len(of_dictionaries))
    joined = " ".join(printed.split())
    parts = ("base model", "writers", "at one time", "there is", "read and hash files", "rows", "in all")
    for part in (*parts, "its training", "usual at most"):
        assert part in joined, part
    assert "It fits." in joined
    assert "hop splits" not in joined  # all attention is replaced
    assert "Not counted: --explain, --verify." in joined
    assert "Nothing says" not in joined


def test_what_does_not_fit_is_said_in_words(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Still exit code 0; with what to change, and that the L0 is assumed."""
    monkeypatch.setattr(estimating, "free_memory", lambda device: 1000)
    code, printed, _ = run(*OF_CASE)
    assert code == 0
    assert max(map(len, printed.splitlines())) <= 80
    joined = " ".join(printed.split())
    assert "It does not fit." in joined
    assert "(--no-hops):" in joined
    assert "Nothing says how many features are active" in joined
    assert "It fits" not in joined


def test_loads_no_weights(run: Run, tmp_path: Path) -> None:
    """NaN weights, which a trace refuses, do not matter; targets are read as for a trace."""
    for part in ("model", "transcoders"):
        (tmp_path / part).mkdir()
        for file in (CASE / part).iterdir():
            (tmp_path / part / file.name).write_bytes(file.read_bytes())
            if file.suffix == ".safetensors":
                poisoned = {name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(file).items()}
                save_file(poisoned, tmp_path / part / file.name, metadata={"format": "pt"})
    of = ("--token-ids", "1,2,3,4,5", "--model", tmp_path / "model", "--replacement", tmp_path / "transcoders")
    assert run(*of, "--target", "7", "--max-targets", 20)[0] == 0
    code, _, message = run(*of, "--target", "nothing of the kind")
    assert code == 2
    assert "target" in message


def test_refusals(run: Run, tmp_path: Path) -> None:
    """As a trace refuses: exit code 2, and no traceback."""
    for args, words in (
        ((PROMPT, "--model", tmp_path), "no model could be read"),
        ((*OF_CASE[:4], "--replacement", tmp_path), "no replacement of a known format"),
        ((PROMPT, "--dtype", "int3"), "dtype 'int3'"),
        ((), "give the prompt once"),
    ):
        code, _, message = run(*args)
        assert code == 2
        assert words in " ".join(message.split())
        assert "Traceback" not in message


def test_sizes_and_times_in_words() -> None:
    """Units that a reader takes in at once."""
    assert [size_name(size) for size in (1e5, 12.4e6, 3.44e9)] == ["0.1 MB", "12 MB", "3.4 GB"]
    assert [time_name(s) for s in (0.042, 7.77, 89.4, 600.0, 9000.0)] == ["0.042 s", "7.8 s", "89 s", "10 min", "2.5 h"]
