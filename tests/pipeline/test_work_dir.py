"""The work directory: what is kept, what is refused, and that a file that is there is complete."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from safetensors.numpy import save_file

from d2q_edge.errors import D2QError
from d2q_edge.pipeline import work_dir
from d2q_edge.pipeline.work_dir import BlockWriter, WorkDir, was_published
from d2q_edge.utils import files

SETTINGS: dict[str, Any] = {"bits": 2, "files": [("a.safetensors", 10)], "recipe": {"seed": 0}}
BLOCK = {
    "a.weight": np.arange(12, dtype=np.uint8).reshape(3, 4),
    "b.weight": np.arange(12, dtype=np.uint8).reshape(4, 3).T,
}


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
    first.write_block(2, {})
    second = WorkDir(output, SETTINGS)
    assert second.path == output.parent / "out.gguf.work"
    assert second.finished == 2
    assert [second.has_block(i) for i in range(3)] == [True, False, True]
    found = second.read_block(0)
    assert found.keys() == BLOCK.keys()
    for name, data in BLOCK.items():
        assert np.array_equal(found[name], data)
    assert second.read_block(2) == {}


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


@pytest.mark.parametrize("content", ["{", "[]", '"text"'])
def test_damaged_settings(output: Path, content: str) -> None:
    work = WorkDir(output, SETTINGS)
    work.write_block(0, BLOCK)
    (work.path / "settings.json").write_text(content)
    with pytest.raises(D2QError, match=r"can't use the work directory .*out.gguf.work .*; remove it"):
        WorkDir(output, SETTINGS)


@pytest.mark.parametrize("keep", [0, 7, 40, -1])
def test_damaged_block(output: Path, keep: int) -> None:
    work = WorkDir(output, SETTINGS)
    work.write_block(3, BLOCK)
    file = work.path / "block-0003.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(D2QError, match=r"block-0003.safetensors is damaged .*; remove it and convert again"):
        work.read_block(3)


def test_no_flipped_bit_goes_unnoticed(output: Path) -> None:
    work = WorkDir(output, SETTINGS)
    work.write_block(3, BLOCK)
    file = work.path / "block-0003.safetensors"
    good = file.read_bytes()
    for position in range(len(good)):
        for bit in (0, 5):
            file.write_bytes(good[:position] + bytes([good[position] ^ 1 << bit]) + good[position + 1 :])
            with pytest.raises(D2QError, match=r"block-0003.safetensors is damaged .*; remove it and convert again"):
                work.read_block(3)


def test_what_was_read_lies_in_memory(output: Path) -> None:
    """Where it may be changed, and where what happens to the file after the check does no harm."""
    work = WorkDir(output, SETTINGS)
    work.write_block(3, BLOCK)
    found = work.read_block(3)
    file = work.path / "block-0003.safetensors"
    with file.open("r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    for name, data in BLOCK.items():
        assert np.array_equal(found[name], data)
        found[name] += 1


def test_a_changed_type_is_noticed(output: Path) -> None:
    work = WorkDir(output, SETTINGS)
    work.write_block(0, BLOCK)
    file = work.path / "block-0000.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"U8"', b'"I8"'))
    with pytest.raises(D2QError, match="is damaged"):
        work.read_block(0)


def test_a_block_is_not_another_one(output: Path) -> None:
    work = WorkDir(output, SETTINGS)
    work.write_block(0, BLOCK)
    shutil.copy(work.path / "block-0000.safetensors", work.path / "block-0001.safetensors")
    shutil.copy(work.path / "block-0000.safetensors", work.path / "refined-0000.safetensors")
    with pytest.raises(D2QError, match="is damaged"):
        work.read_block(1)
    with pytest.raises(D2QError, match="is damaged"):
        work.read_block(0, refined=True)
    save_file({"a": np.zeros(1, np.uint8)}, work.path / "block-0002.safetensors")
    with pytest.raises(D2QError, match="is damaged"):
        work.read_block(2)


def test_everything_is_flushed_before_it_counts(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of what reaches the disk: content, then name, then the directory's entries."""
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
    work = WorkDir(output, SETTINGS)
    work.write_block(0, BLOCK)
    directory = work.path.name
    expected = [("flush", output.parent.name)]
    for partial, name in (("settings.partial", "settings.json"), ("block-0000.partial", "block-0000.safetensors")):
        expected += [("flush", partial), ("rename", name), ("flush", directory)]
    assert events == expected


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


def test_interrupted_write_leaves_no_block(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(_: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    work = WorkDir(output, SETTINGS)
    monkeypatch.setattr(work_dir, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        work.write_block(0, BLOCK)
    again = WorkDir(output, SETTINGS)
    assert again.finished == 0
    assert not again.has_block(0)
    monkeypatch.setattr(work_dir, "save_file", safetensors.numpy.save_file)
    again.write_block(0, BLOCK)
    assert WorkDir(output, SETTINGS).finished == 1


def test_full_disk(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    work = WorkDir(output, SETTINGS)
    monkeypatch.setattr(work_dir, "save_file", full)
    with pytest.raises(D2QError, match=r"can't write .*block-0000.safetensors .*No space left.*; free some disk space"):
        work.write_block(0, BLOCK)
    assert [path.name for path in work.path.iterdir()] == ["settings.json"], "what is useless must not fill the disk"


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


def test_facts_are_kept_with_a_block(output: Path) -> None:
    work = WorkDir(output, SETTINGS)
    work.write_block(0, BLOCK, facts={"errors": {"a": 0.25}, "none": None})
    work.write_block(1, BLOCK)
    again = WorkDir(output, SETTINGS)
    assert again.read_facts(0) == {"errors": {"a": 0.25}, "none": None}
    assert again.read_facts(1) == {}
    assert again.read_block(0).keys() == BLOCK.keys()
    file = work.path / "block-0000.safetensors"
    for content in (file.read_bytes().replace(b"errors", b"arrows"), b"nonsense"):
        file.write_bytes(content)
        with pytest.raises(D2QError, match="is damaged"):
            again.read_facts(0)


def test_the_writer_is_done_at_the_end(tmp_path: Path) -> None:
    work = WorkDir(tmp_path / "out", {})
    with BlockWriter(work, active=True) as writer:
        for index in range(3):
            writer.write(index, {"a": np.full(4, index, np.uint8)}, {"index": index})
    assert [work.read_block(index)["a"].tolist() for index in range(3)] == [[index] * 4 for index in range(3)]
    assert work.read_facts(2) == {"index": 2}


def test_a_writer_that_is_not_active_writes_nothing(tmp_path: Path) -> None:
    work = WorkDir(tmp_path / "out", {})
    with BlockWriter(work, active=False) as writer:
        writer.write(0, {"a": np.zeros(4, np.uint8)}, {})
    assert work.finished == 0


@pytest.mark.parametrize("blocks", [1, 2], ids=["at the end", "at the next block"])
def test_what_a_writer_could_not_write_is_an_error(
    blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = WorkDir(tmp_path / "out", {})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "replace", full)
    written = []
    with pytest.raises(D2QError, match="No space left"), BlockWriter(work, active=True) as writer:
        for index in range(blocks):
            writer.write(index, {"a": np.zeros(4, np.uint8)}, {})
            written.append(index)
    assert written == [0]
