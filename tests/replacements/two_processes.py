"""What each process of `test_parallel.py` does: train on its own batches, leave its weights in a folder.

    torchrun --nproc-per-node N two_processes.py FOLDER

One process gets the batches of two, put together.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuits.replacements.attention_sae import AttentionSAE
from circuits.replacements.coder import CoderSettings
from circuits.replacements.parallel import Processes, started
from circuits.replacements.training import TrainingSettings, train

D, STEPS, TOKENS = 16, 40, 24


class Batches:
    """Sparse sums of known directions. Process r of n has batches r, r + n, ...; one process has pairs of them."""

    def __init__(self, processes: Processes, stop_at: int | None = None) -> None:
        self.processes, self.made, self.stop_at = processes, 0, stop_at
        self.directions = torch.randn(24, D, generator=torch.Generator().manual_seed(0))

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, Tensor]:
        if self.made == self.stop_at:
            raise KeyboardInterrupt
        rank, count = self.processes.rank, self.processes.count
        numbers = [2 * self.made, 2 * self.made + 1] if count == 1 else [count * self.made + rank]
        self.made += 1
        x = torch.cat([self._tokens(number) for number in numbers])
        return {"attn_out.0:none": x, "attn_out.0": x}

    def _tokens(self, number: int) -> Tensor:
        random = torch.Generator().manual_seed(1000 + number)
        active = torch.rand(TOKENS, 24, generator=random) < 1 / 8
        return (active * (1 + torch.rand(TOKENS, 24, generator=random))) @ self.directions + 3.0

    def state_dict(self) -> dict[str, Any]:
        return {"made": self.made, "as_tensor": torch.tensor(self.made), "rank": self.processes.rank}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert int(state["as_tensor"]) == state["made"]
        assert state["rank"] == self.processes.rank
        self.made = int(state["made"])


def settings(processes: Processes) -> TrainingSettings:
    return TrainingSettings(
        STEPS, lr=2e-3, warmup=5, calibration=processes.count, figures_every=10, checkpoint_every=10
    )


def sae(activation: str, rank: int = 0) -> AttentionSAE:
    """Other weights in every process to begin with: the first one's count. Feature 0 never fires."""
    module = AttentionSAE([0], D, CoderSettings(36, activation, k=3, dead_after=10**6, seed=rank))
    with torch.no_grad():
        module.b_enc[0][0] = -100.0
    return module


def run(folder: Path, processes: Processes) -> None:
    for activation in ("topk", "batch_topk", "jump_relu"):
        module = sae(activation, processes.rank)
        train(module, Batches(processes), settings(processes), folder / activation, processes=processes)
        torch.save(module.state_dict(), folder / f"{activation}.{processes.rank}.pt")
    stopped, again = sae("batch_topk", processes.rank), sae("batch_topk", processes.rank)
    try:
        train(stopped, Batches(processes, 26), settings(processes), folder / "stopped", processes=processes)
    except KeyboardInterrupt:
        processes.wait()
    train(again, Batches(processes), settings(processes), folder / "stopped", processes=processes)
    torch.save(again.state_dict(), folder / f"resumed.{processes.rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with started() as (processes, _):
        run(Path(sys.argv[1]), processes)
