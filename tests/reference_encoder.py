"""A reference encoder in numpy: weights to blocks by (weighted) squared error, without calibration.

Tests compare the runtime's C encoder and quantize/rtn.py with it. It is plain and slow: every codebook is tried, with
the best path of codes where an entry depends on the code before. The same input gives the same bytes: of equal
codebooks, codes and paths, the first one, of equal paths that to the even code.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from d2q_edge.formats.codebooks import CHAIN, PAIR_TABLE, SCALAR_CODES, SCALAR_STATES, SCALAR_TABLE
from d2q_edge.formats.tensor_types import F32, GROUP, SCALE_MAX, SCALE_TINY, U8, TensorType, pack, table_index

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

COARSE = np.geomspace(0.6, 4.5, 15)
"""First guesses of d, as multiples of the block's RMS over that of the table's median codebook. The range is wide: a
block with an outlier has a large d whatever its RMS. With the frozen tables the best d was within 0.75 to 4.3."""
COARSE_STRIDE = 4
"""The guesses are compared by every fourth codebook; the tables are sorted by size, so that all sizes occur."""
KEPT = 6
"""Guesses that are compared by all codebooks."""
FINE = (0.93, 0.965, 1.035, 1.07)
"""Multiples of the best one that are tried next."""
REFITS = 2
"""Final rounds of a least-squares refit of d for fixed codes, each followed by a new choice of codes."""
REACH = 4096.0
"""Clamps a block's largest weight, in units of d, so that squares stay finite: only weights far too large for any fp16
scale exceed it."""
PRODUCT = 2**18
"""Multiplications per matrix product: the result stays in the cache, and OpenBLAS starts no threads up to this size."""
BLOCK_STEP = 65536
"""Weights that are encoded at a time: bounds memory."""


@dataclass
class _Blocks:
    """Blocks to encode. x is divided by each block's largest magnitude, `size`."""

    x: F32  # [blocks, groups, vectors, dimension]
    weight: F32  # the same shape, mean 1 in each block
    size: F32  # [blocks], positive

    def subset(self, which: npt.NDArray[np.bool_]) -> "_Blocks":
        return _Blocks(self.x[which], self.weight[which], self.size[which])


@dataclass
class _Choice:
    """Scales and codebooks, with the weighted squared error of x less that of zeros, which keeps small gains exact."""

    scale: F64  # d [blocks]
    codebooks: I64  # [blocks, groups]
    error: F64  # [blocks]


def _vectors(values: F32, t: TensorType) -> F32:
    """Reshape [rows, cols] to [blocks, groups, vectors, dimension], vectors in code order."""
    dimension = 2 if t.paired else 1
    return values.reshape(-1, t.groups, dimension, GROUP // dimension).swapaxes(2, 3)


def _stored(scale: F64) -> F64:
    """Round positive scales to fp16, neither zero nor infinite."""
    return np.clip(scale, SCALE_TINY, SCALE_MAX).astype(np.float16).astype(np.float64)


def _best_path(errors: F32) -> tuple[F32, I64]:
    """Find the best path through chains of scalars, as Viterbi does.

    Args:
        errors: [CHAIN, SCALAR_STATES, SCALAR_STATES, ...]: of each weight, with the best code whose low bit is the
            second index, after a code whose low bit is the first one.

    Returns:
        The error of the best path [...], and the low bits of its codes [CHAIN, ...].
    """
    cost = errors[0, 0]  # no code before the first weight counts as an even one
    origins = []  # for each low bit, whether the code before is odd
    for error in errors[1:]:
        even, odd = cost[0] + error[0], cost[1] + error[1]
        origins.append(odd < even)
        cost = np.minimum(even, odd)
    bits = [cost[1] < cost[0]]
    for origin in reversed(origins):
        bits.append(np.where(bits[-1], origin[1], origin[0]))
    return np.minimum(cost[0], cost[1]), np.stack(bits[::-1]).astype(np.int64)


class _Encoder:
    """The encoder of one tensor type."""

    def __init__(self, t: TensorType) -> None:
        table = PAIR_TABLE if t.paired else SCALAR_TABLE[:, :, None]
        self.type = t
        self.table = table.astype(np.float32)
        self.unit = float(np.median(np.sqrt(np.square(self.table).mean((1, 2)))))

    def _inverse(self, blocks: _Blocks, scale: F64) -> F64:
        """Return the factor [blocks] from x to units of d."""
        return np.minimum(blocks.size / scale, REACH)

    def _scaled(self, blocks: _Blocks, scale: F64) -> F32:
        return blocks.x * self._inverse(blocks, scale).astype(np.float32)[:, None, None, None]

    def choose(self, blocks: _Blocks, scale: F64, stride: int = 1) -> _Choice:
        """Choose the best codebook of each group for these scales [blocks], among every `stride`-th."""
        # The sum of w (u - e)^2, less that of zeros, is the sum of w e^2 - 2 w u e: a matrix product of (-2 w u, w) and
        # (e, e^2) for each entry of all codebooks.
        u = self._scaled(blocks, scale)
        count, groups, vectors, dimension = u.shape
        left = np.concatenate([-2 * blocks.weight * u, blocks.weight], axis=3).reshape(-1, vectors, 2 * dimension)
        table = self.table[::stride]
        right = np.concatenate([table, np.square(table)], axis=2).transpose(1, 2, 0).copy()  # [K, 2 dim, codebooks]
        codebooks = np.empty(len(left), np.int64)
        error = np.empty(len(left), np.float64)
        step = PRODUCT // (2 * dimension * len(table) * vectors)
        for start in range(0, len(left), step):
            part = left[start : start + step].swapaxes(0, 1).reshape(-1, 2 * dimension)  # vector by vector
            if self.type.windowed:
                total = self._path_errors(part, right)
            else:
                total = self._least(part, right).reshape(vectors, -1, len(table)).sum(0)
            codebooks[start : start + step] = total.argmin(1)
            error[start : start + step] = total.min(1)
        gain = error.reshape(count, groups).sum(1) / np.square(self._inverse(blocks, scale))
        return _Choice(scale, codebooks.reshape(count, groups) * stride, gain)

    def _least(self, part: F32, right: F32) -> F32:
        """Return the errors [vectors, codebooks] of vectors (`part`) with the best of the entries `right`."""
        best: F32 = part @ right[0]
        trial = np.empty_like(best)
        for entry in right[1:]:
            np.matmul(part, entry, out=trial)
            np.minimum(best, trial, out=best)
        return best

    def _path_errors(self, part: F32, right: F32) -> F32:
        """Return the errors [groups, codebooks] of the best paths through scalars, `part` weight by weight."""
        states = right.reshape(SCALAR_STATES, -1, SCALAR_STATES, *right.shape[1:])  # code before, code / 2, code % 2
        errors = np.stack(
            [self._least(part, states[p, :, n]) for p in range(SCALAR_STATES) for n in range(SCALAR_STATES)]
        )
        chains = errors.reshape(SCALAR_STATES, SCALAR_STATES, GROUP // CHAIN, CHAIN, -1, right.shape[2])
        return np.asarray(_best_path(chains.transpose(3, 0, 1, 2, 4, 5))[0].sum(0))

    def codes(self, blocks: _Blocks, choice: _Choice) -> U8:
        """Return the best codes [blocks, groups, vectors] of a choice."""
        codes: U8
        u = self._scaled(blocks, choice.scale)
        chosen = self.table[choice.codebooks][:, :, None]  # [blocks, groups, 1, entries, dimension]
        distance = (blocks.weight[:, :, :, None] * np.square(u[:, :, :, None] - chosen)).sum(4)
        if not self.type.windowed:
            codes = distance.argmin(3).astype(np.uint8)
            return codes
        # [blocks, groups, chain, weight, code before, code / 2, code % 2]
        shape = (
            *distance.shape[:2],
            GROUP // CHAIN,
            CHAIN,
            SCALAR_STATES,
            SCALAR_CODES // SCALAR_STATES,
            SCALAR_STATES,
        )
        states = distance.reshape(shape)
        _, bits = _best_path(states.min(5).transpose(3, 4, 5, 0, 1, 2))
        bits = bits.transpose(1, 2, 3, 0)
        before = np.concatenate([np.zeros_like(bits[..., :1]), bits[..., :-1]], axis=3)
        on_path = np.take_along_axis(states, before[..., None, None, None], 4)[..., 0, :, :]
        on_path = np.take_along_axis(on_path, bits[..., None, None], 5)[..., 0]
        codes = (SCALAR_STATES * on_path.argmin(4) + bits).reshape(distance.shape[:3]).astype(np.uint8)
        return codes

    def refit(self, blocks: _Blocks, choice: _Choice) -> F64:
        """Return the least-squares scales [blocks] for the codes of a choice: sum of w x e over sum of w e^2."""
        codes = self.codes(blocks, choice)
        index = table_index(codes) if self.type.windowed else codes
        entries = self.table[choice.codebooks[:, :, None], index]
        top = (blocks.weight * blocks.x * entries).sum((1, 2, 3), dtype=np.float64)
        bottom = (blocks.weight * np.square(entries)).sum((1, 2, 3), dtype=np.float64)
        fitted = np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0) * blocks.size
        return np.where(fitted > 0, fitted, choice.scale)

    def encode(self, blocks: _Blocks) -> tuple[F64, I64, U8]:
        """Return scales [blocks] (0 for zeros), codebooks [blocks, groups] and codes [blocks, groups, vectors]."""
        power = (blocks.weight * np.square(blocks.x)).mean((1, 2, 3), dtype=np.float64)
        guesses = _stored((np.sqrt(power) * blocks.size / self.unit)[:, None] * COARSE)
        rough = np.stack([self.choose(blocks, guess, COARSE_STRIDE).error for guess in guesses.T], axis=1)
        order = rough.argsort(axis=1, kind="stable")
        best = self.choose(blocks, np.take_along_axis(guesses, order[:, :1], 1)[:, 0])
        for rank in range(1, KEPT):
            self._try(blocks, np.take_along_axis(guesses, order[:, rank : rank + 1], 1)[:, 0], best)
        centre = best.scale.copy()
        for factor in FINE:
            self._try(blocks, _stored(centre * factor), best)
        for _ in range(REFITS):
            self._try(blocks, _stored(self.refit(blocks, best)), best)
        codes = self.codes(blocks, best)
        zero = best.error >= 0
        best.scale[zero], best.codebooks[zero], codes[zero] = 0, 0, 0
        return best.scale, best.codebooks, codes

    def _try(self, blocks: _Blocks, scale: F64, best: _Choice) -> None:
        """Accept these scales where they are better."""
        new = scale != best.scale
        if not new.any():
            return
        trial = self.choose(blocks.subset(new), scale[new])
        better = trial.error < best.error[new]
        accepted = np.flatnonzero(new)[better]
        best.scale[accepted], best.codebooks[accepted] = trial.scale[better], trial.codebooks[better]
        best.error[accepted] = trial.error[better]


def encode(t: TensorType, weights: F32, importance: F32 | None = None) -> U8:
    """Encode rows of weights.

    Args:
        t: the block format.
        weights: float32 [rows, cols], finite, cols a multiple of t.block_size. Where they are too large for any fp16
            scale (magnitudes above about 4e6), d is close to the largest fp16 and the stored weights are too small.
        importance: weights of the squared errors, not negative: float32 [cols], or [rows, cols]; None for all ones. A
            block whose importance is zero throughout is encoded as if it were one.

    Returns:
        uint8 [rows, t.row_bytes(cols)]. Blocks of zeros have d = 0.

    Raises:
        ValueError: shapes don't fit, or values are not finite, or an importance is negative.
    """
    rows, columns = weights.shape
    blocks = t.blocks(columns)
    importance = np.ones(columns, np.float32) if importance is None else np.asarray(importance, np.float32)
    if importance.shape not in ((columns,), (rows, columns)):
        raise ValueError(f"importance {importance.shape} doesn't fit weights {weights.shape}")
    if not np.isfinite(weights).all() or not np.isfinite(importance).all() or (importance < 0).any():
        raise ValueError("weights and importance must be finite, and importance not negative")
    x = weights.astype(np.float32).reshape(-1, t.block_size)
    w = np.broadcast_to(importance, weights.shape).reshape(-1, t.block_size)
    encoder = _Encoder(t)
    scales = np.zeros(rows * blocks, np.float16)
    codebooks = np.zeros((rows * blocks, t.groups), np.uint8)
    codes = np.zeros((rows * blocks, t.groups, t.codes(GROUP)), np.uint8)
    size = np.abs(x).max(1, initial=0)
    busy = np.flatnonzero(size)
    step = BLOCK_STEP // t.block_size
    for start in range(0, len(busy), step):
        at = busy[start : start + step]
        part = w[at] / np.maximum(w[at].max(1, keepdims=True), np.float32(1e-38))
        part = np.where(part.max(1, keepdims=True) > 0, part, np.float32(1))
        part = part / part.mean(1, keepdims=True)
        block = _Blocks(_vectors(x[at] / size[at, None], t), _vectors(part, t), size[at])
        scales[at], codebooks[at], codes[at] = encoder.encode(block)
    return pack(t, scales.reshape(rows, -1), codebooks.reshape(rows, -1), codes.reshape(rows, -1))
