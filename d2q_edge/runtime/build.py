"""Build the patched llama-cpp-python, llama.cpp's tools and its server into the cache, and install the wheel.

A wheel or a folder of programs appears in the cache complete or not at all: it is built beside its place and renamed.
"""

import math
import os
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from d2q_edge.errors import D2QError
from d2q_edge.runtime import source
from d2q_edge.runtime.installed import RuntimeInfo, info, installed_version, library_directory
from d2q_edge.runtime.process import run_logged, say
from d2q_edge.runtime.requirements import check_programs, check_space, search_path
from d2q_edge.runtime.tools import SERVER, TOOLS, Tools, installed_key
from d2q_edge.utils.files import scratch_directory
from d2q_edge.utils.machine import cache_key, usable_cpus

WHEEL_OPTIONS = ("-DLLAVA_BUILD=OFF", "-DLLAMA_BUILD_COMMON=OFF", "-DGGML_NATIVE=ON")
"""The package imports mtmd (images) only on request, and never uses llama.cpp's common library."""
TOOL_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DLLAVA_BUILD=OFF", "-DGGML_NATIVE=ON", "-DLLAMA_BUILD_COMMON=ON",
    "-DLLAMA_BUILD_TOOLS=ON", "-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_OPENSSL=OFF", "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",
)  # fmt: skip
SERVER_OPTIONS = (*TOOL_OPTIONS, "-DLLAMA_BUILD_SERVER=ON", "-DLLAMA_USE_PREBUILT_UI=OFF", "-DMTMD_VIDEO=OFF")
"""The last one of several settings of an option counts."""
SERVER_CPU_MINUTES = 8
"""What building llama-server took alone; the tools, built in the same run, are most of it."""
PAGE = Path("vendor/llama.cpp/tools/ui/dist/index.html")
"""Where CMake leaves the web page in the build folder, if npm could build it."""
NO_PAGE = """<!doctype html><meta charset="utf-8"><title>d2q-edge serve</title>
<p>The server is running, and its API is at <code>/v1</code>. The web page has not been built: install npm, and run
<code>d2q-edge runtime install --server</code>.
"""
REMEDY = "free some, or set XDG_CACHE_HOME to a directory of another disk"
SOURCE_SPACE = 200
SPACE = {"wheel": 100, "tools": 100, "server": 100, "page": 800}
"""MiB of disk space that the patched tree takes, and building each in it; the page's are npm's packages."""
Run = Callable[..., None]
PrepareTree = Callable[[Path, Path], None]


def prepare(tree: Path, log: Path) -> None:
    """Check the programs, and make the patched tree; errors as in check_programs and source.prepare."""
    check_programs()
    source.prepare(tree, log)


def prepare_server(tree: Path, log: Path) -> None:
    """Apply the patches of llama-server to the patched tree; errors as in source.apply."""
    source.apply_server(source.patch_directory(), tree, log)


def install(
    tools: bool = False,
    server: bool = False,
    *,
    page: bool = True,
    sdist: Path | None = None,
    run: Run = run_logged,
    prepare_tree: PrepareTree = prepare,
    patch_server: PrepareTree = prepare_server,
) -> RuntimeInfo:
    """Install the patched llama-cpp-python into this environment, build what the cache lacks, and return `info`.

    Args:
        tools: also build llama.cpp's command-line tools (TOOLS) from the same tree.
        server: also build llama-server.
        page: with its web page, where npm is there; npm downloads what that needs.
        sdist: llama-cpp-python's source distribution; None takes the cache's, or downloads it.
        run: runs a command as run_logged does.
        prepare_tree: makes the patched tree as `prepare` does.
        patch_server: patches it for llama-server as `prepare_server` does.

    Raises:
        D2QError: a program or disk space is missing, there is no network, `sdist` is another file, CMAKE_ARGS has an
            open quote, or a build step failed; the cache stays consistent.
    """
    started = time.monotonic()
    version, user_options = source.runtime_version(), _user_options()
    key = cache_key(source.patch_hash())
    place = source.cache_directory() / key
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise D2QError(f"the cache folder {place} can't be created ({error.strerror}); set XDG_CACHE_HOME") from error
    if sdist is not None:
        source.add_sdist(sdist)
    log = place / "build.log"
    wheels = list((place / "wheel").glob("*.whl"))
    missing_tools = tools and not all(Tools(place / "tools").path(name) for name in TOOLS)
    page = page and shutil.which("npm") is not None
    server_place = place / f"server-{source.server_hash()}"
    pageless = page and (server_place / "page").exists()
    missing_server = server and (pageless or not Tools(server_place).path(SERVER))
    missing = {
        "wheel": not wheels, "tools": missing_tools, "server": missing_server, "page": missing_server and page
    }  # fmt: skip
    if any(missing.values()):
        log.unlink(missing_ok=True)
        check_space(place, (SOURCE_SPACE + sum(SPACE[part] for part in missing if missing[part])) << 20, REMEDY)
        try:
            with scratch_directory(place, "work-", REMEDY) as work:
                prepare_tree(work / "source", log)
                # All share a build folder, so that common objects are compiled once.
                if not wheels:
                    _build_wheel(work, place / "wheel", log, run)
                if missing_tools:
                    say(f"Building {', '.join(TOOLS)} (log: {log})")
                    _build_programs(work, TOOLS, log, run, [*TOOL_OPTIONS, *user_options])
                    _publish(work / "programs", place / "tools")
                if missing_server:
                    patch_server(work / "source", log)
                    _build_server(work, log, run, page, user_options)
                    _publish(work / "programs", server_place)
        except OSError as error:
            raise D2QError(f"can't build the runtime in {place} ({error.strerror or error}): {REMEDY}") from error
        wheels = list((place / "wheel").glob("*.whl"))
    if _up_to_date(key):
        say(f"llama-cpp-python {version} is already installed")
    else:
        pip, failure = [*source.PIP, "install"], f"installing {wheels[0].name} failed"
        run([*pip, "--force-reinstall", "--no-deps", wheels[0]], log, failure)
        run([*pip, wheels[0]], log, failure, env=source.pip_variables())  # its dependencies, where they are missing
    say(f"The runtime is ready: llama-cpp-python {version} ({time.monotonic() - started:.0f} s)")
    return info()


def _user_options() -> list[str]:
    """Split CMAKE_ARGS as scikit-build-core does for the wheel: like a shell."""
    try:
        return shlex.split(os.environ.get("CMAKE_ARGS", ""))
    except ValueError as error:
        raise D2QError(f"CMAKE_ARGS can't be split into words ({error}): {os.environ['CMAKE_ARGS']}") from error


def _environment(options: Sequence[str]) -> dict[str, str]:
    """Variables for pip, scikit-build-core and CMake; the user's CMAKE_ARGS come last and win."""
    variables = source.pip_variables() | {
        "PATH": search_path(),
        "CMAKE_BUILD_PARALLEL_LEVEL": str(usable_cpus()),
        "CMAKE_ARGS": " ".join([*options, os.environ.get("CMAKE_ARGS", "")]).strip(),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    if shutil.which("ninja", path=search_path()) and "CMAKE_GENERATOR" not in os.environ:
        variables["CMAKE_GENERATOR"] = "Ninja"
    return variables


def _build_wheel(work: Path, target: Path, log: Path, run: Run) -> None:
    """Build the wheel of work/source, and move it into a folder."""
    say(f"Building the runtime on {usable_cpus()} cores, which takes a few minutes (log: {log})")
    pip = [*source.PIP, "wheel", "--verbose", "--no-deps", *source.isolation()]
    command = [*pip, "--wheel-dir", work / "wheel", work / "source"]
    env = _environment(WHEEL_OPTIONS) | {"SKBUILD_BUILD_DIR": str(work / "build")}
    run(command, log, "building the runtime failed", description="Building the runtime", env=env)
    wheels = list((work / "wheel").glob("*.whl"))
    if len(wheels) != 1:
        raise D2QError(f"building the runtime made {len(wheels)} wheels instead of one; see {log}")
    target.mkdir(parents=True, exist_ok=True)
    wheels[0].replace(target / wheels[0].name)


def _build_server(work: Path, log: Path, run: Run, page: bool, user_options: Sequence[str]) -> None:
    """Build llama-server of work/source into work/programs, with a page that says so where there is no web page."""
    minutes = math.ceil(SERVER_CPU_MINUTES / usable_cpus()) + 3 * page
    with_page = " with its web page" if page else ""
    say(f"Building {SERVER}{with_page} on {usable_cpus()} cores, which takes about {minutes} minutes (log: {log})")
    options = [*SERVER_OPTIONS, f"-DLLAMA_BUILD_UI={'ON' if page else 'OFF'}", *user_options]
    _build_programs(work, (SERVER,), log, run, options)
    if not (work / "build" / PAGE).is_file():
        say(f"{SERVER} comes without its web page: {'npm failed, see the log' if page else 'npm has to build that'}")
        (work / "programs" / "page").mkdir()
        (work / "programs" / "page" / "index.html").write_text(NO_PAGE, "utf-8")


def _build_programs(work: Path, names: Sequence[str], log: Path, run: Run, options: Sequence[str]) -> None:
    """Build programs of work/source, and copy them with their libraries to work/programs."""
    build, env, what = work / "build", _environment(()), names[0] if len(names) == 1 else "llama.cpp's tools"
    # A folder configured for the wheel keeps its settings; these are added.
    run(["cmake", "-S", work / "source", "-B", build, *options], log, f"configuring {what} failed", env=env)
    command = ["cmake", "--build", build, "--parallel", str(usable_cpus()), "--target", *names]
    run(command, log, f"building {what} failed", description=f"Building {what}", env=env)
    out = work / "programs"
    out.mkdir()
    for path in (build / "bin").iterdir():
        if path.stem in names or ".so" in path.name or path.suffix in (".dylib", ".dll"):
            shutil.copy2(path, out / path.name, follow_symlinks=False)


def _publish(programs: Path, target: Path) -> None:
    """Move a complete folder to its place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        shutil.rmtree(target)
    programs.rename(target)


def _up_to_date(key: str) -> bool:
    """Return whether the installed package is the wheel of this key; if unknown, the patch and no CMAKE_ARGS decide."""
    if installed_version() != source.runtime_version() or library_directory() is None:
        return False
    known = installed_key()
    return known == key if known else not os.environ.get("CMAKE_ARGS")
