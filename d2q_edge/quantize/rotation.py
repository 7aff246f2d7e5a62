"""Rotation: a checkpoint in another basis of its residual stream, in which no channel stands out.

QuaRot (arXiv 2404.00456, section 4, stage 1a) with a small rotation (DESIGN section 3): the hidden states h [tokens,
width] become h Q with Q = diag(signs) blockdiag(H, ..., H), random signs, and H the normalized Walsh-Hadamard matrix of
the largest power of two that divides the width, at most 128. An RMS norm without weights commutes with Q, because Q
keeps lengths. So the weights n of every norm move into the layers behind it, and then

    y = norm(h) W^T             becomes  W <- W diag(n) Q,  n <- 1     (q, k, v, gate, up, head)
    h <- h + a W^T + b          becomes  W <- Q^T W,        b <- b Q   (o, down)
    h <- E[token]               becomes  E <- E Q                      (embeddings)

and the model computes what it did. Everything that doesn't touch the residual stream stays: attention and its norms of
q and k, the biases of the layers that read. Tied embeddings are untied, because the head takes the final norm's
weights along and the embeddings don't.

Knows weights. Which tensor reads or writes the residual stream is the family's knowledge, and quantization is nobody's
business here: `RotatedCheckpoint` looks like a checkpoint in float32, and its users don't notice. The sums and
differences are taken in a fixed order in float64, so that a seed gives the same bits on every machine.
"""

import math

import torch

MAX_GROUP = 128
"""Size of the largest Hadamard matrix (DESIGN section 3)."""
CHUNK = 1 << 17
"""Elements that are rotated at a time, in float64: a megabyte, which caches hold (four times as fast as 32 MB)."""


def group_size(width: int) -> int:
    """The size of the Hadamard matrices for a residual stream of that width: the largest power of two that divides it,
    at most MAX_GROUP."""
    return min(width & -width, MAX_GROUP)


def walsh_hadamard(vectors: torch.Tensor) -> torch.Tensor:
    """`vectors @ H` over the last axis, H the symmetric orthogonal Walsh-Hadamard matrix in Sylvester's order:
    H_1 = 1, H_2m = [[H_m, H_m], [H_m, -H_m]] / sqrt(2).

    Args:
        vectors: floats [..., a power of two].

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
    """The orthogonal matrix Q [width, width] of one model."""

    def __init__(self, width: int, seed: int) -> None:
        self.group = group_size(width)
        generator = torch.Generator().manual_seed(seed)
        self.signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1
        """float64 [width], +1 or -1."""

    def inputs(
        self, weight: torch.Tensor, norm: torch.Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """`W diag(n) Q`, for what is read from, or looked up for, the residual stream; also `b Q`.

        Args:
            weight: W, floats [..., width].
            norm: n, floats [width]; None stands for ones.
            dtype: of the result; the arithmetic is float64.
        """
        factors = self.signs if norm is None else self.signs * norm.double()
        rows = weight.reshape(-1, weight.shape[-1])
        result = torch.empty(rows.shape, dtype=dtype)
        step = max(1, CHUNK // rows.shape[1])
        for start in range(0, len(rows), step):
            part = rows[start : start + step].double() * factors
            result[start : start + step] = walsh_hadamard(part.unflatten(-1, (-1, self.group))).flatten(-2)
        return result.reshape(weight.shape)

    def outputs(self, weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """`Q^T W`, for a layer that writes to the residual stream.

        Args:
            weight: W, floats [width, in_features].
            dtype: of the result; the arithmetic is float64.
        """
        return self.inputs(weight.T, dtype=dtype).T.contiguous()
