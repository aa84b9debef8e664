"""A real browser for the tests of the viewer; where there is none they are skipped, and say why."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "graph")]

from browsers import chromium  # noqa: E402


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium, one for all tests; each opens pages of its own."""
    yield from chromium()


class Opened:
    """A page with a graph in it, and everything that it has complained about or asked for."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (self.complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("requestfailed", self._stopped)

    def _stopped(self, request: Any) -> None:
        """What the page's own policy has stopped was not sent."""
        if request.failure == "csp":
            self.requests.remove(request.url)

    def run(self, script: str, argument: Any = None) -> Any:
        """The value of a script in the page."""
        return self.page.evaluate(script, argument)

    def until(self, script: str) -> None:
        """Wait until a script gives true. Playwright's own waiting evaluates text, which the page's policy forbids."""
        end = time.monotonic() + 5
        while not self.run(script):
            assert time.monotonic() < end, f"never came true: {script}"
            self.page.wait_for_timeout(15)

    def state(self, changes: dict[str, Any]) -> None:
        """Change the viewer's state as its controls do."""
        self.run("(changes) => circuits.state.set(changes)", changes)

    def node(self, name: str) -> Any:
        """A node of the picture."""
        return self.page.locator(f'#nodes [data-id="{name}"]')

    @property
    def inspector(self) -> Any:
        """The panel at the side."""
        return self.page.locator("#inspector")

    def edge_point(self, name: str, at: float = 0.5) -> list[float]:
        """Where on the screen an edge runs."""
        point: list[float] = self.run(
            """([name, t]) => {
                const { viewport, model } = circuits;
                const p = [...viewport.scene.points.subarray(8 * model.graph.edgeNames.get(name)).slice(0, 8)];
                const along = (k) => (1-t)**3*p[k] + 3*(1-t)**2*t*p[k+2] + 3*(1-t)*t*t*p[k+4] + t**3*p[k+6];
                const box = viewport.stage.getBoundingClientRect();
                const { k, x, y } = viewport.view;
                return [box.left + x + k * along(0), box.top + y + k * along(1)];
            }""",
            [name, at],
        )
        return point


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    """Opens a graph from disk; afterwards there may be no complaint, and no request but for the file."""
    opened: list[Opened] = []

    def call(
        graph: Any,
        pages: Any = None,
        *,
        width: int = 1280,
        height: int = 820,
        scheme: str = "light",
        hash: str = "",
        name: str = "graph.html",
    ) -> Opened:
        from circuits.graph.formats.html_file import write

        path = tmp_path / name
        write(graph, path, pages)
        one = Opened(browser.new_page())
        one.page.set_viewport_size({"width": width, "height": height})
        one.page.emulate_media(color_scheme=scheme)
        one.page.goto(path.as_uri() + hash)
        one.until("document.querySelector('#stage').dataset.painted > 0")
        opened.append(one)
        return one

    yield call
    for one in opened:
        one.page.close()
    for one in opened:
        assert one.complaints == []
        outside = [url for url in one.requests if not url.startswith(("file:///", "blob:"))]
        assert outside == []
