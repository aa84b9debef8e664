"""How long a piece of work will still take."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Estimate:
    """Time left of work that is done in like steps, from the steps that this process has made itself.

    The first report only sets the clock going: steps made before it, by a process that was stopped, and what had to be
    done before the first step (calibration, compilation) are not taken for speed. Half of the estimate's weight is on
    the last half of the time, so that it follows a machine that gets busier, and is not thrown about by one slow step.
    Work of another kind, such as caching before training, needs an `Estimate` of its own.
    """

    clock: Callable[[], float] = time.monotonic
    _reports: list[tuple[float, int]] = field(default_factory=list)

    def report(self, done: int, total: int) -> float | None:
        """Seconds left after `done` of `total` steps; None as long as there is nothing to tell it from."""
        now = self.clock()
        if not self._reports or done >= self._reports[-1][1]:
            self._reports.append((now, done))
        else:
            self._reports = [(now, done)]
        if len(self._reports) > 512:
            self._reports = self._reports[:1] + self._reports[2::2]
        began, first = self._reports[0]
        if done == first:
            return 0.0 if done >= total else None
        middle = min(self._reports, key=lambda report: abs(report[0] - (began + now) / 2))
        whole = (now - began) / (done - first)
        recent = (now - middle[0]) / (done - middle[1]) if done > middle[1] else whole
        return (total - done) * (whole + recent) / 2


def words(seconds: float | None) -> str:
    """`2 h 05 min left`, `40 s left`; empty while nothing is known."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min left"
    return f"{minutes} min {rest:02d} s left" if minutes else f"{rest} s left"
