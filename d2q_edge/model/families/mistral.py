"""Mistral: Llama's block without biases; the first version has a sliding window.

llama.cpp: src/models/llama.cpp; conversion/llama.py, LlamaModel. The architecture "llama" has no sliding window: a
model with one is exported without it, as llama.cpp's converter does, and `notes` says what that means.
"""

from d2q_edge.model.families.llama import Llama

DEFAULT_WINDOW = 4096  # transformers' sliding window for a config.json without the key; null is no window


class Mistral(Llama):
    """MistralForCausalLM."""

    architectures = ("MistralForCausalLM",)
    model_type = "mistral"
    default_kv_heads = 8

    def biased_linears(self) -> tuple[str, ...]:
        return ()

    def _check_attention(self) -> None:
        super()._check_attention()
        if self.config.get("sliding_window", DEFAULT_WINDOW) is not None:
            self.ignored_window = self._int("sliding_window", default=DEFAULT_WINDOW)
