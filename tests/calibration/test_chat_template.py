"""Conversations as text, against transformers' own rendering."""

from dataclasses import replace
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from d2q_edge.calibration.chat_template import ChatTemplate
from d2q_edge.model.tokenizer import Tokenizer, read_tokenizer
from tests.checkpoints import EXAMPLE

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
TURNS = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {{- raise_exception('System role not supported') }}
{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate') }}
    {%- endif %}
    {{- '[' + message['role'] + ']' + message['content'] | trim }}
{%- endfor %}
"""
TOOLS = """{% if tools %}{{ tools | tojson }}
{% endif %}
    {% for message in messages %}
{% if loop.first %}{% continue %}{% endif %}
{% if message.tool_calls %}{{ message.tool_calls | tojson(indent=2) }}{% endif %}
{{ message.role }}{% generation %}: {{ message.content }}{% endgeneration %}{{ eos_token }}
{% if loop.index > 4 %}{% break %}{% endif %}
{% endfor %}"""
DATE = "{{ strftime_now('%d %B %Y') }}"

QUESTION: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Is 2 < 3 & 'so on'? "}, {"role": "assistant", "content": "Ja, größer."}]
}
WITH_TOOLS: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Use <b>tools</b>."},
        {"role": "user", "content": "How warm is it?"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"where": "Köln"}}}]},
        {"role": "tool", "content": '{"t": 3}'},
        {"role": "assistant", "content": "3 °C"},
    ],
    "tools": [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}],
}


@pytest.mark.parametrize("template", [CHATML, TURNS, TOOLS])
@pytest.mark.parametrize("conversation", [QUESTION, WITH_TOOLS], ids=["question", "tools"])
def test_as_transformers(template: str, conversation: dict[str, Any]) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Backend(BPE()), chat_template=template, **SPECIAL)
    try:
        expected = tokenizer.apply_chat_template(
            conversation["messages"], tools=conversation.get("tools"), tokenize=False
        )
    except Exception:
        expected = None
    found = ChatTemplate(template, SPECIAL)
    rendered = found.render(conversation)
    assert (expected is None) == bool(found.refusals)
    if expected is not None:
        assert rendered == expected


def test_refused_roles_are_folded() -> None:
    template = ChatTemplate(TURNS, SPECIAL)
    rendered = template.render(WITH_TOOLS)
    assert rendered.startswith("<s>[user]Use <b>tools</b>.\n\nHow warm is it?[assistant][{")
    assert '"where": "Köln"' in rendered
    assert rendered.endswith('[user]{"t": 3}[assistant]3 °C')
    template.render(WITH_TOOLS)
    assert template.notes == (
        "the chat template refuses 2 conversations (2: System role not supported); they are used in a simpler form",
    )


@pytest.mark.parametrize("template", ["{% for", "{{ ''.__class__.__mro__ }}{{ 1 / 0 }}", "{{ messages.pop() }}"])
def test_broken_template(template: str) -> None:
    found = ChatTemplate(template, SPECIAL)
    assert found.render(QUESTION) == "User: Is 2 < 3 & 'so on'? \n\nAssistant: Ja, größer.\n\n"
    assert sum(found.refusals.values()) == 1


def test_without_a_template() -> None:
    found = ChatTemplate(None, SPECIAL)
    parts = {
        "role": "user",
        "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}],
    }
    assert found.render({"messages": [parts]}) == "User: a\nb\n\n"
    assert found.notes == ()


def test_the_date_is_always_the_same() -> None:
    assert ChatTemplate(DATE, {}).render(QUESTION) == "01 January 2026"


@pytest.mark.parametrize(
    ("templates", "expected"),
    [
        (None, "User: Is"),
        ("a", "a"),
        ([], "User: Is"),
        ([{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "rag", "template": "r"}, {"name": "tool_use", "template": "t"}], "t"),
        ([{"name": "rag", "template": "r"}], "r"),
    ],
)
def test_choice(templates: Any, expected: str) -> None:
    tokenizer = replace(read_example_tokenizer(), chat_template=templates)
    assert ChatTemplate.of(tokenizer).render(QUESTION).startswith(expected)


def read_example_tokenizer() -> Tokenizer:
    return read_tokenizer(EXAMPLE, {}, 4096)
