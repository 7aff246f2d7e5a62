"""Make llama.cpp stop at every token at which the original model does.

transformers stops at generation_config.json's eos_token_id, one or several, and without any at config.json's. llama.cpp
stops at the file's EOS, EOT and EOM and at tokens with certain texts (src/llama-vocab.cpp); its converter writes EOS.
"""

from collections.abc import Sequence

from gguf import TokenType

from d2q_edge.model.tokenizer.files import Files

_TEXTS = (
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> "
    "<EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> "
    "<｜end▁of▁sentence｜> [e~["
)
END_TEXTS = frozenset(_TEXTS.split())
"""The texts of tokens that llama.cpp always stops at."""


def add_ends(
    files: Files,
    tokens: Sequence[str],
    types: Sequence[int],
    special_ids: dict[str, int],
    default_eos: int | None = None,
) -> tuple[str, ...]:
    """Add the roles "eos", "eot" and "eom" to `special_ids` as far as llama.cpp needs them, and return what is left.

    What either file names counts, since llama.cpp's converter takes config.json's for EOS where the tokenizer has none.

    Args:
        files: the model's.
        tokens, types: of all ids.
        special_ids: ids by role, as llama.cpp's converter writes them; changed in place.
        default_eos: the id that the file's EOS has if `special_ids` doesn't say, if that is a sensible one.

    Returns:
        The texts of tokens that end the original's generation, but not llama.cpp's, because no role is free.
    """
    found: list[int] = []
    for named in (settings.get("eos_token_id") for settings in (files.generation, files.config)):
        listed = named if isinstance(named, list) else [named]
        valid = [token_id for token_id in listed if type(token_id) is int and 0 <= token_id < len(tokens)]
        if listed is not named and "eos" in special_ids:
            # Beside the tokenizer's EOS, a single ordinary token is a default of the architecture that nobody changed.
            valid = [token_id for token_id in valid if types[token_id] != TokenType.NORMAL]
        found += valid
    ends = list(dict.fromkeys(found))
    if ends and "eos" not in special_ids and default_eos not in ends:
        special_ids["eos"] = ends[0]
    known = {special_ids.get("eos", default_eos), special_ids.get("eot"), special_ids.get("eom")}
    missing = [token_id for token_id in ends if token_id not in known and tokens[token_id] not in END_TEXTS]
    free = [role for role in ("eot", "eom") if role not in special_ids]
    special_ids.update(zip(free, missing, strict=False))
    return tuple(tokens[token_id] for token_id in missing[len(free) :])
