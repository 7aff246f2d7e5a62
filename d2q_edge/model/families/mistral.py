"""Mistral: Llama's architecture without biases, in its first versions with a sliding window.

llama.cpp runs it as "llama" (src/models/llama.cpp, conversion/llama.py), which has no sliding window: a model with one
is exported as its converter does it, and `notes` says what that means.
"""

from __future__ import annotations

from d2q_edge.model.families.llama import Llama

DEFAULT_WINDOW = 4096
"""The window that transformers takes when config.json doesn't have the key; null is no window."""


class Mistral(Llama):
    """MistralForCausalLM."""

    architectures = ("MistralForCausalLM",)
    model_type = "mistral"
    default_kv_heads = 8

    def biased_linears(self) -> tuple[str, ...]:
        return ()

    def sliding_window(self, index: int) -> int | None:
        return self._window()

    @property
    def notes(self) -> tuple[str, ...]:
        return self._window_note(self._window())

    def _window(self) -> int | None:
        if self.config.get("sliding_window", DEFAULT_WINDOW) is None:
            return None
        return self._int("sliding_window", default=DEFAULT_WINDOW)

    def _check_attention(self) -> None:
        super()._check_attention()
        self._window()
