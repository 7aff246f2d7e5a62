"""Feed damaged files to everything that reads files, and report whatever isn't read or refused with a D2QError.

    python tools/fuzz.py --minutes 10
    python tools/fuzz.py --target config --seed 1234 --cases 1     # one case again, with its traceback

A case is determined by its target and its seed (fuzz_targets.py does the damage). Cases run in forked workers with
little memory to spare. A finding is an exception other than D2QError, a crash, a case that takes longer than
TIME_LIMIT, or one that allocates more than MEMORY_LIMIT.
"""

from __future__ import annotations

import mmap
import os
import resource
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from d2q_edge.errors import D2QError, sentence
from tools import fuzz_targets

TIME_LIMIT = 60.0
"""Seconds for one case; even on a busy machine they take a fraction of one."""
MEMORY_LIMIT = 2 << 30
"""Bytes that a case may allocate beyond what the libraries have."""
CASES_PER_WORKER = 200

Target = Callable[[int, Path], None]
"""Runs one case, given its seed and a directory of its own, which is empty at first."""


@dataclass(frozen=True)
class Finding:
    """A case that went wrong; `what` is an exception's class and message, or "crash", "hang"."""

    target: str
    seed: int
    what: str


def run_case(target: Target, seed: int, directory: Path) -> str | None:
    """Run one case in this process and return what is wrong, or None."""
    try:
        target(seed, directory)
    except D2QError as error:
        if not sentence(error).isprintable() or not str(error).strip():
            return f"no sentence: {error!r}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # Panics of Rust libraries aren't Exceptions.
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
    return None


def run_cases(name: str, target: Target, seeds: range, time_limit: float = TIME_LIMIT) -> Iterator[Finding]:
    """Run cases in forked workers, one after another; a worker that dies costs only its current case."""
    first = seeds.start
    while first < seeds.stop:
        last = min(first + CASES_PER_WORKER, seeds.stop)
        with tempfile.TemporaryDirectory() as directory, mmap.mmap(-1, 8) as progress:
            progress[:] = struct.pack("<q", first)
            reader, writer = os.pipe()
            worker = os.fork()
            if worker == 0:
                os.close(reader)
                _work(target, range(first, last), Path(directory), progress, writer)
            os.close(writer)
            ended = _watch(worker, progress, time_limit)
            with os.fdopen(reader, encoding="utf-8", errors="replace") as found:
                for line in found:
                    seed, _, what = line.rstrip("\n").partition(" ")
                    yield Finding(name, int(seed), what)
            (seed,) = struct.unpack("<q", progress[:])
            if ended:
                yield Finding(name, seed, ended)
            first = seed + 1 if ended else last


def _work(target: Target, seeds: range, directory: Path, progress: mmap.mmap, writer: int) -> None:
    """Run cases in a worker and end its process."""
    status = 1
    try:
        # Libraries print about damaged files.
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        torch.set_num_threads(1)
        with _little_memory(), os.fdopen(writer, "w", buffering=1, encoding="utf-8", errors="replace") as report:
            for seed in seeds:
                progress[:] = struct.pack("<q", seed)
                if what := run_case(target, seed, directory):
                    report.write(f"{seed} {' '.join(what.split())}\n")
        status = 0
    finally:
        os._exit(status)


@contextmanager
def _little_memory() -> Iterator[None]:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_LIMIT, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def _watch(worker: int, progress: mmap.mmap, time_limit: float) -> str:
    """Wait for a worker's end and return why it ended early, or ""."""
    seen, since = bytes(progress), time.monotonic()
    while True:
        ended, status = os.waitpid(worker, os.WNOHANG)
        if ended:
            return "" if status == 0 else f"crash: {os.waitstatus_to_exitcode(status)}"
        if bytes(progress) != seen:
            seen, since = bytes(progress), time.monotonic()
        if time.monotonic() - since > time_limit:
            os.kill(worker, 9)
            os.waitpid(worker, 0)
            return "hang"
        time.sleep(0.01)


@click.command()
@click.option("--minutes", type=float, default=0.0, help="Until that much time has passed.  [default: --cases]")
@click.option("--cases", default=200, show_default=True, help="Of every target, per round.")
@click.option("--target", "names", type=click.Choice(list(fuzz_targets.TARGETS)), multiple=True, help="[default: all]")
@click.option("--seed", default=0, show_default=True, help="Of the first case.")
def main(minutes: float, cases: int, names: tuple[str, ...], seed: int) -> None:
    """Damage files and see that every one is read or refused."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    deadline = time.monotonic() + 60 * minutes
    findings: list[Finding] = []
    ran = 0
    chosen = names or tuple(fuzz_targets.TARGETS)
    if cases == 1 and len(chosen) == 1:
        with tempfile.TemporaryDirectory() as directory, suppress(D2QError):
            fuzz_targets.TARGETS[chosen[0]](seed, Path(directory))
        return
    while True:
        for name in chosen:
            for finding in run_cases(name, fuzz_targets.TARGETS[name], range(seed, seed + cases)):
                findings.append(finding)
                click.echo(f"{finding.target} --seed {finding.seed}: {finding.what}")
            ran += cases
            if minutes and time.monotonic() > deadline:
                break
        seed += cases
        if time.monotonic() > deadline:
            break
    click.echo(f"{ran} cases, {len(findings)} findings")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
