"""What decides a file's content: the options, the d2q.* keys that record them, the fingerprint of unfinished work.

Knows what has to be the same for two conversions to give the same file. Does not know how anything is done.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from d2q_edge import __version__, codebooks
from d2q_edge.calibration import Text
from d2q_edge.checkpoint import Checkpoint
from d2q_edge.errors import D2QError
from d2q_edge.export import Value
from d2q_edge.pipeline import Method
from d2q_edge.plan import Plan, is_mixed
from d2q_edge.ranks import Ranks
from d2q_edge.sensitivity import choose_windows

FORMAT_VERSION = 1
"""Value of d2q.version: the layout of the blocks and the meaning of the d2q.* keys."""


ROTATIONS = "auto", "on", "off"


@dataclass(frozen=True)
class Options:
    """What decides the content of the file.

    Attributes:
        bits: 2, 3, or the mean over the blocks' linear layers of a mixture of types.
        calibrate: quantize with error feedback on calibration text; otherwise round to nearest, in seconds.
        calibration: a text file, or "builtin".
        calibration_tokens: how many.
        context: tokens per calibration window.
        seed: of the choice of windows, and of the rotation.
        rotation: "on", "off", or "auto" for what pays (quantize/rotation.py).
        dsq: column scales (quantize/dsq.py).
        dac: norm biases (quantize/dac.py).
        refine: tune the whole model afterwards (quantize/refine.py).
        embedding_type, head_type: stock types; None chooses.
        device: "auto", "cpu", "cuda" or "mps".
        memory_limit: bytes of the computer's memory that may be taken; None for what is free.
        pre_tokenizer: llama.cpp's name for the way the tokenizer splits text; None finds it.
    """

    bits: float = 2
    calibrate: bool = True
    calibration: str = "builtin"
    calibration_tokens: int = 65536
    context: int = 512
    seed: int = 0
    rotation: str = "auto"
    dsq: bool = True
    dac: bool = True
    refine: bool = False
    embedding_type: str | None = None
    head_type: str | None = None
    device: str = "auto"
    memory_limit: int | None = None
    pre_tokenizer: str | None = None


def check(options: Options) -> None:
    """Refuse values that make no sense, whoever they come from.

    Raises:
        D2QError: there is one.
    """
    for name, least in (("calibration_tokens", 1), ("context", 8), ("seed", 0)):
        value = getattr(options, name)
        if type(value) is not int or value < least:
            raise D2QError(f"{name} must be a whole number from {least}, not {value!r}")
    if isinstance(options.bits, bool) or not isinstance(options.bits, (int, float)):
        raise D2QError(f"bits must be a number, not {options.bits!r}")
    if options.rotation not in ROTATIONS:
        raise D2QError(f"rotation must be one of {', '.join(ROTATIONS)}, not {options.rotation!r}")


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
    ranks: Ranks,
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
        "device": ranks.device.type,
        "processes": ranks.count,
    }
