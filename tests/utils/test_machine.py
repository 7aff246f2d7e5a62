"""Available memory, capped by the limits of the process's cgroups; the cache key of a machine."""

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from d2q_edge.utils import machine
from d2q_edge.utils.machine import available_memory

MIB = 2**20
FILES = {
    2: ("memory.max", "memory.current", "active_file {}\ninactive_file {}\nanon 77\n"),
    1: (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "inactive_file 3\ntotal_active_file {}\ntotal_inactive_file {}\n",
    ),
}


class Cgroups:
    """A fake /proc/self/cgroup and /sys/fs/cgroup."""

    def __init__(self, directory: Path, version: int) -> None:
        self.membership, self.hierarchy, self.version = directory / "cgroup", directory / "fs", version
        self.root = self.hierarchy / "memory" if version == 1 else self.hierarchy
        self.root.mkdir(parents=True)

    def join(self, path: str) -> None:
        line = f"0::{path}\n" if self.version == 2 else f"8:pids:/x\n4:cpu,memory:{path}\n0::/\n"
        self.membership.write_text(line)

    def limit(self, path: str, limit: str | int, usage: int = 0, cache: tuple[int, int] | None = (0, 0)) -> None:
        group = self.root / path
        group.mkdir(parents=True, exist_ok=True)
        names = FILES[self.version]
        (group / names[0]).write_text(f"{limit}\n")
        (group / names[1]).write_text(f"{usage}\n")
        if cache is not None:
            (group / "memory.stat").write_text(names[2].format(*cache))

    def available(self) -> int:
        return available_memory(self.membership, self.hierarchy)


@pytest.fixture(params=[1, 2], ids=["v1", "v2"])
def cgroups(request: pytest.FixtureRequest, tmp_path: Path) -> Cgroups:
    return Cgroups(tmp_path, request.param)


def test_of_this_machine() -> None:
    assert 2**26 < available_memory() <= psutil.virtual_memory().total


def test_without_cgroups(tmp_path: Path) -> None:
    """As on macOS."""
    assert 2**26 < available_memory(tmp_path / "none", tmp_path / "none") <= psutil.virtual_memory().total


def test_own_limit(cgroups: Cgroups) -> None:
    cgroups.join("/a/b")
    cgroups.limit("a/b", 10 * MIB, 4 * MIB)
    assert cgroups.available() == 6 * MIB
    cgroups.limit("a/b", 10 * MIB, 11 * MIB)
    assert cgroups.available() == 0


def test_the_page_cache_is_available(cgroups: Cgroups) -> None:
    cgroups.join("/a")
    cgroups.limit("a", 10 * MIB, 9 * MIB, (2 * MIB, 3 * MIB))
    assert cgroups.available() == 6 * MIB


def test_without_statistics(cgroups: Cgroups) -> None:
    cgroups.join("/a")
    cgroups.limit("a", 10 * MIB, 9 * MIB, None)
    assert cgroups.available() == MIB


@pytest.mark.parametrize("path", ["/a/b/c", "/../a/b/c"])
def test_the_tightest_limit_on_the_way_up(cgroups: Cgroups, path: str) -> None:
    cgroups.join(path)
    cgroups.limit("a/b/c", 8 * MIB, MIB)
    cgroups.limit("a/b", "max" if cgroups.version == 2 else 2**63 - 4096)
    cgroups.limit("a", 6 * MIB, MIB)
    cgroups.limit("other", MIB)
    assert cgroups.available() == 5 * MIB
    cgroups.limit("", 3 * MIB, MIB)
    assert cgroups.available() == 2 * MIB


def test_the_path_of_the_host_in_a_container(cgroups: Cgroups) -> None:
    """Only the container's own group is mounted, as the root."""
    cgroups.join("/docker/0123")
    cgroups.limit("", 4 * MIB, MIB)
    assert cgroups.available() == 3 * MIB


def test_no_limit(cgroups: Cgroups) -> None:
    cgroups.join("/a")
    cgroups.limit("a", "max" if cgroups.version == 2 else 2**63 - 4096, 2 * MIB)
    assert 2**26 < cgroups.available() <= psutil.virtual_memory().total


def test_key_names_patch_cpu_and_options(environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    environment(CMAKE_ARGS=None)
    first = machine.cache_key("abc")
    assert first.startswith("abc-")
    assert first == machine.cache_key("abc")
    environment(CMAKE_ARGS="-DGGML_OPENMP=OFF")
    with_options = machine.cache_key("abc")
    monkeypatch.setattr(machine, "_cpu", lambda: "another")
    assert len({first, with_options, machine.cache_key("abc")}) == 3
