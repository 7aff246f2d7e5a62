"""The patch series is small, applies without fuzz, and changes only the files that it lists."""

import filecmp
import re
import shutil
from pathlib import Path

import pytest

from d2q_edge.errors import D2QError
from d2q_edge.runtime import source

PATCHES = sorted((source.patch_directory() / "patches").glob("*.patch"))
SERVER_PATCHES = sorted((source.patch_directory() / "server").glob("*.patch"))


def _files(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def _listed(patches: list[Path]) -> set[str]:
    return {name for patch in patches for name in re.findall(r"^\+\+\+ b/(\S+)$", patch.read_text(), re.MULTILINE)}


def test_only_listed_files_change(pristine_tree: Path, patched_tree: Path) -> None:
    before, after = _files(pristine_tree), _files(patched_tree)
    own = {(source.OWN_SOURCES / p.name).as_posix() for p in (source.patch_directory() / "src").iterdir()}
    assert before - after == set()
    assert after - before == own
    changed = {name for name in before if not filecmp.cmp(pristine_tree / name, patched_tree / name, shallow=False)}
    assert changed == _listed(PATCHES) | {"llama_cpp/__init__.py"}


def test_server_patches_apply_after_the_others(patched_tree: Path, tmp_path: Path) -> None:
    for name in _listed(SERVER_PATCHES):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(patched_tree / name, tmp_path / name)
    source.apply_server(source.patch_directory(), tmp_path, tmp_path / "log")
    assert all(not filecmp.cmp(patched_tree / name, tmp_path / name, shallow=False) for name in _listed(SERVER_PATCHES))


def test_patches_are_small_and_say_what_they_are_for() -> None:
    assert len(PATCHES) >= 5
    readme = (source.patch_directory() / "README.md").read_text()
    for number, patch in [*enumerate(PATCHES, 1), *enumerate(SERVER_PATCHES, 1)]:
        purpose, empty, first, *_ = patch.read_text().splitlines()
        assert patch.name.startswith(f"{number:04}-")
        assert purpose.endswith(".")
        assert empty == ""
        assert first.startswith("diff --git ")
        assert patch.name in readme
        assert len(re.findall(r"^[+-](?![+-])", patch.read_text(), re.MULTILINE)) <= 150


def test_every_own_source_is_described() -> None:
    readme = (source.patch_directory() / "README.md").read_text()
    for path in (source.patch_directory() / "src").iterdir():
        assert f"| {path.stem}" in readme and path.suffix in readme


def test_own_sources_are_copied_as_they_are(patched_tree: Path) -> None:
    own = source.patch_directory() / "src"
    names = sorted(path.name for path in own.iterdir())
    _, different, errors = filecmp.cmpfiles(own, patched_tree / source.OWN_SOURCES, names, shallow=False)
    assert not different and not errors


def test_a_patch_that_does_not_apply_is_named(tmp_path: Path) -> None:
    patches = tmp_path / "cpp_patch" / "patches"
    patches.mkdir(parents=True)
    (patches / "0001-wrong.patch").write_text("Wrong.\n\n--- a/file\n+++ b/file\n@@ -1 +1 @@\n-one\n+two\n")
    tree = tmp_path / "tree"
    (tree / source.OWN_SOURCES.parent).mkdir(parents=True)
    (tree / "file").write_text("three\n")
    with pytest.raises(D2QError, match=r"0001-wrong\.patch does not apply"):
        source.apply(tmp_path / "cpp_patch", tree, tmp_path / "log")
