"""This machine: its CPUs, and a name for it, because a native build does not run on every CPU of an architecture."""

import functools
import hashlib
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

CPU_FIELDS = re.compile(r"^(flags|Features|CPU implementer|CPU part|isa)\s*:.*$", re.MULTILINE)
"""Lines of /proc/cpuinfo that decide what -march=native means, on x86, ARM and RISC-V."""


@functools.cache
def _cpu() -> str:
    if sys.platform == "darwin":
        return subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        ).stdout
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    return "\n".join(sorted({match.group(0) for match in CPU_FIELDS.finditer(text)}))


def cache_key(patch: str) -> str:
    """Folder name of what is built from `patch` on this machine, with the CMAKE_ARGS of the environment."""
    machine = (platform.system(), platform.machine(), platform.libc_ver(), _cpu(), os.environ.get("CMAKE_ARGS", ""))
    return f"{patch}-{hashlib.sha256(repr(machine).encode()).hexdigest()[:8]}"


def usable_cpus() -> int:
    """Number of CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
