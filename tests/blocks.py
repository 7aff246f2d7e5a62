"""What the block loop left in a work directory, by full names."""

import numpy as np
import torch

from d2q_edge.formats.quantized_block import QuantizedBlock
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import Family
from d2q_edge.pipeline.work_dir import WorkDir

CPU = torch.device("cpu")


def assert_same_block(found: QuantizedBlock, expected: QuantizedBlock) -> None:
    """All fields are equal, arrays to the last bit and with their dtypes; the order of entries doesn't count."""
    assert {name: weight.type.name for name, weight in found.weights.items()} == {
        name: weight.type.name for name, weight in expected.weights.items()
    }
    for one, other in (
        ({name: weight.data for name, weight in block.weights.items()} for block in (found, expected)),
        (found.floats, expected.floats),
        (found.norm_biases, expected.norm_biases),
        (found.column_scales, expected.column_scales),
    ):
        assert one.keys() == other.keys()
        for name, array in one.items():
            assert array.dtype == other[name].dtype, name
            np.testing.assert_array_equal(array, other[name], err_msg=name, strict=True)
    assert found.metrics == expected.metrics


def expert_linears(number: int) -> tuple[str, ...]:
    """Gate, up and down of an expert, in most families."""
    return tuple(f"mlp.experts.{number}.{part}_proj" for part in ("gate", "up", "down"))


def finished_blocks(work: WorkDir, family: Family, *, refined: bool = False) -> dict[str, QuantizedBlock]:
    """The finished blocks by the prefix that makes full names of their names; "" is what follows the last block."""
    prefixes = [*(family.block_prefix(index) for index in range(family.num_layers)), ""]
    return {
        prefix: work.read_block(index, refined=refined)
        for index, prefix in enumerate(prefixes)
        if work.has_block(index, refined=refined)
    }


def changed_tensors(work: WorkDir, family: Family, *, refined: bool = False) -> dict[str, torch.Tensor]:
    """All tensors that the finished blocks changed, as floats, and "NORM.bias" of corrected norms; no column scales."""
    found: dict[str, torch.Tensor] = {}
    for prefix, block in finished_blocks(work, family, refined=refined).items():
        found |= {f"{prefix}{layer}.weight": weight.take_values(CPU) for layer, weight in block.weights.items()}
        found |= {prefix + name: torch.from_numpy(values) for name, values in block.floats.items()}
        found |= {f"{prefix}{norm}.bias": torch.from_numpy(bias) for norm, bias in block.norm_biases.items()}
    return found


def model_tensors(
    work: WorkDir, family: Family, checkpoint: Checkpoint, *, refined: bool = False
) -> dict[str, torch.Tensor]:
    """`changed_tensors`, and the lm_head divided by its column scales, if it has any."""
    found = changed_tensors(work, family, refined=refined)
    scales = finished_blocks(work, family, refined=refined)[""].column_scales.get(family.head)
    if scales is not None:
        head = f"{family.head}.weight"
        found[head] = checkpoint.tensor(head).float() / torch.from_numpy(scales)
    return found
