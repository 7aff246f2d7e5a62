"""Fixtures that several test files share: random checkpoints, the converted example, llama.cpp's own converter."""

from __future__ import annotations

import io
import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from d2q_edge import cli
from d2q_edge.conversion import convert
from d2q_edge.export.model_file import export
from d2q_edge.options import Options
from d2q_edge.pipeline.report import Report
from d2q_edge.runtime import installed, llama_model, source
from d2q_edge.utils import files
from tests import stock
from tests.availability import fetch_sdist
from tests.checkpoints import EXAMPLE, write_checkpoint
from tests.command_line import Result
from tests.family_models import EXPERT_MODELS, MODELS, ROPE_MODELS, write_model

# A shell that starts the tests in the background has its children ignore Ctrl-C; those of the tests must not.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are tiny: a second thread gains nothing here, and costs a lot where other programs are running."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # for the programs that tests start
        patch.setattr(llama_model, "usable_cpus", lambda: 1)
        torch.set_num_threads(1)
        yield


@pytest.fixture
def d2q(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """d2q(arguments..., stdin=""): what the console script does in an empty directory, and prints to the terminal."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*arguments: object, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "argv", ["d2q-edge", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        output = capfd.readouterr()
        return Result(exit_.value.code if isinstance(exit_.value.code, int) else 0, output.out, output.err)

    return call


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """environment(NAME="value", OTHER=None): set variables, or remove those that are None."""

    def change(**variables: str | None) -> None:
        for name, value in variables.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    return change


@pytest.fixture
def no_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """No llama-cpp-python is installed."""
    monkeypatch.setattr(installed, "installed_version", lambda: None)


@pytest.fixture
def without_package(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """without_package("name"): Python neither finds nor imports this package any more."""
    return lambda name: monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def disk_events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """("flush", name) and ("rename", new name), in the order in which files and directories reach the disk."""
    events: list[tuple[str, str]] = []
    sync, rename = files.sync, Path.replace

    def note_flush(path: Path) -> None:
        events.append(("flush", path.name))
        sync(path)

    def note_rename(path: Path, target: Path) -> None:
        events.append(("rename", target.name))
        rename(path, target)

    monkeypatch.setattr(files, "sync", note_flush)
    monkeypatch.setattr(Path, "replace", note_rename)
    return events


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """make(family="qwen3", *, name="tiny", dtype, shards, **config): see `write_checkpoint`; returns the directory."""

    def make(family: str = "qwen3", *, name: str = "tiny", **options: Any) -> Path:
        write_checkpoint(tmp_path / name, family, **options)
        return tmp_path / name

    return make


@pytest.fixture(scope="session")
def pristine_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution of llama-cpp-python. Tests must not change it."""
    work = tmp_path_factory.mktemp("pristine")
    source.unpack(fetch_sdist(work / "log"), work / "tree")
    return work / "tree"


@pytest.fixture
def stock_convert(tmp_path: Path, pristine_tree: Path) -> Callable[[Path, str, str], Path]:
    """convert(model, type, pre): the file that llama.cpp's own converter makes of a model.

    `pre` is the pre-tokenizer's name, which it would otherwise look up by hash.
    """

    def convert(model: Path, type_name: str, pre: str) -> Path:
        out = tmp_path / f"stock-{model.name}-{type_name}.gguf"
        stock.convert(pristine_tree, pre, [(model, type_name, out)])
        return out

    return convert


@pytest.fixture(scope="session")
def every_model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of every family and variant. Tests must not change them."""
    directory = tmp_path_factory.mktemp("models")
    return {name: write_model(directory / name / "tiny", name) for name in (*MODELS, *EXPERT_MODELS, *ROPE_MODELS)}


@pytest.fixture(scope="session")
def every_f32_file(every_model: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same as F32 files, which test_family_exports compares with those of llama.cpp's converter."""
    directory = tmp_path_factory.mktemp("files")
    for name, model in every_model.items():
        export(model, directory / f"{name}.gguf", "f32", verify=False)
    return {name: directory / f"{name}.gguf" for name in every_model}


@dataclass(frozen=True)
class ExampleFiles:
    """The example model as GGUF files: the original, and quantized with little calibration."""

    f16: Path
    d2q2: Path
    d2q3: Path
    reports: dict[int, Report]
    """By bits."""


@pytest.fixture(scope="session")
def example_files(tmp_path_factory: pytest.TempPathFactory) -> ExampleFiles:
    """Tests must not change them."""
    directory = tmp_path_factory.mktemp("example")
    files = ExampleFiles(directory / "f16.gguf", directory / "d2q2.gguf", directory / "d2q3.gguf", {})
    export(EXAMPLE, files.f16, "f16")
    for bits, path in ((2, files.d2q2), (3, files.d2q3)):
        report = convert(EXAMPLE, path, Options(bits=bits, calibration_tokens=4096)).report
        assert report is not None
        files.reports[bits] = report
    return files


CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] == 'refuse' %}{{ raise_exception('such words') }}{% endif %}"
    "<|im_start|>{{ message['role'] | upper }}: {{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>MODEL: {% endif %}"
)
"""None that llama-cpp-python knows by heart, so that it must come from the file."""


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's directory with a chat template. Tests must not change it."""
    directory = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(EXAMPLE, directory)
    settings = directory / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text("utf-8")), "chat_template": CHAT_TEMPLATE}))
    return directory


@pytest.fixture(scope="session")
def chat_file(chat_model: Path) -> Path:
    """`chat_model` in d2q2, without calibration."""
    path = chat_model.parent / "chat.gguf"
    convert(chat_model, path, Options(bits=2, calibrate=False))
    return path
