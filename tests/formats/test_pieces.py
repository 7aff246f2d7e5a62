"""Files written in pieces by several threads: the same bytes as from one, few pieces at a time, the first failure."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from d2q_edge.formats.pieces import THREADS, Piece, write_pieces

SIZE = 1000
LONG = 20
"""Seconds that nothing here takes, unless something hangs."""


def content(number: int) -> bytes:
    return np.random.default_rng(number).bytes(SIZE)


def piece(number: int, group: int | None, before: Callable[[], object] = lambda: None) -> Piece:
    def make() -> memoryview:
        before()
        return memoryview(content(number))

    return Piece(number * SIZE, make, group)


def write(path: Path, pieces: Sequence[Piece]) -> list[int]:
    """Returns the sizes that were said to be written."""
    sizes: list[int] = []
    with path.open("wb") as file:
        write_pieces(file.fileno(), pieces, sizes.append)
    return sizes


@pytest.mark.parametrize("groups", [0, 1, 3, 30])
def test_bytes_are_those_of_one_thread(tmp_path: Path, groups: int) -> None:
    generator = np.random.default_rng(0)
    order = generator.permutation(200).tolist()
    pieces = [piece(i, int(generator.integers(groups)) if groups and i % 5 else None) for i in order]
    assert write(tmp_path / "file", pieces) == [SIZE] * 200
    assert (tmp_path / "file").read_bytes() == b"".join(map(content, range(200)))


def test_a_write_that_takes_less_than_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, offset: pwrite(handle, data[:7], offset))
    assert write(tmp_path / "file", [piece(0, None), piece(1, 0)]) == [SIZE] * 2
    assert (tmp_path / "file").read_bytes() == content(0) + content(1)


def test_an_empty_piece(tmp_path: Path) -> None:
    assert write(tmp_path / "file", [Piece(0, lambda: memoryview(b"")), piece(0, None)]) == [0, SIZE]


def test_who_makes_what(tmp_path: Path) -> None:
    """Those without a group this thread, in order; those of a group one other, in order."""
    made: list[tuple[int | None, int, int]] = []

    def note(group: int | None, number: int) -> Callable[[], None]:
        return lambda: made.append((group, number, threading.get_ident()))

    groups = [None, *range(7)]
    pieces = [piece(i, groups[i % 8], note(groups[i % 8], i)) for i in range(80)]
    write(tmp_path / "file", pieces)
    assert len(made) == 80
    for group in groups:
        own = [entry for entry in made if entry[0] == group]
        assert own == sorted(own, key=lambda entry: entry[1])
        assert len({thread for _, _, thread in own}) == 1
        assert (own[0][2] == threading.get_ident()) == (group is None)


def test_without_groups_there_are_no_threads(tmp_path: Path) -> None:
    before = threading.active_count()
    write(tmp_path / "file", [piece(i, None, lambda: check(threading.active_count() == before)) for i in range(3)])


def test_how_many_at_a_time(tmp_path: Path) -> None:
    """As many groups as there are threads, and this one beside them; and never more, nor other threads."""
    together = threading.Barrier(THREADS + 1, timeout=LONG)
    lock, running, most, threads = threading.Lock(), 0, 0, set[int]()

    def busy() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            threads.add(threading.get_ident())
        together.wait()
        time.sleep(0.01)
        with lock:
            running -= 1

    write(tmp_path / "file", [piece(i, i if i < 3 * THREADS else None, busy) for i in range(3 * THREADS + 3)])
    assert most == len(threads) == THREADS + 1


@pytest.mark.parametrize("group", [None, 0])
def test_a_piece_is_gone_before_the_next_is_made(tmp_path: Path, group: int | None) -> None:
    last: list[weakref.ref[np.ndarray]] = []

    def make() -> memoryview:
        check(all(array() is None for array in last))
        array = np.zeros(SIZE, np.uint8)
        last[:] = [weakref.ref(array)]
        return array.data

    write(tmp_path / "file", [Piece(i * SIZE, make, group) for i in range(5)])


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), ValueError("x"), KeyboardInterrupt()], ids=repr
)
@pytest.mark.parametrize("group", [None, 2])
def test_the_first_failure_ends_it(tmp_path: Path, group: int | None, error: BaseException) -> None:
    """Whichever thread it is in; others finish the piece that they have in hand, and what fails later isn't it."""
    failed, others = threading.Event(), threading.Barrier(THREADS + 1, timeout=LONG)
    made: list[int | None] = []

    def make(own: int | None) -> None:
        made.append(own)
        others.wait()
        if own == group:
            failed.set()
            raise error
        failed.wait(LONG)
        time.sleep(0.05)
        if own == 1:
            raise RuntimeError("later")

    order = [None, *range(2 * THREADS)]
    pieces = [piece(i, own, lambda own=own: make(own)) for i, own in enumerate([*order, *order])]  # type: ignore[misc]
    with pytest.raises(type(error)) as caught:
        write(tmp_path / "file", pieces)
    assert caught.value is error
    assert sorted(made, key=str) == [*range(THREADS), None], "nothing is begun after a failure"


def test_a_failure_to_write(tmp_path: Path) -> None:
    """A real one."""
    for group in (None, 0):
        handle = os.open("/dev/full", os.O_WRONLY)
        with pytest.raises(OSError, match="No space left"):
            write_pieces(handle, [piece(0, group)], lambda _: check(False))
        os.close(handle)


@pytest.mark.parametrize("group", [None, 0])
def test_a_failure_keeps_no_piece(group: int | None) -> None:
    """A caller that goes on after a full disk has its memory back at once."""
    arrays = [np.zeros(SIZE, np.uint8)]
    last = weakref.ref(arrays[0])
    gc.collect()
    gc.disable()
    try:
        with Path("/dev/full").open("wb") as file, suppress(OSError):
            write_pieces(file.fileno(), [Piece(0, lambda: arrays.pop().data, group)], lambda _: None)
        assert last() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("first", [1, 2 * THREADS])
def test_ctrl_c_outside_of_pieces(tmp_path: Path, first: int) -> None:
    """Also at once, while threads are being started."""
    begun: list[int] = []
    done: list[int] = []

    def make() -> None:
        begun.append(0)
        if len(begun) == first:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        done.append(0)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "file", [piece(i, i // 100, make) for i in range(1000)])
    assert len(begun) == len(done) < first + 2 * THREADS
    time.sleep(0.2)
    assert len(begun) == len(done) < first + 2 * THREADS, "nobody goes on"


def check(true: bool) -> None:
    """An assertion in a lambda."""
    assert true
