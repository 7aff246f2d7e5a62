"""Whole models in the installed runtime: every path of our types, norm biases, the tables' checksum."""

import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from d2q_edge.formats.codebooks import TABLE_SHA256
from d2q_edge.formats.tensor_types import ALL, TensorType, dequantize
from d2q_edge.runtime.installed import require
from tests.kernels import tiny_model
from tests.kernels.ggml import U8, Ggml
from tests.kernels.tiny_model import ARCHITECTURES, F32, WIDTH, logits, random_tensors, write

# loads the first file to have everything else in memory, then prints how many bytes the second one adds
RESIDENT = """
import ctypes, sys
from pathlib import Path
import llama_cpp
def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
parameters = llama_cpp.llama_model_default_params()
parameters.use_extra_bufts = sys.argv[1] == "True"
kept = [llama_cpp.llama_model_load_from_file(sys.argv[2].encode(), parameters)]
before = resident()
kept.append(llama_cpp.llama_model_load_from_file(sys.argv[3].encode(), parameters))
assert all(kept)
print(resident() - before)
"""
TOKENS = [int(token) for token in np.random.default_rng(0).integers(0, 96, 24)]


@pytest.fixture(scope="module")
def llama(ggml: Ggml) -> ModuleType:
    del ggml
    return require()


def _logits(llama: ModuleType, path: Path, batch: int = 64) -> F32:
    out = logits(llama, path, TOKENS, batch)
    assert out is not None
    return out


def _error(actual: F32, expected: F32) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("t", ALL, ids=lambda t: t.name)
@pytest.mark.parametrize("batch", [1, 24], ids=["generation", "prompt"])
def test_model_equals_its_dequantized_weights(
    llama: ModuleType, ggml: Ggml, t: TensorType, batch: int, tmp_path: Path
) -> None:
    tensors = random_tensors("qwen3")
    names = [name for name in tensors if name.startswith(("blk.0.attn_", "blk.0.ffn_")) and "norm" not in name]
    packed = {name: ggml.quantize(t, tensors[name]) for name in [*names, "token_embd.weight"]}
    plain = tensors | {name: dequantize(t, rows) for name, rows in packed.items()}
    expected = _logits(llama, write(tmp_path / "plain.gguf", "qwen3", plain))
    actual = _logits(llama, write(tmp_path / "packed.gguf", "qwen3", tensors, packed, t), batch)
    assert 0 < _error(actual, expected) < 0.03  # what 8-bit activations cost
    assert _error(actual, _logits(llama, write(tmp_path / "f32.gguf", "qwen3", tensors))) > 0.05


@pytest.mark.parametrize("t", ALL, ids=lambda t: t.name)
def test_prompt_and_generation_agree(llama: ModuleType, ggml: Ggml, t: TensorType, tmp_path: Path) -> None:
    """The tiled matrix multiplication (from 8 tokens on) and the dot product agree."""
    tensors = random_tensors("llama")
    packed = {name: ggml.quantize(t, rows) for name, rows in tensors.items() if rows.shape[-1:] != rows.shape}
    path = write(tmp_path / "packed.gguf", "llama", tensors, packed, t)
    prompt, generation = _logits(llama, path, batch=24), _logits(llama, path, batch=1)
    assert _error(prompt, generation) < 0.03
    # another order of sums changes the rounding of a few activations: not in most
    assert np.median(np.abs(prompt - generation)) < 1e-5 * np.abs(generation).max()


def _packed(ggml: Ggml, t: TensorType, tensors: dict[str, F32]) -> dict[str, U8]:
    """Pack the matrices of the blocks, experts too."""
    names = [name for name, rows in tensors.items() if name.startswith("blk.") and rows.ndim > 1 and "_inp" not in name]
    return {
        name: ggml.quantize(t, tensors[name].reshape(-1, tensors[name].shape[-1])).reshape(
            *tensors[name].shape[:-1], -1
        )
        for name in names
    }


@pytest.mark.parametrize("t", ALL, ids=lambda t: t.name)
@pytest.mark.parametrize("arch", ["llama", "phi3", "qwen3moe"])
def test_interleaved_rows_change_nothing_but_rounding(
    llama: ModuleType, ggml: Ggml, arch: str, t: TensorType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tensors = random_tensors(arch)
    path = write(tmp_path / "packed.gguf", arch, tensors, _packed(ggml, t, tensors), t)
    for batch in (1, 5, 24):  # generation; fewer columns than a prompt's multiplication takes; a prompt
        capfd.readouterr()
        interleaved = logits(llama, path, TOKENS, batch)
        assert "CPU_D2Q model buffer" in capfd.readouterr().err
        plain = logits(llama, path, TOKENS, batch, repack=False)
        assert "CPU_D2Q" not in capfd.readouterr().err
        assert interleaved is not None
        assert plain is not None
        assert _error(interleaved, plain) < 0.03
        assert np.median(np.abs(interleaved - plain)) < 1e-5 * np.abs(plain).max()


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
@pytest.mark.parametrize("repack", [True, False])
def test_memory_holds_the_weights_once(
    llama: ModuleType, ggml: Ggml, repack: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = ALL[0]
    small = random_tensors("llama")
    tiny = write(tmp_path / "tiny.gguf", "llama", small, _packed(ggml, t, small), t)
    monkeypatch.setattr(tiny_model, "FEED_FORWARD", 1 << 17)
    big = small | {
        name: np.resize(rows, (1 << 17, WIDTH) if rows.shape[1] == WIDTH else (WIDTH, 1 << 17))
        for name, rows in small.items()
        if name.startswith("blk.0.ffn_") and rows.ndim > 1
    }
    # the last tensor stays mapped: what precedes it isn't unmapped at the end of loading, as the end of a file is
    big["output_norm.weight"] = big.pop("output_norm.weight")
    packed = {
        name: np.resize(ggml.quantize(t, rows[:8]), (len(rows), t.row_bytes(rows.shape[1])))
        for name, rows in big.items()
        if name.startswith("blk.0.ffn_") and rows.ndim > 1
    }
    path = write(tmp_path / "big.gguf", "llama", big, packed, t)
    size = path.stat().st_size
    assert size > 25e6
    command = [sys.executable, "-c", RESIDENT, str(repack), str(tiny), str(path)]
    added = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert added < 1.1 * size


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_output_norm_bias_adds_its_product_with_the_head(llama: ModuleType, arch: str, tmp_path: Path) -> None:
    tensors = random_tensors(arch)
    bias = np.random.default_rng(1).standard_normal(WIDTH).astype(np.float32)
    without = _logits(llama, write(tmp_path / "without.gguf", arch, tensors))
    with_bias = _logits(llama, write(tmp_path / "with.gguf", arch, tensors | {"output_norm.bias": bias}))
    assert _error(with_bias, without + tensors["output.weight"] @ bias) < 1e-4


@pytest.mark.parametrize(
    ("arch", "norm", "linears"),
    [
        ("llama", "attn_norm", ("attn_q", "attn_k", "attn_v")),
        ("llama", "ffn_norm", ("ffn_gate", "ffn_up")),
        ("qwen2", "attn_norm", ("attn_q", "attn_k", "attn_v")),
    ],
)
def test_block_norm_bias_equals_biases_of_the_linears(
    llama: ModuleType, arch: str, norm: str, linears: tuple[str, ...], tmp_path: Path
) -> None:
    tensors = random_tensors(arch)
    bias = np.random.default_rng(2).standard_normal(WIDTH).astype(np.float32)
    folded = {f"blk.0.{name}.bias": tensors[f"blk.0.{name}.weight"] @ bias for name in linears}
    expected = _logits(llama, write(tmp_path / "folded.gguf", arch, tensors | folded))
    actual = _logits(llama, write(tmp_path / "bias.gguf", arch, tensors | {f"blk.0.{norm}.bias": bias}))
    assert _error(actual, expected) < 1e-4
    assert _error(actual, _logits(llama, write(tmp_path / "without.gguf", arch, tensors))) > 0.01


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("norm", ["attn_norm", "ffn_norm"])
def test_block_norm_bias_is_applied(llama: ModuleType, arch: str, norm: str, tmp_path: Path) -> None:
    tensors = random_tensors(arch)
    without = _logits(llama, write(tmp_path / "without.gguf", arch, tensors))
    zero = tensors | {f"blk.0.{norm}.bias": np.zeros(WIDTH, np.float32)}
    one = tensors | {f"blk.0.{norm}.bias": np.ones(WIDTH, np.float32)}
    np.testing.assert_array_equal(_logits(llama, write(tmp_path / "zero.gguf", arch, zero)), without)
    assert _error(_logits(llama, write(tmp_path / "one.gguf", arch, one)), without) > 0.01


# the second are the tables before the codes of scalars had windows
@pytest.mark.parametrize("checksum", ["0" * 64, "d0f2acd1bc4165f5566530eb6601a3c9cf9fb2aefbf065b3d2551ae77fe8f2e5"])
def test_other_tables_are_refused(
    llama: ModuleType, checksum: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tensors = random_tensors("llama")
    same = write(tmp_path / "same.gguf", "llama", tensors, text={"d2q.table_sha256": TABLE_SHA256})
    other = write(tmp_path / "other.gguf", "llama", tensors, text={"d2q.table_sha256": checksum})
    assert logits(llama, same, TOKENS) is not None
    capfd.readouterr()
    assert logits(llama, other, TOKENS) is None
    assert "was written with other d2q codebook tables" in capfd.readouterr().err
