"""Test the pre-tokenizer names against llama.cpp's source, and their detection from tokenizer.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from d2q_edge.errors import D2QError
from d2q_edge.model.tokenizer.pre_tokenizers import BY_NAME, REGEXES, find, named
from tests.model.tokenizer.tokenizers import BYTE_LEVEL, GPT4O, LLAMA3, QWEN2, TEKKEN

PATH = Path("tokenizer.json")


def branches(source: str) -> dict[str, str]:
    """Parse llama-vocab.cpp's chain of ifs: each name with the code of its branch."""
    chain = source[source.index('tokenizer_pre == "default"') : source.index("unknown pre-tokenizer type")]
    found = {}
    for part in re.split(r"} else if \(|} else {", chain):
        condition, _, body = part.partition(") {")
        found.update(dict.fromkeys(re.findall(r'tokenizer_pre == "([^"]+)"', condition), body))
    return found


def test_names_are_those_of_llama_cpp(pristine_tree: Path) -> None:
    source = (pristine_tree / "vendor/llama.cpp/src/llama-vocab.cpp").read_text("utf-8")
    found = branches(source)
    assert set(BY_NAME) == set(found)
    gemma = {name for name, body in found.items() if "PRE_TYPE_GEMMA4" in body}
    for name, body in found.items():
        assert BY_NAME[name].ignores_merges == ("ignore_merges = true" in body), name
        # Gemma 4's is has_codebooks on further below.
        assert BY_NAME[name].adds_bos == ("add_bos = true" in body or name in gemma), name
    assert "pre_type == LLAMA_VOCAB_PRE_TYPE_GEMMA4 && !add_bos" in source


def test_regexes_are_those_of_llama_cpp(pristine_tree: Path) -> None:
    """llama.cpp's source quotes the original of every regex that it rewrites."""
    source = (pristine_tree / "vendor/llama.cpp/src/llama-vocab.cpp").read_text("utf-8")
    quoted = {json.loads(match) for match in re.findall(r'^ *//\s*("[^"]*\\\\p\{L\}.*"),?$', source, re.MULTILINE)}
    assert set(REGEXES) <= quoted
    assert set(REGEXES) == {LLAMA3, QWEN2, TEKKEN, GPT4O}


def content(pre_tokenizer: Any, normalizer: Any = None) -> dict[str, Any]:
    return {"pre_tokenizer": json.loads(pre_tokenizer.__getstate__()), "normalizer": normalizer}


@pytest.mark.parametrize(
    ("family", "ignore_merges", "name"),
    [
        ("llama3", True, "llama-bpe"),
        ("llama3", False, "dbrx"),
        ("qwen2", False, "qwen2"),
        ("tekken", True, "tekken"),
        ("phi4", False, "gpt-4o"),
        ("smollm2", False, "smollm"),
        ("olmoe", False, "gpt-2"),
    ],
)
def test_structures(family: str, ignore_merges: bool, name: str) -> None:
    found = find(PATH, content(BYTE_LEVEL[family]()), ignore_merges=ignore_merges)
    assert found.name == name
    wrapped = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [content(BYTE_LEVEL[family]())["pre_tokenizer"]]}}
    assert find(PATH, wrapped, ignore_merges=ignore_merges) is found


def test_normalized_gpt_2_is_olmo() -> None:
    assert find(PATH, content(BYTE_LEVEL["olmoe"](), {"type": "NFC"}), ignore_merges=False).name == "olmo"


def test_both_ways_to_split_at_matches() -> None:
    for behavior, invert, known in (("Isolated", False, True), ("Removed", True, True), ("Isolated", True, False)):
        changed = content(BYTE_LEVEL["qwen2"]())
        changed["pre_tokenizer"]["pretokenizers"][0].update(behavior=behavior, invert=invert)
        if known:
            assert find(PATH, changed, ignore_merges=False).name == "qwen2"
        else:
            with pytest.raises(D2QError, match="isn't known"):
                find(PATH, changed, ignore_merges=False)


def test_digits_in_groups_are_not_smollm() -> None:
    changed = content(BYTE_LEVEL["smollm2"]())
    changed["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False
    with pytest.raises(D2QError, match=r"isn't known .*individual_digits"):
        find(PATH, changed, ignore_merges=False)


def test_unknown_names() -> None:
    assert named("qwen2").name == "qwen2"
    with pytest.raises(D2QError, match=r"llama.cpp has no pre-tokenizer 'qwen'; it has a\.x-4\.0, .*, qwen2, "):
        named("qwen")
