"""The vocabulary of a GGUF file as the patched llama-cpp-python tokenizes with it; no weights are loaded.

Does not know what the tokens are compared with (verify.py).
"""

from pathlib import Path

from d2q_edge.runtime.llama_file import LlamaFile


class LlamaVocabulary(LlamaFile):
    """A loaded vocabulary. Use in a with block, or call close()."""

    def __init__(self, path: Path) -> None:
        """Load it.

        Raises:
            D2QError: the runtime is not installed, or llama.cpp refuses the file.
        """
        super().__init__(path, vocab_only=True)

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text.

        Args:
            text: what to tokenize; without surrogates.
            special: add the special tokens that the file says, and find special tokens in the text.

        Raises:
            D2QError: llama.cpp fails.
        """
        return self.ids(text, add_special=special, read_special=special)
