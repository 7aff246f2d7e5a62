"""Running the same steps again and again on a GPU without launching their kernels one by one (CUDA graphs).

The search for codebooks and codes is hundreds of small kernels for every 256 columns, and starting them takes longer
than they do. Knows functions of tensors that never wait for the GPU and always do the same for the same shapes; does
not know what they compute.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class _Recorded:
    graph: Any
    inputs: list[torch.Tensor | None]
    outputs: Tensors


class Graphs:
    """Recorded functions, one recording for each set of shapes."""

    def __init__(self) -> None:
        self._recorded: dict[Any, _Recorded] = {}

    def run(self, name: str, function: Callable[..., Tensors], *tensors: torch.Tensor | None) -> Tensors:
        """`function(*tensors)`; elsewhere than on a CUDA device simply that.

        Args:
            name: stands for the function: the same name must always mean the same steps.
            function: of these tensors and nothing that changes; returns tensors of its own.
            tensors: on one device.
        """
        first = next(tensor for tensor in tensors if tensor is not None)
        if first.device.type != "cuda":
            return function(*tensors)
        key = (name, *(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors))
        if key not in self._recorded:
            self._recorded[key] = _record(function, tensors)
        recorded = self._recorded[key]
        for kept, tensor in zip(recorded.inputs, tensors, strict=True):
            if kept is not None and tensor is not None:
                kept.copy_(tensor)
        recorded.graph.replay()
        return tuple(output.clone() for output in recorded.outputs)


def _record(function: Callable[..., Tensors], tensors: tuple[torch.Tensor | None, ...]) -> _Recorded:
    inputs = [None if tensor is None else tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # Libraries and kernels that set themselves up at their first use must not do so during the recording.
    with torch.cuda.stream(stream):
        for _ in range(2):
            function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function(*inputs)
    return _Recorded(graph, inputs, outputs)


@cache
def has_triton(device: torch.device) -> bool:
    """Whether kernels of our own can run there: PyTorch's CUDA builds for Linux bring Triton along, others don't."""
    if device.type != "cuda":
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
