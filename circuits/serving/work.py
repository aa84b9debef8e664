"""Jobs that wait for the one model: a queue that can be full, one thread, progress, and stopping.

A job is stopped through its progress callback, which the engine calls between blocks of its work: when its time is
over, when somebody asked for it, and when the server goes down. What it had is dropped.
"""

import queue
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from circuits.errors import CircuitsError

Act = Callable[["Job"], dict[str, Any]]
State = Literal["waiting", "working", "done", "failed"]
REMEMBERED = 64  # finished jobs that can still be asked about


class Full(Exception):
    """So many jobs wait already that no more is taken."""


class Stopped(CircuitsError):
    """A job was stopped: its time was over, somebody asked for it, or the server goes down."""


@dataclass
class Job:
    """One piece of work with the model.

    act
        Does it, and gives what the browser is told; calls `step` as it goes.
    timeout
        Seconds that it may take once it has begun.
    """

    act: Act
    timeout: float
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    state: State = "waiting"
    stage: str = ""
    done: int = 0
    total: int = 0
    result: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    stopping: str = ""
    ends: float = 0.0

    @property
    def finished(self) -> bool:
        return self.state in ("done", "failed")

    def begin(self, stage: str) -> Callable[[int, int], None]:
        """Name what comes now, and give the progress callback for it.

        Raises
        ------
        Stopped
            From here or from the callback.
        """
        self.stage, self.done, self.total = stage, 0, 0
        self.check()
        return self.step

    def step(self, done: int, total: int) -> None:
        self.done, self.total = done, total
        self.check()

    def check(self) -> None:
        if self.stopping:
            raise Stopped(self.stopping)
        if time.monotonic() > self.ends:
            raise Stopped(
                f"stopped after {self.timeout:g} s, which is the limit here; try a shorter prompt or a lower node "
                "threshold, or start the server with a larger --timeout"
            )

    def report(self) -> dict[str, Any]:
        """What is told of it, as JSON."""
        known: dict[str, Any] = {"job": self.id, "state": self.state, "stage": self.stage}
        known |= {"done": self.done, "total": self.total}
        if self.state == "done":
            known["result"] = self.result
        if self.state == "failed":
            known["error"] = self.error
        return known


class Worker:
    """One thread that does jobs in their order; at most `waiting` of them wait."""

    def __init__(self, waiting: int, timeout: float) -> None:
        self.timeout = timeout
        self.closed = False
        self._queue: queue.Queue[Job | None] = queue.Queue(maxsize=waiting)
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="circuits-serve-worker", daemon=True)
        self._thread.start()

    def submit(self, act: Act) -> Job:
        """Put a job at the end of the queue.

        Raises
        ------
        Full
            There is no place in it, or the server goes down.
        """
        job = Job(act, self.timeout)
        with self._lock:
            if self.closed:
                raise Full("the server is stopping")
            try:
                self._queue.put_nowait(job)
            except queue.Full:
                raise Full(f"{self._queue.maxsize} requests wait already; try again when one is done") from None
            self._jobs[job.id] = job
            finished = [name for name, old in self._jobs.items() if old.finished]
            for name in finished[: max(0, len(finished) - REMEMBERED)]:
                del self._jobs[name]
        return job

    def job(self, name: str) -> Job | None:
        """A job by its id, None if there is none or it is long done."""
        return self._jobs.get(name)

    def ahead(self, job: Job) -> int:
        """How many jobs come before one that waits."""
        with self._lock:
            open_ = [name for name, other in self._jobs.items() if not other.finished]
        return open_.index(job.id) if job.id in open_ else 0

    def stop(self, job: Job, why: str = "stopped") -> None:
        """Stop a job: at once if it waits, at its next step if it runs."""
        job.stopping = job.stopping or why
        if job.state == "waiting":
            job.state, job.error = "failed", why

    def close(self) -> None:
        """Take no more jobs, and stop those that there are; returns at once."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            jobs = list(self._jobs.values())
        for job in jobs:
            if not job.finished:
                self.stop(job, "the server is stopping")
        while True:  # make room for the word that ends the thread
            try:
                self._queue.put_nowait(None)
                return
            except queue.Full:
                try:
                    self._queue.get_nowait()
                except queue.Empty:
                    continue

    def join(self, seconds: float) -> bool:
        """Wait for the thread to end; whether it did."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            if not job.finished:
                self._do(job)

    def _do(self, job: Job) -> None:
        job.ends = time.monotonic() + job.timeout
        job.state = "working"
        try:
            job.result = job.act(job)
            job.state = "done"
        except Exception as error:  # whatever it is, the next job shall run
            job.error, job.state = in_words(error), "failed"


def in_words(error: Exception) -> str:
    """What a reader is told of an error: its own words if it is one that a user can act on."""
    from circuits.graph import GraphError
    from circuits.replacements.errors import ReplacementError

    if isinstance(error, CircuitsError | GraphError | ReplacementError):
        return str(error)
    text = str(error).lower()
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return "out of memory; try a shorter prompt or fewer features"
    import logging

    logging.getLogger("circuits.serving").error("a request failed", exc_info=error)
    return f"something went wrong here ({type(error).__name__}); the server's terminal says more"
