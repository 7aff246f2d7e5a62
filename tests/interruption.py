"""Ctrl-C at a chosen moment, and whatever else happens at one."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import pytest


def interrupt_after(monkeypatch: pytest.MonkeyPatch, place: Any, function: str, calls: int) -> None:
    """Make `place.function` raise KeyboardInterrupt at its call number calls + 1."""
    original, count = getattr(place, function), 0

    def counting(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count > calls:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(place, function, counting)


@contextmanager
def interrupted(place: Any, function: str, calls: int) -> Iterator[None]:
    """Expect the body of the with block to end in a KeyboardInterrupt, at call number calls + 1 of `place.function`."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, place, function, calls)
        with pytest.raises(KeyboardInterrupt):
            yield


@contextmanager
def interrupted_at(text: str) -> Iterator[None]:
    """Expect the body of the with block to end in a KeyboardInterrupt, when it prints `text` to stderr."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    with when_printed(text, interrupt), pytest.raises(KeyboardInterrupt):
        yield


@contextmanager
def when_printed(text: str, action: Callable[[], object]) -> Iterator[None]:
    """Call `action` when the body of the with block prints `text` to stderr; fail if it never does."""
    stream = _Watch(text, action)
    with redirect_stderr(stream):
        yield
    assert stream.seen, f"{text!r} was never printed, but: {stream.getvalue()}"


class _Watch(io.StringIO):
    def __init__(self, text: str, action: Callable[[], object]) -> None:
        super().__init__()
        self.text, self.action, self.seen = text, action, False

    def write(self, content: str) -> int:
        written = super().write(content)
        if not self.seen and self.text in content:
            self.seen = True
            self.action()
        return written
