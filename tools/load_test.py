"""Load `d2q-edge serve` with several clients, and check every answer.

    python -m tools.load_test model.gguf --seconds 180

Half of the requests are streamed, and some of those are given up after a few pieces. Each asks, by a grammar, for an
answer that begins with a number of its own: an answer with another one has got tokens of another request. A finding is
such an answer, one that isn't whole (a finish reason, valid UTF-8, the usage, the end of the stream), a refusal, and
memory that grows by more than MEMORY_GROWTH after the first quarter of the time. With --alone there is one slot, no
prompt cache and temperature 0: answers under load equal those that are given alone.
"""

from __future__ import annotations

import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from d2q_edge.errors import D2QError, sentence
from tools.served import Server, serve

MEMORY_GROWTH = 16 << 20
WORDS = "the", "old", "man", "said", "that", "nothing", "in", "this", "house", "was", "his", "own", "and", "so", "he"
KINDS = "whole", "streamed", "given up"


@dataclass
class Load:
    """What happens while clients are busy.

    Attributes:
        finished: number of requests that ended as they should, by kind.
        findings: what was wrong with the others.
        memory: resident bytes of the server, by the time since the start in seconds.
    """

    finished: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)

    @property
    def growth(self) -> int:
        """Bytes by which memory has grown after the first quarter of the time."""
        begin = [size for second, size in self.memory if second >= self.memory[-1][0] / 4]
        return self.memory[-1][1] - begin[0]


def question(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """Make a request to /v1/completions; return the number that its answer must begin with, and the request."""
    mark = "".join(rng.choices("0123456789", k=8))
    prompt = f"{mark} " + " ".join(rng.choices(WORDS, k=rng.randint(4, 60)))
    grammar = f'root ::= "{mark} " .*'
    return mark, {"prompt": prompt, "grammar": grammar, "max_tokens": rng.randint(12, 80), "temperature": 0.8}


def ask(server: Server, body: dict[str, Any], pieces: int | None = None) -> tuple[str, str]:
    """Send a request; return the text of its answer and what is wrong with that, or "".

    Args:
        server: whom to ask.
        body: the request; streamed if it says so.
        pieces: hang up after as many pieces of the stream; None reads it to its end.
    """
    data = json.dumps({**body, "stream_options": {"include_usage": True}} if body.get("stream") else body).encode()
    request = urllib.request.Request(f"{server.url}/v1/completions", data, {"Content-Type": "application/json"})
    text, reason, usage, ended = "", None, None, not body.get("stream")
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            for line in answer if body.get("stream") else [b"data: " + answer.read()]:
                if not line.startswith(b"data: "):
                    continue
                event = line[6:].decode("utf-8").strip()
                if event == "[DONE]":
                    ended = True
                    continue
                found = json.loads(event)
                usage = found.get("usage") or usage
                for choice in found["choices"]:
                    text, reason = text + choice["text"], choice["finish_reason"] or reason
                if pieces is not None and (pieces := pieces - 1) <= 0:
                    return text, ""
    except urllib.error.HTTPError as error:
        return text, f"status {error.code}: {error.read()[:200]!r}"
    except (OSError, ValueError, KeyError) as error:
        return text, f"{type(error).__name__}: {error}"
    if reason not in ("stop", "length") or not usage or not ended:
        return text, f"not whole: finish reason {reason}, usage {usage}, {'ended' if ended else 'cut off'}"
    return text, ""


def run(server: Server, clients: int, seconds: float, seed: int = 0) -> Load:
    """Load a server for some seconds with as many clients as are wanted."""
    load, end = Load(), time.monotonic() + seconds

    def client(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        while time.monotonic() < end:
            kind = rng.choices(KINDS, (5, 4, 1))[0]
            mark, body = question(rng)
            pieces = rng.randint(1, 5) if kind == "given up" else None
            text, wrong = ask(server, {**body, "stream": kind != "whole"}, pieces)
            if not wrong and text[:9] != f"{mark} "[: len(text) if pieces else 9]:
                wrong = f"not the answer to {mark}: {text!r}"
            if wrong:
                load.findings.append(f"{kind}: {wrong}")
            else:
                load.finished[kind] += 1

    _all_at_once(client, clients, server, load)
    return load


def compare(server: Server, clients: int, rounds: int, seed: int = 0) -> Load:
    """Ask a server of one slot the same questions alone and all at once."""
    load, rng = Load(), random.Random(seed)
    bodies = [{**question(rng)[1], "temperature": 0, "cache_prompt": False} for _ in range(clients * rounds)]
    alone = [ask(server, body)[0] for body in bodies]

    def client(number: int) -> None:
        for index in range(number, len(bodies), clients):
            text, wrong = ask(server, bodies[index])
            wrong = wrong or (f"alone {alone[index]!r}, under load {text!r}" if text != alone[index] else "")
            if wrong:
                load.findings.append(wrong)
            else:
                load.finished["as alone"] += 1

    _all_at_once(client, clients, server, load)
    return load


def _all_at_once(client: Callable[[int], None], clients: int, server: Server, load: Load) -> None:
    start = time.monotonic()
    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        load.memory.append((time.monotonic() - start, server.memory))
        time.sleep(0.25)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--seconds", type=float, default=180.0, show_default=True)
@click.option("--clients", type=click.IntRange(1), default=8, show_default=True)
@click.option("--slots", type=click.IntRange(1), default=4, show_default=True)
@click.option("--alone", is_flag=True, help="One slot: compare answers under load with those given alone.")
@click.option("--seed", type=int, default=0, show_default=True)
def main(file: Path, seconds: float, clients: int, slots: int, alone: bool, seed: int) -> None:
    """Serve a GGUF FILE and load it."""
    try:
        with serve(file, "--context", 256, "--parallel", 1 if alone else slots) as server:
            load = compare(server, clients, 10, seed) if alone else run(server, clients, seconds, seed)
    except D2QError as error:
        raise click.ClickException(sentence(error)) from error
    for finding in load.findings[:20]:
        click.echo(finding)
    sizes = [size >> 20 for _, size in load.memory]
    click.echo(f"finished: {dict(load.finished)}; findings: {len(load.findings)}")
    grown = f"{load.growth / 2**20:.1f} more than after a quarter of the time"
    click.echo(f"memory in MiB: {sizes[0]} at first, {max(sizes)} at most, {sizes[-1]} at the end, {grown}")
    raise SystemExit(bool(load.findings) or load.growth > MEMORY_GROWTH)


if __name__ == "__main__":
    main()
