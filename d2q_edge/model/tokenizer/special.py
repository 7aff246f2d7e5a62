"""Determine the special tokens: their ids by role, and which of them are added to every text.

Follows gguf-py's SpecialVocab (gguf-py/gguf/vocab.py), which llama.cpp's converter uses.
"""

from typing import Any

from d2q_edge.errors import D2QError
from d2q_edge.model.tokenizer.files import Files

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # in the order in which llama.cpp's converter writes them


def special_tokens(files: Files, *, bos_by_default: bool) -> tuple[dict[str, int], dict[str, bool]]:
    """Return the ids of the special tokens by role, and by role whether they are added to every text.

    As in llama.cpp's converter, the post-processor wins over tokenizer_config.json's add_ROLE_token, and ids come from
    tokenizer_config.json's texts, then from config.json. Unlike there, the absence of BOS is recorded if tokenizer.json
    adds none.

    `bos_by_default` says whether llama.cpp adds BOS if the file doesn't say.

    Raises:
        D2QError: the post-processor is of an unknown kind, or adds a token that the model doesn't have.
    """
    content, settings = files.content, files.settings
    texts = {role: _text_of(settings.get(f"{role}_token")) for role in ROLES}
    if content:
        texts["bos"] = texts["bos"] or texts["cls"]
        texts["eos"] = texts["eos"] or texts["sep"]
    add: dict[str, bool] = {}
    post_processor = content.get("post_processor") or {}
    for step in post_processor.get("processors", [post_processor] if post_processor else []):
        if step["type"] == "ByteLevel":
            add.setdefault("bos", False)
            add.setdefault("eos", False)
        elif step["type"] == "TemplateProcessing":
            _read_template(step, texts, add)
        else:
            raise D2QError(f"tokenizer.json's post-processor {step['type']} isn't supported")
    for role in texts:
        if isinstance(flag := settings.get(f"add_{role}_token"), bool):
            add.setdefault(role, flag)
    if content and bos_by_default:
        add.setdefault("bos", False)
    return _ids(files, texts, add), add


def _ids(files: Files, texts: dict[str, str | None], add: dict[str, bool]) -> dict[str, int]:
    ids = {token["content"]: token["id"] for token in files.content.get("added_tokens") or []}
    special: dict[str, int] = {}
    for role, text in texts.items():
        if files.settings and text in ids and 0 <= ids[text] < files.vocab_size:
            special[role] = ids[text]
    for role in texts:
        token_id = files.config.get(f"{role}_token_id")
        if type(token_id) is int and 0 <= token_id < files.vocab_size:
            special.setdefault(role, token_id)
    for role, text in texts.items():
        # A token that is added to every text must have an id; llama.cpp would use its default.
        if not add.get(role) or text not in ids:
            continue
        if ids[text] >= files.vocab_size:
            raise D2QError(
                f"the tokenizer in {files.directory} adds {text!r} to every text, but the model has {files.vocab_size} "
                "tokens only"
            )
        special.setdefault(role, ids[text])
    return special


def _read_template(step: dict[str, Any], texts: dict[str, str | None], add: dict[str, bool]) -> None:
    """Read from a TemplateProcessing step which special tokens surround a text, and update `texts` and `add`."""
    single, pair = ([_special_id(piece) for piece in step.get(key) or []] for key in ("single", "pair"))
    if len(single) < 2:
        return
    first, last = single[0], single[-1]
    if first is not None:
        # Whatever tokenizer_config.json calls BOS, this is the token that transformers puts first.
        texts["bos"], add["bos"] = first, True
    if last is not None:
        if texts["eos"] not in (None, last):
            # Turns of this chat model end differently from texts: tokenizer_config.json's EOS ends a turn.
            texts["eot"] = texts["eos"]
        texts["eos"], add["eos"] = last, True
    if first is not None and pair[:1] == [first]:
        pair = pair[1:]
    if last is not None and pair[-1:] == [last]:
        pair = pair[:-1]
    if between := pair[1:-1]:
        enders = (texts["sep"], texts["eos"])
        add["sep"] = (between[0] in enders and last is None) or (len(between) == 2 and between[1] in enders)


def _special_id(piece: dict[str, Any]) -> str | None:
    """Return the text of a template's special token; None for a placeholder of text."""
    token = piece.get("SpecialToken")
    return None if token is None else str(token["id"])


def _text_of(entry: Any) -> str | None:
    """Return the text of a special token, which tokenizer_config.json has as such or in an object's "content"."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) and entry else None
