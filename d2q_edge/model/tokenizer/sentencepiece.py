"""Build SentencePiece BPE tokenizers (Llama 2, Mistral, Phi-3, Gemma) from tokenizer.model, tokenizer.json, or both.

The GGUF keys follow llama.cpp's conversion/base.py, _create_vocab_sentencepiece. llama.cpp merges by the score of the
result, as SentencePiece does; tokenizer.json has a list of merges instead, which was made from the scores. Without a
tokenizer.model, scores are reconstructed from the merges, and merges that no scores can express are refused.
(llama.cpp's converter then gives every token the same score, which splits most words wrongly.)
"""

import json
import re

from gguf import TokenType

from d2q_edge.errors import D2QError
from d2q_edge.model.tokenizer.added import AddedToken, check_distinct, read_vocabulary
from d2q_edge.model.tokenizer.bpe import read_merges
from d2q_edge.model.tokenizer.content import Tokenizer
from d2q_edge.model.tokenizer.endings import add_ends
from d2q_edge.model.tokenizer.files import Files
from d2q_edge.model.tokenizer.sentencepiece_model import Piece, read_model
from d2q_edge.model.tokenizer.special import special_tokens

SPACE = "\u2581"  # sentencePiece's spelling of a space
# The scores that llama.cpp's converter gives to added tokens and to ids without a token; neither is ever compared.
_ADDED_SCORE, _UNUSED_SCORE = -1000.0, -10000.0
# llama.cpp's defaults for a file without these keys.
_DEFAULT_IDS = {"bos": 1, "eos": 2, "unk": 0}
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
ESCAPE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Prepend", "prepend": SPACE}
IDLE_PATTERN = {"String": " "}  # Gemma's split finds nothing, because the normalizer has replaced what it looks for.


def build(files: Files) -> Tokenizer:
    """Return the tokenizer of tokenizer.model, tokenizer.json or both; raise D2QError as `bpe.build`."""
    vocab, added, left_out = read_vocabulary(files)
    ids: dict[str, int] = {}
    prefix, gaps = _space_prefix(files, vocab) if files.content else (True, set())
    if files.sentencepiece.is_file():
        model = read_model(files.sentencepiece)
        if model.algorithm != "BPE" or model.space_suffix:
            kind = "puts spaces after words" if model.space_suffix else f"is a {model.algorithm} model"
            raise D2QError(f"{files.sentencepiece} {kind}; llama.cpp can do SentencePiece's BPE only")
        pieces, ids = model.pieces, model.special_ids
        if files.content:
            _check_same(files, pieces, vocab, added)
        else:
            prefix = model.adds_space_prefix
            _take_user_defined(pieces, added)
    else:
        pieces = _pieces(files, vocab, added)
    tokens, scores, types = _token_list(files, pieces, added)
    special_ids, add_special = special_tokens(files, bos_by_default=True)
    for role, token_id in ids.items():
        if token_id != _DEFAULT_IDS.get(role):
            special_ids.setdefault(role, token_id)
    lost_ends = add_ends(files, tokens, types, special_ids, _DEFAULT_IDS["eos"])
    setting, beside = files.space_prefix_setting, [token for token in added.values() if token.gaps]
    return Tokenizer(
        model="llama",
        pre="default",
        tokens=tokens,
        types=types,
        merges=[],
        special_ids=special_ids,
        add_special=add_special,
        chat_template=files.chat_template(),
        space_prefix_setting=setting,
        scores=scores,
        adds_space_prefix=prefix if setting is None else setting,
        gaps=frozenset(gaps).union(*(token.gaps for token in beside)),
        left_out=left_out,
        beside=tuple(token.text for token in beside),
        lost_ends=lost_ends,
    )


def _space_prefix(files: Files, vocab: dict[str, int]) -> tuple[bool, set[str]]:
    """Return whether tokenizer.json puts a space before the text, and the kinds of text for which llama.cpp differs.

    The normalizer does so just as llama.cpp; the pre-tokenizer makes exceptions. Everything else is refused.
    """
    normalizer, pre_tokenizer = files.content.get("normalizer"), files.content.get("pre_tokenizer")
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    splits = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer] if pre_tokenizer else [])
    spaces = [step for step in splits if step["type"] == "Metaspace" and step.get("replacement") == SPACE]
    idle = [step for step in splits if step["type"] == "Split" and step["pattern"] == IDLE_PATTERN]
    escapes = [step for step in steps if step == ESCAPE]
    prepends = [step for step in steps if step == _PREPEND]
    known = len(escapes) + len(prepends) == len(steps) and len(spaces) + len(idle) == len(splits)
    if not known or not (escapes or spaces) or (idle and not escapes):
        raise D2QError(
            f"{files.json} normalizes text with {json.dumps(normalizer)} and splits it with "
            f"{json.dumps(pre_tokenizer)}, which llama.cpp can't do for SentencePiece's BPE"
        )
    if any(step.get("split", True) for step in spaces):
        joined = next((token for token in vocab if SPACE in token[1:]), None)
        if joined is not None:
            raise D2QError(
                f"{files.json} splits text at spaces, which llama.cpp doesn't do for SentencePiece's BPE and which "
                f"matters for tokens such as {joined!r}"
            )
    old = ["always" if step.get("add_prefix_space", True) else "never" for step in spaces]
    schemes = {step.get("prepend_scheme", default) for step, default in zip(spaces, old, strict=True)} - {"never"}
    if prepends or not schemes:
        return bool(prepends), set()
    return True, {"leading", "special"}


def _check_same(files: Files, pieces: list[Piece], vocab: dict[str, int], added: dict[str, AddedToken]) -> None:
    """Require that the two files agree, apart from ids that an added token has taken over."""
    taken = {token.id for token in added.values()}
    for token_id, piece in enumerate(pieces):
        if token_id not in taken and vocab.get(piece.text) != token_id:
            raise D2QError(
                f"token {token_id} is {piece.text!r} in {files.sentencepiece}, but not in {files.json}; the two don't "
                "belong together, so remove the wrong one"
            )


def _take_user_defined(pieces: list[Piece], added: dict[str, AddedToken]) -> None:
    """Add the user-defined pieces to the added tokens, for a model without tokenizer.json."""
    taken = {token.id for token in added.values()}
    for token_id, piece in enumerate(pieces):
        if piece.kind == TokenType.USER_DEFINED and token_id not in taken:
            added[piece.text] = AddedToken(piece.text, token_id, special=False, listed=True)


def _pieces(files: Files, vocab: dict[str, int], added: dict[str, AddedToken]) -> list[Piece]:
    """Reconstruct tokenizer.model: the result of a merge scores less than the results of all earlier merges.

    Ids without a token become unused pieces with an empty text.
    """
    merges = read_merges(files)
    results = list(dict.fromkeys(left + right for left, right in merges))
    scores = {text: -float(rank) for rank, text in enumerate(results)}
    unknown = files.content["model"].get("unk_token")
    pieces = [Piece("", 0.0, TokenType.UNUSED)] * files.vocab_size
    for text, token_id in sorted(vocab.items(), key=lambda item: item[1]):
        files.check_id(text, token_id)
        if pieces[token_id].text:
            raise D2QError(f"{files.json} gives the id {token_id} to both {pieces[token_id].text!r} and {text!r}")
        if text in added:
            pieces[token_id] = Piece(text, _ADDED_SCORE, added[text].type)
        elif text == unknown:
            pieces[token_id] = Piece(text, 0.0, TokenType.UNKNOWN)
        elif _BYTE_TOKEN.fullmatch(text):
            pieces[token_id] = Piece(text, 0.0, TokenType.BYTE)
        else:
            pieces[token_id] = Piece(text, scores.setdefault(text, -float(len(scores))), TokenType.NORMAL)
    _require_all_merges(files, pieces, vocab, set(merges))
    return pieces


def _require_all_merges(files: Files, pieces: list[Piece], vocab: dict[str, int], merges: set[tuple[str, str]]) -> None:
    """Refuse a list of merges without a pair of tokens (or characters) that makes up a third: llama.cpp merges it."""
    for piece in pieces:
        text = piece.text
        for cut in range(1, len(text) if piece.kind == TokenType.NORMAL else 0):
            left, right = text[:cut], text[cut:]
            joinable = (left in vocab or cut == 1) and (right in vocab or cut == len(text) - 1)
            if joinable and (left, right) not in merges:
                raise D2QError(
                    f"{files.json} doesn't merge {left!r} and {right!r} although {text!r} is a token, which llama.cpp "
                    "would do; only tokenizers that were made from a SentencePiece model can be converted"
                )


def _token_list(
    files: Files, pieces: list[Piece], added: dict[str, AddedToken]
) -> tuple[list[str], list[float], list[int]]:
    """Return texts, scores and types of the ids 0 .. vocab_size - 1, by the rules of llama.cpp's converter."""
    size = files.vocab_size
    if beyond := [piece.text for piece in pieces[size:]]:
        raise D2QError(
            f"the tokenizer in {files.directory} has the token {beyond[0]!r}, but the model has {size} tokens only"
        )
    tokens = [f"[PAD{i}]" for i in range(size)]
    scores, types = [_UNUSED_SCORE] * size, [int(TokenType.UNUSED)] * size
    for token_id, piece in enumerate(pieces):
        if piece.text:
            tokens[token_id], scores[token_id], types[token_id] = piece.text, piece.score, piece.kind
    owners: dict[int, str] = {}
    for token in added.values():
        if owners.setdefault(token.id, token.text) != token.text:
            raise D2QError(
                f"the tokenizer in {files.directory} gives the id {token.id} to both {owners[token.id]!r} and "
                f"{token.text!r}"
            )
        same = tokens[token.id] == token.text and types[token.id] in (TokenType.CONTROL, TokenType.UNKNOWN)
        if token.listed or not same:
            tokens[token.id], scores[token.id], types[token.id] = token.gguf_text, _ADDED_SCORE, token.type
    byte_tokens = {text for text, kind in zip(tokens, types, strict=True) if kind == TokenType.BYTE}
    if missing := [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in byte_tokens]:
        raise D2QError(
            f"the tokenizer in {files.directory} has no token {missing[0]}; llama.cpp needs one for every byte, for "
            "characters that aren't in the vocabulary"
        )
    check_distinct(files, tokens)
    return tokens, scores, types
