"""Quantize the layers of one linear group, given the statistics of their input: GPTAQ, then coordinate descent."""

from collections.abc import Mapping

import torch

from d2q_edge.distributed.process_group import ProcessGroup
from d2q_edge.formats import tensor_types
from d2q_edge.formats.quantized_block import QuantizedBlock, QuantizedWeight, float_array
from d2q_edge.formats.tensor_types import U8
from d2q_edge.quantize.codebook_search import CodebookSearch, Searches
from d2q_edge.quantize.descent import DampedHessian, descend
from d2q_edge.quantize.gptaq import layer_feedback, quantize_layer
from d2q_edge.quantize.matmul import matmul_precision
from d2q_edge.quantize.output_hessian import OutputHessian
from d2q_edge.quantize.row_feedback import RowFeedback
from d2q_edge.quantize.statistics import InputStatistics


class GroupSolver:
    """Quantizes weight matrices on one device; several processes share the rows, which don't influence each other."""

    def __init__(self, device: torch.device, alpha: float, rounds: int, processes: ProcessGroup) -> None:
        """Prepare a solver; for `alpha` and `rounds` see Options."""
        self.device, self.alpha, self.rounds, self.processes = device, alpha, rounds, processes
        self.searches = Searches(device)

    def solve(
        self,
        weights: Mapping[str, torch.Tensor],
        types: Mapping[str, str],
        statistics: InputStatistics,
        hessian: OutputHessian | None = None,
    ) -> QuantizedBlock:
        """Quantize layers that share an input.

        Args:
            weights: layer to its weight matrix, float32 [rows, columns].
            types: layer to its tensor type; a layer of a stock type keeps its precision here.
            statistics: of the input.
            hessian: G of all their rows; None takes rows for independent.

        Returns:
            The layers' weights, and their errors as metrics.

        Raises:
            D2QError: a Hessian can't be factored.
        """
        result = QuantizedBlock()
        for type_name in dict.fromkeys(types[layer] for layer in weights):
            same = {layer: weight for layer, weight in weights.items() if types[layer] == type_name}
            if type_name in tensor_types.BY_NAME:
                own = hessian
                if hessian is not None and len(same) < len(weights):
                    chosen = [torch.full((len(w),), types[layer] == type_name) for layer, w in weights.items()]
                    own = hessian.rows(torch.cat(chosen).to(self.device))
                self._solve_type(same, type_name, statistics, own, result)
            else:
                result.floats |= {f"{layer}.weight": float_array(weight) for layer, weight in same.items()}
        return result

    def _solve_type(
        self,
        weights: Mapping[str, torch.Tensor],
        type_name: str,
        statistics: InputStatistics,
        hessian: OutputHessian | None,
        result: QuantizedBlock,
    ) -> None:
        search = self.searches[type_name]
        # One below the other: they share everything but their rows.
        together = torch.cat(list(weights.values()))
        data, values, errors = self._quantize(together, statistics, search, hessian)
        start = 0
        for layer, weight in weights.items():
            rows = slice(start, start + len(weight))
            result.weights[layer] = QuantizedWeight(search.tensor_type, data[rows], values[rows].clone())
            lost, total = errors[rows].sum(0).tolist()
            result.metrics.layer_errors[layer] = lost / total if total > 0 else 0.0
            start += len(weight)

    def _quantize(
        self,
        weights: torch.Tensor,
        statistics: InputStatistics,
        search: CodebookSearch,
        hessian: OutputHessian | None,
    ) -> tuple[U8, torch.Tensor, torch.Tensor]:
        """Return packed blocks, dequantized weights and `output_errors` of all rows; each process makes its share."""
        kind, size = search.tensor_type, weights.shape[1]
        data = torch.empty(len(weights), kind.row_bytes(size), dtype=torch.uint8, device=self.device)
        values = torch.empty_like(weights)
        with matmul_precision("highest"):
            feedback = layer_feedback(statistics, kind, self.alpha, processes=self.processes)
            damped = DampedHessian.of(statistics, feedback, search)
            rows = RowFeedback(len(weights), size, hessian, self.device)
            for number, chosen in enumerate(rows.classes):
                part = weights[chosen]
                own, target, shift = self.processes.shard(part), feedback.target(part), rows.shift(number)
                compensated = own
                if shift is not None:
                    # GPTAQ's own target for this would differ by a second-order term.
                    target, compensated = target + shift, own + self.processes.shard(shift)
                layer = quantize_layer(compensated, feedback, search)
                layer = descend(layer, self.processes.shard(target), damped, search, self.rounds)
                shards = layer.packed(kind), layer.weights
                data[chosen], values[chosen] = (self.processes.all_gather(shard, len(chosen)) for shard in shards)
                rows.add_error(number, values[chosen] - target)
        own, made = self.processes.shard(weights), self.processes.shard(values)
        errors = output_errors(own, made, statistics.hessian)
        return _to_host(data), values, self.processes.all_gather(errors, len(weights))


def output_errors(weights: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Return squared output error and squared output of every row, [rows, 2]: the diagonals of E H E^T and W H W^T."""
    return torch.stack([((part @ hessian) * part).sum(1) for part in (weights - quantized, weights)], 1)


def _to_host(data: torch.Tensor) -> U8:
    """Copy bytes to the host, from a GPU through pinned memory, which takes a tenth of the time."""
    host = torch.empty(data.shape, dtype=data.dtype, pin_memory=data.device.type == "cuda")
    array: U8 = host.copy_(data).numpy()
    return array
