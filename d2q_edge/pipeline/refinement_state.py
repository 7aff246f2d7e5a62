"""Keep the state of the whole model's refinement in the work directory, so that an interrupted one goes on."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import torch

from d2q_edge.pipeline.work_dir import WorkDir
from d2q_edge.quantize.refine import RefinementLosses, State, Tunable
from d2q_edge.utils.background import Background
from d2q_edge.utils.machine import available_memory


def read_state(work: WorkDir) -> State | None:
    """Return where an interrupted refinement was."""
    found = work.read_state()
    if found is None:
        return None
    arrays, metadata = found
    # Numpy has no bfloat16.
    tensors = {
        name: torch.from_numpy(array).view(torch.bfloat16) if array.dtype == np.int16 else torch.from_numpy(array)
        for name, array in arrays.items()
    }
    return State(RefinementLosses(metadata["before"], metadata["passes"]), tensors)


class StateWriter(Background):
    """Write the state of every pass while the next one runs, if there is room; after a with block all are written."""

    def __init__(self, work: WorkDir, layers: dict[str, Tunable], device: torch.device, *, active: bool) -> None:
        """Look for room on the disk for two states, and in the memory for a copy; write nothing unless `active`."""
        super().__init__()
        self._work = work
        # Values, two moments, and the entries in use.
        size = sum((4 + 2 + 2 + 1) * value.numel() for layer in layers.values() for value in layer.tuned().values())
        room = 2 * size <= shutil.disk_usage(work.path).free and size <= available_memory()
        self._active = active and room
        if active and not room:
            print(
                f"refinement starts over if it is interrupted: to go on, it would need {2 * size / 2**30:.1f} GiB on "
                f"the disk and {size / 2**30:.1f} GiB of memory",
                file=sys.stderr,
            )

    def keep(self, state: State) -> None:
        """Copy a state, and begin to write it once the one before is written; raise D2QError if that could not be."""
        if not self._active:
            return
        self.wait()
        arrays = {
            name: (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).to("cpu", copy=True).numpy()
            for name, tensor in state.tensors.items()
        }
        metadata = {"before": state.losses.before, "passes": list(state.losses.passes)}
        self.start(self._work.write_state, arrays, metadata)
