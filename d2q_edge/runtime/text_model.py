"""Continue texts with a GGUF file, token by token, by llama.cpp's samplers.

What has been read stays in the KV cache: a text that begins like the one before is only read from where it differs.
"""

import codecs
import ctypes
from collections.abc import Generator, Sequence
from pathlib import Path

from d2q_edge.errors import D2QError
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.options import LOADING, SAMPLING, LoadOptions, SamplingOptions
from d2q_edge.runtime.llama_model import LlamaModel

BATCH = 512
"""Tokens of a prompt that are read at once; Ctrl-C is heard in between."""
REPEAT_WINDOW = 64
"""Tokens that repeat_penalty counts for."""


class TextModel(LlamaModel):
    """A loaded model that continues texts.

    Attributes:
        context: tokens of text and continuation together.
    """

    def __init__(self, path: Path, context: int, threads: int | None = None, options: LoadOptions = LOADING) -> None:
        """Load a GGUF file; `context` is limited to the model's own. See LlamaModel.

        Raises:
            D2QError: see LlamaModel; or the file is damaged.
        """
        file = GGUFFile(path)
        file.check_blocks()
        self.context = min(context, file.context_length or context)
        super().__init__(path, self.context, threads, options)
        self._read: list[int] = []

    def continuation(
        self,
        tokens: Sequence[int],
        max_tokens: int | None,
        temperature: float,
        seed: int | None,
        sampling: SamplingOptions = SAMPLING,
    ) -> Generator[str, None, None]:
        """Yield the text that continues some tokens in pieces, until the model ends it or the context is full.

        Args:
            tokens: at least one.
            max_tokens: limit of the continuation; None for none.
            temperature: 0 always takes the most likely token.
            seed: of the sampling; None takes a random one.
            sampling: which tokens are candidates.

        Raises:
            D2QError: the tokens don't fit into the context, or llama.cpp fails.
        """
        if len(tokens) >= self.context:
            raise D2QError(f"a text of {len(tokens)} tokens exceeds the context of {self.context}")
        api, decoder = self._api, codecs.getincrementaldecoder("utf-8")("replace")
        sampler = self._sampler(temperature, seed, sampling)
        try:
            for token in tokens[-REPEAT_WINDOW:]:
                api.llama_sampler_accept(sampler, token)
            self._advance(tokens)
            room = self.context - len(tokens)
            for _ in range(room if max_tokens is None else min(room, max_tokens)):
                token = api.llama_sampler_sample(sampler, self._context, -1)
                if api.llama_vocab_is_eog(self._vocab, token):
                    break
                if piece := decoder.decode(self._piece(token)):
                    yield piece
                self._decode([token])
            if rest := decoder.decode(b"", True):
                yield rest
        finally:
            api.llama_sampler_free(sampler)

    def _advance(self, tokens: Sequence[int]) -> None:
        """Read tokens from where they differ from what was read before; the last one always, for its logits."""
        same = next((i for i, (old, new) in enumerate(zip(self._read, tokens, strict=False)) if old != new), None)
        kept = min(len(self._read), len(tokens)) if same is None else same
        kept = min(kept, len(tokens) - 1)
        memory = self._api.llama_get_memory(self._context)
        if not self._api.llama_memory_seq_rm(memory, 0, kept, -1):
            self._api.llama_memory_clear(memory, True)
            kept = 0
        self._read = self._read[:kept]
        for start in range(kept, len(tokens), BATCH):
            self._decode(tokens[start : start + BATCH])

    def _decode(self, tokens: Sequence[int]) -> None:
        """Read some tokens after those before."""
        array = (self._api.llama_token * len(tokens))(*tokens)
        if self._api.llama_decode(self._context, self._api.llama_batch_get_one(array, len(tokens))):
            raise D2QError(f"llama.cpp failed to evaluate the text: {self._log.cause}")
        self._read += tokens

    def _piece(self, token: int) -> bytes:
        """Return a token's bytes, none for a special one."""
        size = 256  # no token of a usual vocabulary is longer
        while True:
            buffer = ctypes.create_string_buffer(size)
            count: int = self._api.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def _sampler(self, temperature: float, seed: int | None, options: SamplingOptions) -> ctypes.c_void_p:
        """Chain samplers in llama.cpp's order; the caller frees the chain."""
        api = self._api
        parts = [api.llama_sampler_init_penalties(self.vocab_size, REPEAT_WINDOW, options.repeat_penalty, 0.0, 0.0)]
        if temperature > 0:
            parts += [
                api.llama_sampler_init_top_k(options.top_k),
                api.llama_sampler_init_top_p(options.top_p, 1),
                api.llama_sampler_init_min_p(options.min_p, 1),
                api.llama_sampler_init_temp(temperature),
                api.llama_sampler_init_dist(api.LLAMA_DEFAULT_SEED if seed is None else seed),
            ]
        else:
            parts.append(api.llama_sampler_init_greedy())
        chain: ctypes.c_void_p = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        for part in parts:
            api.llama_sampler_chain_add(chain, part)
        return chain
