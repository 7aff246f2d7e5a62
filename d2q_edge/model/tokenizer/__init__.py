"""Read the tokenizer of a Hugging Face model as GGUF needs it.

`reader` decides which of the two kinds a directory holds; `bpe` and `sentencepiece` build them. The result is compared
with the original tokenizer in export/tokenizer_check.py.
"""

from d2q_edge.model.tokenizer.content import Tokenizer
from d2q_edge.model.tokenizer.reader import read_tokenizer

__all__ = ["Tokenizer", "read_tokenizer"]
