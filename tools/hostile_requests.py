"""Send hostile requests to `d2q-edge serve`, and report what isn't answered in order.

    python -m tools.hostile_requests model.gguf --requests 200 --seed 0
    python -m tools.hostile_requests model.gguf --seed 17 --requests 1 --verbose     # one request again

A request is determined by its seed: a good one for some endpoint, of which a part is replaced, removed or broken
(malformed JSON, grammars, schemas and templates, wrong types, unknown fields, prompts beyond the context). A finding is
a server that dies or stops to answer good requests, a status from 500 on, a refusal without a sentence, and one that
names a file of this machine.
"""

from __future__ import annotations

import copy
import http.client
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from d2q_edge.errors import D2QError, sentence
from tools.served import Server, serve

TIME_LIMIT = 60.0
"""Seconds for an answer."""
MACHINE = re.compile(r"(?:^|[\s\"'(=:])/(?:home|root|tmp|usr|etc|work|var|opt|proc)\b|\.(?:cpp|h|hpp|gguf)\b")
"""A path of the machine, or a source file's name."""
JSON = {"Content-Type": "application/json"}

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
CHAT: dict[str, Any] = {
    "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "Hi"}],
    "max_tokens": 4,
}
GOOD: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}),
    ("/v1/chat/completions", {**CHAT, "tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": True}),
    ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}),
    ("/v1/chat/completions", {**CHAT, "n": 1, "seed": 1, "logprobs": True, "top_logprobs": 2, "stop": ["x"]}),
    ("/v1/completions", {"prompt": "Once", "max_tokens": 4, "temperature": 0.5, "logit_bias": {"3": 1}, "top_p": 0.9}),
    ("/v1/completions", {"prompt": ["Once", [1, 2]], "max_tokens": 4, "echo": False, "stop": "x", "stream": False}),
    ("/completion", {"prompt": "Once", "n_predict": 4, "grammar": 'root ::= "a" [0-9]+', "samplers": ["top_k"]}),
    ("/completion", {"prompt": "Once", "n_predict": 4, "json_schema": SCHEMA, "id_slot": 0, "cache_prompt": True}),
    ("/completion", {"prompt": "Once", "n_predict": 4, "n_probs": 2, "lora": [], "dry_sequence_breakers": ["a"]}),
    ("/v1/responses", {"input": "Hi", "instructions": "s", "max_output_tokens": 4}),
    ("/v1/messages", {**CHAT, "messages": CHAT["messages"][1:], "system": "s"}),
    ("/v1/messages/count_tokens", {"messages": CHAT["messages"][1:]}),
    ("/apply-template", {"messages": CHAT["messages"]}),
    ("/tokenize", {"content": "Once", "add_special": True, "with_pieces": True}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
    ("/infill", {"input_prefix": "a", "input_suffix": "b", "input_extra": [{"text": "t"}], "n_predict": 4}),
    ("/v1/embeddings", {"input": "Hi", "encoding_format": "float"}),
    ("/v1/rerank", {"query": "a", "documents": ["b", "c"]}),
    ("/lora-adapters", {}),
    ("/slots/0?action=erase", {}),
    ("/slots/0?action=save", {"filename": "x"}),
    ("/v1/chat/completions/control", {"id": "x", "action": "end_reasoning"}),
    ("/v1/streams/lookup", {"conversation_ids": ["x"]}),
]
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, -(2**63), 2**70, 1e308, -1e308, 0.5, "", "x", "é\u0000\ufffd", "none",
    "9" * 400, [], [[]], {}, [None], [{}], {"a": None}, {"type": "text"}, [1, -1, 10**9], [["x", 1]], "{{ x", "{% if",
]  # fmt: skip
MESSAGES: list[Any] = [
    {"role": "assistant", "content": None}, {"role": "developer", "content": "d"}, {"role": "user"}, {"content": "x"},
    {"role": 3, "content": "x"}, {"role": "tool", "content": "x"}, {"role": "user", "content": [{"type": "video"}]},
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]},
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]},
    {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}]},
    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
    {"role": "user", "content": "refuse"}, {"role": "assistant", "content": "", "tool_calls": [{}]},
    {"role": "user", "content": {"text": "x"}}, "x", None, [],
]  # fmt: skip
GRAMMARS = [
    "root ::= ", "root ::= (", "x ::= x", "root ::= root", 'root ::= "a', "root ::= [a", 'root ::= "a"{9999999}', "::=",
    'root ::= a\na ::= b\nb ::= a "x" | a', "root ::= undefined", "\x00", "root ::= [^]", 'root ::= ("a"*)*',
    "root ::= " + "(" * 20_000, "root ::= " + '"a" | ' * 5000, 'root ::= "\\xZZ"', 'root ::= "a"{3,1}', "root",
]  # fmt: skip
CHAIN = {f"s{i}": {"type": "array", "items": {"$ref": f"#/$defs/s{i + 1}"}} for i in range(20_000)} | {"s20000": {}}
"""Schemas each of which leads to the next."""
SCHEMAS: list[Any] = [
    {"type": "x"}, {"type": 3}, {"$ref": "#/a/b"}, {"$ref": "#"}, {"$ref": "https://x.invalid/s"},
    {"$ref": "file:///etc/x"}, {"type": "string", "pattern": "("}, {"type": "string", "pattern": "^[a-$"},
    {"type": "string", "pattern": "a{9999999}"},
    {"type": "array", "minItems": 10**9}, {"type": "array", "items": 3}, {"enum": []}, {"enum": 3}, {"const": None},
    {"type": "string", "minLength": -1, "maxLength": -5}, {"properties": 3}, {"type": "object", "properties": {"a": 3}},
    {"anyOf": 3}, {"allOf": [3]}, {"type": ["integer", 3]}, {"type": "integer", "minimum": "x"}, {"format": "x"}, [],
    {"type": "integer", "minimum": 10, "maximum": -10}, "x",
    {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, {"$defs": CHAIN, "$ref": "#/$defs/s0"},
]  # fmt: skip


NESTED = "@nested"
"""Stands for schemas within each other, deeper than Python's json can write."""
DEPTHS = 50, 50_000


@dataclass(frozen=True)
class Request:
    """What is sent, and what was done to it."""

    method: str
    path: str
    body: bytes
    headers: dict[str, str]
    damage: str


def request(seed: int) -> Request:
    """Make a hostile request."""
    rng = random.Random(seed)
    path, good = copy.deepcopy(rng.choice(GOOD))
    chat = "/v1/chat/completions"
    kind = rng.choice(["value", "value", "value", "message", "grammar", "schema", "prompt", "text", "transport"])
    method, headers, damage = "POST", dict(JSON), kind
    if kind == "value":
        for _ in range(rng.choice([1, 1, 2])):
            damage += f" {_replace(rng, good)}"
    elif kind == "message":
        path, good = rng.choice(GOOD[:5] + [entry for entry in GOOD if "messages" in entry[1]])
        good = {**good, "messages": rng.choices([*MESSAGES, *CHAT["messages"]], k=rng.randint(1, 4))}
    elif kind == "grammar":
        path, good = "/completion", {"prompt": "Once", "n_predict": 4, "grammar": rng.choice(GRAMMARS)}
        if rng.random() < 0.3:
            path, good = chat, {**CHAT, "grammar": good["grammar"]}
    elif kind == "schema":
        schema = rng.choice([*SCHEMAS, NESTED])
        path, good = rng.choice([
            ("/completion", {"prompt": "Once", "n_predict": 4, "json_schema": schema}),
            (chat, {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}),
            (chat, {**CHAT, "response_format": {"type": "json_object", "schema": schema}}),
            (chat, {**CHAT, "tools": [{**TOOL, "function": {"name": "f", "parameters": schema}}]}),
        ])  # fmt: skip
    elif kind == "prompt":
        text: Any = rng.choice([
            "word " * rng.choice([300, 200_000]), [3] * 5000, [10**9], [-5], ["a"] * 300, [[]], "\x00", "",
        ])  # fmt: skip
        path, good = rng.choice([
            ("/completion", {"prompt": text, "n_predict": 4}),
            ("/v1/completions", {"prompt": text, "stream": True, "max_tokens": 4}),
            (chat, {"messages": [{"role": "user", "content": text}], "stream": rng.random() < 0.5}),
            ("/tokenize", {"content": text}), ("/infill", {"input_prefix": text, "input_suffix": "x"}),
        ])  # fmt: skip
    depth = rng.choice(DEPTHS)
    deep = '{"type":"array","items":' * depth + "{}" + "}" * depth
    body = json.dumps(good).replace(f'"{NESTED}"', deep).encode()
    if kind == "text":
        body = _break(rng, body)
    elif kind == "transport":
        method = rng.choice(["GET", "PUT", "DELETE", "OPTIONS", "POST", "HEAD"])
        path = rng.choice([
            path, "/", "/../../etc/passwd", "/v1/", "/slots/99", "/slots/x?action=erase", "/slots/0?action=x",
            path + "?x=%zz",
        ])  # fmt: skip
        headers["Content-Type"] = rng.choice([
            "text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "x",
        ])  # fmt: skip
    return Request(method, path, body, headers, damage)


def _replace(rng: random.Random, root: dict[str, Any]) -> str:
    """Replace or remove a part of a JSON object, or add one; return where."""
    new = rng.choice(["unknown_field", "n", "n_probs", "stop", "logit_bias", "grammar_triggers"])
    places: list[tuple[Any, Any]] = [(root, new)]
    stack: list[Any] = [root]
    while stack:
        node = stack.pop()
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        places += [(node, key) for key in keys]
        stack += [node[key] for key in keys if isinstance(node[key], (dict, list))]
    node, key = rng.choice(places)
    if isinstance(node, dict) and key in node and rng.random() < 0.15:
        del node[key]
    else:
        node[key] = copy.deepcopy(rng.choice([*VALUES, NESTED]))
    return str(key)


def _break(rng: random.Random, body: bytes) -> bytes:
    """Make JSON malformed."""
    at = rng.randrange(len(body))
    return rng.choice([
        body[:at], body[:at] + bytes(rng.randrange(256) for _ in range(3)) + body[at + 1 :], b"", b"null", b"[]", b"3",
        b'"x"', body + b"}", b"\xff\xfe" + body, b"[" * 100_000, b'{"a":' * 20_000, body.replace(b'"', b"'"),
        body.replace(b":", b": NaN,", 1), body.replace(b"e", b"\xc3", 1),
    ])  # fmt: skip


def fault(server: Server, sent: Request) -> tuple[str, int, str]:
    """Send a request; return what is wrong with the answer, or "", its status and its text."""
    connection = http.client.HTTPConnection(*server.address, timeout=TIME_LIMIT)
    try:
        connection.request(sent.method, sent.path, sent.body, sent.headers)
        answer = connection.getresponse()
        status, text = answer.status, answer.read().decode("utf-8")
        kind = answer.headers.get("Content-Type", "")
    except (OSError, http.client.HTTPException, UnicodeDecodeError) as error:
        return f"no answer: {type(error).__name__}: {error}", 0, ""
    finally:
        connection.close()
    errors = [status] if status >= 400 else []
    messages = [text]
    try:
        if "event-stream" in kind:
            events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
            refusals = [event["error"] for event in events if "error" in event]
            errors += [refusal["code"] for refusal in refusals]
            messages = [refusal["message"] for refusal in refusals]
        elif errors and sent.method != "HEAD" and not kind.startswith("text/"):
            messages = [json.loads(text)["error"]["message"]]
    except (ValueError, KeyError, TypeError):
        return "no sentence", status, text
    if any(code >= 500 for code in errors):
        return f"status {max(errors)}", status, text
    if errors and sent.method != "HEAD" and not all(message.strip() for message in messages):
        return "no sentence", status, text
    if errors and any(MACHINE.search(message) for message in messages):
        return "names a file of this machine", status, text
    return "", status, text


def run(server: Server, seeds: range) -> Iterator[tuple[int, Request, str, int, str]]:
    """Send the requests of these seeds; yield each with what is wrong, the status and the text of the answer.

    Raises:
        D2QError: the server has died, or doesn't answer a good request any more.
    """
    good = Request("POST", "/completion", json.dumps({"prompt": "Once", "n_predict": 2}).encode(), JSON, "")
    for seed in seeds:
        sent = request(seed)
        yield (seed, sent, *fault(server, sent))
        wrong, status, text = fault(server, good)
        if wrong or status != 200:
            raise D2QError(
                f"after the request of seed {seed} ({sent.damage}), a good one gets {wrong or status}: {text}"
            )


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--requests", type=click.IntRange(1), default=200, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the first request.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[-- OPTIONS]")
@click.option("--verbose", is_flag=True, help="Print every request and its answer.")
def main(file: Path, options: tuple[str, ...], requests: int, seed: int, verbose: bool) -> None:
    """Serve a GGUF FILE with two slots and a context of 256 tokens, and OPTIONS, and send hostile requests."""
    counts: Counter[int] = Counter()
    findings = 0
    try:
        with serve(file, "--context", 256, "--parallel", 2, *options) as server:
            memory = server.memory
            for number, sent, wrong, status, text in run(server, range(seed, seed + requests)):
                counts[status] += 1
                findings += bool(wrong)
                if wrong or verbose:
                    click.echo(f"seed {number} ({sent.damage}) {sent.method} {sent.path} {sent.body[:300]!r}")
                    click.echo(f"  {wrong or status}: {text[:400]}")
            grown = server.memory - memory
    except D2QError as error:
        raise click.ClickException(sentence(error)) from error
    statuses = ", ".join(f"{status}: {count}" for status, count in sorted(counts.items()))
    click.echo(f"{requests} requests, {findings} findings; by status {statuses}; memory grew by {grown >> 20} MiB")
    raise SystemExit(bool(findings))


if __name__ == "__main__":
    main()
