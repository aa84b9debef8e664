"""The application with the embedded model: asked without a network, or as a process of its own on a free port."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "viewer")]
torch.set_num_threads(1)

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def model() -> Any:
    """The embedded default."""
    from circuits.loading import load

    return load()


@pytest.fixture
def make(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Makes clients of applications with a folder of their own: `client.studio`, `client.worker`, `client.do`."""
    from starlette.testclient import TestClient

    from circuits.serving.app import application
    from circuits.serving.shelf import Shelf
    from circuits.serving.studio import Studio
    from circuits.serving.work import Worker

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    workers: list[Worker] = []

    class Client(TestClient):
        """Waits for jobs."""

        studio: Studio
        worker: Worker

        def do(self, address: str, content: Any) -> dict[str, Any]:
            """Begin a job and wait for its end; its last report."""
            begun = self.post(address, json=content)
            assert begun.status_code == 202, begun.text
            return self.wait(begun.json()["job"])

        def wait(self, job: str) -> dict[str, Any]:
            end = time.monotonic() + 60
            while time.monotonic() < end:
                report: dict[str, Any] = self.get(f"/api/jobs/{job}").json()
                if report["state"] in ("done", "failed"):
                    return report
                time.sleep(0.02)
            raise AssertionError("the job never ended")

    def call(*, host: str = "127.0.0.1", waiting: int = 4, timeout: float = 60.0, max_tokens: int = 64) -> Client:
        studio = Studio(model, Shelf(tmp_path / "graphs"), max_tokens)
        worker = Worker(waiting, timeout)
        workers.append(worker)
        client = Client(application(studio, worker, host), base_url="http://127.0.0.1:8000")
        client.studio, client.worker = studio, worker
        return client

    yield call
    for worker in workers:
        worker.close()
        assert worker.join(30)


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """Starts `circuits serve` as a process; gives it and its address."""
    started: list[subprocess.Popen[str]] = []

    def call(*options: str) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-m", "circuits", "serve", "--port", "0", "--graphs", str(tmp_path / "graphs")]
        environment = {**os.environ, "XDG_DATA_HOME": str(tmp_path / "data"), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=CHECKOUT,
            env=environment,
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", said)
        assert found is not None, said + process.stdout.read()
        return process, found[0]

    yield call
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
