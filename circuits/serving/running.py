"""The server's life: a socket of its own, uvicorn, and a clean stop on SIGINT and SIGTERM, also while a trace runs."""

import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from circuits.errors import CircuitsError
from circuits.serving.app import application
from circuits.serving.studio import Studio
from circuits.serving.work import Worker

GRACE = 3  # seconds that open connections get when the server stops
LAST = 20.0  # seconds that a running job gets to come to its next step


class _Server(uvicorn.Server):
    """Stops the jobs first: their streams of progress end then, and no connection keeps the server up."""

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self.worker = worker

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.worker.close()
        super().handle_exit(sig, frame)


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises
    ------
    CircuitsError
        The address is taken or is none of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise CircuitsError(
            f"cannot listen on {host} port {port} ({error}); give another --port (0 takes a free one) or --host"
        ) from error


def serve(
    studio: Studio, listening: socket.socket, host: str, worker: Worker, started: Callable[[], None] | None = None
) -> None:
    """Answer requests until SIGINT or SIGTERM; then stop the jobs, end the connections and return."""
    config = uvicorn.Config(
        application(studio, worker, host),
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        ws="none",
        lifespan="off",
        limit_concurrency=100,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=GRACE,
    )
    # uvicorn raises the signal again when it is done, for whoever had a handler before: that is nothing here.
    before = {sig: signal.signal(sig, _nothing) for sig in (signal.SIGINT, signal.SIGTERM)}
    try:
        if started is not None:
            started()
        _Server(config, worker).run(sockets=[listening])
    finally:
        worker.close()
        worker.join(LAST)
        for sig, handler in before.items():
            signal.signal(sig, handler)


def _nothing(sig: int, frame: FrameType | None) -> None:
    """A signal that has been obeyed already."""
