"""Record what decides a file's content: the d2q.* keys in the file, and the fingerprint of unfinished work."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from d2q_edge import __version__
from d2q_edge.calibration.mixture import Part, digest, names
from d2q_edge.calibration.windows import Windows
from d2q_edge.distributed.process_group import ProcessGroup
from d2q_edge.export.model_file import Value
from d2q_edge.formats import codebooks, tensor_types
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.peft_files import adapter_files, content_hash
from d2q_edge.options import Options
from d2q_edge.pipeline.sensitivity import choose_windows
from d2q_edge.pipeline.type_plan import TypePlan, is_mixed
from d2q_edge.quantize import native

FORMAT_VERSION = 1
"""Value of d2q.version: the layout of the blocks and the meaning of the d2q.* keys."""


@dataclass(frozen=True)
class Calibration:
    """What the model is calibrated on: texts, and the windows drawn from them."""

    parts: tuple[Part, ...]
    windows: Windows

    def describe(self) -> str:
        """Return a sentence for people."""
        context = self.windows.calibration.shape[1]
        sizes = [
            f"{count * context:,} of {part.text.source}"
            for part, count in zip(self.parts, self.windows.counts, strict=True)
        ]
        which = f" ({', '.join(sizes)})" if len(sizes) > 1 else ""
        return (
            f"calibrating on {self.windows.calibration.size:,} of the text's {self.windows.available:,} tokens{which}, "
            f"validating on {self.windows.validation.size:,} others"
        )


def d2q_metadata(
    types: TypePlan, options: Options, rotated: bool, calibration: Calibration | None, scope: str | None = None
) -> dict[str, Value]:
    """Return the d2q.* keys: what a reader of the file needs, and what it takes to make the file again.

    `scope` is what refinement tunes together, if anything.
    """
    recipe: dict[str, Any] = {"bits": options.bits, "method": "rtn", "rotation": rotated, "dsq": False, "dac": False}
    if rotated:
        recipe["seed"] = options.seed
    if options.adapter is not None:
        recipe["adapter_sha256"] = content_hash(adapter_files(options.adapter))
    if calibration is not None:
        recipe |= {
            "method": "gptaq",
            "alpha": options.alpha,
            "dsq": options.dsq,
            "dac": options.dac,
            "guidance": options.guidance,
            "rounds": options.descent_rounds,
            "refine": options.refine,
            "calibration": names(calibration.parts),
            "calibration_sha256": digest(calibration.parts),
            "calibration_tokens": calibration.windows.calibration.size,
            "context": options.context,
            "seed": options.seed,
        }
        if scope is not None:
            recipe["refine_scope"] = scope
        if is_mixed(options.bits):
            recipe |= {
                "allocation": "divergence",
                "allocation_windows": len(choose_windows(calibration.windows.calibration)),
            }
    return {
        "d2q.version": FORMAT_VERSION,
        "d2q.recipe": json.dumps(recipe),
        "d2q.table_sha256": codebooks.TABLE_SHA256,
        "d2q.bits_per_weight": types.bits_per_weight,
    }


def fingerprint(
    checkpoint: Checkpoint,
    types: TypePlan,
    metadata: dict[str, Value],
    windows: npt.NDArray[np.int64],
    processes: ProcessGroup,
) -> dict[str, Any]:
    """Return everything that decides the content of the quantized blocks, as JSON values."""
    return {
        "d2q-edge": __version__,
        "model": str(checkpoint.directory.resolve()),
        "config.json": checkpoint.config,
        "weight files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in checkpoint.weight_files],
        "recipe": metadata,
        "types": dict(types.linears),
        "calibration tokens": hashlib.sha256(windows.tobytes()).hexdigest(),
        "device": processes.device.type,
        # Without a C compiler torch does the same with other results.
        "C compiler": native.is_available(tensor_types.D2Q2, processes.device),
        "processes": processes.world_size,
    }
