"""What the user is told while it runs."""

import sys
import time
from collections.abc import Sequence


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Progress:
    """Lines that say which run is under way, and how long all will take.

    Args:
        finished: seconds of each run that is already complete.
        total: how many runs there are.
    """

    def __init__(self, finished: Sequence[float], total: int):
        self.finished, self.total = list(finished), total
        self.left = total - len(self.finished)
        self.name, self.start = "", 0.0

    def begin(self, name: str, number: int) -> None:
        self.name, self.start = f"[{number}/{self.total}] {name}", time.monotonic()

    def line(self, text: str) -> None:
        say(f"{self.name}: {text}{self._estimate()}")

    def end(self, succeeded: bool) -> None:
        self.left -= 1
        if succeeded:
            self.finished.append(time.monotonic() - self.start)

    def _estimate(self) -> str:
        if not self.finished:
            return ""
        spent = time.monotonic() - self.start
        left = seconds_left(self.finished, self.left, spent)
        return f"; all runs: about {duration(left)} left"


def seconds_left(finished: Sequence[float], runs_left: int, spent: float) -> float:
    """Estimated seconds until the last run ends, from those that finished (at least one).

    Args:
        finished: seconds of each finished run.
        runs_left: unfinished ones, the one under way included.
        spent: seconds that the one under way has taken.
    """
    mean = sum(finished) / len(finished)
    return max(0.0, mean - spent) + mean * (runs_left - 1)


def duration(seconds: float) -> str:
    """Of an estimate: "2 h 5 min", "7 min" or "40 s"."""
    if seconds < 100:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    hours = f"{minutes // 60} h " if minutes >= 60 else ""
    return f"{hours}{minutes % 60} min"
