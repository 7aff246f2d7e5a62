"""What the pipeline left in a work directory, as torch has it."""

from collections.abc import Mapping

import numpy as np
import torch

from d2q_edge.formats import tensor_types
from d2q_edge.pipeline.column_scaling import COLUMN_SCALE
from d2q_edge.pipeline.work_dir import WorkDir


def changed_tensors(work: WorkDir, types: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Everything that the finished blocks changed, as floats, by full name.

    Args:
        work: with the blocks.
        types: of the linear layers' weights.
    """
    found = {}
    for index in range(work.finished):
        for name, data in work.read_block(index).items():
            if data.dtype == np.uint8:
                data = tensor_types.dequantize(tensor_types.BY_NAME[types[name]], data.view(np.uint8))
            if not name.endswith(COLUMN_SCALE):
                found[name] = torch.from_numpy(data)
    return found
