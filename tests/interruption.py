"""Simulate Ctrl-C at a chosen moment."""

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
