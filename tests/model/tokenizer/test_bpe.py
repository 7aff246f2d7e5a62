"""Test byte-level BPE: what is written and what is refused. test_families.py compares ids with llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from d2q_edge.errors import D2QError
from d2q_edge.export.tokenizer_check import verify
from d2q_edge.model.tokenizer import Tokenizer, read_tokenizer
from d2q_edge.model.tokenizer.original import load_original
from tests.availability import require_runtime
from tests.checkpoints import EXAMPLE
from tests.model.tokenizer.vocabulary_file import tokenizer_keys, write_vocabulary

Make = Callable[..., Path]
Edit = Callable[[dict[str, Any]], object]


def edit(directory: Path, change: Edit, file: str = "tokenizer.json") -> None:
    content = json.loads((directory / file).read_text("utf-8"))
    change(content)
    (directory / file).write_text(json.dumps(content), "utf-8")


def read(directory: Path, vocab_size: int = 4100, pre_tokenizer: str | None = None) -> Tokenizer:
    config = json.loads((directory / "config.json").read_text())
    return read_tokenizer(directory, config, vocab_size, pre_tokenizer)


def test_example_tokenizer() -> None:
    tokenizer = read(EXAMPLE, 4096)
    assert tokenizer.pre == "qwen2"
    assert len(tokenizer.tokens) == len(tokenizer.types) == 4096
    assert tokenizer.tokens[:3] == ["!", '"', "#"]
    assert tokenizer.tokens[4093:] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.types[4092:] == [gguf.TokenType.NORMAL] + [gguf.TokenType.CONTROL] * 3
    assert len(tokenizer.merges) == 3837
    assert tokenizer.merges[0].count(" ") == 1
    assert tokenizer.special_ids == {"eos": 4093, "pad": 4093}
    assert tokenizer.add_special == {"bos": False, "eos": False}
    assert tokenizer.chat_template is None


def test_llama_tokenizer(make_checkpoint: Make) -> None:
    tokenizer = read(make_checkpoint("llama"))
    assert tokenizer.pre == "llama-bpe"
    assert tokenizer.special_ids == {"bos": 4093, "eos": 4095, "pad": 4093}
    assert tokenizer.add_special == {"bos": True, "eos": False, "sep": False}
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.space_prefix_setting is False


def test_rows_beyond_the_vocabulary_are_padding(make_checkpoint: Make) -> None:
    tokenizer = read(make_checkpoint(), 4098)
    assert tokenizer.tokens[4095:] == ["<|im_end|>", "[PAD4096]", "[PAD4097]"]
    assert tokenizer.types[4096:] == [gguf.TokenType.UNUSED] * 2


def test_added_tokens_by_kind(make_checkpoint: Make) -> None:
    directory = make_checkpoint()

    def add(content: dict[str, Any]) -> None:
        for token_id, text in ((4096, "<tool\u2581call>"), (4097, "<|odd|>"), (4098, "<unused7>")):
            content["added_tokens"].append({"id": token_id, "content": text, "special": False})

    edit(directory, add)
    tokenizer = read(directory)
    assert tokenizer.tokens[4096:4099] == ["<tool call>", "<|odd|>", "<unused7>"]
    assert tokenizer.types[4096:4099] == [gguf.TokenType.USER_DEFINED, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]


def test_added_token_that_only_tokenizer_config_has(make_checkpoint: Make) -> None:
    directory = make_checkpoint()
    token = {"content": "<extra>", "special": True}
    edit(directory, lambda settings: settings["added_tokens_decoder"].update({"4096": token}), "tokenizer_config.json")
    assert read(directory).tokens[4096] == "<extra>"
    token["content"] = "<|im_end|>"
    edit(directory, lambda settings: settings["added_tokens_decoder"].update({"4096": token}), "tokenizer_config.json")
    with pytest.raises(D2QError, match=r"the id 4095, but tokenizer_config.json gives it 4096"):
        read(directory)


def test_old_spelling_of_merges(make_checkpoint: Make) -> None:
    directory = make_checkpoint()
    before = read(directory).merges

    def join(content: dict[str, Any]) -> None:
        content["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]

    edit(directory, join)
    assert read(directory).merges == before


def test_without_tokenizer_config(make_checkpoint: Make) -> None:
    directory = make_checkpoint("llama")
    (directory / "tokenizer_config.json").unlink()
    tokenizer = read(directory)
    assert tokenizer.special_ids == {"bos": 4093, "eos": 4095}
    assert tokenizer.add_special["bos"] is True


def test_special_tokens_as_objects_and_flags(make_checkpoint: Make) -> None:
    directory = make_checkpoint()

    def change(settings: dict[str, Any]) -> None:
        settings.update(eos_token={"content": "<|im_end|>"}, bos_token="<|im_start|>", add_bos_token=True)

    edit(directory, change, "tokenizer_config.json")
    # The post-processor says that nothing is added, and it is what transformers follows.
    assert read(directory).add_special == {"bos": False, "eos": False}
    assert read(directory).special_ids["eos"] == 4095
    edit(directory, lambda content: content.update(post_processor=None))
    assert read(directory).add_special == {"bos": True}


def test_roles_without_a_key(make_checkpoint: Make, tmp_path: Path) -> None:
    """Without a BOS token, CLS stands in for it, as in llama.cpp's converter; CLS itself has no key."""
    directory = make_checkpoint()
    edit(
        directory,
        lambda settings: settings.update(cls_token="<|im_start|>", add_cls_token=True),
        "tokenizer_config.json",
    )
    tokenizer = read(directory)
    assert tokenizer.special_ids["cls"] == tokenizer.special_ids["bos"] == 4094
    keys = dict(tokenizer_keys(write_vocabulary(tmp_path / "out.gguf", tokenizer)))
    assert keys["tokenizer.ggml.bos_token_id"] == 4094
    assert not [key for key in keys if "cls" in key]


def test_bos_that_only_the_template_names(make_checkpoint: Make) -> None:
    """Without an id, llama.cpp would add its default before every text."""
    directory = make_checkpoint("llama", bos_token_id=None)
    (directory / "tokenizer_config.json").unlink()
    tokenizer = read(directory)
    assert (tokenizer.special_ids["bos"], tokenizer.bos) == (4093, 4093)


def test_no_bos_where_llama_cpp_would_add_one(make_checkpoint: Make) -> None:
    """SmolLM3 has Llama 3's pre-tokenizer, and no BOS."""
    directory = make_checkpoint("llama")
    edit(directory, lambda content: content.update(post_processor=None))
    edit(directory, lambda settings: settings.pop("add_bos_token"), "tokenizer_config.json")
    assert read(directory).add_special == {"bos": False}
    assert read(directory).bos is None


def test_contradicting_merges(make_checkpoint: Make) -> None:
    directory = make_checkpoint()
    edit(directory, lambda content: content["model"]["merges"].append(["qz", "qz"]))
    with pytest.raises(D2QError, match=r"merges 'qz' and 'qz', but not both and the result are in its vocabulary"):
        read(directory)


def test_twice_the_same_text(make_checkpoint: Make) -> None:
    """llama.cpp would abort the whole process."""
    directory = make_checkpoint()
    token = {"id": 4096, "content": "[PAD4099]", "special": False}
    edit(directory, lambda content: content["added_tokens"].append(token))
    with pytest.raises(D2QError, match=r"token '\[PAD4099\]' twice, with the ids 4096 and 4099"):
        read(directory)


@pytest.mark.parametrize("template", [7, ["text"], [{"name": "a"}], [{"name": "a", "template": None}]])
def test_odd_chat_templates(make_checkpoint: Make, template: Any) -> None:
    directory = make_checkpoint()
    edit(directory, lambda settings: settings.update(chat_template=template), "tokenizer_config.json")
    with pytest.raises(D2QError, match=r"tokenizer_config.json: chat_template must be a text, or a list of objects"):
        read(directory)


def test_broken_json(make_checkpoint: Make) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        directory = make_checkpoint(name=f"with-{name}")
        (directory / name).write_text("{")
        with pytest.raises(D2QError, match=rf"{name} isn't valid JSON"):
            read(directory)


def test_template_that_ends_texts(make_checkpoint: Make) -> None:
    directory = make_checkpoint("llama")

    def change(content: dict[str, Any]) -> None:
        template = content["post_processor"]["processors"][1]
        template["single"].append({"SpecialToken": {"id": "<|im_start|>", "type_id": 0}})
        template["pair"] = []

    edit(directory, change)
    tokenizer = read(directory)
    assert tokenizer.add_special == {"bos": True, "eos": True}
    assert tokenizer.special_ids == {"bos": 4093, "eos": 4094, "pad": 4093, "eot": 4095}


def test_template_wins_over_bos_token(make_checkpoint: Make) -> None:
    directory = make_checkpoint("llama")
    edit(directory, lambda settings: settings.update(bos_token="<|im_start|>"), "tokenizer_config.json")
    assert read(directory).special_ids["bos"] == 4093


def test_chat_templates(make_checkpoint: Make) -> None:
    """Templates in several places are read in transformers' order."""
    directory = make_checkpoint()
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    assert read(directory).chat_template == "from json"
    edit(directory, lambda settings: settings.update(chat_template="from settings"), "tokenizer_config.json")
    assert read(directory).chat_template == "from settings"
    assert load_original(directory).chat_template == "from settings"
    (directory / "chat_template.jinja").write_text("from jinja")
    assert read(directory).chat_template == "from jinja"
    assert load_original(directory).chat_template == "from jinja"
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tools.jinja").write_text("with tools")
    assert read(directory).chat_template == [
        {"name": "default", "template": "from jinja"},
        {"name": "tools", "template": "with tools"},
    ]
    assert load_original(directory).chat_template == {"default": "from jinja", "tools": "with tools"}


def test_unknown_regex_is_quoted(make_checkpoint: Make) -> None:
    directory = make_checkpoint()
    edit(directory, lambda content: content["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\p{L}+|\s+"))
    with pytest.raises(D2QError) as caught:
        read(directory)
    assert r"\p{L}+|\s+" in str(caught.value)
    assert "known: llama-bpe, dbrx, qwen2, tekken, gpt-4o, smollm, gpt-2, olmo" in str(caught.value)
    assert "say --pre-tokenizer NAME" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda c: c.pop("pre_tokenizer"), "splits text in a way that isn't known"),
        (
            lambda c: c.update(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}),
            "ByteLevel",
        ),
        (lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "isn't known"),
        (lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "isn't known"),
        (lambda c: c["pre_tokenizer"]["pretokenizers"].append({"type": "Digits"}), "isn't known.*Digits"),
        (lambda c: c.update(normalizer={"type": "Lowercase"}), "normalizes text with.*Lowercase"),
        (lambda c: c["model"].update(type="Unigram"), "Unigram tokenizer; only BPE"),
        (lambda c: c["model"].update(end_of_word_suffix="</w>"), "sets end_of_word_suffix"),
        (lambda c: c.update(post_processor={"type": "RobertaProcessing"}), "post-processor RobertaProcessing"),
        (lambda c: c["model"]["vocab"].update(x=5000), "the id 5000, but the model has 4100 tokens only"),
        (lambda c: c["model"]["vocab"].update(xyz=7), "the id 7 to both"),
        (lambda c: c.pop("model"), "doesn't have the structure of a tokenizer"),
        (lambda c: c.update(model=[]), "doesn't have the structure of a tokenizer"),
        (lambda c: c["model"].update(merges=[["a"]]), "doesn't have the structure of a tokenizer"),
    ],
)
def test_refused_tokenizers(make_checkpoint: Make, change: Edit, pattern: str) -> None:
    directory = make_checkpoint()
    edit(directory, change)
    with pytest.raises(D2QError, match=pattern):
        read(directory)


def test_ignore_merges_matters_only_for_unreachable_tokens(make_checkpoint: Make) -> None:
    directory = make_checkpoint("llama")
    edit(directory, lambda content: content["model"].update(ignore_merges=False))
    assert read(directory).pre == "dbrx", "as llama-bpe, but for this"
    assert read(directory, pre_tokenizer="llama-bpe").pre == "llama-bpe"
    edit(directory, lambda content: content["model"]["vocab"].update(qzqzq=4096))
    assert read(directory).pre == "dbrx"
    with pytest.raises(D2QError, match=r"sets ignore_merges to false, unlike llama.cpp's llama-bpe.*'qzqzq'"):
        read(directory, pre_tokenizer="llama-bpe")
    edit(directory, lambda content: content["model"].update(ignore_merges=True))
    assert read(directory).pre == "llama-bpe"
    assert read(directory).tokens[4096] == "qzqzq"


def test_added_tokens_are_found_before_words(make_checkpoint: Make) -> None:
    """Looking up whole words makes no difference for them, even if the vocabulary has them too."""
    directory = make_checkpoint("llama")

    def change(content: dict[str, Any]) -> None:
        content["model"].update(ignore_merges=False)
        content["model"]["vocab"].update({"<|qzqzq|>": 4096})
        content["added_tokens"].append({"id": 4096, "content": "<|qzqzq|>", "special": True})

    edit(directory, change)
    assert read(directory, pre_tokenizer="llama-bpe").pre == "llama-bpe"


def test_added_tokens_beyond_the_embeddings(make_checkpoint: Make, tmp_path: Path) -> None:
    """Padding tokens of a fine-tune without rows in the model are left out; all other text is tokenized as before."""
    directory = make_checkpoint("llama")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokens = [{"id": 4100, "content": "<pad>", "special": True}, {"id": 4101, "content": "[more]", "special": False}]
    tokens = [{**token, **flags} for token in tokens]
    edit(directory, lambda content: content["added_tokens"].extend(tokens))
    tokenizer = read(directory)
    assert tokenizer.left_out == {"<pad>", "[more]"}
    assert len(tokenizer.tokens) == 4100 and not tokenizer.left_out & set(tokenizer.tokens)
    assert tokenizer.notes == ("'<pad>' and 1 more tokens are left out: the tokenizer has more than the model's 4100",)
    require_runtime()
    verify(write_vocabulary(tmp_path / "x.gguf", tokenizer), directory, tokenizer)
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<pad>"}}, {"Sequence": {"id": "A"}}]}
    edit(directory, lambda content: content.update(post_processor={**template, "pair": []}))
    with pytest.raises(D2QError, match=r"adds '<pad>' to every text, but the model has 4100 tokens only"):
        read(directory)


def test_missing_files(make_checkpoint: Make) -> None:
    directory = make_checkpoint()
    (directory / "tokenizer.json").unlink()
    with pytest.raises(D2QError, match=r"no tokenizer.json or tokenizer.model"):
        read(directory)
    (directory / "tekken.json").touch()
    with pytest.raises(D2QError, match=r"Mistral's tekken.json only"):
        read(directory)
