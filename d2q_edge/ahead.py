"""What takes seconds and will be needed, begun by threads while the process does something else.

Knows when a thread imports and when nobody may: two threads that import modules which import each other would see half
of them, so whoever imports anything of transformers after `begin` calls `wait` first. transformers' models take
seconds, most of them in Python, and nothing needs them before the first block is built; tokenizing a text, looking
through the weights and meeting other processes take seconds, too, most of them in Rust and C++. What transformers needs
for tokenizers is imported already (tokenizer/original.py).
"""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_threads: list[threading.Thread] = []
_lock = threading.Lock()
"""Held while the thread is started, so that nobody waits for one that isn't running yet."""


def wake_driver() -> None:
    """Let the CUDA driver, if there is one, look at its GPUs, which takes a second, while torch is imported."""
    with suppress(RuntimeError):
        threading.Thread(target=_wake_driver, daemon=True).start()


@contextmanager
def no_garbage() -> Iterator[None]:
    """During a with block nothing looks for garbage: imports make many objects, and hardly one of them is any; looking
    through them again and again takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def begin() -> None:
    """Start importing transformers' models, in a thread; without effect when repeated."""
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
    with no_garbage(), suppress(Exception):
        from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel  # noqa: F401


def _wake_driver() -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuInit(0)
