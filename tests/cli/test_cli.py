"""The command line's contract: exit codes, errors of one sentence, JSON keys, help."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from d2q_edge import __version__, runtime
from d2q_edge.errors import D2QError
from d2q_edge.export.conversion_report import fingerprint
from d2q_edge.export.model_file import export
from d2q_edge.runtime.llama_model import LlamaModel
from tests.availability import require_runtime
from tests.checkpoints import EXAMPLE
from tests.command_line import Call, refused
from tests.conftest import ExampleFiles

Make = Callable[..., Path]
QUICK = ("--calibration-tokens", "512", "--context", "32")
COMMANDS = (
    "convert", "inspect", "metadata", "adapter", "eval", "compare", "bench", "run", "chat", "serve", "runtime",
    "runtime install", "runtime info",
)  # fmt: skip


class TestConvert:
    @pytest.mark.slow
    def test_quantizes(self, d2q: Call, make_checkpoint: Make) -> None:
        model = make_checkpoint(hidden_size=64, intermediate_size=128)
        off = ("--rotation", "off", "--no-dsq", "--no-dac", "--bits", "2")
        planned = d2q("convert", model, "-o", "out.gguf", *off, "--dry-run")
        assert (planned.code, planned.err) == (0, "")
        assert list(Path.cwd().iterdir()) == []
        size = int(planned.out.split()[1].replace(",", ""))
        done = d2q("convert", model, "-o", "out.gguf", *QUICK, *off, "--report", "report.json")
        assert done.code == 0
        assert done.err.startswith("needs at most ")
        *same, memory, time = planned.out.splitlines()
        assert done.out.splitlines()[:2] == same
        assert memory.startswith("needs at most ")
        assert time.startswith("takes about ")
        assert "types: 14 x d2q2_64, 1 x q5_0, 1 x q5_1" in done.out
        assert Path("out.gguf").stat().st_size == size
        assert {path.name for path in Path.cwd().iterdir()} == {"out.gguf", "report.json"}
        report = json.loads(Path("report.json").read_text())
        assert report.keys() == {
            "bytes", "bits_per_weight", "linear_bits_per_weight", "types", "layer_errors", "column_scales",
            "norm_shifts", "validation", "seconds", "refinement", "fingerprint", "format",
        }  # fmt: skip
        assert report["fingerprint"] == fingerprint(Path("out.gguf"))
        assert report["bytes"] == size
        assert report["linear_bits_per_weight"] == 2.5
        assert len(report["layer_errors"]) == 14

    def test_report_of_a_plan(self, d2q: Call, make_checkpoint: Make) -> None:
        assert d2q("convert", make_checkpoint(), "-o", "out.gguf", "--dry-run", "--report", "plan.json").code == 0
        assert [path.name for path in Path.cwd().iterdir()] == ["plan.json"]
        plan = json.loads(Path("plan.json").read_text())
        assert "fingerprint" not in plan and plan["bytes"] > 0

    def test_three_bits_without_calibration(self, d2q: Call, make_checkpoint: Make) -> None:
        model = make_checkpoint(hidden_size=64, intermediate_size=128)
        options = ("--bits", "3", "--no-calibration", "--embedding-type", "F16", "--head-type", "Q5_0")
        planned = d2q("convert", model, "-o", "out.gguf", *options, "--dry-run")
        assert d2q("convert", model, "-o", "out.gguf", *options).code == 0
        assert int(planned.out.split()[1].replace(",", "")) == Path("out.gguf").stat().st_size
        facts = json.loads(d2q("inspect", "out.gguf", "--json").out)
        assert facts["types"].keys() == {"d2q3_64", "f16", "q5_0", "f32"}

    @pytest.mark.slow
    def test_mixture(self, d2q: Call, make_checkpoint: Make) -> None:
        model = make_checkpoint(hidden_size=64, intermediate_size=128)
        options = ("--bits", "3.2", *QUICK)
        planned = d2q("convert", model, *options, "--dry-run")
        assert (planned.code, planned.err) == (0, "")
        assert list(Path.cwd().iterdir()) == []
        name, size = planned.out.split()[0].rstrip(":"), int(planned.out.split()[1].replace(",", ""))
        assert name == "Tiny-624K-D2Q3.2.gguf"
        done = d2q("convert", model, *options, "--report", "report.json")
        assert done.code == 0
        assert done.err.startswith("needs at most ")
        *same, _, _ = planned.out.splitlines(keepends=True)
        assert done.out.startswith("".join(same))
        assert Path(name).stat().st_size == size
        layers = [line.split(":")[0] for line in same[2:]]
        assert layers == [f"  {layer}_proj" for layer in ("q", "k", "v", "o", "gate", "up", "down")]
        report = json.loads(Path("report.json").read_text())
        assert 3.1 < report["linear_bits_per_weight"] <= 3.2
        assert len(report["layer_errors"]) == 14
        assert {"d2q2_64", "d2q3_64"} < set(report["types"].values())
        recipe = json.loads(d2q("inspect", name, "--json").out)["recipe"]
        assert recipe["bits"] == 3.2
        assert (recipe["allocation"], recipe["allocation_windows"]) == ("divergence", 4)

    def test_rotation(self, d2q: Call, make_checkpoint: Make) -> None:
        model = make_checkpoint(hidden_size=64, intermediate_size=128, tie_word_embeddings=True)
        for choice, tensors in (("off", 24), ("on", 25)):
            options = ("--no-calibration", "--force", "--rotation", choice)
            assert d2q("convert", model, "-o", "out.gguf", *options).code == 0
            facts = json.loads(d2q("inspect", "out.gguf", "--json").out)
            assert facts["recipe"]["rotation"] is (choice == "on")
            assert sum(entry["tensors"] for entry in facts["types"].values()) == tensors, "with a head of its own"

    def test_default_names(self, d2q: Call) -> None:
        said = d2q("convert", EXAMPLE, "--type", "Q8_0").out
        size = Path("Tiny-Qwen3-4.2M-Q8_0.gguf").stat().st_size
        assert said == f"Tiny-Qwen3-4.2M-Q8_0.gguf: {size:,} bytes\n"
        assert [path.name for path in Path.cwd().iterdir()] == ["Tiny-Qwen3-4.2M-Q8_0.gguf"]
        assert d2q("convert", EXAMPLE, "--bits", "3", "--dry-run").out.startswith("Tiny-Qwen3-4.2M-D2Q3.gguf: ")

    def test_stock_type_is_the_export(self, d2q: Call, tmp_path: Path) -> None:
        export(EXAMPLE, tmp_path / "stock.gguf", "f16")
        assert d2q("convert", EXAMPLE, "-o", "out.gguf", "--type", "f16").code == 0
        assert Path("out.gguf").read_bytes() == (tmp_path / "stock.gguf").read_bytes()


@pytest.mark.slow
class TestEval:
    KEYS = (
        "perplexity", "perplexity_stderr", "reference_perplexity", "kl_divergence_mean", "kl_divergence_p99",
        "top1_agreement", "chunks", "bytes", "bits_per_weight", "scored", "reference_perplexity_stderr",
        "perplexity_ratio", "perplexity_ratio_stderr", "kl_divergence_stderr", "kl_divergence_median",
        "kl_divergence_max", "kl_divergence_p99_interval", "top1_agreement_stderr",
    )  # fmt: skip

    def test_json(self, d2q: Call, example_files: ExampleFiles) -> None:
        require_runtime()
        options = ("--chunks", "2", "--context", "128")
        result = d2q("eval", example_files.d2q2, "--reference", example_files.f16, *options, "--json")
        assert (result.code, result.err) == (0, "")
        values = json.loads(result.out)
        assert tuple(values) == self.KEYS
        interval = values.pop("kl_divergence_p99_interval")
        assert interval[0] <= values["kl_divergence_p99"] <= interval[1]
        assert all(isinstance(value, (int, float)) for value in values.values())
        assert 0 < values["kl_divergence_mean"] < 3
        assert values["chunks"] == 2
        alone = json.loads(d2q("eval", example_files.d2q2, *options, "--json").out)
        assert tuple(alone) == self.KEYS
        assert alone["perplexity"] == values["perplexity"]
        assert alone["kl_divergence_mean"] is None

    def test_text(self, d2q: Call, example_files: ExampleFiles) -> None:
        require_runtime()
        result = d2q("eval", example_files.f16, "--chunks", "1", "--context", "64")
        assert result.code == 0
        assert [line.split()[0] for line in result.out.splitlines()] == ["perplexity", "in", "file"]

    def test_bad_requests(self, d2q: Call, example_files: ExampleFiles, tmp_path: Path) -> None:
        require_runtime()
        (tmp_path / "not.gguf").write_text("something else, and long enough to be a header")
        (tmp_path / "cut.gguf").write_bytes(example_files.f16.read_bytes()[:-1000])
        (tmp_path / "short.txt").write_text("Too short.")
        refused(d2q("eval", "none.gguf"), "there is no file none.gguf")
        refused(d2q("eval", example_files.f16, "--reference", "none.gguf"), "there is no file none.gguf")
        refused(d2q("eval", tmp_path / "not.gguf"), "isn't a GGUF file")
        refused(d2q("eval", example_files.f16, "--reference", tmp_path / "not.gguf"), "not.gguf")
        refused(d2q("eval", tmp_path / "cut.gguf"), "is truncated")
        refused(d2q("eval", example_files.f16, "--text", tmp_path / "short.txt"), "less than one chunk of 512")
        refused(d2q("eval", example_files.f16, "--text", "none.txt"), "can't read the text none.txt")


@pytest.mark.slow
class TestCompare:
    OPTIONS = ("--chunks", "1", "--context", "64", "--no-speed")

    def test_table_and_outputs(self, d2q: Call, example_files: ExampleFiles) -> None:
        require_runtime()
        result = d2q("compare", example_files.f16, example_files.d2q2, *self.OPTIONS, "-o", "r.html", "-o", "r.svg")
        assert (result.code, result.err) == (0, "")
        assert [line.split()[0] for line in result.out.splitlines()] == ["file", "f16", "d2q2", "*"]
        assert sorted(path.name for path in Path.cwd().iterdir()) == ["r.html", "r.svg"]
        assert "d2q2" in Path("r.html").read_text("utf-8")
        values = json.loads(d2q("compare", example_files.f16, example_files.d2q2, *self.OPTIONS, "--json").out)
        assert [row["name"] for row in values["files"]] == ["f16", "d2q2"]
        assert values["files"][1]["kl_divergence_mean"] > 0

    def test_table_before_an_output_that_fails(self, d2q: Call, example_files: ExampleFiles) -> None:
        require_runtime()
        Path("r.svg").mkdir()
        result = d2q("compare", example_files.f16, example_files.d2q2, *self.OPTIONS, "-o", "r.svg")
        assert result.code == 1
        assert [line.split()[0] for line in result.out.splitlines()] == ["file", "f16", "d2q2", "*"]
        assert result.err.splitlines() == ["Error: can't write r.svg: Is a directory"]

    def test_bad_requests(
        self,
        d2q: Call,
        example_files: ExampleFiles,
        monkeypatch: pytest.MonkeyPatch,
        without_package: Callable[[str], None],
    ) -> None:
        monkeypatch.setattr(LlamaModel, "__init__", None)
        own = example_files.f16, example_files.d2q2
        refused(d2q("compare", example_files.f16), "there is nothing to compare with the reference")
        refused(d2q("compare", *own, "--with-stock", "D2Q2"), "D2Q2 isn't a stock type that can be made")
        refused(d2q("compare", *own, "-o", "r.pdf"), "r.pdf should end in .html for a report, or in .png or .svg")
        refused(d2q("compare", *own, "-o", "none/r.html"), "the output directory none doesn't exist")
        refused(d2q("compare", *own, "--report", "none.json"), "can't read none.json")
        without_package("matplotlib")
        refused(
            d2q("compare", *own, "-o", "r.html"), "reports and pictures need matplotlib: pip install 'd2q-edge[report]'"
        )


class TestOtherCommands:
    @pytest.mark.slow
    def test_inspect(self, d2q: Call, example_files: ExampleFiles) -> None:
        facts = json.loads(d2q("inspect", example_files.d2q3, "--json").out)
        assert {"architecture", "bytes", "bits_per_weight", "types", "recipe", "table_sha256"} <= facts.keys()
        text = d2q("inspect", example_files.d2q3)
        assert (text.code, text.err) == (0, "")
        assert "d2q3" in text.out
        refused(d2q("inspect", "none.gguf"), "there is no file none.gguf")

    @pytest.mark.slow
    def test_run(self, d2q: Call, example_files: ExampleFiles) -> None:
        require_runtime()
        options = ("-p", "The old man", "-n", "12", "--seed", "1")
        result = d2q("run", example_files.d2q3, *options)
        assert (result.code, result.err) == (0, "")
        assert result.out.startswith("The old man")
        assert len(result.out) > 30
        assert d2q("run", example_files.d2q3, *options).out == result.out
        refused(d2q("run", "none.gguf", "-p", "x"), "there is no file none.gguf")

    @pytest.mark.slow
    def test_no_runtime(self, d2q: Call, example_files: ExampleFiles, no_runtime: None) -> None:
        for arguments in (("eval", example_files.f16), ("run", example_files.f16, "-p", "x")):
            refused(d2q(*arguments), "is not installed: run `d2q-edge runtime install`")
        result = d2q("runtime", "info", "--json")
        assert result.code == 0
        assert json.loads(result.out)["version"] is None

    def test_runtime_info(self, d2q: Call) -> None:
        facts = json.loads(d2q("runtime", "info", "--json").out)
        assert list(facts) == ["version", "patch_hash", "types", "library", "tools", "server"]
        assert {"llama-quantize", "llama-imatrix", "llama-perplexity", "llama-bench"} <= facts["tools"].keys()
        assert [line.split()[0] for line in d2q("runtime", "info").out.splitlines()] == list(facts)

    def test_runtime_install(self, d2q: Call, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[tuple[object, ...]] = []

        def install(tools: bool, server: bool, *, page: bool, sdist: Path | None) -> None:
            asked.append((tools, server, page, sdist))

        monkeypatch.setattr(runtime, "install", install)
        for options in ((), ("--tools",), ("--server", "--sdist", "a b"), ("--tools", "--server", "--no-page")):
            assert d2q("runtime", "install", *options).code == 0
        none, tools = (False, False, True, None), (True, False, True, None)
        assert asked == [none, tools, (False, True, True, Path("a b")), (True, True, False, None)]

        def fail(*_: bool, **__: bool) -> None:
            raise D2QError("no compiler:\n  install one")

        monkeypatch.setattr(runtime, "install", fail)
        refused(d2q("runtime", "install"), "Error: no compiler: install one")


class TestHelp:
    @pytest.mark.parametrize("command", ["", *COMMANDS])
    def test_fits_the_terminal(self, d2q: Call, command: str, environment: Callable[..., None]) -> None:
        environment(COLUMNS="200")
        results = [d2q(*command.split(), flag) for flag in ("--help", "-h")]
        assert results[0] == results[1]
        assert (results[0].code, results[0].err) == (0, "")
        lines = results[0].out.splitlines()
        assert max(map(len, lines)) <= 100
        assert len(lines) <= 40, "a screen"

    def test_mentions_every_option_of_the_contract(self, d2q: Call) -> None:
        said = {command: d2q(*command.split(), "--help").out for command in COMMANDS}
        for option in (
            "--output", "--bits", "--type", "--calibration", "--calibration-tokens", "--context", "--seed",
            "--rotation", "--dsq", "--no-dsq", "--dac", "--no-dac", "--refine", "--refine-scope", "--no-calibration",
            "--embedding-type", "--head-type", "--device", "--dry-run", "--force", "--report",
        ):  # fmt: skip
            assert option in said["convert"]
        for option in ("--reference", "--text", "--chunks", "--context", "--json"):
            assert option in said["eval"]
        assert "--lora" in said["eval"]
        for command in ("run", "chat"):
            for option in (
                "--context", "--top-p", "--top-k", "--min-p", "--repeat-penalty", "--lora", "--cache-type-k",
                "--cache-type-v", "--no-repack",
            ):  # fmt: skip
                assert option in said[command]
        for command in ("eval", "bench", "serve"):
            assert "--no-repack" in said[command]
        for option in ("--with-stock", "--output", "--calibration", "--text", "--chunks", "--report", "--json"):
            assert option in said["compare"]
        for option in ("--set", "--remove", "--chat-template", "--output"):
            assert option in said["metadata"]
        assert "--json" in said["inspect"]
        assert "--json" in said["runtime info"]
        for option in ("--tools", "--server", "--no-page"):
            assert option in said["runtime install"]
        for option in (
            "--host", "--port", "--context", "--parallel", "--api-key", "--threads", "--cache-type-k", "--cache-type-v",
            "--lora",
        ):  # fmt: skip
            assert option in said["serve"]

    def test_version(self, d2q: Call) -> None:
        assert d2q("--version").out == f"d2q-edge, version {__version__}\n"
