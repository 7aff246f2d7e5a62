"""A session of OpenAI's own Python client with `serve`."""

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.availability import require_server
from tools.served import Server, serve

pytestmark = pytest.mark.slow
KEY = "secret"
QUESTION = [{"role": "user", "content": "Who is there?"}]
PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["Tom", "Ann"]}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": CITY}}]
TEMPLATE = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content %}{{ message.content }}{% endif %}{% for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def server(chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    require_server()
    template = tmp_path_factory.mktemp("template") / "tools.jinja"
    template.write_text(TEMPLATE)
    options = ("--context", 1024, "--parallel", 2, "--threads", 1, "--api-key", KEY)
    with serve(chat_file, *options, "--", "--chat-template-file", template) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


def ask(client: Any, messages: Any = QUESTION, tokens: int = 8, **options: Any) -> Any:
    options = {"temperature": 0, "max_completion_tokens": tokens, **options}
    return client.chat.completions.create(model="chat", messages=messages, **options)


def test_model_and_key(server: Server, client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["chat"]
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="other", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_streamed_answer_is_the_answer(client: Any) -> None:
    # A prompt in the cache is computed in other batches, whose rounding decides where two tokens are about as likely.
    anew: dict[str, Any] = {"extra_body": {"cache_prompt": False}}
    whole = ask(client, **anew)
    assert (whole.usage.completion_tokens, whole.choices[0].finish_reason) == (8, "length")
    events = list(ask(client, stream=True, stream_options={"include_usage": True}, **anew))
    pieces = [event.choices[0].delta.content for event in events if event.choices]
    assert len(pieces) > 4
    assert "".join(piece or "" for piece in pieces) == whole.choices[0].message.content
    assert events[-1].usage.completion_tokens == 8


def test_two_answers_in_one_stream(client: Any) -> None:
    events = list(ask(client, stream=True, n=2, temperature=1))
    ends = {choice.index: choice.finish_reason for event in events for choice in event.choices}
    assert ends == {0: "length", 1: "length"}


def test_roles_and_empty_messages(client: Any) -> None:
    history = [{"role": "developer", "content": "Be short."}, {"role": "assistant", "content": None}, *QUESTION]
    assert ask(client, history).choices[0].message.content


def test_two_at_once(client: Any) -> None:
    first = iter(ask(client, tokens=200, stream=True, logit_bias={"4093": -100}))
    next(first)
    assert ask(client).choices[0].finish_reason == "length", "the second one doesn't wait"
    rest = list(first)
    assert len(rest) > 20, "the first one goes on"
    assert rest[-1].choices[0].finish_reason == "length"


def test_json_schema(client: Any) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    said = ask(client, tokens=400, response_format=wanted).choices[0]
    assert said.finish_reason == "stop"
    person = json.loads(said.message.content)
    assert person["name"] in ("Tom", "Ann")
    assert person["age"] in range(1, 100)


def test_tools(client: Any) -> None:
    # llama.cpp allows text before a call, and this model would never end it.
    begun = [*QUESTION, {"role": "assistant", "content": "<tool_call>\n"}]
    options = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    said = ask(client, begun, tokens=400, **options).choices[0]
    assert said.finish_reason == "tool_calls"
    call = said.message.tool_calls[0]
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    answered = [*QUESTION, said.message.model_dump(exclude_none=True)]
    answered.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
    assert ask(client, answered, tools=TOOLS).choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_that_is_too_long(client: Any, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError, match=r"exceeds the available context size \(1024 tokens\)"):
        ask(client, [{"role": "user", "content": "word " * 3000}], stream=stream)


def test_what_the_server_was_not_started_for(client: Any) -> None:
    """The client would ask again if the status were one of the server's faults, as llama.cpp's 501."""
    with pytest.raises(openai.BadRequestError, match="does not support embeddings"):
        client.embeddings.create(model="chat", input="x")


def test_client_that_hangs_up(server: Server, client: Any) -> None:
    before = predicted(server)
    stream = ask(client, tokens=900, stream=True, logit_bias={"4093": -100})
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 20
    while any(slot["is_processing"] for slot in json.loads(get(server, "/slots"))):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert ask(client).choices[0].message.content
    assert predicted(server) - before < 500, "the answer that nobody reads is not continued"


def predicted(server: Server) -> int:
    found = re.search(r"^llamacpp:tokens_predicted_total (\d+)", get(server, "/metrics"), re.MULTILINE)
    assert found
    return int(found[1])


def get(server: Server, path: str) -> str:
    request = urllib.request.Request(server.url + path, headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return str(response.read().decode())
