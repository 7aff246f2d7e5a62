"""Serve one GGUF file with llama-cpp-python's OpenAI-compatible server (the extra d2q-edge[serve])."""

import importlib
import ipaddress
import os
import socket
from pathlib import Path
from typing import Any

from d2q_edge import runtime
from d2q_edge.errors import D2QError
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.options import CHAT_CONTEXT, SERVER_HOST, SERVER_PORT
from d2q_edge.runtime.chat import TEMPLATE_KEY
from d2q_edge.runtime.generate import llama_options
from d2q_edge.runtime.process import say

EXTRA = "the server's packages are missing: pip install 'd2q-edge[serve]'"


def serve(
    path: Path,
    host: str = SERVER_HOST,
    port: int = SERVER_PORT,
    *,
    context: int = CHAT_CONTEXT,
    api_key: str | None = None,
    threads: int | None = None,
) -> None:
    """Answer requests until the process gets SIGINT or SIGTERM.

    Args:
        path: the GGUF file.
        host: address to listen on; any but a loopback address lets other machines in.
        port: port to listen on; 0 takes a free one, which the message on stderr names.
        context: tokens of one conversation; limited to the model's own context.
        api_key: bearer token that clients must send, if any.
        threads: number of CPU threads; None takes all CPUs that this process may use.

    Raises:
        D2QError: the runtime or a package is missing, the file can't be loaded, or the address can't be used.
    """
    runtime.require()
    file = GGUFFile(path)
    file.check_blocks()
    try:
        uvicorn: Any = importlib.import_module("uvicorn")
        app: Any = importlib.import_module("llama_cpp.server.app")
        settings: Any = importlib.import_module("llama_cpp.server.settings")
    except ImportError as error:
        raise D2QError(f"{EXTRA} ({error})") from error
    with _listen(host, port) as listener:
        if not file.kv.get(TEMPLATE_KEY):
            say("The file has no chat template: use /v1/completions, because /v1/chat/completions has to guess one.")
        if api_key is None and not _is_loopback(host):
            say("Everybody who can reach this address can use the server; --api-key makes it ask for a key.")
        # It would name a file whose settings replace those below.
        os.environ.pop("CONFIG_FILE", None)
        # Without logits_all=False the logits of every token of the context are kept, which can be gigabytes.
        options = {**llama_options(file, context, threads), "logits_all": False}
        model = settings.ModelSettings(model=str(path), model_alias=path.stem, **options)
        server = settings.ServerSettings(host=host, port=port, api_key=api_key)
        try:
            application = app.create_app(server_settings=server, model_settings=[model])
        except Exception as error:
            # llama.cpp's ValueError, or whatever jinja2 raises for an untrusted chat template.
            raise D2QError(f"llama.cpp can't load {path}: {error}") from error
        name = f"[{host}]" if ":" in host else host
        say(f"{path} is served at http://{name}:{listener.getsockname()[1]}/v1 (Ctrl-C ends)")
        try:
            uvicorn.Server(uvicorn.Config(application, log_level="warning")).run(sockets=[listener])
        except KeyboardInterrupt:
            return  # uvicorn has shut down and passes the signal on


def _listen(host: str, port: int) -> socket.socket:
    """Open a listening socket, before the model is loaded: a port in use is found at once."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
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
