"""The benchmark of whole models: its arithmetic by hand, its files, and one run on a tiny model."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from d2q_edge.errors import D2QError
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.options import BenchmarkOptions
from tests.availability import require_tool
from tests.evaluation.fake_tools import FakeTools
from tools import bench_model
from tools.bench_model import Shape

TINY = Shape(layers=1, width=256, feed_forward=512)


def _round(scale: float = 1.0, **changes: float) -> dict[bench_model.Variant, float]:
    ours = changes.get("d2q2", 1.0)
    times: dict[bench_model.Variant, float] = {("d2q2", True): ours, ("d2q2", False): 2 * ours}
    times |= {("d2q3", True): 3.0, ("d2q3", False): 1.0}
    for name in bench_model.STOCK:
        times[name, True] = changes.get(name, 2.0)
        if name in bench_model.REPACKED:
            times[name, False] = 4.0
    return {variant: seconds * scale for variant, seconds in times.items()}


def test_ratio_is_the_median_of_rounds_and_counts_the_better_form() -> None:
    # the second round is slow as a whole, which changes no ratio; in the third d2q2 alone is
    rounds = [_round(), _round(scale=10), _round(d2q2=1.8), _round(q2_K=0.5), _round()]
    ratios = bench_model.ratios(rounds)
    assert len(ratios) == 10
    assert ratios["d2q2/q2_K"] == 0.5  # of 0.5, 0.5, 0.9, 2, 0.5; the other form's are 0.25, 0.25, 0.45, 0.25, 0.25
    assert ratios["d2q3/iq2_xs"] == 1.5
    slow_repacked = [_round(q4_0=8.0)]
    assert bench_model.ratios(slow_repacked)["d2q2/q4_0"] == 0.25


def test_variants_run_in_turn() -> None:
    # The time tells the call, the threads and the phase.
    tools = FakeTools(
        seconds=lambda call, options: (call * 100 + int(options["-t"]) * 10 + 1, call * 100 + int(options["-t"]) * 10)
    )
    times = bench_model.measure(
        {name: Path(name) for name in ("d2q2", "q2_K", "q3_K")}, BenchmarkOptions(rounds=2), tools
    )
    assert {(each["-t"], each["-p"], each["-n"]) for each in tools.benched} == {("1,2", "512", "64")}
    calls = [(each["-m"], each["--repack"]) for each in tools.benched]
    assert calls == 2 * [("d2q2", "1"), ("d2q2", "0"), ("q2_K", "1"), ("q2_K", "0"), ("q3_K", "1")]
    assert set(times) == {"prompt-1", "prompt-2", "generation-1", "generation-2"}
    variants = [("d2q2", True), ("d2q2", False), ("q2_K", True), ("q2_K", False), ("q3_K", True)]
    assert times["prompt-2"] == [
        dict(zip(variants, (121, 221, 321, 421, 521), strict=True)),
        dict(zip(variants, (621, 721, 821, 921, 1021), strict=True)),
    ]
    assert times["generation-1"][1]["q2_K", False] == 910


def test_table() -> None:
    times = {"prompt-2": [_round()], "generation-2": [_round(scale=2)]}
    lines = bench_model.table(times, BenchmarkOptions(prompt=512, generation=64)).splitlines()
    assert len({len(line) for line in lines if line}) == 1, "columns line up"
    assert lines[0].split() == ["tokens/s", "generation-2", "prompt-2"]
    assert lines[1].split() == ["d2q2,", "repacked", "32.0", "512.0"]
    assert lines[2].split() == ["d2q2,", "as", "it", "is", "16.0", "256.0"]
    assert "q2_K, repacked              16.0         256.0" in lines
    assert "q2_K, as it is               8.0         128.0" in lines
    assert lines[-10].split() == ["d2q2/q2_K", "0.500", "0.500"]


def test_markdown_has_the_faster_form_of_each_type() -> None:
    rounds = [_round(q4_K=8.0), _round(q4_K=8.0, d2q2=0.5), _round(q4_K=8.0, d2q2=3.0)]
    lines = bench_model.markdown(
        {"prompt-1": [_round()], "generation-2": rounds}, BenchmarkOptions(prompt=512, generation=64)
    ).splitlines()
    assert lines[:2] == ["| tokens/s | generation, 2 threads | prompt, 1 thread |", "|---|---|---|"]
    assert lines[2] == "| d2q2 | 64.0 | 512.0 |"
    assert lines[3] == "| d2q3 | 21.3 | 170.7 |", "repacked, though the other form takes a third"
    assert "| Q2_K | 32.0 | 256.0 |" in lines
    assert "| Q4_K | 16.0 | 256.0 |" in lines, "as it is 4 s, repacked 8 s and 2 s"
    assert len(lines) == 2 + len(bench_model.STOCK) + len(bench_model.OURS)


def test_what_was_measured_has_both_forms() -> None:
    options = BenchmarkOptions(prompt=512, generation=64)
    seen = json.loads(json.dumps(bench_model.measured({"prompt-1": [_round()]}, options)))
    assert seen["tokens_per_second"]["d2q3, as it is"] == {"prompt-1": 512}
    assert seen["tokens_per_second"]["d2q3, repacked"]["prompt-1"] == pytest.approx(512 / 3)
    assert seen["ratios_of_times"]["prompt-1"]["d2q3/q3_K"] == 1.5, "the default form, though the other is faster"
    assert seen["prompt"] == 512


def test_generated_widths_fit_blocks(tmp_path: Path) -> None:
    with pytest.raises(D2QError, match="multiples of 256"):
        bench_model.generate_checkpoint(tmp_path / "model", Shape(1, 256, 500))


@pytest.mark.slow
def test_tiny_model(tmp_path: Path) -> None:
    for tool in ("llama-quantize", "llama-imatrix", "llama-bench"):
        require_tool(tool)
    shape = ["--layers", "1", "--width", "256", "--feed-forward", "512"]
    quick = ["--prompt", "8", "--generation", "2", "--threads", "1", "--rounds", "2", "--keep", str(tmp_path)]
    written = tmp_path / "bench.json"
    result = CliRunner().invoke(bench_model.main, [*shape, *quick, "--json", "--write", str(written)])
    assert result.exit_code == 0, result.output
    assert "d2q3, as it is" in json.loads(written.read_text())["tokens_per_second"]
    ratios = json.loads(result.stdout)
    assert set(ratios) == {"prompt-1", "generation-1"}
    for phase in ratios.values():
        assert set(phase) == {f"{ours}/{stock}" for ours in bench_model.OURS for stock in bench_model.STOCK}
        assert all(0 < ratio < 1000 for ratio in phase.values())
    for name in (*bench_model.OURS, *bench_model.STOCK):
        types = {t.name: t.type_name for t in GGUFFile(tmp_path / f"{name}.gguf").tensors.values()}
        layers = {kind for tensor, kind in types.items() if tensor.startswith("blk.") and "norm" not in tensor}
        assert layers == {name.lower()}
        assert types["token_embd.weight"] == "q8_0"

    kept = (tmp_path / "f16.gguf").stat().st_mtime_ns
    with bench_model.prepared(None, TINY, tmp_path) as files:
        assert all(path.is_file() for path in files.values())
    assert (tmp_path / "f16.gguf").stat().st_mtime_ns == kept
