"""Render conversations by a model's chat template, as transformers does; or plainly for a model without one.

The template is an untrusted program: it runs in Jinja's sandbox, and what it raises is reported. See
https://huggingface.co/docs/transformers/chat_templating for what templates expect of their environment.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from d2q_edge.model.tokenizer import Tokenizer

TODAY = datetime.datetime(2026, 1, 1)
"""What templates that print the date are told, because the same command must give the same file on another day."""


class ChatTemplate:
    """A model's chat template.

    Attributes:
        refusals: reasons why it refused a conversation, which was rendered more simply then, with how often.
    """

    def __init__(self, template: str | None, special: Mapping[str, str]) -> None:
        """Take a template, or None for the plain form, and the texts of special tokens ("bos_token", ...)."""
        self._source, self._special = template, dict(special)
        self.refusals: dict[str, int] = {}

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ChatTemplate":
        """Return the chat template of a model's tokenizer."""
        special = {f"{role}_token": tokenizer.tokens[index] for role, index in tokenizer.special_ids.items()}
        templates = tokenizer.chat_template
        if isinstance(templates, list):
            templates = {entry["name"]: entry["template"] for entry in templates}.get("default")
            if tokenizer.default_template is not None:
                templates = tokenizer.default_template["template"]
        return cls(templates, special)

    def render(self, conversation: Mapping[str, Any]) -> str:
        """Return a conversation as text.

        One that the template refuses is rendered without the roles that some models lack, or else plainly.
        """
        if self._source is None:
            return plain(conversation)
        try:
            return self._render(conversation)
        except Exception as error:  # whatever an untrusted program raises
            reason = " ".join(str(error).split()) or type(error).__name__
        self.refusals[reason] = self.refusals.get(reason, 0) + 1
        try:
            return self._render({"messages": simplified(conversation)})
        except Exception:
            return plain(conversation)

    @property
    def syntax_error(self) -> str | None:
        """Return why the template can't be parsed; None if it can."""
        try:
            _ = self._template
        except Exception as error:  # whatever Jinja makes of untrusted text
            return " ".join(str(error).split()) or type(error).__name__
        return None

    @property
    def notes(self) -> tuple[str, ...]:
        """Return a sentence on the refused conversations, if there were any."""
        if not self.refusals:
            return ()
        reason, count = max(self.refusals.items(), key=lambda entry: entry[1])
        return (
            f"the chat template refuses {sum(self.refusals.values())} conversations ({count}: {reason[:200]}); they "
            "are used in a simpler form",
        )

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return what a model is given that is to answer now; raise whatever the template raises."""
        today = datetime.datetime.now().strftime
        return self._render({"messages": messages, "strftime_now": today}, add_generation_prompt=True)

    def _render(self, conversation: Mapping[str, Any], add_generation_prompt: bool = False) -> str:
        variables = {"tools": None, "documents": None, **self._special, **conversation}
        return self._template.render(**variables, add_generation_prompt=add_generation_prompt)

    @cached_property
    def _template(self) -> Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": TODAY.strftime}
        return environment.from_string(self._source or "")


def plain(conversation: Mapping[str, Any]) -> str:
    """Return a conversation for a base model: every message after its role."""
    return "".join(f"{message['role'].capitalize()}: {_text(message)}\n\n" for message in conversation["messages"])


def simplified(conversation: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the messages with the roles user and assistant only, which take turns."""
    turns: list[dict[str, str]] = []
    for message in conversation["messages"]:
        role = "assistant" if message["role"] == "assistant" else "user"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += f"\n\n{_text(message)}"
        else:
            turns.append({"role": role, "content": _text(message)})
    return turns


def _text(message: Mapping[str, Any]) -> str:
    """Return a message's text: its content, or the text parts of it, or the tools that it calls."""
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(part["text"] for part in content if isinstance(part, dict) and "text" in part)
    calls = message.get("tool_calls")
    return "\n".join([*([str(content)] if content else []), *([_to_json(calls)] if calls else [])])


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Write JSON without escaping HTML's characters, which Jinja's own filter does."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: where a template says what the model generates; it changes no text."""

    tags: ClassVar[set[str]] = {"generation"}  # type: ignore[misc]

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
