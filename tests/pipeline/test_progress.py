"""Progress of the block loop: a line per block where stderr is no terminal, a bar by weights where it is one."""

import io
import re
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from d2q_edge.distributed.process_group import ProcessGroup
from d2q_edge.pipeline.progress import BlockProgress
from d2q_edge.pipeline.work_dir import WorkDir
from tests.pipeline.common import PLAIN, SMALL, WINDOWS, Make, Setup, StoppedAt

LINE = re.compile(
    r"Quantizing: (?P<done>\d+\.?\d*k?)/(?P<total>\d+\.?\d*k?) weights, block (?P<block>\d)/3, "
    r"mean error (?P<error>0\.\d{4}), \d+ (s|min \d+ s) elapsed(, about (?P<left>\d+ (s|min \d+ s)) left)?"
)
FEW = WINDOWS[:4]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Second(ProcessGroup):
    """The second of two processes, as far as it is asked."""

    @property
    def is_main(self) -> bool:
        return False


def lines(text: str) -> list[re.Match[str]]:
    found = [LINE.fullmatch(line) for line in text.splitlines()]
    assert None not in found, text
    return [match for match in found if match is not None]


class TestInALog:
    def test_a_line_per_block(self, make_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        setup = Setup(make_checkpoint("llama", **SMALL))
        report = setup.run(WorkDir(tmp_path / "out.gguf", {}), PLAIN, windows=FEW)
        shown = capsys.readouterr()
        assert shown.out == ""
        found = lines(shown.err)
        assert [match["block"] for match in found] == ["1", "2", "3"]
        weights = 64 * 64 * 2 + 2 * 32 * 64 + 3 * 64 * 256
        assert [match["done"] for match in found] == [f"{part * weights / 1000:.3g}k" for part in (1, 2, 3)]
        assert {match["total"] for match in found} == {f"{3 * weights / 1000:.3g}k"}
        assert [match["left"] is None for match in found] == [False, False, True]
        for index, match in enumerate(found):
            errors = [e for name, e in report.layer_errors.items() if name.startswith(f"model.layers.{index}.")]
            assert len(errors) == 7
            assert float(match["error"]) == pytest.approx(sum(errors) / 7, abs=6e-5)

    def test_a_resumed_run(self, make_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Finished blocks have no line, and count as done from the first line on."""
        setup = Setup(make_checkpoint("llama", **SMALL))
        with pytest.raises(KeyboardInterrupt):
            setup.run(StoppedAt(tmp_path / "out", {}), PLAIN, windows=FEW)
        capsys.readouterr()
        setup.run(WorkDir(tmp_path / "out", {}), PLAIN, windows=FEW)
        found = lines(capsys.readouterr().err)
        assert [match["block"] for match in found] == ["2", "3"]
        assert found[0]["done"] != found[0]["total"]
        assert found[1]["done"] == found[1]["total"]
        setup.run(WorkDir(tmp_path / "out", {}), PLAIN, windows=FEW)
        assert capsys.readouterr().err == ""

    def test_layers_of_stock_types(
        self, make_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """They have no error, but are done with their block."""
        setup = Setup(make_checkpoint("llama", **{**SMALL, "intermediate_size": 100}))
        setup.run(WorkDir(tmp_path / "out.gguf", {}), PLAIN, windows=FEW)
        found = lines(capsys.readouterr().err)
        assert found[-1]["done"] == found[-1]["total"]

    def test_without_any_error(self, make_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        setup = Setup(make_checkpoint("llama", **SMALL), type_name="f16")
        setup.run(WorkDir(tmp_path / "out.gguf", {}), PLAIN, windows=FEW)
        shown = capsys.readouterr().err.splitlines()
        assert len(shown) == 3
        assert re.fullmatch(
            r"Quantizing: \d+\.?\d*k/\d+k weights, block 2/3, \d+ s elapsed, about \d+ s left", shown[1]
        )


class TestOnATerminal:
    def test_a_bar_and_no_lines(self, make_checkpoint: Make, tmp_path: Path) -> None:
        setup = Setup(make_checkpoint("llama", **SMALL))
        with redirect_stderr(Terminal()) as terminal:
            setup.run(WorkDir(tmp_path / "out.gguf", {}), PLAIN, windows=FEW)
        shown = terminal.getvalue()
        assert "Quantizing:   0%|" in shown
        assert "Quantizing: 100%|" in shown
        assert "block 3/3, mean error 0." in shown
        assert "elapsed" not in shown
        assert shown.count("\n") == 1, "one bar, which stays"

    def test_other_processes_are_quiet(self, make_checkpoint: Make, tmp_path: Path) -> None:
        setup = Setup(make_checkpoint("llama", **SMALL))
        work = WorkDir(tmp_path / "out.gguf", {})
        with redirect_stderr(Terminal()) as terminal:
            setup.run(work, PLAIN, windows=FEW, processes=Second())
        assert terminal.getvalue() == ""
        assert work.finished == 0


class TestCounting:
    """Time goes with weights, and layers are not equally large."""

    def test_follows_the_weights(self, make_checkpoint: Make, capsys: pytest.CaptureFixture[str]) -> None:
        setup = Setup(make_checkpoint("llama", **SMALL))
        sizes = {name: setup.checkpoint.tensor(name).numel() for name in setup.types}
        block = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
        with BlockProgress(setup.family, setup.types, quiet=True) as shown:
            assert shown.total == sum(sizes.values()) == 3 * block
            shown.add_layers(0, {"mlp.down_proj": 0.01})
            assert shown.done == sizes["model.layers.0.mlp.down_proj.weight"]
            shown.add_layers(0, {"mlp.down_proj": 0.01, "mlp.up_proj": 0.02})
            assert shown.done == sum(sizes[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("up", "down"))
            shown.finish_block(0, {"mlp.down_proj": 0.01, "mlp.up_proj": 0.02})
            assert shown.done == block
            shown.skip_block(1)
            assert shown.done == 2 * block
            shown.finish_block(2, {})
            assert shown.done == shown.total
        assert capsys.readouterr().err == ""

    def test_the_layer_of_the_moment(self, make_checkpoint: Make) -> None:
        setup = Setup(make_checkpoint("llama", **SMALL))
        with (
            redirect_stderr(Terminal()) as terminal,
            BlockProgress(setup.family, setup.types, quiet=False) as shown,
        ):
            shown.add_layers(1, {"mlp.down_proj": 0.01234})
        assert "block 2/3 mlp.down_proj error 0.0123" in terminal.getvalue()
