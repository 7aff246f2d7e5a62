"""A server whose answers a test decides."""

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tools.served import Server


@contextmanager
def canned(status: int, kind: str, body: bytes) -> Iterator[Server]:
    """Answer every POST with this; status 0 hangs up."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if status:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with subprocess.Popen(["true"]) as process:
            yield Server(f"http://127.0.0.1:{server.server_port}", process)
        server.shutdown()
