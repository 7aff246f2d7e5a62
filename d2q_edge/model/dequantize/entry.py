"""Present a weight that a checkpoint stores as codes and scales as an ordinary float32 tensor."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from d2q_edge.errors import D2QError
from d2q_edge.model.weight_files import DTYPES, TensorEntry

Parts = Mapping[str, TensorEntry]
"""The tensors of one module by the last part of their names, "qweight" for example."""
FLOATS = tuple(DTYPES)


@dataclass(frozen=True)
class DequantizedEntry(TensorEntry):
    """A weight, float32 [out_features, in_features], that is computed from other tensors when it is loaded."""

    code: str  # what is stored for each weight: "fp8", "int4", ...
    compute: Callable[[], torch.Tensor]

    def load(self) -> torch.Tensor:
        """Read the parts and dequantize; raise D2QError if they can't be read or contradict each other."""
        return self.compute()


class Format(Protocol):
    """A module that knows how a group of quantizers stores weights."""

    PARTS: frozenset[str]
    """Last parts of the names of tensors that aren't needed once weights are dequantized."""

    def weight(self, module: str, parts: Parts, settings: Mapping[str, Any]) -> DequantizedEntry | None:
        """Describe the weight of a module; None if it isn't quantized.

        Args:
            module: full name of the layer.
            parts: all its tensors.
            settings: quantization_config.

        Raises:
            D2QError: a part is missing, or of a dtype or shape that makes no sense; the variant isn't supported.
        """


def dequantized(
    module: str, stored: TensorEntry, shape: tuple[int, int], code: str, compute: Callable[[], torch.Tensor]
) -> DequantizedEntry:
    """Return the entry of a module's weight."""
    return DequantizedEntry(stored.file, f"{module}.weight", "F32", shape, code, compute)


def part(
    module: str, parts: Parts, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None = None
) -> TensorEntry:
    """Return a part that must be there, in one of these dtypes and, if given, of this shape; D2QError otherwise."""
    if name not in parts:
        raise D2QError(
            f"the quantized layer {module} has no {name}, so the checkpoint isn't complete; download it again"
        )
    found = parts[name]
    if found.dtype not in dtypes or (shape is not None and found.shape != shape):
        raise contradiction(module, found)
    return found


def matrix(module: str, parts: Parts, name: str, dtypes: tuple[str, ...]) -> tuple[TensorEntry, tuple[int, int]]:
    """Return a part as `part` does, which must have two dimensions, and its shape."""
    found = part(module, parts, name, dtypes)
    match found.shape:
        case (int(rows), int(columns)) if rows and columns:
            return found, (rows, columns)
    raise contradiction(module, found)


def contradiction(module: str, found: TensorEntry) -> D2QError:
    """Return the error for a part of a dtype or shape that doesn't follow from the others and the config."""
    return D2QError(
        f"the quantized layer {module} has a {found.name.rpartition('.')[2]} of dtype {found.dtype} and shape "
        f"{list(found.shape)}, which doesn't fit its other tensors and config.json's quantization_config; they may not "
        "belong together"
    )
