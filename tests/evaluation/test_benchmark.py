"""Benchmarks: arithmetic by hand, the stock file that is made to compare with, and llama-bench itself."""

import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from d2q_edge.conversion import convert
from d2q_edge.errors import D2QError
from d2q_edge.evaluation import benchmark
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.options import BenchmarkOptions, Options
from tests.availability import require_tool
from tests.conftest import ExampleFiles
from tests.evaluation.fake_tools import FakeTools

TIMES = {
    # Seconds in three rounds; the second round is slow as a whole.
    ("a.gguf", None): (1.0, 10.0, 2.0),
    ("b.gguf", None): (4.0, 40.0, 4.0),
    ("s.gguf", "1"): (2.0, 20.0, 2.0),
    ("s.gguf", "0"): (3.0, 15.0, 3.0),
}


def files_without_tensors(directory: Path, *names: str) -> list[Path]:
    paths = [directory / name for name in names]
    for path in paths:
        path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    return paths


class FakeBench(FakeTools):
    """A call takes what TIMES says, generating half of it."""

    def __init__(self) -> None:
        super().__init__(seconds=self._seconds)

    def calls(self) -> list[tuple[str, str | None]]:
        return [(Path(options["-m"]).name, options.get("--repack")) for options in self.benched]

    def _seconds(self, _: int, options: Mapping[str, str]) -> tuple[float, float]:
        assert [options[name] for name in ("-t", "-p", "-n", "-r")] == ["4", "100", "10", "1"]
        seconds = TIMES[self.calls()[-1]][self.calls().count(self.calls()[-1]) - 1]
        return seconds, seconds / 2


def fake_load(path: Path, repack: bool) -> float:
    return {"a.gguf": 1.5, "b.gguf": 2.0}.get(path.name, 0.5) if repack else 0.25


def test_speeds_and_ratios(tmp_path: Path) -> None:
    options = BenchmarkOptions(prompt=100, generation=10, threads=(4,), rounds=3)
    ours, other, stock = files_without_tensors(tmp_path, "a.gguf", "b.gguf", "s.gguf")
    tools = FakeBench()
    result = benchmark.benchmark({"ours": ours, "other": other}, options, stock, tools, fake_load)
    assert tools.calls() == 3 * list(TIMES), "in turn"
    # medians: 2 s and 4 s for 100 tokens; 1 s and 2 s for 10
    assert result.speeds["ours"] == {"prompt-4": 50, "generation-4": 10}
    assert result.speeds["other"] == {"prompt-4": 25, "generation-4": 5}
    assert result.stock == {"prompt-4": 50, "generation-4": 10}, "the faster form: 2 s, the other takes 3 s"
    # round by round, repacked: 2/1, 20/10, 2/2; as it is: 3/1, 15/10, 3/2
    assert result.ratios is not None
    assert result.ratios["ours"] == {"prompt-4": 1.5, "generation-4": 1.5}
    assert result.ratios["other"] == {"prompt-4": 0.5, "generation-4": 0.5}
    assert result.to_json()["speed_ratios"]["ours"]["prompt-4"] == 1.5
    lines = result.describe("Q2_K").splitlines()
    assert len({len(line) for line in lines}) == 1, "columns line up"
    assert [re.split(r" {2,}", line.rstrip()) for line in lines] == [
        ["tokens/s", "prompt-4", "generation-4", "load"],
        ["ours", "50.0", "10.0", "1.50 s"],
        ["other", "25.0", "5.0", "2.00 s"],
        ["Q2_K (stock)", "50.0", "10.0"],
        ["ours / stock", "1.50", "1.50"],
        ["other / stock", "0.50", "0.50"],
    ]


def test_without_a_stock_file(tmp_path: Path) -> None:
    options, tools = BenchmarkOptions(prompt=100, generation=10, threads=(4,), rounds=1), FakeBench()
    (path,) = files_without_tensors(tmp_path, "a.gguf")
    result = benchmark.benchmark({"ours": path}, options, tools=tools, load=fake_load)
    assert tools.calls() == [("a.gguf", None)]
    assert (result.stock, result.ratios) == (None, None)
    assert result.to_json() == {
        "prompt": 100,
        "generation": 10,
        "threads": (4,),
        "rounds": 1,
        "repack": True,
        "tokens_per_second": {"ours": {"prompt-4": 100, "generation-4": 20}},
        "stock_tokens_per_second": None,
        "speed_ratios": None,
        "load_seconds": {"ours": 1.5},
    }
    assert len(result.describe().splitlines()) == 2


def test_weights_as_they_are_in_the_file(tmp_path: Path) -> None:
    options = BenchmarkOptions(prompt=100, generation=10, threads=(4,), rounds=1, repack=False)
    ours, stock = files_without_tensors(tmp_path, "s.gguf", "s2.gguf")
    tools = FakeTools()
    result = benchmark.benchmark({"ours": ours}, options, stock, tools, fake_load)
    assert [(Path(run["-m"]).name, run["--repack"]) for run in tools.benched] == [("s.gguf", "0"), ("s2.gguf", "0")]
    assert result.stock == {"prompt-4": 100, "generation-4": 10}
    assert result.loading == {"ours": 0.25}


@pytest.fixture
def small(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A model of one block in d2q2."""
    model = make_checkpoint(hidden_size=256, intermediate_size=256, num_hidden_layers=1, head_dim=64)
    convert(model, tmp_path / "small.gguf", Options(bits=2, calibrate=False))
    return tmp_path / "small.gguf"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Q2_K", "iq2_xs"])
def test_stock_file_is_the_same_model(small: Path, name: str) -> None:
    require_tool("llama-quantize")
    require_tool("llama-imatrix")
    ours = GGUFFile(small).tensors
    with benchmark.stock_file(small, name) as path:
        stock = GGUFFile(path).tensors
        assert stock.keys() == ours.keys()
        for tensor, own in ours.items():
            kind = name.lower() if own.type_name == "d2q2" else own.type_name
            assert (stock[tensor].type_name, stock[tensor].shape) == (kind, own.shape)
    types = Counter(own.type_name for own in ours.values())
    assert types["d2q2"] > 3
    assert types.keys() >= {"q4_k", "q5_k"}, "embeddings and head, which keep their types"
    assert not path.exists()


def test_unknown_stock_type(small: Path) -> None:
    require_tool("llama-quantize")
    with (
        pytest.raises(D2QError, match=r"can't make a Q9_X file of .*: .*invalid ftype 'Q9_X'$"),
        benchmark.stock_file(small, "Q9_X"),
    ):
        pass


def test_files_without_embeddings_have_no_stock_file(tmp_path: Path) -> None:
    """An importance matrix, for example."""
    (path,) = files_without_tensors(tmp_path, "imatrix.gguf")
    with (
        pytest.raises(D2QError, match=r"imatrix.gguf has no token embeddings, so it isn't a language model; name a"),
        benchmark.stock_file(path, "Q2_K"),
    ):
        pass


def test_paths_with_a_comma(tmp_path: Path) -> None:
    """llama-bench takes one for two: it gets links to the files."""
    paths = [tmp_path / "a,b" / "c.gguf", tmp_path / "a,b" / "c,d.gguf", tmp_path / "e.gguf"]
    (tmp_path / "a,b").mkdir()
    for path in paths:
        path.write_text(path.name)
    read: list[str] = []

    class Reading(FakeTools):
        def run(self, name: str, *arguments: object) -> str:
            assert "," not in str(arguments[1])
            read.append(Path(str(arguments[1])).read_text())
            return super().run(name, *arguments)

    times = benchmark.run_rounds({path: ("-m", path) for path in paths}, BenchmarkOptions(rounds=2), Reading())
    assert read == [path.name for path in paths] * 2
    assert list(times["prompt-1"][0]) == paths


def test_llama_bench(example_files: ExampleFiles, tmp_path: Path) -> None:
    require_tool("llama-bench")
    options = BenchmarkOptions(prompt=4, generation=4, threads=(1,), rounds=1)
    (tmp_path / "a,b").mkdir()
    path = Path(shutil.copy(example_files.d2q2, tmp_path / "a,b" / "c,d.gguf"))
    result = benchmark.benchmark({"ours": path}, options, path)
    assert result.speeds["ours"]["prompt-1"] > 0
    assert result.ratios is not None and result.ratios["ours"]["generation-1"] > 0


def test_files_are_checked_first(example_files: ExampleFiles, tmp_path: Path) -> None:
    file, tools = GGUFFile(example_files.d2q2), FakeTools()
    tensor = next(name for name, info in file.tensors.items() if info.type_name == "d2q2")
    damaged, block = example_files.d2q2.read_bytes(), file.raw(tensor)[:74].tobytes()
    assert damaged.count(block) == 1
    (tmp_path / "damaged.gguf").write_bytes(damaged.replace(block, b"\x00\x7c" + block[2:]))
    with pytest.raises(D2QError, match="NaN or infinite"):
        benchmark.benchmark({"ours": tmp_path / "damaged.gguf"}, BenchmarkOptions(), tools=tools)
    with pytest.raises(D2QError, match="there is no file"):
        benchmark.benchmark({"none": tmp_path / "none.gguf"}, BenchmarkOptions(), tools=tools)
    assert tools.benched == []
