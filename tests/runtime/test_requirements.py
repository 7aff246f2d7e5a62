"""What a build needs is checked before it starts: programs, compilers that work, packages that have them."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from d2q_edge.errors import D2QError
from d2q_edge.runtime import requirements
from tests.runtime.conftest import make_program

Environment = Callable[..., None]
BROKEN = 'case "$1" in --version) exit 0;; esac; echo "<stdin>:1:10: fatal error: vector: No such file" >&2; exit 1'


@pytest.fixture
def programs(tmp_path: Path, environment: Environment, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with fakes of everything that a build needs, and an unknown system around it."""
    environment(CC=None, CXX=None)
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("cc", "c++", "make", "patch"):
        make_program(tmp_path / "bin" / name)
    make_program(tmp_path / "bin" / "cmake", "echo cmake version 3.25.1")
    return tmp_path / "bin"


def refusal(programs: Path) -> str:
    """What the check says."""
    with pytest.raises(D2QError) as caught:
        requirements.check_programs(str(programs))
    return str(caught.value)


def test_all_there(programs: Path) -> None:
    requirements.check_programs(str(programs))


def test_this_machine_is_fit_to_build() -> None:
    if not all(map(shutil.which, ("cc", "c++", "make", "cmake", "patch"))):
        pytest.skip("it has no compilers")
    requirements.check_programs()


@pytest.mark.parametrize(
    ("manager", "hint"),
    [
        ("apt-get", ": apt install build-essential cmake"),
        ("dnf", ": dnf install gcc-c++ make cmake"),
        ("zypper", ": zypper install gcc-c++ make cmake"),
        ("pacman", ": pacman -S base-devel cmake"),
        ("apk", ": apk add build-base cmake"),
        ("unknown", ""),
    ],
)
def test_missing_ones_are_named_with_their_packages(programs: Path, manager: str, hint: str) -> None:
    for name in ("cmake", "c++"):
        (programs / name).unlink()
    make_program(programs / manager)
    assert refusal(programs) == f"to build the runtime, install a C++ compiler, cmake first{hint}"


def test_only_what_is_missing_is_named(programs: Path) -> None:
    (programs / "patch").unlink()
    make_program(programs / "apt-get")
    assert refusal(programs) == "to build the runtime, install patch first: apt install patch"


def test_on_a_mac(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    (programs / "cmake").unlink()
    assert refusal(programs).endswith("install cmake first: brew install cmake")
    # Without the developer tools, the compilers are there and offer to install them.
    make_program(programs / "c++", "echo 'xcode-select: note: No developer tools were found'; exit 1")
    assert refusal(programs).endswith("a C++ compiler, cmake first: xcode-select --install && brew install cmake")


def test_program_that_does_not_run_is_missing(programs: Path) -> None:
    (programs / "make").write_bytes(b"\x7fELF of another machine")
    make_program(programs / "patch", "echo 'unrecognized option: version'; exit 1")  # BusyBox
    assert "install make or ninja, patch first" in refusal(programs)
    make_program(programs / "ninja")
    assert "install patch first" in refusal(programs)


def test_compiler_without_headers(programs: Path) -> None:
    make_program(programs / "c++", BROKEN)
    make_program(programs / "apt-get")
    assert refusal(programs) == (
        "a C++ compiler is there, but doesn't work (<stdin>:1:10: fatal error: vector: No such file): install it anew: "
        "apt install build-essential"
    )


def test_compiler_of_the_environment_counts(programs: Path, environment: Environment) -> None:
    (programs / "c++").rename(programs / "my c++")
    environment(CXX="my c++")
    requirements.check_programs(str(programs))
    make_program(programs / "ccache", 'test "$1" = gcc-42')
    environment(CC="ccache gcc-42")
    requirements.check_programs(str(programs))
    environment(CC="  ")
    requirements.check_programs(str(programs))
    environment(CC="gcc-41")
    assert "install a C compiler first" in refusal(programs)


def test_old_cmake(programs: Path) -> None:
    make_program(programs / "cmake", "echo cmake version 3.18.4")
    assert refusal(programs) == "the runtime needs CMake 3.21 or newer, not cmake version 3.18.4: pip install cmake"


def test_space(tmp_path: Path) -> None:
    requirements.check_space(tmp_path, 1, "")
    with pytest.raises(D2QError, match=f"takes 1073741824 MiB of disk space for a while, and {tmp_path} has .*: do x"):
        requirements.check_space(tmp_path, 1 << 50, "do x")


def test_own_environment_comes_first(environment: Environment) -> None:
    environment(PATH="/a")
    assert requirements.search_path().split(os.pathsep)[1:] == ["/a"]
