"""A conversation with a GGUF file, in the words of its own chat template.

Knows messages and what an interruption leaves of them. Does not know the terminal (cli/chat.py). The template is
applied by llama-cpp-python; the part of the conversation that the model has read already is not read again.
"""

from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

from d2q_edge.errors import D2QError
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.runtime.generate import load

TEMPLATE_KEY = "tokenizer.chat_template"


def has_template(path: Path) -> bool:
    """Whether a file says how messages become text.

    Raises:
        D2QError: it can't be read.
    """
    return bool(GGUFFile(path).kv.get(TEMPLATE_KEY))


class Conversation:
    """A loaded model and the messages so far. Use in a with block, or call close()."""

    def __init__(
        self,
        path: Path,
        *,
        system: str | None = None,
        context: int = 4096,
        max_tokens: int | None = None,
        temperature: float = 0.7,
        seed: int | None = None,
        threads: int | None = None,
    ) -> None:
        """Load a file.

        Args:
            path: the GGUF file.
            system: the system message, if there is to be one.
            context: tokens of the whole conversation; what the model was made for is the limit.
            max_tokens: of one answer; None leaves it the whole context.
            temperature: 0 takes the likeliest token every time.
            seed: of the sampling; None takes another one every time.
            threads: None takes as many as there are CPUs for this process.

        Raises:
            D2QError: the file has no chat template or can't be loaded, or the runtime is not installed.
        """
        if not has_template(path):
            raise D2QError(
                f"{path} has no chat template, as models that only continue text have none: use "
                f'`d2q-edge run {path} -p "..."`'
            )
        self._start = [{"role": "system", "content": system}] if system else []
        self._options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
        self._model = load(path, context, seed, threads)
        self.context: int = self._model.n_ctx()
        """Tokens that the conversation can have."""
        self.messages: list[dict[str, str]] = []
        """What was said, as {"role": ..., "content": ...}."""
        self.reset()

    def __enter__(self) -> "Conversation":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model."""
        self._model.close()

    def reset(self) -> None:
        """Forget what was said, but for the system message."""
        self.messages = list(self._start)

    def answer(self, question: str) -> Generator[str, None, None]:
        """Yield the answer in pieces as they come.

        Closing the iterator, or an interruption, ends the answer: what was said of it stays in the conversation. When
        nothing was said, the question is forgotten too.

        Raises:
            D2QError: the conversation is longer than the context, or the template refuses it.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        said: list[str] = []
        try:
            pieces = self._model.create_chat_completion(messages=asked, stream=True, **self._options)
            with closing(pieces):
                for piece in pieces:
                    text = piece["choices"][0]["delta"].get("content")
                    if text:
                        said.append(text)
                        yield text
        except Exception as error:
            # The template is a program by strangers: there is no one exception for what it can raise.
            if "exceed context window" in str(error):
                raise D2QError(
                    f"the conversation no longer fits into {self.context} tokens: start again with /reset, or "
                    "with a larger --context"
                ) from error
            raise D2QError(f"the chat template, or llama.cpp, refuses the conversation: {error}") from error
        finally:
            if said:
                self.messages = [*asked, {"role": "assistant", "content": "".join(said)}]
