"""Do slow work, such as writing to a disk, in the background."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T", bound="Background")


class Background:
    """A thread that does one task at a time; at the end of a with block all are done."""

    def __init__(self) -> None:
        """Start without a task."""
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def start(self, action: Callable[..., None], *arguments: Any) -> None:
        """Start a task, once the one before is done; raise what that one has raised."""
        self.wait()
        self._pending = self._thread.submit(action, *arguments)

    def wait(self) -> None:
        """Wait for the task, if there is one, and raise what it has raised."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self.wait()
