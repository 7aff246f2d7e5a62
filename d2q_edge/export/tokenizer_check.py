"""Check that a file tokenizes text in llama.cpp as the model does in transformers.

The probe is a list of texts (data/tokenizer_probe.json), the model's special tokens within text, and a sample of its
vocabulary. Kinds of text that llama.cpp is known to tokenize in another way (`Tokenizer.gaps`) are mentioned, not
refused.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from d2q_edge import runtime
from d2q_edge.errors import D2QError
from d2q_edge.model.tokenizer import Tokenizer
from d2q_edge.runtime.llama_model import LlamaVocabulary

PROBE = Path(__file__).parents[1] / "data" / "tokenizer_probe.json"
_SPECIAL_SAMPLES, _VOCABULARY_SAMPLES, _WORDS_PER_TEXT = 64, 2000, 50
# llama.cpp makes control tokens of some texts wherever a vocabulary has them, such as Qwen's ordinary "</s>".
_LOOKS_SPECIAL = re.compile(r"\s*[<\[_].*[>\]]\s*")
_GAPS = {
    "decomposed": "text that isn't in Unicode's composed form (NFC)",
    "marks": "words with combining marks",
    "camel": "words with letters beyond ASCII that have upper case inside",
    "leading": "text that starts with a space",
    "special": "white space around special tokens",
    "word": "special tokens within words",
}


@dataclass(frozen=True)
class _Reference:
    """The original tokenizer: its name, text to ids, one id to text, and whether it knows special tokens."""

    name: str
    encode: Callable[[str], list[int]]
    decode: Callable[[int], str]
    special: bool


def verify(path: Path, directory: Path, tokenizer: Tokenizer, *, quiet: bool = False) -> None:
    """Compare the tokenizer in the GGUF file `path` with that of the model in `directory`; `tokenizer` was written.

    Unless `quiet`, stderr says what was left out or is known to differ.

    Raises:
        D2QError: a token differs, or llama.cpp or transformers can't load their file.
    """

    def say(message: str) -> None:
        if not quiet:
            print(message, file=sys.stderr)

    try:
        runtime.require()
    except D2QError as error:
        say(f"the file's tokenizer was not compared with the model's: {error}")
        return
    reference = _load_reference(directory)
    if reference is None:
        say(
            "the file's tokenizer was not compared with the model's: for a tokenizer.model without a tokenizer.json "
            "that takes SentencePiece (pip install 'd2q-edge[sentencepiece]')"
        )
        return
    known: set[str] = set()
    with LlamaVocabulary(path) as vocabulary:
        for text, gaps in _probes(tokenizer, reference):
            special, theirs = reference.special, reference.encode(text)
            ours = vocabulary.tokenize(text, add_special=special, read_special=special)
            if ours != theirs and not gaps:
                raise D2QError(_difference(text, ours, theirs, reference))
            if ours != theirs:
                known.add(min(gaps))
    if known:
        kinds = ", ".join(_GAPS[gap] for gap in sorted(known))
        say(f"llama.cpp is known to tokenize some text of such models in another way than {reference.name}: {kinds}")


def text_gaps(text: str) -> frozenset[str]:
    """Return which of the _GAPS "decomposed", "marks", "camel" and "leading" a text falls into."""
    found = {
        "leading": text.startswith((" ", "\u2581")),
        "decomposed": unicodedata.normalize("NFC", text) != text,
        "marks": any(unicodedata.category(character)[0] == "M" for character in text),
        "camel": any(
            any(not letter.isascii() and letter.lower() != letter.upper() for letter in word)
            and any(letter != letter.lower() for letter in word[1:])
            for word in re.findall(r"[^\W\d_]{2,}", text)
        ),
    }
    return frozenset(gap for gap, is_there in found.items() if is_there)


def _load_reference(directory: Path) -> _Reference | None:
    """Load the tokenizer in transformers, a tokenizer.model alone in SentencePiece; None where that isn't installed.

    transformers would guess at what a tokenizer.model alone leaves open.
    """
    if (directory / "tokenizer.json").is_file() or not (directory / "tokenizer.model").is_file():
        # Importing transformers takes seconds, which a conversion without verification saves.
        from d2q_edge.model.tokenizer.original import load_original

        loaded: Any = load_original(directory)
        return _Reference(
            "transformers",
            lambda text: list(loaded.encode(text, verbose=False)),
            lambda token_id: str(loaded.decode([token_id])),
            special=True,
        )
    if importlib.util.find_spec("sentencepiece") is None:
        return None
    from sentencepiece import SentencePieceProcessor

    model: Any = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    size = model.vocab_size()
    return _Reference(
        "SentencePiece",
        lambda text: list(model.encode(text)),
        lambda token_id: str(model.decode([token_id])) if token_id < size else "",
        special=False,
    )


def _probes(tokenizer: Tokenizer, reference: _Reference) -> Iterator[tuple[str, frozenset[str]]]:
    """Yield texts, each with those of the tokenizer's gaps that it falls into."""
    kinds = (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)
    special = [text for text, kind in zip(tokenizer.tokens, tokenizer.types, strict=True) if kind in kinds]
    texts: list[str] = json.loads(PROBE.read_text(encoding="utf-8"))
    for text in [*texts, *_vocabulary(tokenizer, reference)]:
        is_special = any(token in text for token in special)
        if (is_special and not reference.special) or any(token in text for token in tokenizer.left_out):
            continue
        gaps = text_gaps(text) | ({"special"} if is_special else set())
        yield text, gaps & tokenizer.gaps
    if not reference.special:
        return
    named = [tokenizer.tokens[token_id] for token_id in tokenizer.special_ids.values()]
    for token in dict.fromkeys([*named, *special[:: len(special) // _SPECIAL_SAMPLES + 1]]):
        yield token, frozenset()
        for text in (f"one {token} two", f"three{token}four", f"\n{token}\n{token}"):
            yield text, tokenizer.gaps & {"special", "word"}


def _vocabulary(tokenizer: Tokenizer, reference: _Reference) -> Iterator[str]:
    """Yield texts made of an even sample of the normal tokens, without those that are only parts of characters."""
    normal = [i for i, kind in enumerate(tokenizer.types) if kind == gguf.TokenType.NORMAL]
    decoded = (reference.decode(token_id) for token_id in normal[:: len(normal) // _VOCABULARY_SAMPLES + 1])
    # Without a decoder in tokenizer.json, spaces come out as the vocabulary spells them.
    words = [word.replace("\u2581", " ") if tokenizer.model != "gpt2" else word for word in decoded]
    words = [word for word in words if not _LOOKS_SPECIAL.fullmatch(word)]
    words = [word for word in words if word and "\ufffd" not in word and not text_gaps(word) & tokenizer.gaps]
    for start in range(0, len(words), _WORDS_PER_TEXT):
        yield " ".join(words[start : start + _WORDS_PER_TEXT])


def _difference(text: str, ours: list[int], theirs: list[int], reference: _Reference) -> str:
    """Describe the first difference in one sentence."""
    start = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    shown = text if len(text) <= 60 else text[:57] + "..."
    pieces = [ids[start : start + 3] for ids in (ours, theirs)]
    found, wanted = (f"{ids} ({' | '.join(map(reference.decode, ids))!r})" for ids in pieces)
    return (
        f"llama.cpp would tokenize {shown!r} in another way than {reference.name}: from token {start} on it has "
        f"{found} where {reference.name} has {wanted}; the file was not written, because it would be worse than the "
        "model (--no-verify writes it all the same)"
    )
