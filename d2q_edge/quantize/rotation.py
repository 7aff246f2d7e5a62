"""Rotate the residual stream (QuaRot, arXiv 2404.00456, section 4, stage 1a) with small Hadamard matrices.

The hidden states h [tokens, width] become h Q with Q = diag(signs) blockdiag(H, ..., H): random signs, and H the
normalized Walsh-Hadamard matrix of the largest power of two that divides the width, at most 128. Q
keeps lengths and so commutes with an RMS norm without weights. With the norms' weights n folded into the layers that
follow, the model computes the same after

    y = norm(h) W^T             W <- W diag(n) Q,  n <- 1     (q, k, v, gate, up, head)
    h <- h + a W^T + b          W <- Q^T W,        b <- b Q   (o, down)
    h <- E[token]               E <- E Q                      (embeddings)

Sums and differences are taken in a fixed order in float64: a seed gives the same bits on every machine.
"""

import math

import torch

MAX_GROUP = 128
"""Size of the largest Hadamard matrix."""
CHUNK = 1 << 17
"""Elements that are rotated at a time, in float64: a megabyte fits into caches (four times as fast as 32 MB)."""


def group_size(width: int) -> int:
    """Return the size of the Hadamard matrices for a residual stream of that width."""
    return min(width & -width, MAX_GROUP)


def walsh_hadamard(vectors: torch.Tensor) -> torch.Tensor:
    """Return vectors [..., a power of two] @ H, the orthogonal Walsh-Hadamard matrix in Sylvester's order.

    H_1 = 1, H_2m = [[H_m, H_m], [H_m, -H_m]] / sqrt(2).

    Raises:
        ValueError: the last axis isn't a power of two.
    """
    size, half = vectors.shape[-1], 1
    if size < 1 or size & (size - 1):
        raise ValueError(f"{size} is not a power of two")
    while half < size:
        first, second = vectors.unflatten(-1, (-1, 2, half)).unbind(-2)
        vectors = torch.stack((first + second, first - second), -2).flatten(-3)
        half *= 2
    return vectors / math.sqrt(size)


class Rotation:
    """The orthogonal matrix Q [width, width] of one model.

    Attributes:
        group: size of the Hadamard matrices.
        signs: +1 or -1, float64 [width].
    """

    def __init__(self, width: int, seed: int, *, chunk: int = CHUNK) -> None:
        self._chunk = chunk
        self.group = group_size(width)
        generator = torch.Generator().manual_seed(seed)
        self.signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1

    def inputs(
        self, weight: torch.Tensor, norm: torch.Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Return W diag(n) Q, for layers that read the residual stream and for embeddings; also b Q.

        W is float [..., width], n float [width], ones for None. The arithmetic is float64 whatever `dtype` is returned.
        """
        factors = self.signs if norm is None else self.signs * norm.double()
        rows = weight.reshape(-1, weight.shape[-1])
        result = torch.empty(rows.shape, dtype=dtype)
        step = max(1, self._chunk // rows.shape[1])
        for start in range(0, len(rows), step):
            part = rows[start : start + step].double() * factors
            result[start : start + step] = walsh_hadamard(part.unflatten(-1, (-1, self.group))).flatten(-2)
        return result.reshape(weight.shape)

    def outputs(self, weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return Q^T W, for layers that write to the residual stream; W is float [width, in_features]."""
        return self.inputs(weight.T, dtype=dtype).T.contiguous()
