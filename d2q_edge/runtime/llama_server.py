"""Serve a GGUF file with llama.cpp's own server, llama-server: its command line, its log and its end."""

import ctypes
import ipaddress
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from d2q_edge.errors import D2QError
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.options import ServerOptions
from d2q_edge.runtime.build import install
from d2q_edge.runtime.chat import TEMPLATE_KEY
from d2q_edge.runtime.process import say
from d2q_edge.runtime.tools import SERVER, Tools, environment, server_directory
from d2q_edge.utils.machine import usable_cpus

DEFAULTS = (
    *("--cors-origins", "localhost"),  # web pages of other sites get no answer
    *("--cache-ram", "0"),  # otherwise up to 8 GiB of earlier prompts stay in memory
    *("--fit", "off"),  # the context is what was asked for
    *("--metrics", "--log-prefix", "--log-colors", "off"),
)
"""Arguments that the user's override."""
READY = re.compile(r"listening on (\S+)$")
LOG_LINE = re.compile(r"^(?:[\d.]+ )?([IWED]) (.*)$")
"""Level and message, with or without a time before them."""
CAUSE = "error loading model: "
LAST = 20
"""Errors that are kept."""
GRACE = 20.0
"""Seconds that the server has to end after a signal."""
_PR_SET_PDEATHSIG = 1


def serve(path: Path, options: ServerOptions, rest: Sequence[str] = (), program: Path | None = None) -> None:
    """Answer requests until the process gets SIGINT, SIGTERM or SIGHUP; call it in the main thread.

    Args:
        path: the GGUF file.
        options: how to serve it.
        rest: more arguments of llama-server; they win.
        program: llama-server; None takes the cache's, and builds it if it is missing.

    Raises:
        D2QError: a file is missing or can't be loaded, the address can't be used, the server can't be built, or fails.
    """
    file = GGUFFile(path)
    file.check_blocks()
    for adapter in options.lora:
        if not adapter.is_file():
            raise D2QError(f"there is no adapter {adapter}")
    _check_address(options.host, options.port)
    if program is None and (program := Tools(server_directory()).path(SERVER)) is None:
        say(f"{SERVER} isn't built yet; this is needed once.")
        install(server=True)
        program = Tools(server_directory()).find(SERVER)
    if not file.kv.get(TEMPLATE_KEY):
        say("The file has no chat template: use /v1/completions, because /v1/chat/completions has to guess one.")
    if options.api_key is None and not _is_loopback(options.host):
        say("Everybody who can reach this address can use the server; --api-key makes it ask for a key.")
    _Process(path, [str(program), *arguments(file, options, program.parent / "page"), *rest], options.api_key).run()


def arguments(file: GGUFFile, options: ServerOptions, page: Path) -> list[str]:
    """Return llama-server's arguments for a file; the folder `page`, if it exists, stands in for its web page."""
    context = min(options.context, file.context_length or options.context)
    threads = str(options.threads or usable_cpus())
    alias = file.path.stem.replace(",", "_")  # commas separate several names
    found = ["--model", str(file.path), "--alias", alias, "--host", options.host, "--port", str(options.port)]
    found += ["--ctx-size", str(context * options.parallel), "--parallel", str(options.parallel)]
    found += ["--threads", threads, "--threads-batch", threads]
    found += ["--cache-type-k", options.cache_type_k, "--cache-type-v", options.cache_type_v]
    if not options.repack:
        found.append("--no-repack")
    for adapter in options.lora:
        found += ["--lora", _quoted(str(adapter))]
    return [*found, *DEFAULTS, *(("--path", str(page)) if page.is_dir() else ())]


def _quoted(path: str) -> str:
    """Quote a path for an option of llama-server that takes several ones as a line of a CSV file."""
    doubled = path.replace('"', '""')
    return f'"{doubled}"' if "," in path or '"' in path else path


class _Process:
    """A running llama-server. Signals to this process are passed on to it; its log is printed without the chatter."""

    def __init__(self, path: Path, command: list[str], api_key: str | None) -> None:
        self._path, self._command = path, command
        # Not among the arguments, which every user of the machine can see.
        self._variables = {**environment(), **({"LLAMA_API_KEY": api_key} if api_key else {})}
        self._errors: list[str] = []
        self._signal: int | None = None
        self._ready = False
        self._process: subprocess.Popen[str] | None = None
        self._killer: threading.Timer | None = None

    def run(self) -> None:
        """Start the server and follow it to its end; raise a D2QError unless it ends in order after a signal."""
        ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        # nohup and shells in the background have signals ignored.
        before = {number: signal.getsignal(number) for number in ending if signal.getsignal(number) != signal.SIG_IGN}
        for number in before:
            signal.signal(number, self._end)
        try:
            code = self._follow()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        # One that is still loading has no handler of its own.
        if self._signal is None or code not in (0, -self._signal):
            how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
            did = f"{SERVER} ended" if self._ready or self._signal else f"llama.cpp can't serve {self._path}"
            raise D2QError(f"{did} ({how}): {self._reason()}")

    def _follow(self) -> int:
        try:
            # In a session of its own, so that Ctrl-C at the terminal doesn't reach it twice, which would cut it off.
            with subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=self._variables,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
                text=True,
                errors="replace",
            ) as self._process:
                try:
                    if self._signal is not None:
                        self._pass_on(self._process)
                    assert self._process.stdout is not None
                    for line in self._process.stdout:
                        self._read(line.rstrip())
                except BaseException:
                    self._process.kill()
                    raise
            return self._process.returncode
        except OSError as error:
            raise D2QError(f"{self._command[0]} can't be started ({error.strerror})") from error

    def _end(self, number: int, _: object) -> None:
        self._signal = number
        if self._process is not None:
            self._pass_on(self._process)

    def _pass_on(self, process: subprocess.Popen[str]) -> None:
        """Send the last signal; have the server killed if it doesn't end then."""
        if self._killer is None:
            self._killer = threading.Timer(GRACE, process.kill)
            self._killer.daemon = True
            self._killer.start()
        process.send_signal(self._signal or signal.SIGTERM)

    def _read(self, line: str) -> None:
        found = LOG_LINE.match(line)
        level, message = (found[1], found[2]) if found else ("", line)
        if level == "E" or message.startswith("error"):
            self._errors = [*self._errors, message][-LAST:]
        if match := READY.search(message):
            self._ready = True
            say(f"{self._path} is served at {match[1]}/v1 (Ctrl-C ends)")
        elif level in ("W", "E", "D") and self._ready and not self._signal:
            say(message)

    def _reason(self) -> str:
        causes = [error.partition(CAUSE)[2] for error in self._errors if CAUSE in error]
        # The name of the function comes before a message. The first error is the cause of the others.
        return [*causes, *(error.partition(": ")[2] or error for error in self._errors), "it gave no reason"][0].strip()


def _die_with_parent() -> None:
    """Have Linux end the server when this process is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _check_address(host: str, port: int) -> None:
    """Raise a D2QError if nothing can listen there, before the model is loaded."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port), family=family).close()
    except (OSError, UnicodeError) as error:
        # strerror has the address appended; a resolver's error codes are negative.
        code = getattr(error, "errno", None) or 0
        reason = os.strerror(code) if code > 0 else getattr(error, "strerror", None) or error
        raise D2QError(f"can't listen on {host}, port {port} ({reason}): choose others by --host, --port") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
