"""The work directory: what is kept, what is refused, and that a file that is there is complete."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2q_edge.errors import D2QError
from d2q_edge.formats.quantized_block import BlockMetrics, QuantizedBlock, QuantizedWeight
from d2q_edge.formats.tensor_types import D2Q2_64
from d2q_edge.pipeline.work_dir import BlockWriter, WorkDir, was_published
from tests.blocks import assert_same_block

SETTINGS: dict[str, Any] = {"bits": 2, "files": [("a.safetensors", 10)], "recipe": {"seed": 0}}
BLOCK = QuantizedBlock(
    weights={"a": QuantizedWeight(D2Q2_64, np.arange(60, dtype=np.uint8).reshape(3, 20))},
    floats={"norm.weight": np.arange(4, dtype=np.float32)},
    metrics=BlockMetrics({"a": 0.25}, {"norm": {"applied": False, "gain": None}}),
)
EMPTY = QuantizedBlock()


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.gguf"


def test_nothing_is_made_before_the_first_block(output: Path) -> None:
    work = WorkDir(output, SETTINGS)
    assert work.finished == 0
    assert not work.has_block(0)
    assert list(output.parent.iterdir()) == []


def test_blocks_survive_the_process(output: Path) -> None:
    first = WorkDir(output, SETTINGS)
    first.write_block(0, BLOCK)
    first.write_block(2, EMPTY)
    first.write_block(0, EMPTY, refined=True)
    second = WorkDir(output, SETTINGS)
    assert second.path == output.parent / "out.gguf.work"
    assert second.finished == 2
    assert [second.has_block(i) for i in range(3)] == [True, False, True]
    assert [second.has_block(i, refined=True) for i in range(3)] == [True, False, False]
    assert_same_block(second.read_block(0), BLOCK)
    assert_same_block(second.read_block(2), EMPTY)
    assert_same_block(second.read_block(0, refined=True), EMPTY)


def test_remove(output: Path) -> None:
    work = WorkDir(output, SETTINGS)
    work.write_block(0, BLOCK)
    work.remove()
    assert list(output.parent.iterdir()) == []
    work.remove()


def test_other_conversions_blocks_are_refused(output: Path) -> None:
    WorkDir(output, SETTINGS).write_block(0, BLOCK)
    changed = {**SETTINGS, "bits": 3, "device": "cpu"}
    with pytest.raises(D2QError, match="an unfinished conversion with another bits, device; repeat that one"):
        WorkDir(output, changed)
    assert WorkDir(output, SETTINGS).finished == 1, "the refused attempt must not cost anything"


def test_force_starts_anew(output: Path) -> None:
    WorkDir(output, SETTINGS).write_block(0, BLOCK)
    work = WorkDir(output, {**SETTINGS, "bits": 3}, force=True)
    assert work.finished == 0
    work.write_block(1, BLOCK)
    assert WorkDir(output, {**SETTINGS, "bits": 3}).finished == 1


def test_force_keeps_blocks_of_the_same_conversion(output: Path) -> None:
    WorkDir(output, SETTINGS).write_block(0, BLOCK)
    assert WorkDir(output, SETTINGS, force=True).finished == 1


@pytest.mark.parametrize("content", ["{", "[]", '"text"', "[" * 200_000])
def test_damaged_settings(output: Path, content: str) -> None:
    work = WorkDir(output, SETTINGS)
    work.write_block(0, BLOCK)
    (work.path / "settings.json").write_text(content)
    with pytest.raises(D2QError, match=r"can't use the work directory .*out.gguf.work .*; remove it"):
        WorkDir(output, SETTINGS)


def test_damaged_block(output: Path) -> None:
    work = WorkDir(output, SETTINGS)
    work.write_block(3, BLOCK)
    file = work.path / "block-0003.safetensors"
    content = file.read_bytes()
    for damaged in (content[:-1], content[:-1] + b"?"):
        file.write_bytes(damaged)
        with pytest.raises(D2QError, match=r"block-0003.safetensors is damaged .*; remove it and convert again"):
            work.read_block(3)


def test_a_block_is_not_another_one(output: Path) -> None:
    work = WorkDir(output, SETTINGS)
    work.write_block(0, BLOCK)
    shutil.copy(work.path / "block-0000.safetensors", work.path / "block-0001.safetensors")
    shutil.copy(work.path / "block-0000.safetensors", work.path / "refined-0000.safetensors")
    with pytest.raises(D2QError, match="is damaged"):
        work.read_block(1)
    with pytest.raises(D2QError, match="is damaged"):
        work.read_block(0, refined=True)


def test_state_of_a_refinement(output: Path) -> None:
    work = WorkDir(output, SETTINGS)
    assert work.read_state() is None
    work.write_state({"a": np.ones(3, np.float32)}, {"passes": [0.5]})
    work.write_state({"a": np.zeros(3, np.float32)}, {"passes": [0.5, 0.25]})
    again = WorkDir(output, SETTINGS)
    found = again.read_state()
    assert found is not None
    assert {name: array.tolist() for name, array in found[0].items()} == {"a": [0, 0, 0]}
    assert found[1] == {"passes": [0.5, 0.25]}
    assert again.finished == 0
    file = work.path / "refining.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(D2QError, match=r"refining.safetensors is damaged"):
        again.read_state()
    again.remove_state()
    assert again.read_state() is None
    again.remove_state()


def test_everything_is_flushed_before_it_counts(output: Path, disk_events: list[tuple[str, str]]) -> None:
    """The order of what reaches the disk: content, then name, then the directory's entries."""
    work = WorkDir(output, SETTINGS)
    work.write_block(0, BLOCK)
    directory = work.path.name
    expected = [("flush", output.parent.name)]
    for partial, name in (("settings.partial", "settings.json"), ("block-0000.partial", "block-0000.safetensors")):
        expected += [("flush", partial), ("rename", name), ("flush", directory)]
    assert disk_events == expected


class TestPublishing:
    def finish(self, output: Path) -> WorkDir:
        work = WorkDir(output, SETTINGS)
        work.write_block(0, BLOCK)
        work.complete.write_bytes(b"the file")
        return work

    def test_moves_the_file(self, output: Path) -> None:
        output.write_text("old")
        work = self.finish(output)
        assert not was_published(output)
        work.publish()
        assert output.read_bytes() == b"the file"
        assert was_published(output)
        assert not work.complete.exists()
        work.remove()
        assert not was_published(output)
        assert list(output.parent.iterdir()) == [output]

    def test_killed_while_removing(self, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever is left, the output is known to be this conversion's."""
        unlink = Path.unlink
        for allowed in (0, 1, 2):
            work = self.finish(output)
            work.write_block(1, BLOCK)
            work.publish()
            left = allowed

            def counting(path: Path) -> None:
                nonlocal left
                if left == 0:
                    raise KeyboardInterrupt
                left -= 1
                unlink(path)

            with monkeypatch.context() as patch:
                patch.setattr(Path, "unlink", counting)
                patch.setattr(shutil, "rmtree", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    work.remove()
            assert was_published(output)
            again = WorkDir(output, SETTINGS)
            assert again.finished == 2 - allowed
            again.remove()
            assert list(output.parent.iterdir()) == [output]

    def test_a_killed_write_is_no_obstacle(self, output: Path) -> None:
        work = self.finish(output)
        (work.path / ".complete.gguf.partial").write_bytes(b"hal")
        assert WorkDir(output, SETTINGS).finished == 1
        work.publish()
        work.remove()
        assert list(output.parent.iterdir()) == [output]

    def test_another_file_was_not_published(self, output: Path) -> None:
        self.finish(output).publish()
        os.utime(output, ns=(0, 0))
        assert not was_published(output)

    def test_work_of_an_earlier_run_says_nothing(self, output: Path) -> None:
        output.write_text("old")
        WorkDir(output, SETTINGS).write_block(0, BLOCK)
        assert not was_published(output)
        (output.parent / "out.gguf.work" / "settings.json").write_text("{")
        assert not was_published(output)

    def test_that_fails(self, output: Path) -> None:
        work = self.finish(output)
        output.mkdir()
        with pytest.raises(D2QError, match=r"can't write .*out.gguf: Is a directory"):
            work.publish()
        assert work.complete.exists()


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_interrupted_write_leaves_no_block(output: Path) -> None:
    work = WorkDir(output, SETTINGS)
    work.write_block(0, BLOCK)
    (work.path / "block-0001.partial").write_bytes(b"half")
    again = WorkDir(output, SETTINGS)
    assert again.finished == 1
    assert not again.has_block(1)
    again.write_block(1, BLOCK)
    assert WorkDir(output, SETTINGS).finished == 2
    assert not (work.path / "block-0001.partial").exists()


def test_missing_parent(tmp_path: Path) -> None:
    with pytest.raises(D2QError, match="can't write"):
        WorkDir(tmp_path / "none" / "out.gguf", SETTINGS).write_block(0, BLOCK)


@pytest.mark.parametrize("force", [False, True])
def test_foreign_files_are_never_deleted(output: Path, force: bool) -> None:
    work = WorkDir(output, SETTINGS)
    work.write_block(0, BLOCK)
    (work.path / "diary.txt").write_text("dear diary")
    with pytest.raises(D2QError, match=r"holds diary.txt, which d2q-edge didn't put there; move it away"):
        WorkDir(output, {**SETTINGS, "bits": 3}, force=force)
    assert (work.path / "diary.txt").read_text() == "dear diary"


def test_a_file_in_its_place(output: Path) -> None:
    output.with_name("out.gguf.work").write_text("x")
    with pytest.raises(D2QError, match="can't use the work directory"):
        WorkDir(output, SETTINGS)


def test_leftovers_of_a_crash_at_the_start(output: Path) -> None:
    path = output.with_name("out.gguf.work")
    path.mkdir()
    (path / "settings.partial").write_text("{")
    assert WorkDir(output, SETTINGS).finished == 0


def test_the_writer_is_done_at_the_end(tmp_path: Path) -> None:
    work = WorkDir(tmp_path / "out", {})
    with BlockWriter(work, active=True) as writer:
        for index in range(3):
            writer.write(index, QuantizedBlock(floats={"a": np.full(4, index, np.float32)}))
    assert [work.read_block(index).floats["a"].tolist() for index in range(3)] == [[index] * 4 for index in range(3)]


def test_a_writer_that_is_not_active_writes_nothing(tmp_path: Path) -> None:
    work = WorkDir(tmp_path / "out", {})
    with BlockWriter(work, active=False) as writer:
        writer.write(0, BLOCK)
    assert work.finished == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("blocks", [1, 2], ids=["at the end", "at the next block"])
def test_what_a_writer_could_not_write_is_an_error(blocks: int, tmp_path: Path) -> None:
    work = WorkDir(tmp_path / "none" / "out", {})
    written = []
    with pytest.raises(D2QError, match=r"can't write to .*out.work"), BlockWriter(work, active=True) as writer:
        for index in range(blocks):
            writer.write(index, BLOCK)
            written.append(index)
    assert written == [0]


def test_an_error_in_the_work_is_not_hidden_by_the_writers(tmp_path: Path) -> None:
    work = WorkDir(tmp_path / "none" / "out", {})
    with pytest.raises(ZeroDivisionError), BlockWriter(work, active=True) as writer:
        writer.write(0, BLOCK)
        raise ZeroDivisionError
