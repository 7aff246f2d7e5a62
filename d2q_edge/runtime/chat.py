"""Talk to a GGUF file through its own chat template."""

from collections.abc import Generator
from contextlib import closing
from pathlib import Path

from d2q_edge.errors import D2QError
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.options import CHAT_CONTEXT, CHAT_TEMPERATURE, LOADING, SAMPLING, LoadOptions, SamplingOptions
from d2q_edge.runtime.text_model import TextModel

TEMPLATE_KEY = "tokenizer.chat_template"


class Conversation:
    """A loaded model and the messages so far. Use it in a with block, or call close().

    Attributes:
        context: tokens that the conversation can have.
        messages: the conversation, as {"role": ..., "content": ...}.
    """

    def __init__(
        self,
        path: Path,
        *,
        system: str | None = None,
        context: int = CHAT_CONTEXT,
        max_tokens: int | None = None,
        temperature: float = CHAT_TEMPERATURE,
        seed: int | None = None,
        threads: int | None = None,
        sampling: SamplingOptions = SAMPLING,
        loading: LoadOptions = LOADING,
    ) -> None:
        """Load a file.

        Args:
            path: the GGUF file.
            system: system message, if any.
            context: tokens of the whole conversation; limited to the model's own context.
            max_tokens: limit of one answer; None is what the context has room for.
            temperature: of the sampling; 0 always takes the most likely token.
            seed: of the sampling; None takes a random one.
            threads: number of CPU threads; None takes all CPUs that this process may use.
            sampling: which tokens are candidates.
            loading: adapters, types of the KV cache, repacking.

        Raises:
            D2QError: the file has no valid chat template or can't be loaded, or the runtime is not installed.
        """
        if not GGUFFile(path).kv.get(TEMPLATE_KEY):
            raise D2QError(
                f'{path} has no chat template, so it can only continue text: use `d2q-edge run {path} -p "..."`'
            )
        self._start = [{"role": "system", "content": system}] if system else []
        self._options = max_tokens, temperature, seed, sampling
        self._model = TextModel(path, context, threads, loading)
        self.context = self._model.context
        self._template = self._model.chat_template
        if (reason := self._template.syntax_error) is not None:
            self.close()
            raise D2QError(f"the chat template of {path} isn't valid ({reason}); `d2q-edge metadata` can replace it")
        self.messages: list[dict[str, str]] = list(self._start)

    def __enter__(self) -> "Conversation":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model."""
        self._model.close()

    def reset(self) -> None:
        """Forget all messages but the system message."""
        self.messages = list(self._start)

    def answer(self, question: str) -> Generator[str, None, None]:
        """Yield the answer in pieces as they are generated.

        Closing the iterator, or an interruption, ends the answer; the part generated so far stays in the conversation.
        If that is nothing, the question is forgotten, too.

        Raises:
            D2QError: the conversation is longer than the context, or the template refuses it.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        said: list[str] = []
        try:
            # The template is an untrusted program that can raise anything.
            tokens = self._model.tokenize(self._template.prompt(asked), add_special=False, read_special=True)
        except Exception as error:
            raise D2QError(f"the chat template refuses the conversation: {error}") from error
        if not tokens:
            raise D2QError("the chat template makes nothing of the conversation; `d2q-edge metadata` can replace it")
        if len(tokens) >= self.context:
            raise D2QError(
                f"the conversation no longer fits into {self.context} tokens: start again with /reset, or with a "
                "larger --context"
            )
        try:
            with closing(self._model.continuation(tokens, *self._options)) as pieces:
                for piece in pieces:
                    said.append(piece)
                    yield piece
        finally:
            if said:
                self.messages = [*asked, {"role": "assistant", "content": "".join(said)}]
