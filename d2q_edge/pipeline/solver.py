"""Quantize the layers of one linear group, given the statistics of their input: GPTAQ, then coordinate descent."""

from collections.abc import Mapping

import torch

from d2q_edge.distributed.process_group import ProcessGroup
from d2q_edge.formats import tensor_types
from d2q_edge.formats.quantized_block import QuantizedBlock, QuantizedWeight, float_array
from d2q_edge.formats.tensor_types import U8
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.descent import descend
from d2q_edge.quantize.gptaq import layer_feedback, quantize_layer
from d2q_edge.quantize.matmul import matmul_precision
from d2q_edge.quantize.statistics import InputStatistics


class GroupSolver:
    """Quantizes weight matrices on one device; several processes share the rows, which don't influence each other."""

    def __init__(self, device: torch.device, alpha: float, rounds: int, processes: ProcessGroup) -> None:
        """Prepare a solver; for `alpha` and `rounds` see Options."""
        self.device, self.alpha, self.rounds, self.processes = device, alpha, rounds, processes
        self._searches: dict[str, CodebookSearch] = {}

    def solve(
        self, weights: Mapping[str, torch.Tensor], types: Mapping[str, str], statistics: InputStatistics
    ) -> QuantizedBlock:
        """Quantize layers that share an input.

        Args:
            weights: layer to its weight matrix, float32 [rows, columns].
            types: layer to its tensor type; a layer of a stock type keeps its precision here.
            statistics: of the input.

        Returns:
            The layers' weights, and their errors as metrics.

        Raises:
            D2QError: the Hessian can't be factored.
        """
        result = QuantizedBlock()
        for type_name in dict.fromkeys(types[layer] for layer in weights):
            same = {layer: weight for layer, weight in weights.items() if types[layer] == type_name}
            if type_name in tensor_types.BY_NAME:
                self._solve_type(same, type_name, statistics, result)
            else:
                result.floats |= {f"{layer}.weight": float_array(weight) for layer, weight in same.items()}
        return result

    def _solve_type(
        self, weights: Mapping[str, torch.Tensor], type_name: str, statistics: InputStatistics, result: QuantizedBlock
    ) -> None:
        search = self._search(type_name)
        # One below the other: all rows of all layers are independent.
        together = torch.cat(list(weights.values()))
        data, values, errors = self._quantize(together, statistics, search)
        start = 0
        for layer, weight in weights.items():
            rows = slice(start, start + len(weight))
            result.weights[layer] = QuantizedWeight(search.tensor_type, data[rows], values[rows].clone())
            lost, total = errors[rows].sum(0).tolist()
            result.metrics.layer_errors[layer] = lost / total if total > 0 else 0.0
            start += len(weight)

    def _quantize(
        self, weights: torch.Tensor, statistics: InputStatistics, search: CodebookSearch
    ) -> tuple[U8, torch.Tensor, torch.Tensor]:
        """Return packed blocks, dequantized weights and `output_errors` of all rows; each process makes its share."""
        own = self.processes.shard(weights)
        with matmul_precision("highest"):
            feedback = layer_feedback(statistics, search.tensor_type, self.alpha, processes=self.processes)
            layer = quantize_layer(own, feedback, search)
            layer = descend(layer, own, statistics, feedback, search, self.rounds)
        shards = layer.packed(search.tensor_type), layer.weights, output_errors(own, layer.weights, statistics.hessian)
        data, values, errors = (self.processes.all_gather(shard, len(weights)) for shard in shards)
        return _to_host(data), values, errors

    def _search(self, type_name: str) -> CodebookSearch:
        if type_name not in self._searches:
            self._searches[type_name] = CodebookSearch(tensor_types.BY_NAME[type_name], self.device)
        return self._searches[type_name]


def output_errors(weights: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Return squared output error and squared output of every row, [rows, 2]: the diagonals of E H E^T and W H W^T."""
    return torch.stack([((part @ hessian) * part).sum(1) for part in (weights - quantized, weights)], 1)


def _to_host(data: torch.Tensor) -> U8:
    """Copy bytes to the host, from a GPU through pinned memory, which takes a tenth of the time."""
    host = torch.empty(data.shape, dtype=data.dtype, pin_memory=data.device.type == "cuda")
    array: U8 = host.copy_(data).numpy()
    return array
