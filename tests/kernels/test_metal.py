"""The Metal kernels, compiled for this CPU and dispatched by ggml's own host code, against ggml's C code.

Weights and activations are small integers times powers of two, so that sums are exact in any order, and results must be
equal. Two stock types go through the same tests to validate the emulation.
"""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from d2q_edge.formats.codebooks import PAIR_TABLE, SCALAR_TABLE
from d2q_edge.formats.tensor_types import ALL, GROUP, TensorType, pack
from tests.availability import unavailable
from tests.kernels import blocks
from tests.kernels.metal.build import LIBRARIES, build, configure, embedded_sources
from tests.kernels.metal.emulator import Emulator, Quantized, Unsupported
from tests.kernels.metal.translate import ATTRIBUTE

F64 = npt.NDArray[np.float64]
POWERS = np.array([0.5, 1, 2, -0.5, -1, -2], np.float16)
STOCK = {"q4_0": (2, 32, 18), "q2_K": (10, 256, 84)}
"""Type number, weights and bytes per block of the stock types."""
NAMES = [*(t.name for t in ALL), *STOCK]
OWN = {t.name: t for t in ALL}


def _needs(*programs: str) -> None:
    if missing := [program for program in programs if shutil.which(program) is None]:
        unavailable(f"programs are missing: {', '.join(missing)}")


@pytest.fixture(scope="module")
def emulator(patched_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """Compile the patched tree's Metal kernels and host code."""
    _needs("gcc", "g++", "cmake", "ninja")
    return Emulator(build(patched_tree, tmp_path_factory.mktemp("metal")))


def block_size(name: str) -> int:
    return OWN[name].block_size if name in OWN else STOCK[name][1]


def exact_weights(name: str, shape: tuple[int, ...], seed: int = 0) -> Quantized:
    """Pack random weights [..., rows, columns] that are integers times a power of two."""
    rng = np.random.default_rng(seed)
    *lead, columns = shape
    rows = int(np.prod(lead))
    count = columns // block_size(name)
    scales = rng.choice(POWERS, (rows, count))
    if name in OWN:
        t = OWN[name]
        books = rng.integers(0, 256, (rows, columns // GROUP), dtype=np.uint8)
        codes = rng.integers(0, 16 if t.paired else 8, (rows, t.codes(columns)), dtype=np.uint8)
        return Quantized(t.id, columns, pack(t, scales, books, codes).reshape(*lead, -1))
    number, _, size = STOCK[name]
    packed = rng.integers(0, 256, (rows, count, size), dtype=np.uint8)
    if name == "q4_0":
        packed[:, :, :2] = scales[..., None].view(np.uint8)
    else:
        packed[:, :, 80:] = np.stack([scales, rng.choice(POWERS, scales.shape)], axis=2).view(np.uint8)
    return Quantized(number, columns, packed.reshape(*lead, -1))


def exact_activations(shape: tuple[int, ...], seed: int = 1) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32)


def product(weights: npt.NDArray[np.float32], x: npt.NDArray[np.float32]) -> F64:
    """Multiply weights [..., rows, columns] by x [..., tokens, columns] to [..., tokens, rows]."""
    return np.asarray(x.astype(np.float64) @ np.swapaxes(weights.astype(np.float64), -1, -2))


def expected_path(name: str, columns: int, tokens: int) -> str:
    """Return which of ggml's kernels computes a product."""
    if columns % 128 == 0 and (2 if name == "q4_0" else 4) <= tokens <= 8:
        return "mul_mv_ext"
    return "mul_mm" if tokens > 8 else "mul_mv"


# rows that are no multiple of the tiles of 4, 8 or 64, and one that is; odd and even numbers of blocks
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 6, 8, 9, 33])
@pytest.mark.parametrize(("rows", "blocks_of_256"), [(1, 1), (7, 2.5), (5, 9), (128, 0.25), (70, 0.75)])
@pytest.mark.parametrize("name", NAMES)
def test_mul_mat(emulator: Emulator, name: str, rows: int, blocks_of_256: float, tokens: int) -> None:
    size = block_size(name)
    columns = max(1, int(256 * blocks_of_256) // size) * size
    weights = exact_weights(name, (rows, columns))
    x = exact_activations((tokens, columns))
    result = emulator.run("mul_mat", weights, x)
    np.testing.assert_array_equal(result.values.reshape(tokens, rows), product(emulator.dequantize(weights), x))
    (kernel,) = result.kernels
    assert kernel.startswith(f"kernel_{expected_path(name, columns, tokens)}_{name}_f32")


@pytest.mark.parametrize("tokens", [1, 5, 10])
@pytest.mark.parametrize("name", NAMES)
def test_mul_mat_in_batches(emulator: Emulator, name: str, tokens: int) -> None:
    """Broadcast 2 x 2 matrices over 4 x 2 sets of activations."""
    weights = exact_weights(name, (2, 2, 9, 512))
    x = exact_activations((2, 4, tokens, 512))
    result = emulator.run("mul_mat", weights, x)
    repeated = np.repeat(emulator.dequantize(weights), 2, axis=1)
    np.testing.assert_array_equal(result.values.reshape(2, 4, tokens, 9), product(repeated, x))


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_activations(emulator: Emulator, name: str) -> None:
    weights, x = exact_weights(name, (70, 512)), exact_activations((12, 512))
    result = emulator.run("mul_mat", weights, x.astype(np.float16))
    np.testing.assert_array_equal(result.values.reshape(12, 70), product(emulator.dequantize(weights), x))
    assert result.kernels == (f"kernel_mul_mm_{name}_f16",)
    with pytest.raises(Unsupported):
        emulator.run("mul_mat", weights, x[:2].astype(np.float16))


# from 32 tokens on, a matrix product per expert; below, a product per token
@pytest.mark.parametrize(("tokens", "used", "shared"), [(1, 2, True), (3, 4, False), (40, 2, True), (33, 1, False)])
@pytest.mark.parametrize("name", NAMES)
def test_mul_mat_id(emulator: Emulator, name: str, tokens: int, used: int, shared: bool) -> None:
    experts, rows, columns = 5, 70, 256 + block_size(name)
    rng = np.random.default_rng(2)
    weights = exact_weights(name, (experts, rows, columns))
    x = exact_activations((tokens, 1 if shared else used, columns))
    chosen = np.stack([rng.permutation(experts)[:used] for _ in range(tokens)]).astype(np.int32)
    result = emulator.run("mul_mat_id", weights, x, chosen)
    per_token = np.broadcast_to(x, (tokens, used, columns))
    expected = product(emulator.dequantize(weights)[chosen], per_token[:, :, None, :])[:, :, 0, :]
    np.testing.assert_array_equal(result.values.reshape(tokens, used, rows), expected)
    path = "mul_mm_id" if tokens >= 32 else "mul_mv_id"
    assert result.kernels[-1] == f"kernel_{path}_{name}_f32"


@pytest.mark.parametrize("name", NAMES)
def test_get_rows(emulator: Emulator, name: str) -> None:
    weights = exact_weights(name, (2, 11, 768))
    chosen = np.array([[3, 3, 0, 10, 7], [10, 1, 2, 0, 0]], np.int32)
    result = emulator.run("get_rows", weights, chosen)
    expected = np.stack([rows[c] for rows, c in zip(emulator.dequantize(weights), chosen, strict=True)])
    np.testing.assert_array_equal(result.values.reshape(expected.shape), expected)
    assert result.kernels == (f"kernel_get_rows_{name}",)


@pytest.mark.parametrize("t", ALL, ids=lambda t: t.name)
@pytest.mark.parametrize("packed", [blocks.every_entry, blocks.every_scale], ids=lambda f: f.__name__)
def test_every_entry_and_scale_is_dequantized_exactly(emulator: Emulator, t: TensorType, packed: object) -> None:
    rows = packed(t)  # type: ignore[operator]
    weights = Quantized(t.id, rows.shape[1] // t.type_size * t.block_size, rows)
    result = emulator.run("get_rows", weights, np.zeros((1, 1), np.int32))
    np.testing.assert_array_equal(result.values, emulator.dequantize(weights)[0])


@pytest.mark.parametrize("tokens", [1, 4, 9])
@pytest.mark.parametrize("t", ALL, ids=lambda t: t.name)
def test_every_entry_reaches_the_products(emulator: Emulator, t: TensorType, tokens: int) -> None:
    """A row per codebook, with every code at every position, times activations that distinguish the positions."""
    packed = blocks.every_entry(t)
    columns = packed.shape[1] // t.type_size * t.block_size // 256
    weights = Quantized(t.id, columns, packed.reshape(256, -1))
    x = exact_activations((tokens, columns))
    expected = product(emulator.dequantize(weights), x)
    np.testing.assert_array_equal(emulator.run("mul_mat", weights, x).values.reshape(tokens, 256), expected)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("t", ALL, ids=lambda t: t.name)
def test_largest_products(emulator: Emulator, t: TensorType, sign: int) -> None:
    """The largest entries and the largest scale that a kernel's precision, half for mul_mm or float, allows."""
    packed = blocks.largest_entries(t, 512, sign)
    for scale, size, tokens in ((65504, 1, 1), (65504, 1, 4), (512, 1, 9), (1, 32768, 9)):
        blocks_of_row = packed.copy().reshape(-1, t.type_size)
        blocks_of_row[:, :2] = np.array([scale], np.float16).view(np.uint8)
        weights = Quantized(t.id, 512, blocks_of_row.reshape(1, -1))
        x = np.full((tokens, 512), size, np.float32)
        result = emulator.run("mul_mat", weights, x)
        np.testing.assert_array_equal(result.values.reshape(tokens, 1), product(emulator.dequantize(weights), x))


@pytest.mark.parametrize("tokens", [2, 5, 40])
@pytest.mark.parametrize("t", ALL, ids=lambda t: t.name)
def test_ordinary_numbers(emulator: Emulator, t: TensorType, tokens: int) -> None:
    """Scales and activations that are rounded: to float32 precision, after mul_mm's rounding of both to half."""
    weights = Quantized(t.id, 768, blocks.random_rows(t, 70, 768))
    x = np.random.default_rng(3).normal(size=(tokens, 768)).astype(np.float32)
    result = emulator.run("mul_mat", weights, x).values.reshape(tokens, 70)
    values = emulator.dequantize(weights)
    if tokens > 8:
        x, values = (a.astype(np.float16).astype(np.float32) for a in (x, values))
    assert np.all(np.abs(result - product(values, x)) <= 1e-6 * product(np.abs(values), np.abs(x)))


@pytest.mark.parametrize("t", ALL, ids=lambda t: t.name)
def test_other_operations_are_declined(emulator: Emulator, t: TensorType) -> None:
    """Copies from and to our types must stay on the CPU, as Metal has none, rather than abort."""
    weights = exact_weights(t.name, (2, 512))
    with pytest.raises(Unsupported):
        emulator.run("cpy", weights, np.zeros((2, 512), np.float32))
    with pytest.raises(Unsupported):
        emulator.run("cpy", np.zeros((2, 512), np.float32), weights)


def test_metal_tables_hold_the_same_numbers(patched_tree: Path) -> None:
    """Parse the tables independently, in case that Metal's compiler reads them differently."""
    text = (patched_tree / "vendor/llama.cpp/ggml/src/d2q/d2q-tables-metal.h").read_text(encoding="ascii")
    found = {}
    for name, body in re.findall(r"constant \w+ (d2q_\w+)(?:\[\d+\])+ = \{(.*?)\};", text, flags=re.DOTALL):
        words = re.findall(r"0x([0-9A-F]+)", body)
        found[name] = np.array([list(reversed(bytes.fromhex(word))) for word in words], np.uint8).view(np.int8)
    np.testing.assert_array_equal(found["d2q_pair_table"].reshape(256, 16, 2), PAIR_TABLE)
    np.testing.assert_array_equal(found["d2q_scalar_table"].reshape(256, 16), SCALAR_TABLE)


CLANG = next(filter(None, map(shutil.which, ("clang++", *(f"clang++-{n}" for n in range(14, 25))))), None)


@pytest.mark.skipif(CLANG is None, reason="needs clang++")
@pytest.mark.parametrize("break_it", [False, True], ids=["as it is", "wrong on purpose"])
def test_pointers_keep_their_address_space(patched_tree: Path, tmp_path: Path, break_it: bool) -> None:
    """Apple's compiler refuses a pointer without an address space, which gcc doesn't check."""
    for name in ("d2q-tables-metal.h", "d2q-metal.h", "d2q-metal-mul-mv.h"):
        text = (patched_tree / "vendor/llama.cpp/ggml/src/d2q" / name).read_text()
        if break_it:
            text = text.replace("device const uint16_t * qh", "const uint16_t * qh", 1)
        (tmp_path / name).write_text(ATTRIBUTE.sub("", text))
    source = Path(__file__).parent / "metal/address_spaces.cpp"
    command = [str(CLANG), "-std=c++14", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
    done = subprocess.run([*command, f"-I{tmp_path}", source], capture_output=True, text=True, check=False)
    assert (done.returncode != 0) == break_it, done.stderr
    assert ("address_space" in done.stderr) == break_it


def _preprocessed(source: Path, *flags: str) -> list[str]:
    command = ["g++", "-E", "-P", "-x", "c++", "-nostdinc", "-w", *flags, str(source)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.strip() for line in text.splitlines() if line.strip()]


def test_library_from_files_is_the_embedded_one(patched_tree: Path, tmp_path: Path) -> None:
    """ggml builds the Metal library from one merged text per kind or from files: both must have our code."""
    _needs("g++", "cmake", "ninja")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "metal_stdlib").touch()
    merged = embedded_sources(patched_tree, tmp_path / "embedded")
    configure(patched_tree, tmp_path / "files", embed=False)
    installed = tmp_path / "files/bin"
    for name in LIBRARIES:
        text = tmp_path / f"{name}.metal"
        text.write_text(merged[name])
        embedded = _preprocessed(text, f"-I{empty}", "-DGGML_METAL_EMBED_LIBRARY")
        assert embedded == _preprocessed(installed / f"kernels/{name}.metal", f"-I{empty}", f"-I{installed}")
        assert any("block_d2q3_64" in line and "host_name" in line for line in embedded)
