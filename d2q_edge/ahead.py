"""Importing transformers' models while the process does something else.

They take seconds, most of them in Python, and nothing needs them before the first block is built; tokenizing a text,
looking through the weights and meeting other processes take seconds, too, most of them in Rust and C++. Knows when a
thread imports and when nobody may: two threads that import modules which import each other would see half of them, so
whoever imports anything of transformers after `begin` calls `wait` first. What transformers needs for tokenizers is
imported already (tokenizer/original.py).
"""

from __future__ import annotations

import threading
from contextlib import suppress

_threads: list[threading.Thread] = []
_lock = threading.Lock()
"""Held while the thread is started, so that nobody waits for one that isn't running yet."""


def begin() -> None:
    """Start importing, in a thread; without effect when repeated."""
    with _lock:
        if not _threads:
            # Not a daemon: Python would stop it anywhere in torch's C++ when the process ends.
            _threads.append(threading.Thread(target=_import))
            # Where no thread can be started, everything is imported when it is needed.
            with suppress(RuntimeError):
                _threads[0].start()


def wait() -> None:
    """Until nothing is being imported."""
    with _lock:
        # One whose start failed, or was interrupted before it, doesn't run and can't be joined.
        running = [thread for thread in _threads if thread.ident is not None]
    for thread in running:
        thread.join()


def _import() -> None:
    # What fails here fails again where it is needed, and is reported there.
    with suppress(Exception):
        from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel  # noqa: F401
