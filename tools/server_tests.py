"""Run llama.cpp's own tests of its server against our build, with a local file in place of every text model.

    python -m tools.server_tests model.gguf                          # all of them
    python -m tools.server_tests model.gguf unit/test_basic.py       # some

The tests come from the source distribution (tools/server/tests). This module is also the pytest plugin that prepares
them: it makes the presets of text models use the local file, and drops what can't pass with it, for one of the reasons
of `server_tests.json`. They are counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import pytest

from d2q_edge.errors import D2QError, sentence
from d2q_edge.runtime import source
from d2q_edge.runtime.tools import SERVER, Tools, environment, server_directory

ROOT = Path(__file__).parents[1]
TESTS = Path("vendor/llama.cpp/tools/server/tests")
DROPPED = Path(__file__).with_name("server_tests.json")
"""By reason, how the ids of tests begin."""
SLOW = "is marked as slow: downloads models of gigabytes"
TEXT_PRESETS = "tinyllama2", "tinyllama_infill", "stories15m_moe"
MODEL = "D2Q_SERVER_TESTS_MODEL"


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Stand in for the package that would download models."""
    sys.modules["wget"] = types.ModuleType("wget")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Drop tests, and have the presets use the local file."""
    import utils  # type: ignore[import-not-found]

    presets, model = utils.ServerPreset, os.environ[MODEL]
    presets.load_all = staticmethod(lambda: None)
    for name in TEXT_PRESETS:
        setattr(presets, name, staticmethod(_local(getattr(presets, name), model)))
    reasons: dict[str, list[str]] = json.loads(DROPPED.read_text("utf-8"))
    kept, counts = [], Counter[str]()
    for item in items:
        matches = [reason for reason, tests in reasons.items() if item.nodeid.startswith(tuple(tests))]
        if item.get_closest_marker("slow"):
            matches.append(SLOW)
        if matches:
            counts[matches[0]] += 1
        else:
            kept.append(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    config.stash[_COUNTS] = counts


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    """Print how many tests were dropped, and why."""
    for reason, count in config.stash[_COUNTS].items():
        terminalreporter.write_line(f"dropped {count}: {reason}")


_COUNTS = pytest.StashKey[Counter[str]]()


def _local(preset: Callable[[], Any], model: str) -> Callable[[], Any]:
    def make() -> Any:
        server = preset()
        server.offline, server.model_hf_repo, server.model_hf_file, server.model_file = False, None, None, model
        return server

    return make


def run(tree: Path, model: Path, arguments: Sequence[str], port: int = 8080) -> subprocess.CompletedProcess[str]:
    """Run the tests of an unpacked source distribution; `arguments` are pytest's.

    Raises:
        D2QError: llama-server isn't built.
    """
    server = Tools(server_directory()).find(SERVER)
    variables = {
        "LLAMA_SERVER_BIN_PATH": str(server),
        MODEL: str(model.resolve()),
        "PORT": str(port),
        "LLAMA_ARG_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-p", "tools.server_tests", "-q", "--tb=short", *arguments]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables |= {**environment(), **variables, "PYTHONPATH": paths}
    return subprocess.run(command, cwd=tree / TESTS, env=variables, capture_output=True, text=True, check=False)


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def main(file: Path, arguments: tuple[str, ...]) -> None:
    """Run llama.cpp's server tests with a GGUF FILE that has a chat template; ARGUMENTS are pytest's."""
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory) / "tree"
        try:
            source.unpack(source.fetch_sdist(Path(directory) / "log"), tree)
            done = run(tree, file, arguments)
        except D2QError as error:
            raise click.ClickException(sentence(error)) from error
    click.echo(done.stdout + done.stderr)
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
