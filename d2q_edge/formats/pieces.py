"""Pieces of a file whose places are known beforehand: made by several threads, each written where it belongs.

Knows bytes, offsets and threads. Does not know what the pieces are (gguf_file.py) nor which of them may be made beside
others (output.py).
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Lock, Semaphore

THREADS = 4
"""Groups at a time, beside the pieces without one. More would wait for the disk, or for the kernel, which lets one
thread at a time write to a file."""


@dataclass(frozen=True)
class Piece:
    """Bytes of a file: where they begin, and what makes them.

    The pieces of a group are made by one thread, one after the other, and beside them those of other groups. Those
    without a group are made by the thread that calls `write_pieces`.
    """

    offset: int
    make: Callable[[], memoryview]
    group: int | None = None


def write_pieces(handle: int, pieces: Iterable[Piece], written: Callable[[int], object]) -> None:
    """Make all pieces and write them; those of a group, and those without one, in their order.

    No thread has more than one piece in hand, and none has one any more when this returns or raises.

    Args:
        handle: of the file.
        pieces: what to write; none is made before.
        written: called with the size of every piece when it is written, by one thread at a time.

    Raises:
        BaseException: what went wrong first in whichever thread; nothing more is begun then.
    """
    own: list[Piece] = []
    groups: dict[int, list[Piece]] = {}
    for piece in pieces:
        (own if piece.group is None else groups.setdefault(piece.group, [])).append(piece)
    failures: list[BaseException] = []
    counting, making = Lock(), Semaphore(THREADS)

    def write(piece: Piece) -> None:
        try:
            if not failures:
                size = _write(handle, piece)
                with counting:
                    written(size)
        except BaseException as error:
            failures.append(error)

    def write_group(group: list[Piece]) -> None:
        for piece in group:
            with making:
                write(piece)

    with ThreadPoolExecutor(THREADS) as pool:
        try:
            others = [pool.submit(write_group, group) for group in groups.values()]
            for piece in own:
                write(piece)
            wait(others)
        except BaseException as error:
            # Ctrl-C outside of a piece: the threads must know before they are waited for. The pool doesn't know one
            # whose start was interrupted, and that one must not write to whatever gets the file's handle next.
            failures.append(error)
            for _ in range(THREADS):
                making.acquire()
            making.release(THREADS)
    if failures:
        first = failures[0]
        # Its traceback holds what was being written, and this list: it must not hold itself. The list stays full for a
        # thread that wakes up late.
        failures[:] = [RuntimeError("over")]
        try:
            raise first
        finally:
            del first


def _write(handle: int, piece: Piece) -> int:
    """Make and write one; returns its size. Its bytes are gone before the next one's are made."""
    data = rest = piece.make()
    while rest:
        # It may take less than all: Linux at most 2 GiB at a time.
        rest = rest[os.pwrite(handle, rest, piece.offset + data.nbytes - rest.nbytes) :]
    return data.nbytes
