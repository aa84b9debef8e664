"""Debian's Chromium, headless, for every test that needs a real browser; where there is none they skip, and say why."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Nothing that the browser itself would ask the network; as root it has no sandbox.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


_started: list[Any] = []


def chromium() -> Iterator[Any]:
    """One browser context for all folders of tests, closed by the one that began it: the body of a fixture."""
    if _started:
        yield _started[0]
        return
    if CHROMIUM is None:
        pytest.skip("there is no Chromium; install Debian's package chromium (.ci/run does)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing; install the extra 'dev'")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        context = started.new_context()
        context.set_default_timeout(5000)
        _started.append(context)
        yield context
        _started.clear()
        started.close()
