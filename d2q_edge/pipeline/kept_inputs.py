"""Keep what a sublayer's last layer reads in the quantized model from when its statistics are collected until it is
solved, so that the layers before it need not run again. Where there is no memory for all, the rest is computed twice:
the result is the same to the last bit."""

import torch


class KeptInputs:
    """Inputs of one layer in the quantized model, by batch, in the host's memory; empty between two sublayers."""

    def __init__(self, memory: int | None) -> None:
        """Keep at most so many bytes; None for as many as there are."""
        self._memory = memory
        self._layer = ""
        self._batches: dict[int, torch.Tensor] = {}

    def begin(self, layer: str) -> None:
        """Start over with another layer, named relative to its block."""
        self._layer, self._batches = layer, {}

    def keep(self, batch: int, inputs: torch.Tensor) -> None:
        """Keep a batch, float32 [tokens, in_features], if there is room."""
        used = sum(kept.nbytes for kept in self._batches.values())
        if self._memory is None or used + inputs.nbytes <= self._memory:
            self._batches[batch] = inputs

    def take(self, batch: int) -> tuple[str, torch.Tensor] | None:
        """Return the layer and a batch of its inputs, which are forgotten; None if they weren't kept."""
        inputs = self._batches.pop(batch, None)
        return None if inputs is None else (self._layer, inputs)
