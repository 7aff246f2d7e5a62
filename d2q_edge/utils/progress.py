"""Show the progress of long work on stderr: a bar on a terminal, a line now and then elsewhere (nohup, CI, a log)."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
P = TypeVar("P", bound="Progress")
INTERVAL = 30.0
"""Seconds between two lines where there is no terminal."""
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"


class Progress:
    """Count the steps of some work, and show how many are done and how long the rest will take. Use in a with block."""

    def __init__(
        self,
        description: str,
        total: float,
        unit: str = "step",
        *,
        initial: float = 0,
        unit_scale: bool = False,
        interval: float = INTERVAL,
        quiet: bool = False,
    ) -> None:
        """Start the clock.

        Args:
            description: what is being done ("Writing").
            total: number of steps, each called a `unit`.
            initial: steps that an earlier run has done; they don't count for the time that is left.
            unit_scale: show large numbers with a metric prefix ("3.2G").
            interval: seconds between two lines where stderr is no terminal; infinity leaves it to `print_line`.
            quiet: show nothing at all.
        """
        self.total, self.done = total, initial
        self._description, self._unit, self._scale, self._initial = description, unit, unit_scale, initial
        self._started = self._printed = time.monotonic()
        self._interval, self._status = interval, ""
        terminal = sys.stderr is not None and sys.stderr.isatty()
        self._lines = not terminal and not quiet
        look = {"desc": description, "unit": unit, "unit_scale": unit_scale, "bar_format": BAR}
        self._bar = tqdm(total=total, initial=initial, disable=quiet or not terminal, **look)

    def __enter__(self: P) -> P:
        return self

    def __exit__(self, *_error: object) -> None:
        self._bar.close()

    def update(self, steps: float = 1) -> None:
        """Count steps that are done."""
        self.done += steps
        self._bar.update(steps)
        if time.monotonic() - self._printed >= self._interval and self.done < self.total:
            self.print_line()

    def skip(self, steps: float) -> None:
        """Count steps that were done before; they don't count for the time that is left."""
        self.done += steps
        self._initial += steps
        self._bar.update(steps)

    def set_status(self, status: str) -> None:
        """Set what is shown after the numbers from the next update on."""
        self._status = status
        self._bar.set_postfix_str(status, refresh=False)

    def print_line(self) -> None:
        """Print a line about the state of the work where stderr is no terminal; a terminal has the bar."""
        self._printed = time.monotonic()
        if not self._lines:
            return
        elapsed, fresh = self._printed - self._started, self.done - self._initial
        parts = [f"{self._description}: {self._count(self.done)}/{self._count(self.total)} {self._unit}"]
        parts += [self._status] if self._status else []
        parts.append(f"{duration(elapsed)} elapsed")
        if fresh > 0 and self.done < self.total:
            parts.append(f"about {duration(elapsed / fresh * (self.total - self.done))} left")
        print(", ".join(parts), file=sys.stderr, flush=True)

    def _count(self, number: float) -> str:
        return tqdm.format_sizeof(number) if self._scale else f"{number:.0f}"


def track(items: Iterable[T], description: str, unit: str, *, quiet: bool = False) -> Iterator[T]:
    """Yield the items one by one, and show the progress."""
    items = list(items)
    with Progress(description, len(items), unit, quiet=quiet) as progress:
        for item in items:
            yield item
            progress.update()


def duration(seconds: float) -> str:
    """Format a number of seconds for people: "8 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, seconds = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"
