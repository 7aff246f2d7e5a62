"""Building llama.cpp for a phone: CMake's options, and the files that are collected. test_arm.py runs such a build."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from d2q_edge.errors import D2QError
from d2q_edge.runtime import source
from tools import phone

TOOLCHAIN = """
file(WRITE "${CMAKE_CURRENT_LIST_DIR}/seen"
    "${ANDROID_ABI} ${ANDROID_PLATFORM} ${ANDROID_STL} ${ANDROID_SUPPORT_FLEXIBLE_PAGE_SIZES}")
message(FATAL_ERROR "this is as far as it goes without an NDK")
"""
RUNTIME = Path("toolchains/llvm/prebuilt/linux-x86_64/sysroot/usr/lib/aarch64-linux-android/libc++_shared.so")


@pytest.fixture
def ndk(tmp_path: Path) -> Path:
    """A folder with the two files of an NDK that we name; the toolchain file records its options and stops."""
    root = tmp_path / "ndk"
    (root / "build/cmake").mkdir(parents=True)
    (root / "build/cmake/android.toolchain.cmake").write_text(TOOLCHAIN)
    (root / RUNTIME).parent.mkdir(parents=True)
    (root / RUNTIME).write_text("C++")
    return root


def _project(tree: Path) -> None:
    """Write a stand-in for llama.cpp in a patched tree."""
    root = tree / "vendor/llama.cpp"
    root.mkdir(parents=True)
    (root / "CMakeLists.txt").write_text("cmake_minimum_required(VERSION 3.14)\nproject(phone C)\n")


def test_the_ndk_is_told_what_to_build_for(ndk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _project(tmp_path / "tree")
    # a relative path, which CMake would look for in its own build folder
    options = phone.android_options(Path("ndk"), 30)
    with pytest.raises(D2QError, match=r"configuring llama\.cpp for the phone failed"):
        phone.configure(tmp_path / "tree", tmp_path / "build", options, tmp_path / "log")
    assert (ndk / "build/cmake/seen").read_text() == "arm64-v8a android-30 c++_shared ON"
    # one CPU backend for each kind of phone is a set of libraries that are loaded by name
    assert {"-DGGML_CPU_ALL_VARIANTS=ON", "-DGGML_BACKEND_DL=ON", "-DBUILD_SHARED_LIBS=ON"} <= set(options)


def test_linux_programs_are_static(tmp_path: Path) -> None:
    options = phone.linux_options("armv8.6-a+i8mm")
    assert "-DGGML_CPU_ARM_ARCH=armv8.6-a+i8mm" in options
    assert "-DBUILD_SHARED_LIBS=OFF" in options
    assert any(option.startswith("-DCMAKE_EXE_LINKER_FLAGS=-static") for option in options)


def test_wrong_ndk(ndk: Path, tmp_path: Path) -> None:
    with pytest.raises(D2QError, match=r"isn't an Android NDK: it has no build/cmake/android.toolchain.cmake"):
        phone.android_options(tmp_path, 28)
    assert phone.cpp_runtime(ndk) == ndk / RUNTIME
    (ndk / RUNTIME).unlink()
    with pytest.raises(D2QError, match="has no libc"):
        phone.cpp_runtime(ndk)
    result = CliRunner().invoke(phone.main, ["android", "--ndk", str(tmp_path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "isn't an Android NDK" in result.output
    assert not (tmp_path / "out").exists(), "found before any work"


def test_collect_follows_links(tmp_path: Path) -> None:
    """adb push copies no links, and a library is asked for by its versioned name."""
    build = tmp_path / "build/bin"
    build.mkdir(parents=True)
    for name in ("llama-bench", "llama-other", "libggml-cpu.so", "libllama.so.0.5.0"):
        (build / name).write_text(name)
    (build / "libllama.so.0").symlink_to("libllama.so.0.5.0")
    files = phone.collect(tmp_path / "build", ["llama-bench"], tmp_path / "out")
    assert [path.name for path in files] == ["libggml-cpu.so", "libllama.so.0", "libllama.so.0.5.0", "llama-bench"]
    assert not (tmp_path / "out/libllama.so.0").is_symlink()
    assert (tmp_path / "out/libllama.so.0").read_text() == "libllama.so.0.5.0"


def test_android_command(ndk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line to the folder for the phone, with an NDK that compiles nothing."""
    asked: list[tuple[str, ...]] = []

    def compile_programs(build: Path, programs: tuple[str, ...], log: Path) -> None:
        asked.append(programs)
        (build / "bin").mkdir(parents=True)
        (build / "bin/libggml-cpu-android_armv8.2_1.so").write_text("kernels")
        for name in programs:
            (build / "bin" / name).write_text("program")

    monkeypatch.setattr(source, "prepare", lambda tree, log: _project(tree))
    monkeypatch.setattr(phone, "configure", lambda tree, build, options, log: build.mkdir())
    monkeypatch.setattr(phone, "compile_programs", compile_programs)
    out = tmp_path / "phone"
    result = CliRunner().invoke(phone.main, ["android", "--ndk", str(ndk), "--out", str(out)])
    assert result.exit_code == 0, result.output
    names = sorted(["libc++_shared.so", "libggml-cpu-android_armv8.2_1.so", *phone.PROGRAMS])
    assert asked == [phone.PROGRAMS]
    assert sorted(path.name for path in out.iterdir()) == names
    assert [Path(line).name for line in result.stdout.splitlines()] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ndk", "phone"], "nothing is left of the work"
