"""What isn't quantized is read as it is; what can't be dequantized is refused with its reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from d2q_edge.errors import D2QError
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from tests.opening import refused, rewrite
from tests.quantized_checkpoints import KINDS, change_config, quantize

Make = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
SIZES = {"hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 1}
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def make_quantized(make_checkpoint: Make) -> Make:
    def make(kind: str, **settings: Any) -> Path:
        directory = make_checkpoint("qwen3", **SIZES)
        quantize(directory, kind)
        if settings:
            change_config(directory, quantization_config={**KINDS[kind].settings, **settings})
        return directory

    return make


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        (KINDS["gptq"].settings, "gptq"),
        (KINDS["fp8-blocks"].settings, "fp8"),
        ({"bits": 4}, "an unnamed method"),
    ],
)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_settings_without_quantized_weights(
    make_checkpoint: Make, key: str, settings: dict[str, Any], method: str
) -> None:
    directory = make_checkpoint()
    plain = Checkpoint.open(directory)
    change_config(directory, **{key: settings})
    checkpoint = Checkpoint.open(directory)
    checkpoint.check(family_for(checkpoint.config).tensor_shapes())
    assert checkpoint.config == plain.config
    assert checkpoint.notes == (
        f"config.json has a quantization_config ({method}), which is ignored: the weights aren't quantized",
    )
    assert all(torch.equal(checkpoint.tensor(name), plain.tensor(name)) for name in plain.names)


@pytest.mark.parametrize("method", ["bitsandbytes", "mxfp4", "aqlm", "quip", "hqq", "eetq", "auto-round", "bitnet"])
def test_other_methods(make_checkpoint: Make, method: str) -> None:
    directory = make_checkpoint()
    rewrite(directory, lambda tensors: tensors.update({f"{UP}.weight": torch.zeros(3072, 1, dtype=torch.uint8)}))
    change_config(directory, quantization_config={"quant_method": method})
    refused(directory, f"is quantized with {method} in a way that can't be dequantized here; use the unquantized")


def test_settings_of_the_wrong_kind(make_checkpoint: Make) -> None:
    directory = make_checkpoint()
    change_config(directory, quantization_config=[4])
    refused(directory, "quantization_config must be an object")


def test_weights_without_settings(make_quantized: Make) -> None:
    directory = make_quantized("gptq")
    change_config(directory, quantization_config=None)
    refused(directory, r"there are qweight tensors\), but config.json has no quantization_config to say how")


@pytest.mark.parametrize(
    ("kind", "settings", "pattern"),
    [
        (
            "gptq",
            {"checkpoint_format": "marlin"},
            "GPTQ weights are in the form 'marlin', which is for one kernel only",
        ),
        ("gptq", {"format": "gptq_p"}, "form 'gptq_p'"),
        ("gptq", {"format": ["gptq"]}, r"form \['gptq'\]"),
        ("gptq", {"is_marlin_format": True}, "for one kernel only"),
        ("gptq-no-index", {"bits": 5}, "has a qweight of dtype I32 .* doesn't fit"),
        ("gptq-no-index", {"bits": 4.0}, "has a qweight of dtype I32 .* doesn't fit"),
        ("gptq-no-index", {"bits": None}, "has a qweight of dtype I32 .* doesn't fit"),
        ("gptq-no-index", {"bits": 8}, "has a qzeros of dtype I32"),
        ("awq", {"version": "gemv"}, "AWQ weights are in the form 'gemv' with 4 bits, but only 'gemm'"),
        ("awq", {"bits": 8}, "with 8 bits"),
        (
            "fp8-blocks",
            {"weight_block_size": [64, 64]},
            r"weight_scale_inv of dtype F32 and shape \[.*\], which doesn't",
        ),
        ("fp8-blocks", {"weight_block_size": 128}, "can't have scales for blocks of the size 128"),
        ("fp8-blocks", {"weight_block_size": [0, 128]}, r"blocks of the size \[0, 128\]"),
        ("ct-int4", {"format": "marlin-24"}, "in the form 'marlin-24', which can't be dequantized here"),
        ("ct-int4", {"format": "nvfp4-pack-quantized"}, "in the form 'nvfp4-pack-quantized'"),
        ("ct-int4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "in the form 'sparse-24-bitmask'"),
        ("ct-int4", {"transform_config": {"config_groups": {"R1": {}}}}, "in the form 'transformed'"),
        ("ct-int4", {"config_groups": {}}, "has no config_groups"),
        ("ct-int4", {"config_groups": {"group_0": 4}}, "has no config_groups"),
        ("ct-int4", {"config_groups": {"a": {"weights": {"num_bits": 3}}}}, "has a weight_packed of dtype I32"),
        ("ct-int4", {"config_groups": {"a": {"weights": {"num_bits": [4]}}}}, "has a weight_packed of dtype I32"),
        ("ct-int4", {"config_groups": {"a": {"weights": {"num_bits": 4, "group_size": "x"}}}}, "size .1, 'x'"),
        ("ct-fp8-rows", {"config_groups": {"a": {"weights": None}}}, "has a weight_scale of dtype BF16"),
    ],
)
def test_settings_that_do_not_fit(make_quantized: Make, kind: str, settings: dict[str, Any], pattern: str) -> None:
    refused(make_quantized(kind, **settings), pattern)


@pytest.mark.parametrize(
    ("kind", "part", "value", "pattern"),
    [
        ("gptq", "qzeros", None, f"quantized layer {UP} has no qzeros, so the checkpoint isn't complete"),
        ("gptq", "scales", torch.ones(6, 8), r"has a scales of dtype F32 and shape \[6, 8\], which doesn't fit"),
        ("gptq", "qweight", torch.ones(24, 320), "has a qweight of dtype F32"),
        ("gptq", "g_idx", torch.zeros(7, dtype=torch.int32), "has a qweight of dtype I32|has a g_idx"),
        ("awq", "scales", torch.ones(5, 320), r"has a scales of dtype F32 and shape \[5, 320\]"),
        ("fp8-blocks", "weight_scale_inv", None, "has no weight_scale, so the checkpoint"),
        ("fp8-blocks", "weight_scale_inv", torch.ones(3, 3), r"weight_scale_inv of dtype F32 and shape \[3, 3\]"),
        ("fp8-blocks", "weight_scale_inv", torch.ones(3, 2).to(torch.uint8), "weight_scale_inv of dtype U8"),
        ("fp8-matrix", "weight", torch.ones(4).to(torch.float8_e4m3fn), r"weight of dtype F8_E4M3 and shape \[4\]"),
        ("ct-int4", "weight_shape", None, "has no weight_shape"),
        ("ct-int4", "weight_scale", torch.ones(320, 7), "has a weight_packed of dtype I32"),
        ("ct-int4-asymmetric", "weight_zero_point", torch.ones(2, 2).int(), "weight_zero_point of dtype I32"),
    ],
)
def test_tensors_that_do_not_fit(
    make_quantized: Make, kind: str, part: str, value: torch.Tensor | None, pattern: str
) -> None:
    directory = make_quantized(kind)

    def change(tensors: Tensors) -> None:
        del tensors[f"{UP}.{part}"]
        if value is not None:
            tensors[f"{UP}.{part}"] = value

    rewrite(directory, change)
    refused(directory, pattern)


@pytest.mark.parametrize(
    ("kind", "part", "value", "pattern"),
    [
        ("gptq-shuffled", "g_idx", torch.full((192,), 6, dtype=torch.int32), "g_idx that names groups without scales"),
        ("gptq-shuffled", "g_idx", torch.full((192,), -1, dtype=torch.int32), "g_idx that names groups without scales"),
        ("ct-int4-shuffled", "weight_g_idx", torch.full((192,), 9, dtype=torch.int32), "g_idx that names groups"),
        ("ct-int4", "weight_shape", torch.tensor([320, 200]), "has a weight_shape of dtype I64"),
        ("fp8-blocks", "weight_scale_inv", torch.full((3, 2), torch.nan), f"tensor {UP}.weight in .* contains NaN"),
    ],
)
def test_content_that_does_not_fit(
    make_quantized: Make, kind: str, part: str, value: torch.Tensor, pattern: str
) -> None:
    directory = make_quantized(kind)
    rewrite(directory, lambda tensors: tensors.update({f"{UP}.{part}": value}))
    checkpoint = Checkpoint.open(directory)
    checkpoint.check(family_for(checkpoint.config).tensor_shapes())
    with pytest.raises(D2QError, match=pattern):
        checkpoint.tensor(f"{UP}.weight")


def test_a_shape_that_config_denies(make_quantized: Make) -> None:
    directory = make_quantized("gptq")
    change_config(directory, intermediate_size=384)
    refused(directory, r"up_proj.weight has the shape \[320, 192\], but config.json implies \[384, 192\]|gate_proj")


def test_biases_that_only_autogptq_has(make_quantized: Make) -> None:
    """It gave one to every layer for a time; one that isn't zero belongs to the model."""
    directory = make_quantized("gptq")
    names = load_file(directory / "model.safetensors").keys()
    zeros = {f"{name.rpartition('.')[0]}.bias": torch.zeros(8).half() for name in names if name.endswith(".qweight")}
    rewrite(directory, lambda tensors: tensors.update(zeros))
    checkpoint = Checkpoint.open(directory)
    checkpoint.check(family_for(checkpoint.config).tensor_shapes())
    assert not checkpoint.names & zeros.keys()
    rewrite(directory, lambda tensors: tensors.update({f"{UP}.bias": torch.ones(320).half()}))
    refused(directory, f"tensor {UP}.bias in .* has no place")


def test_scales_of_activations_are_left_out(make_quantized: Make) -> None:
    directory = make_quantized("ct-fp8-rows")
    before = Checkpoint.open(directory).names
    scale = torch.ones(1)
    more = {f"{UP}.input_scale": scale, "model.layers.0.self_attn.k_scale": scale, f"{UP}.output_scale": scale}
    rewrite(directory, lambda tensors: tensors.update({name: value.clone() for name, value in more.items()}))
    assert Checkpoint.open(directory).names == before
