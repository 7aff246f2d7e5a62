"""The roofline: its arithmetic by hand, and its program."""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.options import BenchmarkOptions
from tests.conftest import ExampleFiles
from tests.evaluation.fake_tools import FakeTools
from tools import roofline


def test_share_is_what_generation_reads_of_what_can_be_read() -> None:
    seen = roofline.Roofline({1: 20e9, 2: 30e9}, {"a.gguf": {1: 15e9, 2: 27e9}})
    assert seen.shares("a.gguf") == {1: 0.75, 2: 0.9}
    assert seen.to_json()["share"] == {"a.gguf": {1: 0.75, 2: 0.9}}
    lines = seen.describe().splitlines()
    assert [line.split() for line in lines] == [
        ["GB/s", "1", "thread", "2", "threads"],
        ["can", "be", "read", "20.0", "30.0"],
        ["a.gguf", "15.0", "(", "75%)", "27.0", "(", "90%)"],
    ]
    assert len({len(line) for line in lines}) == 1, "columns line up"


def test_embeddings_count_only_as_the_head(example_files: ExampleFiles) -> None:
    tensors = GGUFFile(example_files.d2q2).tensors
    everything = sum(each.nbytes for each in tensors.values())
    counted = everything if "output.weight" not in tensors else everything - tensors["token_embd.weight"].nbytes
    assert roofline.bytes_per_token(example_files.d2q2) == counted


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_measure(example_files: ExampleFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "BYTES", 1 << 20)

    def seconds(_: int, options: Mapping[str, str]) -> tuple[float, float]:
        assert (options["-p"], options["-n"], options["--repack"]) == ("0", "64", "1")
        return 0.0, 2.0 / int(options["-t"])

    tools = FakeTools(seconds=seconds)
    seen = roofline.measure([example_files.d2q2], BenchmarkOptions(prompt=0, rounds=2), tools)
    assert set(seen.bandwidth) == {1, 2}
    assert min(seen.bandwidth.values()) > 1e6
    size = roofline.bytes_per_token(example_files.d2q2)
    assert seen.generation[example_files.d2q2.name] == {1: size * 32, 2: size * 64}
    assert len(tools.benched) == 2


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_program_prints_a_number_for_each_round(tmp_path: Path) -> None:
    program, source = tmp_path / "roofline", Path(roofline.__file__).with_suffix(".c")
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O2"]
    subprocess.run(["cc", *flags, str(source), "-lpthread", "-o", str(program)], check=True)
    printed = subprocess.run([str(program), "3", "4", "1000000"], check=True, capture_output=True, text=True).stdout
    assert len([float(word) for word in printed.split()]) == 4
    assert subprocess.run([str(program)], capture_output=True, check=False).returncode == 2
