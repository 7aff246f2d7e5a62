"""Tiny tokenizers with the structure of real families' (normalizer, pre-tokenizer, post-processor, added tokens).

The vocabularies are trained on a few sentences of many languages, with the packages that trained the real ones. The
structures are public facts, written down here once more: tests compare with them, so nothing of the product is used.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.tokenization_utils_base import generate_merges

from tests.model.tokenizer.texts import CORPUS

Json = dict[str, Any]
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + CONTRACTIONS + "?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + CONTRACTIONS + "?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(regex: str, behavior: str = "isolated", invert: bool = False) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), behavior, invert),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


BYTE_LEVEL: dict[str, Callable[[], Any]] = {
    "llama3": lambda: _split(LLAMA3),
    "qwen2": lambda: _split(QWEN2),
    "tekken": lambda: _split(TEKKEN),
    "phi4": lambda: _split(GPT4O, "removed", True),
    "smollm2": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "olmoe": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
}
"""Pre-tokenizers by family."""
NORMALIZED = ("qwen2", "olmoe")
LOOKS_WORDS_UP = ("llama3", "tekken")


@cache
def byte_level(name: str, size: int = 600) -> str:
    """Train a byte-level tokenizer without special tokens and return its tokenizer.json."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=name in LOOKS_WORDS_UP))
    if name in NORMALIZED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = BYTE_LEVEL[name]()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return str(tokenizer.to_str())


@cache
def sentencepiece_model(*, prefix: bool = True, symbols: tuple[str, ...] = (), algorithm: str = "bpe") -> bytes:
    """Train a tokenizer.model with byte fallback, like Llama 2's (with a space prefix) or Gemma's (without)."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=600,
        model_type=algorithm,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        character_coverage=0.98,
        user_defined_symbols=list(symbols),
        hard_vocab_limit=algorithm == "bpe",
        minloglevel=3,
    )
    return model.getvalue()


def sentencepiece_json(model: bytes, normalizer: Json | None, pre_tokenizer: Json | None) -> Json:
    """Return the tokenizer.json of a SentencePiece model, with merges as transformers makes them."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = generate_merges(vocab, {piece: processor.get_score(i) for piece, i in vocab.items()})
    bpe = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    content: Json = json.loads(Tokenizer(bpe).to_str())
    content["normalizer"], content["pre_tokenizer"] = normalizer, pre_tokenizer
    return content


def add_tokens(content: Json, tokens: dict[str, Json]) -> None:
    """Add tokens to tokenizer.json's content; those in its vocabulary keep their ids, others get the next ones."""
    vocab = content["model"]["vocab"]
    following = max(vocab.values()) + 1
    for text, options in tokens.items():
        token_id = vocab.get(text, following)
        following += text not in vocab
        entry = {"id": token_id, "content": text, "single_word": False, "lstrip": False, "rstrip": False}
        content["added_tokens"].append({**entry, "normalized": False, "special": True, **options})


def bos_template(content: Json, bos: str) -> Json:
    """Return a post-processor that puts a token before every text."""
    token_id = next(token["id"] for token in content["added_tokens"] if token["content"] == bos)
    special = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, special, second],
        "special_tokens": {bos: {"id": bos, "ids": [token_id], "tokens": [bos]}},
    }


def write(directory: Path, config: Json, settings: Json, content: Json | None, model: bytes | None = None) -> Path:
    """Write the files of a tokenizer, as on the hub, to a directory and return it."""
    directory.mkdir(exist_ok=True)
    if content is not None:
        (directory / "tokenizer.json").write_text(json.dumps(content), "utf-8")
        decoder = {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in content["added_tokens"]
        }
        settings = {"added_tokens_decoder": decoder, **settings}
    if model is not None:
        (directory / "tokenizer.model").write_bytes(model)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    (directory / "config.json").write_text(json.dumps(config), "utf-8")
    return directory
