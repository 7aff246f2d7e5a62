"""Texts that are continued token by token: llama-cpp-python's own sampling, the KV cache, types of the cache."""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2q_edge.errors import D2QError
from d2q_edge.options import LoadOptions, SamplingOptions
from d2q_edge.runtime.text_model import TextModel
from tests.availability import require_runtime
from tests.conftest import ExampleFiles

PROMPT = "The old man said to the old man that"


def text(model: TextModel, prompt: str = PROMPT, tokens: int = 24, *rest: Any) -> str:
    return "".join(model.continuation(model.tokenize(prompt), tokens, *(rest or (0, None))))


@pytest.mark.parametrize(
    ("temperature", "sampling"),
    [
        (0, SamplingOptions()),
        (0.8, SamplingOptions()),
        (1.5, SamplingOptions(top_k=5)),
        (1.5, SamplingOptions(top_k=0, top_p=0.5)),
        (1.5, SamplingOptions(top_k=0, top_p=1, min_p=0.3)),
    ],
)
def test_the_sampling_is_llama_cpp_pythons(
    example_files: ExampleFiles, temperature: float, sampling: SamplingOptions
) -> None:
    require_runtime()
    import llama_cpp

    options = {"top_k": sampling.top_k or -1, "top_p": sampling.top_p, "min_p": sampling.min_p}
    model = llama_cpp.Llama(str(example_files.f16), n_ctx=128, n_threads=1, verbose=False)
    with closing(model):
        expected = model(PROMPT, max_tokens=24, temperature=temperature, seed=7, **options)
    with TextModel(example_files.f16, 128, 1) as own:
        assert text(own, PROMPT, 24, temperature, 7, sampling) == expected["choices"][0]["text"]


def test_repetitions_in_the_prompt_count_too(example_files: ExampleFiles) -> None:
    """As in llama-cli and llama-server; llama-cpp-python only counts what it has generated itself."""
    require_runtime()
    with TextModel(example_files.f16, 128, 1) as model:
        found = text(model, PROMPT, 12, 0, None, SamplingOptions(repeat_penalty=1.5))
        plain, tokens = text(model, PROMPT, 12), model.tokenize(PROMPT)
        for _ in range(12):
            logits = model.logits(np.array(tokens, np.int32), len(tokens) - 1)[0].copy()
            seen = list(set(tokens))
            logits[seen] = np.where(logits[seen] > 0, logits[seen] / 1.5, logits[seen] * 1.5)
            tokens.append(int(logits.argmax()))
        expected = b"".join(model._piece(token) for token in tokens[-12:]).decode()
    assert found == expected != plain


def test_what_was_read_is_used_again(example_files: ExampleFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    require_runtime()
    longer = PROMPT + "ks and so on, and so on, to the end"

    def fresh(prompt: str) -> str:
        with TextModel(example_files.f16, 128, 1) as model:
            return text(model, prompt)

    with TextModel(example_files.f16, 128, 1) as model:
        read: list[int] = []
        original = model._decode

        def decode(tokens: list[int]) -> None:
            read.append(len(tokens))
            original(tokens)

        monkeypatch.setattr(model, "_decode", decode)
        results = [text(model, prompt) for prompt in (longer, PROMPT, longer, longer, "Another text")]
        count, short = len(model.tokenize(longer)), len(model.tokenize(PROMPT))
    assert results == [fresh(prompt) for prompt in (longer, PROMPT, longer, longer, "Another text")]
    prompts = [read[index] for index in range(0, 5 * 25, 25)]
    assert prompts[:2] == [count, 1]
    assert prompts[2] == count - short
    assert prompts[3] == 1


def test_ctrl_c_leaves_a_usable_model(example_files: ExampleFiles) -> None:
    require_runtime()
    with TextModel(example_files.f16, 128, 1) as model:
        expected = text(model)
        pieces = model.continuation(model.tokenize(PROMPT + " he"), None, 0, None)
        next(pieces)
        pieces.close()
        model._read.pop()  # interrupted between reading a token and noting it
        assert text(model) == expected


def test_the_context_is_the_limit(example_files: ExampleFiles) -> None:
    require_runtime()
    with TextModel(example_files.f16, 64, 1) as model:
        tokens = model.tokenize(PROMPT)
        assert len("".join(model.continuation(tokens, None, 1.0, 1)).split()) > 15
        assert len(model._read) == 64
        with pytest.raises(D2QError, match="a text of 64 tokens exceeds the context of 64"):
            next(model.continuation(tokens[:1] * 64, None, 0, None))


def test_types_of_the_cache(example_files: ExampleFiles) -> None:
    require_runtime()
    tokens = np.arange(100, 164, dtype=np.int32)

    def logits(kind_k: str, kind_v: str) -> np.ndarray[Any, Any]:
        options = LoadOptions(cache_type_k=kind_k, cache_type_v=kind_v)
        with TextModel(example_files.f16, 64, 1, options) as model:
            return model.logits(tokens, 0).copy()

    exact = logits("f32", "f32")
    errors = [
        float(np.square(logits(*kinds) - exact).mean()) for kinds in (("q8_0", "f32"), ("q4_0", "f32"), ("f32", "q4_0"))
    ]
    assert 0 < errors[0] < errors[1] / 10
    assert errors[2] > errors[0]


@pytest.mark.parametrize("repack", [True, False])
def test_repacking_is_llama_cpps_choice_or_off(
    example_files: ExampleFiles, monkeypatch: pytest.MonkeyPatch, repack: bool
) -> None:
    api: Any = pytest.importorskip("llama_cpp")
    require_runtime()
    seen, load = [], api.llama_model_load_from_file

    def note(path: bytes, parameters: Any) -> Any:
        seen.append(parameters.use_extra_bufts)
        return load(path, parameters)

    monkeypatch.setattr(api, "llama_model_load_from_file", note)
    with TextModel(example_files.f16, 64, 1, LoadOptions(repack=repack)):
        assert seen == [repack]


def test_a_damaged_file(example_files: ExampleFiles, tmp_path: Path) -> None:
    require_runtime()
    content = bytearray(example_files.d2q2.read_bytes())
    content[-4:] = b"\xff\xff\xff\x7f"  # the last tensor is a norm's bias
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(D2QError, match="is damaged: NaN or infinity"):
        TextModel(tmp_path / "bad.gguf", 64, 1)
