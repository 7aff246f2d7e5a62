"""Perplexity and KL divergence against llama-perplexity, and against torch on the same weights; progress; errors."""

import json
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from d2q_edge.calibration.text import EVALUATION, load_evaluation
from d2q_edge.conversion import convert
from d2q_edge.errors import D2QError
from d2q_edge.evaluation.perplexity import Evaluation, cut, evaluate, measure
from d2q_edge.export.model_file import export
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.options import Options
from d2q_edge.runtime.llama_model import LlamaModel
from tests.availability import require_runtime, require_tool
from tests.checkpoints import EXAMPLE
from tests.conftest import ExampleFiles

Make = Callable[..., Path]
CHUNKS = 6
VARIED = """def f(x):\n\treturn x**2  # 12345.678\n\nI'll say: "it's 3,000 o'clock", they're here — naïve café.\n
你好，世界！日本語のテキスト 한국어 🙂👍🏽🇩🇪    many   spaces\t\ttabs\n\n\n\nEND\r\n <|endoftext|> ½ ² Ω ﬁ e\u0301 """


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough for CHUNKS chunks; the tools tokenize a text whole."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(EVALUATION.read_text("utf-8")[:20000], "utf-8")
    return path


@pytest.fixture(scope="module")
def measured(example_files: ExampleFiles, text: Path) -> Evaluation:
    require_runtime()
    return evaluate(example_files.d2q2, example_files.f16, str(text), CHUNKS)


@pytest.mark.slow
class TestAgainstTheTool:
    @pytest.fixture(scope="class")
    @staticmethod
    def said(example_files: ExampleFiles, text: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
        """What llama-perplexity prints about the D2Q2 file."""
        tool, base = require_tool("llama-perplexity"), tmp_path_factory.mktemp("base") / "logits"
        options = [
            "-f",
            str(text),
            "-c",
            "512",
            "-b",
            "512",
            "--chunks",
            str(CHUNKS),
            "--kl-divergence-base",
            str(base),
        ]
        subprocess.run([str(tool), "-m", str(example_files.f16), *options], check=True, capture_output=True)
        command = [str(tool), "-m", str(example_files.d2q2), *options, "--kl-divergence"]
        # llama.cpp prints from a thread that it doesn't wait for at the end, so the last lines can be lost.
        for _ in range(10):
            printed = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout
            if "Same top p:" in printed:
                return printed
        pytest.fail(f"llama-perplexity prints no result: {printed}")

    @pytest.mark.parametrize(
        ("label", "field", "tolerance"),
        [
            (r"Mean PPL\(Q\)", "perplexity", 1e-3),
            (r"Mean PPL\(base\)", "reference_perplexity", 1e-3),
            (r"Mean PPL\(Q\)/PPL\(base\)", "perplexity_ratio", 1e-3),
            (r"Mean    KLD", "kl_divergence_mean", 5e-3),
            (r"99.0%   KLD", "kl_divergence_p99", 5e-3),
            (r"Median  KLD", "kl_divergence_median", 5e-3),
            (r"Maximum KLD", "kl_divergence_max", 5e-3),
        ],
    )
    def test_numbers(self, said: str, measured: Evaluation, label: str, field: str, tolerance: float) -> None:
        found = re.search(label + r" *: *([\d.]+)", said)
        assert found, said
        assert getattr(measured, field) == pytest.approx(float(found[1]), rel=tolerance)

    @pytest.mark.parametrize(
        ("label", "field", "unit"),
        [
            (r"Mean PPL\(Q\)", "perplexity_stderr", 1),
            (r"Mean PPL\(base\)", "reference_perplexity_stderr", 1),
            (r"Mean PPL\(Q\)/PPL\(base\)", "perplexity_ratio_stderr", 1),
            (r"Mean    KLD", "kl_divergence_stderr", 1),
            (r"Same top p", "top1_agreement_stderr", 100),
        ],
    )
    def test_standard_errors(self, said: str, measured: Evaluation, label: str, field: str, unit: float) -> None:
        found = re.search(label + r" *: *[\d.]+ ± *([\d.]+)", said)
        assert found, said
        assert getattr(measured, field) * unit == pytest.approx(float(found[1]), rel=5e-3)

    def test_agreement(self, said: str, measured: Evaluation) -> None:
        found = re.search(r"Same top p: *([\d.]+)", said)
        assert found, said
        assert measured.top1_agreement is not None
        # One position more or less: the tool keeps 16 bits of each log-probability.
        assert measured.top1_agreement * 100 == pytest.approx(float(found[1]), abs=100 / (255 * CHUNKS) + 1e-3)


@pytest.mark.slow
class TestAgainstTorch:
    @pytest.mark.parametrize(
        ("file", "chunks", "tolerance"), [("f16", 4, 5e-4), ("d2q2", 64, 5e-3), ("d2q3", 64, 5e-3)]
    )
    @torch.inference_mode()
    def test_perplexity_of_the_same_weights(
        self, example_files: ExampleFiles, file: str, chunks: int, tolerance: float
    ) -> None:
        """llama.cpp rounds activations to eight bits before it multiplies quantized weights.

        That adds noise of about 0.1 nats to each token of this small model, hence many chunks.
        """
        require_runtime()
        path: Path = getattr(example_files, file)
        text = EVALUATION.read_text("utf-8")
        content = GGUFFile(path)
        family = family_for(Checkpoint.open(EXAMPLE).config)
        model: Any = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32).eval()
        names = family.tensor_shapes()
        weights = {name: torch.from_numpy(content.dequantize(family.gguf_name(name)).copy()) for name in names}
        _, unexpected = model.load_state_dict(weights, strict=False)
        assert unexpected == []
        model.tie_weights()
        ids = AutoTokenizer.from_pretrained(EXAMPLE)(text, verbose=False)["input_ids"][: 512 * chunks]
        losses = []
        for window in torch.tensor(ids).view(chunks, 512):
            scores = torch.log_softmax(model(window[None]).logits[0, 256:511], -1)
            losses.append(-scores.gather(1, window[257:, None]))
        expected = math.exp(float(torch.cat(losses).double().mean()))
        assert evaluate(path, None, "builtin", chunks).perplexity == pytest.approx(expected, rel=tolerance)

    @torch.inference_mode()
    def test_logits_of_a_llama(self, make_checkpoint: Make, tmp_path: Path) -> None:
        """Row order and BOS matter here, unlike in the example; attention is made sharp, so that they matter much."""
        require_runtime()
        path = make_checkpoint("llama", hidden_size=256, intermediate_size=512, dtype=torch.float32)
        tensors = load_file(path / "model.safetensors")
        for name in tensors:
            if "q_proj" in name or "k_proj" in name:
                tensors[name] *= 4
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        options = Options(bits=3, calibration_tokens=1024, context=64, embedding_type="f32", head_type="f32")
        convert(path, tmp_path / "out.gguf", options)
        content = GGUFFile(tmp_path / "out.gguf")
        family = family_for(Checkpoint.open(path).config)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        weights = {}
        for name, shape in family.tensor_shapes().items():
            rows = np.arange(shape[0])
            order = family.export_rows(name, rows)
            values = np.empty(shape, np.float32)
            values[order] = content.dequantize(family.gguf_name(name))
            weights[name] = torch.from_numpy(values)
        ids = AutoTokenizer.from_pretrained(path)("The old man looked out over the sea and said nothing.")["input_ids"]
        original = model(torch.tensor([ids])).logits[0].numpy()
        model.load_state_dict(weights)
        expected = model(torch.tensor([ids])).logits[0].numpy()
        with LlamaModel(tmp_path / "out.gguf", 64) as llama:
            assert llama.bos == ids[0] == 4093
            assert llama.tokenize("The old man looked out over the sea and said nothing.") == ids
            logits = llama.logits(np.array(ids, np.int32), 0).copy()
            assert np.array_equal(llama.logits(np.array(ids, np.int32), 5), logits[5:])
        error = np.square(logits - expected).mean() / np.square(expected).mean()
        # Activations have eight bits in llama.cpp.
        assert error < 0.01
        assert error < 0.2 * np.square(original - expected).mean() / np.square(expected).mean()


def test_token_ids_are_those_of_transformers(example_files: ExampleFiles) -> None:
    require_runtime()
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    with LlamaModel(example_files.d2q2, 64) as model:
        assert model.bos is None
        for line in [*VARIED.split("END"), EVALUATION.read_text("utf-8")[:5000]]:
            if "<|endoftext|>" not in line:
                assert model.tokenize(line) == tokenizer(line)["input_ids"]
        assert len(model.tokenize("<|endoftext|>")) > 1, "a special token's name in a text is text"


def test_fields(measured: Evaluation, example_files: ExampleFiles) -> None:
    assert measured.chunks == CHUNKS
    assert measured.bytes == example_files.d2q2.stat().st_size
    infos = GGUFFile(example_files.d2q2).tensors.values()
    bits = 8 * sum(info.nbytes for info in infos) / sum(info.elements for info in infos)
    assert measured.bits_per_weight == pytest.approx(bits)
    assert list(measured.to_json()) == [
        "perplexity", "perplexity_stderr", "reference_perplexity", "kl_divergence_mean", "kl_divergence_p99",
        "top1_agreement", "chunks", "bytes", "bits_per_weight", "scored", "reference_perplexity_stderr",
        "perplexity_ratio", "perplexity_ratio_stderr", "kl_divergence_stderr", "kl_divergence_median",
        "kl_divergence_max", "kl_divergence_p99_interval", "top1_agreement_stderr",
    ]  # fmt: skip
    assert measured.scored == 255 * CHUNKS


def test_three_bits_are_nearer_than_two(measured: Evaluation, example_files: ExampleFiles, text: Path) -> None:
    three = evaluate(example_files.d2q3, example_files.f16, str(text), CHUNKS)
    assert three.kl_divergence_mean is not None
    assert measured.kl_divergence_mean is not None
    assert three.kl_divergence_mean < 0.5 * measured.kl_divergence_mean
    assert three.perplexity < measured.perplexity


def test_a_file_against_itself(example_files: ExampleFiles, text: Path) -> None:
    require_runtime()
    same = evaluate(example_files.f16, example_files.f16, str(text), 1, context=128)
    assert (same.kl_divergence_mean, same.top1_agreement) == (0, 1)
    assert same.perplexity == same.reference_perplexity
    alone = evaluate(example_files.f16, None, str(text), 1, context=128)
    assert alone.perplexity == same.perplexity
    assert alone.kl_divergence_mean is alone.kl_divergence_p99 is alone.top1_agreement is None


def test_conversations(chat_model: Path, chat_file: Path, tmp_path: Path) -> None:
    """They are rendered by the file's chat template; special tokens are tokens, as transformers reads them."""
    require_runtime()
    chats = [[{"role": "user", "content": f"How many days has year {n}? "}] for n in range(1990, 2010)]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    expected = [token for chat in chats for token in tokenizer.apply_chat_template(chat)["input_ids"]]
    with LlamaModel(chat_file, 32) as model:
        found = cut(model, load_evaluation(str(tmp_path / "chats.jsonl")), 32, None)
    assert found.ravel().tolist() == expected[: found.size]
    assert len(found) == len(expected) // 32
    assert evaluate(chat_file, text=str(tmp_path / "chats.jsonl"), context=32, chunks=2).chunks == 2


def test_every_chunk_begins_with_bos(make_checkpoint: Make, tmp_path: Path) -> None:
    require_runtime()
    export(make_checkpoint("llama"), tmp_path / "llama.gguf", "f16")
    text = load_evaluation("builtin")
    with LlamaModel(tmp_path / "llama.gguf", 64) as model:
        chunks = cut(model, text, 64, 3)
        tokens = np.array(model.tokenize(EVALUATION.read_text("utf-8"))[: 3 * 64]).reshape(3, 64)
    assert chunks[:, 0].tolist() == [4093] * 3
    assert tokens[0, 0] == 4093 != tokens[1, 0]
    assert np.array_equal(chunks[:, 1:], tokens[:, 1:])


def test_chunks_are_at_most_what_the_text_has(example_files: ExampleFiles, tmp_path: Path) -> None:
    require_runtime()
    (tmp_path / "short.txt").write_text(EVALUATION.read_text("utf-8")[:1200])
    tokens = len(AutoTokenizer.from_pretrained(EXAMPLE)((tmp_path / "short.txt").read_text())["input_ids"])
    assert evaluate(example_files.f16, None, str(tmp_path / "short.txt"), 99, context=64).chunks == tokens // 64


def test_too_few_values_for_intervals(example_files: ExampleFiles) -> None:
    require_runtime()
    few = evaluate(example_files.d2q2, example_files.f16, chunks=1, context=24)
    assert few.scored == 11 and few.perplexity_stderr > 0
    assert "in brackets: 95 % confidence, from 11 tokens" in few.describe()
    fewer = evaluate(example_files.d2q2, example_files.f16, chunks=1, context=22)
    assert fewer.scored == 10 and fewer.perplexity_stderr == 0
    assert "(" not in fewer.describe()
    assert "too few for confidence intervals: from 10 tokens in 1 chunks" in fewer.describe()


def test_context_beyond_the_model(example_files: ExampleFiles, capsys: pytest.CaptureFixture[str]) -> None:
    require_runtime()
    evaluate(example_files.f16, chunks=1, context=2048)
    assert "the model was trained for" not in capsys.readouterr().err
    evaluate(example_files.f16, chunks=1, context=2049)
    assert "the model was trained for 2048 tokens; it can't predict" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"chunks": 0}, {"chunks": -1}, {"context": 7}, {"context": 0}, {"context": -5}])
def test_numbers_that_make_no_sense(example_files: ExampleFiles, options: dict[str, Any]) -> None:
    with pytest.raises(D2QError, match=r"context must be at least 8 and chunks at least 1, not "):
        evaluate(example_files.f16, **options)


@pytest.mark.parametrize(("reference", "status"), [(False, r"perplexity \d+\.\d{3}"), (True, r"KLD \d\.\d{4}")])
def test_progress_without_a_terminal(
    example_files: ExampleFiles, capfd: pytest.CaptureFixture[str], reference: bool, status: str
) -> None:
    require_runtime()
    with LlamaModel(example_files.d2q2, 64) as model:
        windows = cut(model, load_evaluation("builtin"), 64, 3)
        base = (lambda _: np.zeros((31, model.vocab_size), np.float32)) if reference else None
        measure(GGUFFile(example_files.d2q2), model, windows, base, interval=0)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2, "after each chunk but the last"
    for done, line in enumerate(lines, 1):
        assert re.fullmatch(rf"Evaluating d2q2.gguf: {done}/3 chunk, {status}, \d+ s elapsed, about \d+ s left", line)
    evaluate(example_files.d2q2, example_files.f16 if reference else None, chunks=3, context=64)
    assert capfd.readouterr().err == "", "a line every 30 seconds"


def test_description(measured: Evaluation) -> None:
    lines = measured.describe().splitlines()
    half = 1.96 * measured.perplexity_stderr
    low, high = measured.perplexity - half, measured.perplexity + half
    assert lines[0].split() == ["perplexity", f"{measured.perplexity:.4f}", f"({low:.4f}", "to", f"{high:.4f})"]
    names = ["perplexity", "reference", "ratio", "KL", "99", "median", "top-1", "in", "file"]
    assert [line.split()[0] for line in lines] == names
    assert measured.kl_divergence_p99_interval is not None
    low, high = measured.kl_divergence_p99_interval
    assert low < (measured.kl_divergence_p99 or 0) < high
    assert f"({low:.4f} to {high:.4f})" in lines[4]


class TestErrors:
    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(D2QError, match=r"there is no file .*none.gguf"):
            evaluate(tmp_path / "none.gguf")

    def test_missing_reference(self, example_files: ExampleFiles, tmp_path: Path) -> None:
        require_runtime()
        with pytest.raises(D2QError, match=r"there is no file .*none.gguf"):
            evaluate(example_files.f16, tmp_path / "none.gguf")

    @pytest.mark.parametrize("as_reference", [False, True])
    def test_not_a_gguf(self, example_files: ExampleFiles, tmp_path: Path, as_reference: bool) -> None:
        require_runtime()
        other = tmp_path / "other.gguf"
        other.write_bytes(b"something else, and long enough to be a header")
        with pytest.raises(D2QError, match=r"other.gguf"):
            evaluate(*((example_files.f16, other) if as_reference else (other, None)))

    def test_file_that_llama_cpp_refuses(self, tmp_path: Path, example_files: ExampleFiles) -> None:
        require_runtime()
        content = example_files.f16.read_bytes().replace(b"blk.3.ffn_down.weight", b"blk.3.ffn_dowm.weight")
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(D2QError, match=r"llama.cpp can't load .*bad.gguf: .*blk.3.ffn_down.weight"):
            evaluate(tmp_path / "bad.gguf")

    @pytest.mark.parametrize("as_reference", [False, True])
    def test_loss_that_is_too_large(self, example_files: ExampleFiles, tmp_path: Path, as_reference: bool) -> None:
        require_runtime()
        info = GGUFFile(example_files.f16).tensors["output_norm.weight"]
        content = bytearray(example_files.f16.read_bytes())
        norm = np.frombuffer(content, np.float32, info.nbytes // 4, info.offset)
        norm *= 1e6
        (tmp_path / "bad.gguf").write_bytes(content)
        files = (example_files.f16, tmp_path / "bad.gguf")
        with pytest.raises(D2QError, match=r"damaged: loss .* in chunk 1"):
            evaluate(*(files if as_reference else files[::-1]), chunks=1, context=64)

    def test_reference_with_another_tokenizer(
        self, example_files: ExampleFiles, make_checkpoint: Make, tmp_path: Path, text: Path
    ) -> None:
        require_runtime()
        export(make_checkpoint("llama"), tmp_path / "llama.gguf", "f16")
        with pytest.raises(D2QError, match="split the text into different tokens; they are different models"):
            evaluate(example_files.f16, tmp_path / "llama.gguf", str(text), 1)

    def test_reference_with_another_vocabulary(
        self, example_files: ExampleFiles, make_checkpoint: Make, tmp_path: Path, text: Path
    ) -> None:
        require_runtime()
        export(make_checkpoint("qwen3"), tmp_path / "other.gguf", "f16")
        with pytest.raises(D2QError, match=r"has 4096 tokens and .* 4100; they are different models"):
            evaluate(example_files.f16, tmp_path / "other.gguf", str(text), 1)

    def test_short_text(self, example_files: ExampleFiles, tmp_path: Path) -> None:
        require_runtime()
        (tmp_path / "short.txt").write_text("Too short.")
        with pytest.raises(D2QError, match=r"the text has \d tokens, less than one chunk of 512; use a longer --text"):
            evaluate(example_files.f16, None, str(tmp_path / "short.txt"))

    def test_no_runtime(self, example_files: ExampleFiles, no_runtime: None) -> None:
        with pytest.raises(D2QError, match=r"is not installed: run `d2q-edge runtime install`"):
            evaluate(example_files.f16)
