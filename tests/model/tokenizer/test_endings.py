"""Every token that ends generation in transformers ends it in llama.cpp, with as few keys beyond the converter's."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig, PreTrainedConfig

from d2q_edge import runtime
from d2q_edge.export.model_file import export
from d2q_edge.model.tokenizer import read_tokenizer
from d2q_edge.model.tokenizer.endings import END_TEXTS
from d2q_edge.runtime.generate import generate
from d2q_edge.runtime.llama_model import LlamaVocabulary
from tests.availability import require_runtime
from tests.checkpoints import EXAMPLE
from tests.model.tokenizer.families import FAMILIES
from tests.model.tokenizer.vocabulary_file import convert_vocabularies, tokenizer_keys, write_vocabulary

ROLES = ("eos", "eot", "eom")


class Model:
    """A family's tokenizer with end tokens of one's choice."""

    def __init__(self, directory: Path, name: str, config: Any, generation: Any = None, **settings: Any) -> None:
        self.directory, self.family = FAMILIES[name].write(directory), FAMILIES[name]
        self.config = {**self.family.config(), "eos_token_id": config}
        path = directory / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
        (directory / "config.json").write_text(json.dumps(self.config))
        if generation is not None:
            (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
        self.tokenizer = read_tokenizer(directory, self.config, self.family.vocab_size)
        self.keys = {role: self.tokenizer.special_ids[role] for role in ROLES if role in self.tokenizer.special_ids}

    def transformers_ends(self) -> set[int]:
        if (self.directory / "generation_config.json").exists():
            found = GenerationConfig.from_pretrained(self.directory).eos_token_id
        else:
            found = GenerationConfig.from_model_config(PreTrainedConfig(**self.config)).eos_token_id
        return set(found if isinstance(found, list) else [found])

    def llama_ends(self) -> set[int]:
        require_runtime()
        api: Any = runtime.require()
        file = write_vocabulary(self.directory / "ours.gguf", self.tokenizer)
        with LlamaVocabulary(file) as vocabulary:
            return {i for i in range(self.family.vocab_size) if api.llama_vocab_is_eog(vocabulary._vocab, i)}


def token(name: str, text: str) -> int:
    """The id of an added token: they follow 600 others."""
    return 600 + list(FAMILIES[name].added).index(text)


def qwen(text: str) -> int:
    return token("qwen2", text)


@pytest.mark.parametrize(
    ("name", "config", "generation", "keys"),
    [
        # Known by their texts: nothing beyond the converter's key.
        ("qwen2", None, [qwen("<|im_end|>"), qwen("<|endoftext|>")], {"eos": qwen("<|im_end|>")}),
        ("llama3", [601, 602], None, {"eos": 602}),
        ("llama2", 2, [2], {"eos": 2}),
        # One, two and three that llama.cpp doesn't know.
        ("qwen2", None, [qwen("<|im_end|>"), qwen("<tool_call>")], {"eos": qwen("<|im_end|>"), "eot": 603}),
        ("qwen2", [603, 601], qwen("<|im_end|>"), {"eos": qwen("<|im_end|>"), "eot": 603, "eom": 601}),
        ("mistral", [2], [2, 5, 6], {"eos": 2, "eot": 5, "eom": 6}),
        ("qwen2", qwen("<tool_call>"), None, {"eos": qwen("<|im_end|>"), "eot": 603}),
        ("qwen2", [True, "x", None, -1, 10**6, 2.0], {}, {"eos": qwen("<|im_end|>")}),
    ],
)
def test_every_end_ends(tmp_path: Path, name: str, config: Any, generation: Any, keys: dict[str, int]) -> None:
    model = Model(tmp_path / "model", name, config, generation)
    assert model.keys == keys
    assert model.tokenizer.lost_ends == () and model.tokenizer.notes == ()
    found = model.llama_ends()
    assert found >= set(keys.values())
    if generation != {}:
        assert found >= model.transformers_ends()
    by_text = {i for i, text in enumerate(model.tokenizer.tokens) if text in END_TEXTS}
    assert found == by_text | set(keys.values())


@pytest.mark.parametrize(("config", "generation"), [(7, None), (7, 602), (None, 7)])
def test_a_single_ordinary_token_is_a_forgotten_default(tmp_path: Path, config: Any, generation: Any) -> None:
    """Configs have their class's default, such as 2, beside tokenizers in which that is a character."""
    model = Model(tmp_path / "model", "qwen2", config, generation)
    assert model.keys == {"eos": qwen("<|im_end|>")}
    alone = Model(tmp_path / "alone", "qwen2", config, generation, eos_token=None)
    assert 7 in alone.llama_ends()


def test_more_than_a_file_can_say(tmp_path: Path) -> None:
    model = Model(tmp_path / "model", "qwen2", None, [602, 603, 601, 8, 9])
    assert model.keys == {"eos": 602, "eot": 603, "eom": 601}
    lost = [model.tokenizer.tokens[i] for i in (8, 9)]
    assert model.tokenizer.notes == (
        f"{lost[0]!r}, {lost[1]!r} end the original's answers, but a GGUF file has no more keys for it",
    )
    assert model.llama_ends().isdisjoint((8, 9))


@pytest.mark.parametrize(("name", "default"), [("qwen2", 11), ("llama2", 2)])
def test_without_an_eos_token(tmp_path: Path, name: str, default: int) -> None:
    """llama.cpp's default for EOS, which the converter leaves alone then, is a comma in Qwen's vocabulary."""
    end = token(name, "<|im_end|>") if name == "qwen2" else 5
    nothing = Model(tmp_path / "nothing", name, None, eos_token=None)
    assert nothing.keys == {} and default in nothing.llama_ends()
    model = Model(tmp_path / "model", name, [end], eos_token=None)
    assert model.keys == {"eos": end}
    assert end in model.llama_ends() and (11 in model.llama_ends()) is False
    usual = Model(tmp_path / "usual", "llama2", [5, 2], eos_token=None)
    assert usual.keys == {"eot": 5} and usual.llama_ends() >= {2, 5}


def test_damaged_generation_config_is_ignored(tmp_path: Path) -> None:
    directory = FAMILIES["qwen2"].write(tmp_path / "model")
    (directory / "generation_config.json").write_text("{")
    assert read_tokenizer(directory, {}, 624).special_ids["eos"] == 602


def test_answers_end_there(tmp_path: Path) -> None:
    require_runtime()
    shutil.copytree(EXAMPLE, tmp_path / "model")
    texts = []
    for ends in ([4093], [4093, json.loads((EXAMPLE / "tokenizer.json").read_text())["model"]["vocab"]["."]]):
        (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        export(tmp_path / "model", tmp_path / "out.gguf", "q8_0", force=True, verify=False)
        texts.append("".join(generate(tmp_path / "out.gguf", "Once upon a time", 60, 0.0, 0)))
    before, found, _ = texts[0].partition(".")
    assert found and texts[1] == before


@pytest.mark.slow
def test_keys_are_the_stock_converters_where_these_end_everywhere(pristine_tree: Path, tmp_path: Path) -> None:
    models = {
        "qwen2": Model(tmp_path / "qwen2", "qwen2", [602], [602, 600]),
        "llama3": Model(tmp_path / "llama3", "llama3", [601, 602]),
        "gemma3": Model(tmp_path / "gemma3", "gemma3", [2], [2]),
    }
    jobs = {model.directory: model.family.pre for model in models.values()}
    files = convert_vocabularies(pristine_tree / "vendor/llama.cpp", jobs, tmp_path)
    for name, model in models.items():
        recorded = model.family.architecture == "LlamaForCausalLM"
        ours = write_vocabulary(tmp_path / f"{name}.gguf", model.tokenizer, space_prefix=recorded)
        assert tokenizer_keys(ours) == tokenizer_keys(files[name])


def test_texts_are_llama_cpps(pristine_tree: Path) -> None:
    source = (pristine_tree / "vendor/llama.cpp/src/llama-vocab.cpp").read_text("utf-8")
    condition = source.partition("special_eog_ids.clear();")[2].partition("special_eog_ids.insert(t.second);")[0]
    assert set(re.findall(r't\.first == "(.*?)"', condition)) == END_TEXTS
