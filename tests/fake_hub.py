"""Serve one repository as the Hugging Face hub would, with planned faults.

It answers what huggingface_hub needs: lists of files, HEAD with commit and ETag, a redirect to another host for large
files, ranges. A test plans faults: an HTTP status, or a connection that breaks after some bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

REPO = "tiny-org/Tiny-Model-2M"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LATER = "89abcdef0123456789abcdef0123456789abcdef"


class Request(NamedTuple):
    """A request that was answered. `range` is the header's value, or ""; `token` what the client authenticated with."""

    method: str
    path: str
    range: str
    token: str


@dataclass
class Fault:
    """A fault for requests whose "METHOD path" matches: a status, or the answer cut off after `keep` bytes."""

    pattern: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    keep: int = -1
    times: int = 10**9
    action: Callable[[], None] = lambda: None


@dataclass
class Hub:
    """The server's state, shared with the test."""

    files: dict[str, bytes]
    endpoint: str = ""
    commits: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, COMMIT: COMMIT, "v1": LATER, LATER: LATER})
    requests: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    token: str = ""
    """Required for every request, unless it is empty."""


@contextmanager
def serve(directory: Path) -> Iterator[Hub]:
    """Serve the files of a directory and its subdirectories."""
    files = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    hub = Hub(files)

    class Handler(_Handler):
        state = hub

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        self.state.requests.append(Request(self.command, path, self.headers.get("range", ""), token))
        keep = -1
        for fault in self.state.faults:
            if fault.times > 0 and re.search(fault.pattern, f"{self.command} {path}"):
                fault.times -= 1
                fault.action()
                if fault.status:
                    return self._answer(fault.status, fault.headers, b"")
                keep = fault.keep
        if path.startswith("/large/"):
            return self._content(self.state.files[path.removeprefix("/large/")], {}, keep)
        if self.state.token and token != self.state.token:
            return self._answer(401, {"X-Error-Code": "GatedRepo"}, b"")
        if match := re.fullmatch(rf"/api/models/{REPO}/revision/(.+)", path):
            return self._list(match[1])
        if match := re.fullmatch(rf"/api/models/{REPO}/tree/(.+)", path):
            return self._tree(match[1])
        if match := re.fullmatch(rf"/{REPO}/resolve/([^/]+)/(.+)", path):
            return self._file(match[1], match[2], keep)
        return self._answer(404, {"X-Error-Code": "RepoNotFound"}, b"")

    do_HEAD = do_GET

    def _list(self, revision: str) -> None:
        if revision not in self.state.commits:
            return self._answer(404, {"X-Error-Code": "RevisionNotFound"}, b"")
        siblings = [{"rfilename": name, "size": len(data)} for name, data in self.state.files.items()]
        self._json({"_id": "1", "id": REPO, "sha": self.state.commits[revision], "siblings": siblings})

    def _tree(self, revision: str) -> None:
        if revision not in self.state.commits:
            return self._answer(404, {"X-Error-Code": "RevisionNotFound"}, b"")
        return self._json(
            [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.state.files.items()
            ]
        )

    def _json(self, content: object) -> None:
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def _file(self, revision: str, name: str, keep: int) -> None:
        if revision not in self.state.commits:
            return self._answer(404, {"X-Error-Code": "RevisionNotFound"}, b"")
        headers = {"X-Repo-Commit": self.state.commits[revision]}
        if name not in self.state.files:
            return self._answer(404, {**headers, "X-Error-Code": "EntryNotFound"}, b"")
        data = self.state.files[name]
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        if not name.endswith(".safetensors"):
            return self._content(data, {**headers, "ETag": etag}, keep)
        linked = {"X-Linked-Etag": etag, "X-Linked-Size": str(len(data)), "Location": f"/large/{name}"}
        # Another host, as far as a client can tell: it must not send its token there.
        linked["Location"] = self.state.endpoint.replace("127.0.0.1", "localhost") + linked["Location"]
        return self._answer(302, {**headers, **linked}, b"")

    def _content(self, data: bytes, headers: dict[str, str], keep: int) -> None:
        status = 200
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", "")):
            status, first = 206, int(match[1])
            headers = {**headers, "Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"}
            data = data[first:]
        self._answer(status, headers, data, keep)

    def _answer(self, status: int, headers: dict[str, str], body: bytes, keep: int = -1) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body if keep < 0 else body[:keep])
        if keep >= 0:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Tests read `Hub.requests` instead."""
