"""Quantizing the layers of one linear group, given the statistics of their input: GPTAQ, then coordinate descent.

Knows the steps for one matrix (quantize/gptaq.py, descent.py) and how processes share its rows, which don't influence
each other. Does not know where the statistics come from (pipeline.py).
"""

from collections.abc import Mapping

import torch

from d2q_edge.distributed.process_group import ProcessGroup
from d2q_edge.formats import tensor_types
from d2q_edge.pipeline.work_dir import Packed
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.descent import descend
from d2q_edge.quantize.gptaq import layer_feedback, quantize_layer
from d2q_edge.quantize.matmul import matmul_precision
from d2q_edge.quantize.statistics import InputStatistics


class GroupSolver:
    """Quantizes matrices on one device."""

    def __init__(self, device: torch.device, alpha: float, rounds: int, processes: ProcessGroup) -> None:
        """Begin; `alpha` is that of gptaq.py and `rounds` those of descent.py."""
        self.device, self.alpha, self.rounds, self.processes = device, alpha, rounds, processes
        self._searches: dict[str, CodebookSearch] = {}

    def solve(
        self, weights: Mapping[str, torch.Tensor], kind: str, statistics: InputStatistics
    ) -> dict[str, tuple[Packed, torch.Tensor, float]]:
        """Quantize layers that share an input, in one tensor type.

        Args:
            weights: of every layer, float32 [rows, columns].
            kind: name of one of our tensor types.
            statistics: of the input.

        Returns:
            Of every layer the blocks, uint8 [rows, bytes], what they stand for, float32 [rows, columns], and its error:
            squared error of the outputs over the squared outputs, tr(E H E^T) / tr(W H W^T).

        Raises:
            D2QError: the Hessian can't be factored.
        """
        # Rows don't influence each other, so that they are quantized as one matrix.
        together = torch.cat(list(weights.values()))
        data, restored, squares = self._quantize(together, statistics, self._search(kind))
        found, start = {}, 0
        for name, weight in weights.items():
            here = slice(start, start + len(weight))
            lost, whole = squares[here].sum(0).tolist()
            found[name] = data[here], restored[here].clone(), lost / whole if whole > 0 else 0.0
            start += len(weight)
        return found

    def _quantize(
        self, weights: torch.Tensor, statistics: InputStatistics, search: CodebookSearch
    ) -> tuple[Packed, torch.Tensor, torch.Tensor]:
        """Blocks, what they stand for, and `_squares`; this process makes its part of the rows."""
        own = self.processes.shard(weights)
        with matmul_precision("highest"):
            feedback = layer_feedback(statistics, search.tensor_type, self.alpha, processes=self.processes)
            layer = quantize_layer(own, feedback, search)
            layer = descend(layer, own, statistics, feedback, search, self.rounds)
        parts = layer.packed(search.tensor_type), layer.weights, _squares(own, layer.weights, statistics.hessian)
        data, restored, squares = (self.processes.all_gather(part, len(weights)) for part in parts)
        return _on_the_computer(data), restored, squares

    def _search(self, kind: str) -> CodebookSearch:
        if kind not in self._searches:
            self._searches[kind] = CodebookSearch(tensor_types.BY_NAME[kind], self.device)
        return self._searches[kind]


def _on_the_computer(data: torch.Tensor) -> Packed:
    """Bytes that may be a GPU's: into pinned memory, which takes a tenth of the time."""
    host = torch.empty(data.shape, dtype=data.dtype, pin_memory=data.device.type == "cuda")
    array: Packed = host.copy_(data).numpy()
    return array


def _squares(weights: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Of every row the squared error of its output, and the squared output: [rows, 2]."""
    parts = weights - quantized, weights
    return torch.stack([((part @ hessian) * part).sum(1) for part in parts], 1)
