"""Quantize the linear layers of a checkpoint as public tools store them, by the formats' descriptions, with numpy only.

Every function returns the tensors that replace a weight, by the last part of their names, and what they stand for,
computed in float64 from the codes before they are packed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

Array = npt.NDArray[Any]
Stored = dict[str, torch.Tensor]
Result = tuple[Stored, Array]


def pack(values: Array, bits: int) -> Array:
    """Pack rows of unsigned integers into a stream of bits, the lowest first, and that into int32 words."""
    stream = np.unpackbits(values.astype(np.uint8)[..., None], axis=-1, bitorder="little")[..., :bits]
    stream = stream.reshape(len(values), -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    words: Array = np.packbits(stream, axis=1, bitorder="little").view("<i4")
    return words


def blocks_of(grid: Array, block: tuple[int, int], shape: tuple[int, int]) -> Array:
    """Repeat each value of a grid over its block, cut to a shape."""
    repeated: Array = np.kron(grid, np.ones(block))
    return repeated[: shape[0], : shape[1]]


def _maxima(weight: Array, block: tuple[int, int]) -> Array:
    """Return the largest magnitude of every block."""
    (rows, columns), (height, width) = weight.shape, block
    padded = np.pad(np.abs(weight), ((0, -rows % height), (0, -columns % width)))
    maxima: Array = padded.reshape(len(padded) // height, height, -1, width).max(axis=(1, 3))
    return maxima


def float8(
    weight: Array,
    block: tuple[int, int] | None,
    name: str = "weight_scale",
    scale_shape: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_dtype: torch.dtype = torch.float32,
) -> Result:
    """One scale for every block, where a width of 0 is a whole row; None is the matrix, and the inputs have one too."""
    height, width = block or weight.shape
    block = height, width or weight.shape[1]
    scales = torch.from_numpy(_maxima(weight, block) / torch.finfo(dtype).max).to(scale_dtype)
    repeated = blocks_of(scales.double().numpy(), block, weight.shape)
    codes = torch.from_numpy(weight / repeated).to(dtype)
    stored = {"weight": codes, name: scales if scale_shape is None else scales.reshape(scale_shape)}
    if block == weight.shape:
        stored["input_scale"] = torch.ones(1)
    return stored, codes.double().numpy() * repeated


def int8(weight: Array, *, symmetric: bool) -> Result:
    """compressed-tensors' bytes: one scale and zero point for every row."""
    scales = torch.from_numpy(_maxima(weight, (1, weight.shape[1])) / 100).bfloat16()
    zeros = np.zeros_like(scales.float().numpy()) if symmetric else np.arange(len(weight))[:, None] % 41 - 20.0
    codes = np.clip(np.rint(weight / scales.double().numpy()) + zeros, -128, 127)
    stored = {"weight": torch.from_numpy(codes).to(torch.int8), "weight_scale": scales}
    if not symmetric:
        stored["weight_zero_point"] = torch.from_numpy(zeros).to(torch.int8)
    return stored, (codes - zeros) * scales.double().numpy()


def packed(weight: Array, bits: int, group: int, *, symmetric: bool = True, ordered: bool = True) -> Result:
    """compressed-tensors' integers; a group of 0 columns is a whole row."""
    rows, columns = weight.shape
    index, scales, zeros, codes = _grouped(weight, bits, group or columns, symmetric=symmetric, ordered=ordered)
    stored = {
        "weight_packed": torch.from_numpy(pack(codes, bits)),
        "weight_scale": scales.T.contiguous(),
        "weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        stored["weight_zero_point"] = torch.from_numpy(pack(zeros, bits).T.copy())
    if not ordered:
        stored["weight_g_idx"] = torch.from_numpy(index.astype(np.int32))
    return stored, (codes - zeros.T[:, index]) * scales.double().numpy().T[:, index]


def gptq(
    weight: Array,
    bits: int,
    group: int,
    *,
    version: int = 1,
    symmetric: bool = True,
    ordered: bool = True,
    index: bool = True,
    least_zero: int = 1,
) -> Result:
    """AutoGPTQ's and GPTQModel's; the latter subtracts one from packed zero points, unless they are of 3 bits."""
    places, scales, zeros, codes = _grouped(
        weight, bits, group, symmetric=symmetric, ordered=ordered, least_zero=least_zero
    )
    points = pack((zeros - 1) % 8 if bits == 3 else zeros, bits)
    if version == 1 and bits != 3:
        points = points - pack(np.ones_like(zeros), bits)
    stored = {
        "qweight": torch.from_numpy(pack(codes, bits).T.copy()),
        "qzeros": torch.from_numpy(points),
        "scales": scales,
    }
    if index:
        stored["g_idx"] = torch.from_numpy(places.astype(np.int32))
    return stored, (codes - zeros.T[:, places]) * scales.double().numpy().T[:, places]


def awq(weight: Array, group: int) -> Result:
    """AutoAWQ's version gemm: eight outputs in a word, in the order 0, 2, 4, 6, 1, 3, 5, 7."""
    index, scales, zeros, codes = _grouped(weight, 4, group, symmetric=False, ordered=True)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    interleaved = [pack(values.reshape(-1, 8)[:, order], 4).reshape(len(values), -1) for values in (codes.T, zeros)]
    names = ("qweight", "qzeros")
    stored = {name: torch.from_numpy(words.copy()) for name, words in zip(names, interleaved, strict=True)}
    stored["scales"] = scales
    return stored, (codes - zeros.T[:, index]) * scales.double().numpy().T[:, index]


def _grouped(
    weight: Array, bits: int, group: int, *, symmetric: bool, ordered: bool, least_zero: int = 1
) -> tuple[Array, torch.Tensor, Array, Array]:
    """Return every column's group, scales [groups, rows], zero points [groups, rows] and codes [rows, columns]."""
    columns = weight.shape[1]
    generator = np.random.default_rng(columns)
    index = np.arange(columns) // group
    if not ordered:
        index = generator.permutation(index)
    members = [weight[:, index == group] for group in range(int(index.max()) + 1)]
    low, high = (np.stack([bound(own, axis=1) for own in members]) for bound in (np.min, np.max))
    steps = 2**bits - 1
    spread = np.maximum(-low, high) * 2 if symmetric else high - low
    scales = torch.from_numpy(spread / steps).half()
    zeros = np.full(spread.shape, 2 ** (bits - 1))
    if not symmetric:
        zeros = np.clip(np.rint(-low / scales.double().numpy()), least_zero, steps).astype(np.int64)
        # Random weights have none at the ends of the range.
        zeros[:, ::7] = generator.integers(least_zero, steps + 1, zeros[:, ::7].shape)
    codes = np.rint(weight / scales.double().numpy().T[:, index]) + zeros.T[:, index]
    return index, scales, zeros, np.clip(codes, 0, steps).astype(np.int64)


@dataclass(frozen=True)
class Kind:
    """A way to quantize: the tensors of one weight, and quantization_config.

    `others` has the tensors of layers whose names end as its keys, where these are stored in another way.
    """

    store: Callable[[Array], Result]
    settings: dict[str, Any]
    code: str
    others: dict[str, Callable[[Array], Result]] = field(default_factory=dict)


def _compressed(form: str, *schemes: dict[str, Any], **settings: Any) -> dict[str, Any]:
    groups = {
        f"group_{number}": {"targets": ["Linear"], "weights": scheme, "input_activations": None}
        for number, scheme in enumerate(schemes)
    }
    shared = {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"]}
    return {**shared, "config_groups": groups, "quantization_status": "compressed", **settings}


def _scheme(bits: int, strategy: str, kind: str = "int", **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "strategy": strategy, "type": kind, "symmetric": True, **more}


def _gptq(bits: int, group: int, **settings: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, **settings}


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
_E5M2 = torch.float8_e5m2
KINDS: dict[str, Kind] = {
    "fp8-blocks": Kind(
        partial(float8, block=(128, 128), name="weight_scale_inv"), {**_FP8, "weight_block_size": [128, 128]}, "fp8"
    ),
    "fp8-blocks-powers": Kind(
        partial(float8, block=(128, 128), name="weight_scale_inv", scale_dtype=torch.float8_e8m0fnu),
        {**_FP8, "weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
        "fp8",
    ),
    "fp8-matrix": Kind(partial(float8, block=None, scale_shape=()), {**_FP8, "weight_block_size": None}, "fp8"),
    "fp8-e5m2": Kind(partial(float8, block=None, scale_shape=(1,), dtype=_E5M2), _FP8, "fp8"),
    "fp8-rows": Kind(partial(float8, block=(1, 0)), {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200}, "fp8"),
    "modelopt": Kind(partial(float8, block=None, scale_shape=()), {"quant_method": "modelopt"}, "fp8"),
    "ct-fp8-rows": Kind(
        partial(float8, block=(1, 0), scale_dtype=torch.bfloat16),
        _compressed("float-quantized", _scheme(8, "channel", "float")),
        "fp8",
    ),
    "ct-fp8-matrix": Kind(
        partial(float8, block=None, scale_shape=(1,)),
        _compressed("float-quantized", _scheme(8, "tensor", "float")),
        "fp8",
    ),
    "ct-fp8-blocks": Kind(
        partial(float8, block=(128, 128)),
        _compressed("float-quantized", _scheme(8, "block", "float", block_structure=[128, 128])),
        "fp8",
    ),
    "ct-int8": Kind(partial(int8, symmetric=True), _compressed("int-quantized", _scheme(8, "channel")), "int8"),
    "ct-int8-asymmetric": Kind(
        partial(int8, symmetric=False), _compressed("int-quantized", _scheme(8, "channel")), "int8"
    ),
    "ct-int4": Kind(
        partial(packed, bits=4, group=32), _compressed("pack-quantized", _scheme(4, "group", group_size=32)), "int4"
    ),
    "ct-int4-asymmetric": Kind(
        partial(packed, bits=4, group=32, symmetric=False),
        _compressed("pack-quantized", _scheme(4, "group", group_size=32, symmetric=False)),
        "int4",
    ),
    "ct-int4-shuffled": Kind(
        partial(packed, bits=4, group=32, ordered=False),
        _compressed("pack-quantized", _scheme(4, "group", group_size=32, actorder="group")),
        "int4",
    ),
    "ct-int8-packed": Kind(
        partial(packed, bits=8, group=0), _compressed("pack-quantized", _scheme(8, "channel", group_size=-1)), "int8"
    ),
    "ct-mixed": Kind(
        partial(packed, bits=4, group=32),
        _compressed("mixed-precision", _scheme(4, "group", group_size=32), _scheme(8, "channel", "float")),
        "fp8 and int4",
        {"down_proj": partial(float8, block=(1, 0))},
    ),
    "gptq": Kind(partial(gptq, bits=4, group=32), _gptq(4, 32), "int4"),
    "gptq-8-bit": Kind(partial(gptq, bits=8, group=64), _gptq(8, 64, sym=True), "int8"),
    "gptq-3-bit": Kind(partial(gptq, bits=3, group=32, symmetric=False, least_zero=0), _gptq(3, 32, sym=False), "int3"),
    "gptq-2-bit": Kind(partial(gptq, bits=2, group=32, version=2), _gptq(2, 32, checkpoint_format="gptq_v2"), "int2"),
    "gptq-asymmetric": Kind(partial(gptq, bits=4, group=32, symmetric=False), _gptq(4, 32, sym=False), "int4"),
    "gptq-borrowing": Kind(
        partial(gptq, bits=4, group=32, symmetric=False, least_zero=0), _gptq(4, 32, sym=False), "int4"
    ),
    "gptq-v2": Kind(
        partial(gptq, bits=4, group=32, symmetric=False, least_zero=0, version=2),
        _gptq(4, 32, sym=False, checkpoint_format="gptq_v2"),
        "int4",
    ),
    "gptq-shuffled": Kind(
        partial(gptq, bits=4, group=32, symmetric=False, ordered=False), _gptq(4, 32, desc_act=True), "int4"
    ),
    "gptq-no-index": Kind(partial(gptq, bits=4, group=32, index=False), _gptq(4, 32), "int4"),
    "gptq-mixed": Kind(
        partial(gptq, bits=4, group=32),
        _gptq(4, 32, dynamic={"+:.*down_proj.*": {"bits": 8}}),
        "int4 and int8",
        {"down_proj": partial(gptq, bits=8, group=32)},
    ),
    "awq": Kind(
        partial(awq, group=32), {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, "int4"
    ),
}
"""By a name for the tests."""


def quantize(directory: Path, name: str) -> dict[str, torch.Tensor]:
    """Quantize the blocks' linear layers in place; return what all tensors stand for, in float64 if quantized."""
    kind = KINDS[name]
    stored: Stored = {}
    meant: dict[str, torch.Tensor] = {}
    for full, tensor in load_file(directory / "model.safetensors").items():
        module, _, leaf = full.rpartition(".")
        if leaf != "weight" or tensor.dim() != 2 or ".layers." not in full:
            stored[full] = meant[full] = tensor
            continue
        store = next((own for end, own in kind.others.items() if module.endswith(end)), kind.store)
        parts, values = store(tensor.double().numpy())
        stored |= {f"{module}.{part}": value for part, value in parts.items()}
        meant[full] = torch.from_numpy(values)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    change_config(directory, quantization_config=kind.settings)
    return meant


def change_config(directory: Path, **entries: Any) -> None:
    """Set entries of config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
