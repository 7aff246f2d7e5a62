"""What decides a file's content: the options, the d2q.* keys that record them, the fingerprint of unfinished work.

Knows what has to be the same for two conversions to give the same file. Does not know how anything is done.
"""

import hashlib
import json
from typing import Any

import numpy as np
import numpy.typing as npt

from d2q_edge import __version__
from d2q_edge.calibration.text import Text
from d2q_edge.distributed.process_group import ProcessGroup
from d2q_edge.export.model_file import Value
from d2q_edge.formats import codebooks
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.options import Options
from d2q_edge.pipeline.block_loop import Method
from d2q_edge.pipeline.sensitivity import choose_windows
from d2q_edge.pipeline.type_plan import Plan, is_mixed

FORMAT_VERSION = 1
"""Value of d2q.version: the layout of the blocks and the meaning of the d2q.* keys."""


def own_keys(
    plan: Plan,
    options: Options,
    method: Method,
    rotated: bool,
    text: Text | None,
    windows: npt.NDArray[np.int64] | None,
) -> dict[str, Value]:
    """The d2q.* keys: what a reader needs, and what it takes to make the file again."""
    recipe: dict[str, Any] = {"bits": options.bits, "method": "rtn", "rotation": rotated, "dsq": False, "dac": False}
    if rotated:
        recipe["seed"] = options.seed
    if text is not None and windows is not None:
        recipe |= {
            "method": "gptaq",
            "alpha": method.alpha,
            "dsq": method.dsq,
            "dac": method.dac,
            "rounds": method.rounds,
            "refine": options.refine,
            "calibration": text.source,
            "calibration_sha256": text.sha256,
            "calibration_tokens": windows.size,
            "context": options.context,
            "seed": options.seed,
        }
        if is_mixed(options.bits):
            recipe |= {"allocation": "divergence", "allocation_windows": len(choose_windows(windows))}
    return {
        "d2q.version": FORMAT_VERSION,
        "d2q.recipe": json.dumps(recipe),
        "d2q.table_sha256": codebooks.TABLE_SHA256,
        "d2q.bits_per_weight": plan.bits_per_weight,
    }


def fingerprint(
    checkpoint: Checkpoint,
    plan: Plan,
    metadata: dict[str, Value],
    windows: npt.NDArray[np.int64],
    processes: ProcessGroup,
) -> dict[str, Any]:
    """What decides the content of the packed blocks."""
    weights = sorted(checkpoint.directory.glob("*.safetensors"))
    return {
        "d2q-edge": __version__,
        "model": str(checkpoint.directory.resolve()),
        "config.json": checkpoint.config,
        "weight files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in weights],
        "recipe": metadata,
        "types": dict(plan.linears),
        "calibration tokens": hashlib.sha256(windows.tobytes()).hexdigest(),
        "device": processes.device.type,
        "processes": processes.world_size,
    }
