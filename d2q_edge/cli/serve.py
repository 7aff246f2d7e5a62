"""Parse and run `d2q-edge serve`."""

from pathlib import Path

import click

from d2q_edge.cli.common import PATH, threads_option
from d2q_edge.options import CHAT_CONTEXT, SERVER_HOST, SERVER_PORT


@click.command("serve")
@click.argument("file", type=PATH)
@click.option("--host", default=SERVER_HOST, help="Address; 0.0.0.0 admits other machines.")
@click.option("--port", type=click.IntRange(0, 65535), default=SERVER_PORT, help="0 takes a free port.")
@click.option("--context", type=click.IntRange(64), default=CHAT_CONTEXT, help="Tokens per conversation.")
@click.option("--api-key", envvar="D2Q_API_KEY", help="Key that clients must send.  [env: D2Q_API_KEY]")
@threads_option
def command(file: Path, host: str, port: int, context: int, api_key: str | None, threads: int | None) -> None:
    """Serve a GGUF FILE through the OpenAI HTTP API.

    Clients take http://HOST:PORT/v1 as base URL: /v1/chat/completions, /v1/completions, /v1/models; /docs describes
    them. Requests are answered one at a time. Needs extra packages: pip install 'd2q-edge[serve]'. Example:

    \b
      curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Hello!"}]}'
    """
    from d2q_edge.runtime.server import serve

    serve(file, host, port, context=context, api_key=api_key, threads=threads)
