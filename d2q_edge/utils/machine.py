"""Describe this machine: usable CPUs, available memory, and a cache key for native builds."""

import functools
import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import psutil

CPU_FIELDS = re.compile(r"^(flags|Features|CPU implementer|CPU part|isa)\s*:.*$", re.MULTILINE)
"""Lines of /proc/cpuinfo that decide what -march=native means, on x86, ARM and RISC-V."""


@functools.cache
def _cpu() -> str:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    return "\n".join(sorted({match.group(0) for match in CPU_FIELDS.finditer(text)}))


def cache_key(patch: str) -> str:
    """Return the folder name for what is built from `patch`, for this CPU, with the CMAKE_ARGS of the environment."""
    machine = (platform.system(), platform.machine(), platform.libc_ver(), _cpu(), os.environ.get("CMAKE_ARGS", ""))
    return f"{patch}-{hashlib.sha256(repr(machine).encode()).hexdigest()[:8]}"


def user_cache() -> Path:
    """Return d2q-edge's directory in the user's cache directory; it may not exist."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "d2q-edge"


def usable_cpus() -> int:
    """Return the number of CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory(membership: Path = Path("/proc/self/cgroup"), hierarchy: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how many bytes this process can allocate without swapping, or being killed for its container's limit.

    `membership` names its cgroups, one "ID:CONTROLLERS:PATH" per line (cgroups(7)), which are mounted in `hierarchy`.
    """
    free: int = psutil.virtual_memory().available
    return max(0, min([free, *_cgroup_headroom(membership, hierarchy)]))


def _cgroup_headroom(membership: Path, hierarchy: Path) -> Iterator[int]:
    """Yield limit - usage of every memory cgroup from the process's own up to the root, where there is a limit."""
    try:
        lines = membership.read_text("utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            folder, limit, usage, prefix = "", "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            folder, limit, usage, prefix = "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        # A container may see the host's path here although only its own subtree is mounted: missing levels are skipped.
        parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
        for depth in range(len(parts), -1, -1):
            group = hierarchy.joinpath(folder, *parts[:depth])
            try:
                headroom = int((group / limit).read_text()) - int((group / usage).read_text())
            except (OSError, ValueError):  # no such group, or no limit ("max")
                continue
            # The page cache counts as usage, but the kernel drops it before it enforces the limit.
            with suppress(OSError, ValueError):
                statistics = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
                headroom += sum(int(statistics.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            yield headroom
