"""Accumulate second moments of a layer's input over the calibration tokens: the Hessian of GPTQ, the dXXT of GPTAQ.

With X the layer's input in the quantized model and X~ that in the original model, one column per token
(arXiv 2504.02692; activations have tokens in rows here):

    H = 2/n X X^T,   dXXT = 2/n (X~ - X) X^T.
"""

import torch

from d2q_edge.quantize.matmul import add_gram, add_product, mirrored


class InputStatistics:
    """H and dXXT of one layer input, accumulated over batches of calibration tokens."""

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.tokens = torch.zeros((), device=device)
        self._XXT = torch.zeros(columns, columns, device=device)
        self._dXXT = torch.zeros(columns, columns, device=device)

    def add_batch(self, quantized: torch.Tensor, original: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add the inputs of the same tokens in both models, float32 [..., columns], and their weights [tokens]."""
        x = quantized.reshape(-1, quantized.shape[-1])
        difference = original.reshape(x.shape) - x
        self.tokens += len(x)
        if weights is not None:
            # On both factors alike, so that H stays symmetric however they are rounded.
            roots = weights.sqrt()[:, None]
            x, difference = x * roots, difference * roots
        add_gram(self._XXT, x)
        add_product(self._dXXT, difference, x)

    @property
    def sums(self) -> list[torch.Tensor]:
        """The accumulators, for an all_reduce over the processes that share the batches."""
        return [self._XXT, self._dXXT, self.tokens]

    @property
    def hessian(self) -> torch.Tensor:
        """H, float32 [columns, columns]; the identity where no input was ever other than zero: columns count alike."""
        hessian = mirrored(self._XXT * (2 / self.tokens.clamp(min=1)))
        diagonal = hessian.diagonal()
        diagonal.add_((diagonal.sum() == 0).to(diagonal))
        return hessian

    @property
    def dXXT(self) -> torch.Tensor:
        """dXXT, float32 [columns, columns]."""
        return self._dXXT * (2 / self.tokens.clamp(min=1))
