"""The tokenizer of a Hugging Face model, as a GGUF wants it.

`reader` decides which kind a directory has; `bpe` and `sentencepiece` build the two kinds that llama.cpp has for the
models of ours. Nothing here tokenizes text or looks at the model's weights; export/tokenizer_check.py compares the
result.
"""

from d2q_edge.model.tokenizer.content import Tokenizer
from d2q_edge.model.tokenizer.reader import read_tokenizer

__all__ = ["Tokenizer", "read_tokenizer"]
