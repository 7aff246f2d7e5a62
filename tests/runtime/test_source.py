"""The patched source: hashes, cache, download, unpacking."""

import hashlib
import http.server
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from d2q_edge.errors import D2QError
from d2q_edge.runtime import source
from tests.runtime.conftest import make_patch

HEX = set("0123456789abcdef")
BACKEND = f"""
import pathlib
def prepare_metadata_for_build_wheel(directory, settings=None):
    folder = pathlib.Path(directory) / "llama_cpp_python.dist-info"
    folder.mkdir()
    text = "Metadata-Version: 2.1\\nName: llama-cpp-python\\nVersion: {source.VERSION}\\n"
    (folder / "METADATA").write_text(text)
    return folder.name
def build_wheel(*_):
    raise AssertionError
"""


def _sdist(directory: Path) -> bytes:
    """A source distribution that has what pip asks it for before it downloads it."""
    top = directory / f"llama_cpp_python-{source.VERSION}"
    top.mkdir(parents=True)
    build = 'requires = []\nbuild-backend = "backend"\nbackend-path = ["."]'
    (top / "pyproject.toml").write_text(f"[build-system]\n{build}\n")
    (top / "PKG-INFO").write_text(f"Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: {source.VERSION}\n")
    (top / "backend.py").write_text(BACKEND)
    with tarfile.open(directory / source.SDIST, "w:gz") as file:
        file.add(top, top.name)
    return (directory / source.SDIST).read_bytes()


@contextmanager
def _proxy(content: bytes) -> Iterator[tuple[str, list[str]]]:
    """A proxy that answers for an index with this source distribution: its address, and the URLs it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            page = f'<a href="/files/{source.SDIST}">{source.SDIST}</a>'.encode()
            body = content if self.path.endswith(source.SDIST) else page
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if body is page else "application/gzip")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


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
        def download(command: list[str], *_: object, **__: object) -> None:
            (Path(command[command.index("-d") + 1]) / source.SDIST).write_bytes(b"other")

        with pytest.raises(D2QError, match="is not the expected file"):
            source.fetch_sdist(cache, run=download)
        assert [p for p in cache.rglob("*") if p.is_file()] == []

    def test_damaged_cache_entry_is_downloaded_again(self, cache: Path) -> None:
        content = b"the real one"
        sha256 = hashlib.sha256(content).hexdigest()
        downloads = []

        def download(command: list[str], *_: object, **__: object) -> None:
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
        sentence = r"can't download llama-cpp-python 0\.3\.36 with pip .*: d2q-edge runtime install --sdist llama_cpp"
        with pytest.raises(D2QError, match=sentence):
            source.fetch_sdist(tmp_path / "log")

    def test_nothing_is_tried_again_unless_the_user_wants_it(
        self, cache: Path, tmp_path: Path, environment: Callable[..., None]
    ) -> None:
        """pip's output, where its retries are, goes to the log."""
        environment(PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_CONFIG_FILE=os.devnull, PIP_RETRIES=None)
        environment(PIP_EXTRA_INDEX_URL=None, PIP_FIND_LINKS=None)
        for retries in ("0", "1"):
            log = tmp_path / f"log{retries}"
            with pytest.raises(D2QError):
                source.fetch_sdist(log)
            assert log.read_text().count("Retrying") == int(retries)
            environment(PIP_RETRIES="1")

    def test_download_through_a_proxy(self, cache: Path, tmp_path: Path, environment: Callable[..., None]) -> None:
        """pip's usual variables reach it; only the proxy knows the index."""
        content = _sdist(tmp_path / "sdist")
        with _proxy(content) as (address, asked):
            environment(HTTP_PROXY=address, http_proxy=address, NO_PROXY=None, no_proxy=None)
            environment(PIP_INDEX_URL="http://index.invalid/simple", PIP_TRUSTED_HOST="index.invalid")
            environment(PIP_CONFIG_FILE=os.devnull, PIP_EXTRA_INDEX_URL=None, PIP_FIND_LINKS=None, PIP_PROXY=None)
            found = source.fetch_sdist(tmp_path / "log", sha256=hashlib.sha256(content).hexdigest())
        assert found.read_bytes() == content
        assert f"http://index.invalid/files/{source.SDIST}" in asked

    def test_given_source_needs_no_network(self, cache: Path, tmp_path: Path) -> None:
        def download(*_: object, **__: object) -> None:
            raise AssertionError("no download")

        content = b"the real one"
        sha256 = hashlib.sha256(content).hexdigest()
        given = tmp_path / "a b.tar.gz"
        for _ in range(2):
            given.write_bytes(content)
            source.add_sdist(given, sha256=sha256)
            given.unlink()
            assert source.fetch_sdist(tmp_path / "log", run=download, sha256=sha256).read_bytes() == content

    @pytest.mark.parametrize(
        ("folder", "what"),
        [
            ("llama_cpp_python-0.3.35", "has version 0.3.35 of llama-cpp-python"),
            (f"llama_cpp_python-{source.VERSION}", "has SHA-256 [0-9a-f]{64}"),
            ("numpy-2.0", "has SHA-256 [0-9a-f]{64}"),
            (None, "has SHA-256 [0-9a-f]{64}"),
        ],
    )
    def test_another_given_source_is_named(self, cache: Path, tmp_path: Path, folder: str | None, what: str) -> None:
        given = tmp_path / "x.tar.gz"
        given.write_bytes(b"no archive")
        if folder:
            with tarfile.open(given, "w:gz") as file:
                file.addfile(tarfile.TarInfo(f"{folder}/PKG-INFO"))
        with pytest.raises(D2QError, match=rf"x\.tar\.gz isn't llama_cpp_python-0\.3\.36.*: it {what}; the right"):
            source.add_sdist(given)
        assert not cache.exists()

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
