"""The patched source: hashes, cache, download, unpacking."""

import hashlib
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from d2q_edge.errors import D2QError
from d2q_edge.runtime import source
from tests.runtime.conftest import make_patch

HEX = set("0123456789abcdef")


class TestSource:
    def test_cache_is_where_the_user_wants_it(self, cache: Path, environment: Callable[..., None]) -> None:
        assert source.cache_directory() == cache
        for useless in ("", "relative"):
            environment(XDG_CACHE_HOME=useless)
            assert source.cache_directory() == Path.home() / ".cache/d2q-edge/runtime"

    def test_hash_depends_on_every_byte_and_name(self, tmp_path: Path) -> None:
        first = source.patch_hash(make_patch(tmp_path / "a"))
        assert len(first) == 12
        assert set(first) <= HEX
        assert first == source.patch_hash(make_patch(tmp_path / "b"))
        changed = [
            make_patch(tmp_path / "c", patch="One"),
            make_patch(tmp_path / "d", code="Two"),
            make_patch(tmp_path / "e"),
        ]
        (changed[2] / "src/x.c").rename(changed[2] / "src/y.c")
        assert len({first, *map(source.patch_hash, changed)}) == 4

    def test_patches_of_the_server_have_a_hash_of_their_own(self, tmp_path: Path) -> None:
        directory = make_patch(tmp_path / "a")
        runtime, before = source.patch_hash(directory), source.server_hash(directory)
        (directory / "server").mkdir()
        (directory / "server/0001-x.patch").write_text("x")
        assert source.patch_hash(directory) == runtime, "the wheel and the tools don't have to be built again"
        assert source.server_hash(directory) != before

    def test_hash_is_never_only_digits(self, tmp_path: Path) -> None:
        hashes = [source.patch_hash(make_patch(tmp_path / "a", code=str(i))) for i in range(1000)]
        assert not any(text.isdigit() for text in hashes)

    def test_version_is_the_releases_with_the_hash(self) -> None:
        assert source.runtime_version() == f"0.3.36+d2q.{source.patch_hash()}"

    def test_download_of_another_file_is_refused(self, cache: Path) -> None:
        def download(command: list[str], *_: object) -> None:
            (Path(command[command.index("-d") + 1]) / source.SDIST).write_bytes(b"other")

        with pytest.raises(D2QError, match="is not the expected file"):
            source.fetch_sdist(cache, run=download)
        assert [p for p in cache.rglob("*") if p.is_file()] == []

    def test_damaged_cache_entry_is_downloaded_again(self, cache: Path) -> None:
        content = b"the real one"
        sha256 = hashlib.sha256(content).hexdigest()
        downloads = []

        def download(command: list[str], *_: object) -> None:
            downloads.append(command)
            (Path(command[command.index("-d") + 1]) / source.SDIST).write_bytes(content)

        (cache / "sdist").mkdir(parents=True)
        (cache / "sdist" / source.SDIST).write_bytes(content[:5])
        for _ in range(2):
            assert source.fetch_sdist(cache, run=download, sha256=sha256).read_bytes() == content
        assert len(downloads) == 1

    def test_no_network_is_one_sentence(self, cache: Path, tmp_path: Path, environment: Callable[..., None]) -> None:
        environment(PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES="0", PIP_CONFIG_FILE=os.devnull)
        environment(PIP_EXTRA_INDEX_URL=None, PIP_FIND_LINKS=None)
        with pytest.raises(D2QError, match=r"can't download llama-cpp-python 0\.3\.36 with pip"):
            source.fetch_sdist(tmp_path / "log")

    @pytest.mark.parametrize("name", ["top/../../evil", "top/link"])
    def test_unpacking_stays_inside(self, tmp_path: Path, name: str) -> None:
        archive = tmp_path / "x.tar.gz"
        members = [tarfile.TarInfo(text) for text in ("top/.git/config", "top/good/file", name)]
        if name == "top/link":
            members[2].type, members[2].linkname = tarfile.SYMTYPE, "/etc/passwd"

        def unpacked(count: int) -> set[str]:
            with tarfile.open(archive, "w:gz") as file:
                for member in members[:count]:
                    file.addfile(member)
            source.unpack(archive, tmp_path / "out" / "tree")
            return {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if not p.is_dir()}

        assert unpacked(2) == {"x.tar.gz", "out/tree/good/file"}
        with pytest.raises(D2QError, match="which is not a plain file inside it"):
            unpacked(3)
        assert not [p for p in tmp_path.rglob("*") if p.name in ("evil", "link")]
