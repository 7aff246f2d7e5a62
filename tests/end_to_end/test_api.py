"""The package as a library: what can be imported from it, when that costs time, and the example script."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import d2q_edge
from d2q_edge import conversion, errors
from d2q_edge import options as options_module
from d2q_edge.cli import cli
from d2q_edge.evaluation import perplexity
from d2q_edge.formats.gguf_reader import GGUFFile
from tests.availability import require_runtime
from tests.checkpoints import EXAMPLE
from tests.conftest import ExampleFiles

SCRIPT = EXAMPLE.parent / "convert_and_evaluate.py"


def test_names() -> None:
    assert d2q_edge.convert is conversion.convert
    assert d2q_edge.evaluate is perplexity.evaluate
    assert d2q_edge.Options is options_module.Options
    assert d2q_edge.D2QError is errors.D2QError
    for name in d2q_edge.__all__:
        documented = getattr(d2q_edge, name)
        assert documented.__doc__
        assert name in dir(d2q_edge)
    with pytest.raises(AttributeError, match="module 'd2q_edge' has no attribute 'reconvert'"):
        d2q_edge.reconvert  # noqa: B018


@pytest.mark.slow
def test_importing_is_quick_and_order_does_not_matter() -> None:
    """A submodule becomes an attribute of the package when it is loaded: none may have the name of a function."""
    script = (
        "import sys, d2q_edge\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'llama_cpp'} & sys.modules.keys()))\n"
        "import d2q_edge.conversion, d2q_edge.evaluation.perplexity, d2q_edge.cli\n"
        "from d2q_edge import convert, evaluate\n"
        "print(callable(convert), callable(evaluate))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "[]\nTrue True\n"), result.stderr


@pytest.mark.slow
def test_strings_and_defaults(tmp_path: Path, example_files: ExampleFiles) -> None:
    planned = d2q_edge.convert(str(EXAMPLE), str(tmp_path / "out.gguf"), dry_run=True)
    assert planned.types.linear_bits_per_weight == 2.3125
    assert list(tmp_path.iterdir()) == []
    require_runtime()
    strings = d2q_edge.evaluate(str(example_files.d2q2), reference=str(example_files.f16), chunks=1, context=32)
    assert strings == d2q_edge.evaluate(example_files.d2q2, example_files.f16, chunks=1, context=32)


@pytest.mark.slow
def test_example_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require_runtime()
    specification = importlib.util.spec_from_file_location("convert_and_evaluate", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    example.main(EXAMPLE, tmp_path / "out", calibration_tokens=1024, chunks=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path}/out/d2q2.gguf: ")
    share, perplexity, divergence, agreement = lines[-4:]
    assert share.startswith("21% of the original's 8,5")
    assert perplexity.startswith("perplexity ")
    assert 0.3 < float(divergence.split()[2]) < 2
    assert agreement.endswith("of all places")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["d2q2.gguf", "original.gguf"]


def test_command_line_has_the_same_defaults() -> None:
    """What `convert` gets when nothing but the model is named is what `Options()` has."""
    given = cli.commands["convert"].make_context("convert", ["model"]).params
    defaults = vars(d2q_edge.Options())
    only_in_python = {"calibrate", "alpha", "descent_rounds"}
    assert {name: given.get(name, "missing") for name in defaults.keys() - only_in_python} == {
        name: value for name, value in defaults.items() if name not in only_in_python
    }
    assert not only_in_python & given.keys()
    assert given["no_calibration"] is not defaults["calibrate"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context must be a whole number from 8, not 0"),
        ({"context": -1}, "context must be a whole number from 8, not -1"),
        ({"context": 64.0}, "context must be a whole number from 8, not 64.0"),
        ({"seed": -1}, "seed must be a whole number from 0, not -1"),
        ({"seed": 2**63}, "seed must be a whole number from 0, not 9223372036854775808"),
        ({"calibration_tokens": 0}, "calibration_tokens must be a whole number from 1, not 0"),
        ({"bits": "2"}, "bits must be a number, not '2'"),
        ({"bits": True}, "bits must be a number, not True"),
        ({"alpha": "0.5"}, "alpha must be a number, not '0.5'"),
        ({"descent_rounds": -1}, "descent_rounds must be a whole number from 0, not -1"),
        ({"rotation": "maybe"}, "rotation must be one of auto, on, off, not 'maybe'"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.D2QError, match=f"^{message}$"):
        d2q_edge.convert(EXAMPLE, tmp_path / "x.gguf", d2q_edge.Options(**options))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_result(tmp_path: Path) -> None:
    """Bits per weight are the file's own, and only what can chat is said to."""
    output = tmp_path / "a file.gguf"
    result = d2q_edge.convert(EXAMPLE, output, d2q_edge.Options(calibrate=False), verify=False)
    assert result.bits_per_weight == GGUFFile(output).bits_per_weight
    assert result.describe(output).splitlines()[-1] == f"run it: d2q-edge run '{output}' -p PROMPT"
    model = shutil.copytree(EXAMPLE, tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    chats = d2q_edge.convert(model, tmp_path / "chats.gguf", d2q_edge.Options(calibrate=False), verify=False)
    last = chats.describe(Path("chats.gguf")).splitlines()[-1]
    assert last == "run it: d2q-edge chat chats.gguf, or d2q-edge run chats.gguf -p PROMPT"


def test_whole_bits_are_whole() -> None:
    """They are in the file's recipe, and 2.0 would make it another file."""
    bits = [d2q_edge.Options(bits=bits).bits for bits in (2, 2.0, 3.0, 2.5)]
    assert [str(each) for each in bits] == ["2", "2", "3", "2.5"]
