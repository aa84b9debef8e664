"""Two processes under `torchrun`, on the CPU, train as one process does that has the batches of both."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import circuits
from circuits.replacements.checkpoints import read_log
from circuits.replacements.errors import ReplacementError
from circuits.replacements.parallel import Processes, _buckets
from circuits.replacements.training import train

WORKER = Path(__file__).with_name("two_processes.py")
State = dict[str, Tensor]


def _worker() -> Any:
    spec = importlib.util.spec_from_file_location("two_processes", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave: weights of every process, checkpoints and logs."""
    folder = tmp_path_factory.mktemp("two")
    path = os.pathsep.join([str(Path(circuits.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(WORKER), str(folder)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def _states(folder: Path, name: str) -> tuple[State, State]:
    one, two = (torch.load(folder / f"{name}.{rank}.pt", weights_only=True) for rank in range(2))
    return one, two


@pytest.mark.parametrize("name", ["topk", "batch_topk", "jump_relu", "resumed"])
def test_both_processes_end_with_the_same_weights(folder: Path, name: str) -> None:
    """Parameters and buffers, to the bit, though they began with different ones."""
    one, two = _states(folder, name)
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("activation", ["topk", "jump_relu"])
def test_two_processes_train_as_one_with_the_batches_of_both(folder: Path, tmp_path: Path, activation: str) -> None:
    """The same weights, counters and loss curve; the process's share of the batch must not matter."""
    worker = _worker()
    module = worker.sae(activation)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    train(module, worker.Batches(Processes()), worker.settings(Processes()), tmp_path)
    ours, theirs = module.state_dict(), _states(folder, activation)[0]
    for name, tensor in ours.items():
        assert torch.allclose(tensor.float(), theirs[name].float(), atol=1e-5, rtol=1e-5), name
    assert torch.equal(ours["unfired"], theirs["unfired"])
    assert int(ours["unfired"][0, 0]) == int(ours["unfired"].max()) == 2 * worker.STEPS * worker.TOKENS
    assert len(ours["unfired"].unique()) > 3 or activation == "jump_relu"  # which fires too often here
    assert float((ours["W_enc.0"] - before["W_enc.0"]).abs().max()) > 0.01
    for one, two in zip(read_log(tmp_path), read_log(folder / activation), strict=True):
        assert one["step"] == two["step"]
        for name in ("loss", "gradient_norm", "l0/attention-sae.0"):
            assert one[name] == pytest.approx(two[name], rel=1e-4)


def test_two_processes_go_on_exactly(folder: Path) -> None:
    """Stopped behind a checkpoint and started again: weights and loss curve of a training that was not."""
    whole, resumed = _states(folder, "batch_topk")[0], _states(folder, "resumed")[0]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert read_log(folder / "stopped") == read_log(folder / "batch_topk")
    assert [line["step"] for line in read_log(folder / "stopped")] == [10, 20, 30, 40]


def test_another_number_of_processes_is_refused(folder: Path) -> None:
    """One process cannot know where the other was in its text."""
    worker = _worker()
    with pytest.raises(ReplacementError, match="made by 2 processes, now there are 1; go on with the same number"):
        train(worker.sae("topk"), worker.Batches(Processes()), worker.settings(Processes(count=2)), folder / "topk")


def test_buckets_hold_every_tensor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By dtype, in order, none over the limit but for a single large tensor."""
    monkeypatch.setattr("circuits.replacements.parallel.BUCKET", 10)
    tensors = [torch.zeros(n, dtype=dtype) for n in (4, 7, 3, 25, 1) for dtype in (torch.float32, torch.bfloat16)]
    buckets = list(_buckets(tensors))
    assert sorted(id(tensor) for bucket in buckets for tensor in bucket) == sorted(map(id, tensors))
    assert all(len(bucket) == 1 or sum(map(Tensor.numel, bucket)) <= 10 for bucket in buckets)
    assert all(len({tensor.dtype for tensor in bucket}) == 1 for bucket in buckets)


def test_one_process_needs_no_others() -> None:
    """Nothing is sent, and nothing changed."""
    module, one = nn.Linear(2, 2), Processes()
    one.broadcast(module)
    one.average_gradients(module)
    one.wait()
    assert module.weight.grad is None
    assert one.leads
    assert one.gather(5) == [5]
    assert one.mean_of({"a": 2.0}) == {"a": 2.0}
