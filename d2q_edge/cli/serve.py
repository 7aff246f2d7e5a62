"""Parse and run `d2q-edge serve`."""

from pathlib import Path

import click

from d2q_edge.cli.common import PATH, field_option, threads_option
from d2q_edge.options import CACHE_TYPES, ServerOptions


@click.command("serve")
@click.argument("file", type=PATH)
@click.argument("rest", nargs=-1, type=click.UNPROCESSED, metavar="[-- OPTIONS]")
@field_option(ServerOptions, "host", help="Address; 0.0.0.0 admits other machines.")
@field_option(ServerOptions, "port", type=click.IntRange(0, 65535), help="0 takes a free port.")
@field_option(ServerOptions, "context", type=click.IntRange(64), help="Tokens per conversation.")
@field_option(ServerOptions, "parallel", type=click.IntRange(1, 256), help="Conversations at the same time.")
@click.option("--api-key", envvar="D2Q_API_KEY", help="Key that clients must send.  [env: D2Q_API_KEY]")
@field_option(ServerOptions, "cache_type_k", type=click.Choice(CACHE_TYPES), help="Type of the context's keys.")
@field_option(ServerOptions, "cache_type_v", type=click.Choice(CACHE_TYPES), help="Type of the context's values.")
@click.option("--lora", type=PATH, multiple=True, help="Adapter, a GGUF file; may be repeated.")
@field_option(ServerOptions, "repack", help="Let llama.cpp rearrange weights for speed.")
@threads_option
def command(file: Path, rest: tuple[str, ...], **options: object) -> None:
    """Serve a GGUF FILE with llama.cpp's server, through the OpenAI HTTP API.

    Clients take http://HOST:PORT/v1 as base URL. Ctrl-C and SIGTERM end it (exit code 0). The first time, the server is
    built, which takes some minutes. Options of llama-server can follow after --. Example:

    \b
      d2q-edge serve model.gguf --parallel 4 -- --cache-ram 1024
      curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Hello!"}]}'
    """
    from d2q_edge.runtime.llama_server import serve

    if rest and not rest[0].startswith("-"):
        raise click.UsageError(f"One file is served, and {rest[0]} is another.")
    serve(file, ServerOptions(**options), rest)  # type: ignore[arg-type]
