"""`circuits train` as processes of its own: killed at any moment and started again, and two under `torchrun`."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import GPT2Config, GPT2LMHeadModel

import circuits
from circuits.replacements import load_replacement
from circuits.replacements.checkpoints import read_log

STEPS = 120
KINDS = {  # what each kind needs beside the common options
    "attention-sae": ["--features", "32", "--k", "4"],
    "mtc": ["--features", "32", "--k", "4", "--layer", "1"],
}
RUN = [sys.executable, "-m", "circuits"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "circuits"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of two layers, and documents of random tokens."""
    folder = tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(folder / "model")
    rng = random.Random(0)
    lines = [json.dumps([0, *(rng.randrange(1, 60) for _ in range(rng.randint(3, 30)))]) for _ in range(300)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    return folder


def start(program: list[str], kind: str, data: Path, output: Path, *options: str) -> subprocess.Popen[str]:
    command = [*program, "train", kind, "--model", str(data / "model"), "--text", str(data / "text.jsonl")]
    command += ["--window", "32", "--batch-tokens", "128", "--steps", str(STEPS), "--log-every", "1", *KINDS[kind]]
    command += ["--checkpoint-every", "5", "--dtype", "float32", "-o", str(output), *options]
    path = os.pathsep.join([str(Path(circuits.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-3000:]
    return output


def kill_at(process: subprocess.Popen[str], log: Path, step: int) -> None:
    """SIGKILL once the log has reached `step`."""
    while process.poll() is None:
        if log.is_file() and log.read_bytes().count(b"\n") >= step:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.001)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, "the training ended before it could be killed"


@pytest.mark.parametrize("kind", list(KINDS))
def test_killed_and_started_again_is_the_same_to_the_bit(kind: str, data: Path, tmp_path: Path) -> None:
    """SIGKILL at a random step: checkpoint, loss curve and saved weights are those of a training that was not killed.

    A checkpoint is written every five steps, which takes about as long as these, so that some kills fall into it.
    """
    step = random.Random(f"{kind} 1").randrange(6, STEPS - 20)
    whole, killed = (start(RUN, kind, data, tmp_path / name) for name in ("whole", "killed"))
    log = tmp_path / "killed" / "checkpoints" / kind / "log.jsonl"
    kill_at(killed, log, step)
    left = len(log.read_text().splitlines())
    assert step <= left < STEPS
    again = finish(start(RUN, kind, data, tmp_path / "killed"))
    finish(whole)
    assert f"step {STEPS}  " in again
    assert "step 1  " not in again  # it went on, and did not begin again
    curves = [read_log(tmp_path / name / "checkpoints" / kind) for name in ("whole", "killed")]
    assert [line["step"] for line in curves[0]] == list(range(1, STEPS + 1))
    assert curves[0] == curves[1]
    for place in [f"checkpoints/{kind}/checkpoint.safetensors", *_weights(tmp_path / "whole", kind)]:
        one, two = _tensors(tmp_path / "whole" / place), _tensors(tmp_path / "killed" / place)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one), place
    assert not list((tmp_path / "killed" / "checkpoints" / kind).glob(".*"))


def _weights(output: Path, kind: str) -> list[str]:
    found = sorted(str(path.relative_to(output)) for path in (output / kind).glob("*.safetensors"))
    assert found
    return found


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping


def test_torchrun_trains_saves_once_and_caches(data: Path, tmp_path: Path) -> None:
    """Two processes from the command line; another training with one process learns from what they have cached."""
    cache = ["--cache", str(tmp_path / "cache"), "--cache-dtype", "float32"]
    output = finish(start(TORCHRUN, "attention-sae", data, tmp_path / "two", *cache))
    assert output.count(f"step {STEPS}  ") == 1  # only the first process reports
    saved = load_replacement(tmp_path / "two" / "attention-sae")
    assert saved.training["tokens"] == 2 * 128 * STEPS
    curve = read_log(tmp_path / "two" / "checkpoints" / "attention-sae")
    assert curve[-1]["loss"] < 0.8 * curve[0]["loss"]
    assert sorted(path.name for path in (tmp_path / "cache").glob("*")) == [
        "manifest.json", "part-0.json", "part-1.json", "shard-0-00000.safetensors", "shard-1-00000.safetensors",
    ]  # fmt: skip
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    options = [*cache, "--layer", "1", "--precision", "bfloat16"]
    finish(start(RUN, "attention-sae", data, tmp_path / "one", *options))
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    other = read_log(tmp_path / "one" / "checkpoints" / "attention-sae")
    assert other[-1]["loss"] < 0.8 * other[0]["loss"]
