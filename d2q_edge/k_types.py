"""Encoders for llama.cpp's stock types q4_k, q5_k and q6_k, which gguf-py can decode but not write.

Knows the three block layouts (ggml-common.h) and how to choose scales, minimums and codes by squared error. Does not
know files or models (gguf_file.py). All three hold 256 weights in small groups whose scales are integers in units of
one or two float16 numbers:

    q4_k, q5_k: 8 groups of 32, w = d * s * code - dmin * m; s and m have 6 bits, codes 4 or 5.
    q6_k:      16 groups of 16, w = d * s * (code - 32); s has 8 bits and a sign, codes have 6.

Every group tries several step sizes; each fixes the codes, and least squares gives the scale (and minimum) that fit
these codes best. The integers are made from the winners. (Fitting d and dmin once more to the final codes would gain
half a percent.) numpy only, in pieces that stay in the processor's cache: 20 (q6_k) to 30 ns per weight and core,
less than llama-quantize takes.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F16 = npt.NDArray[np.float16]
U8 = npt.NDArray[np.uint8]

BLOCK = 256
PIECE = 2**20
"""Weights that a thread encodes at a time: a step on one of the dozen arrays of a search is long enough for threads not
to wait for each other in Python (on 16 cores eight times as fast as pieces of 2^16)."""
AFFINE_STEPS = np.linspace(-2, 1.6, 13)
"""Codes that a group's range is divided into, relative to the largest code. More than that cuts the range's end off,
which often pays; fewer have other places for the zero."""
SYMMETRIC_STEPS = np.linspace(-3.2, 0.8, 11)
"""The same for q6_k, relative to 32 codes between zero and the largest magnitude."""
TINY = np.float32(1e-30)
"""Keeps quotients finite where all weights of a group are zero."""
SINGULAR = np.float32(1e-6)
"""Determinants below this share of their terms are rounding errors."""


def encode(type_name: str, weights: F32, importance: F32 | None = None) -> U8:
    """Encode rows of weights.

    Args:
        type_name: "q4_k", "q5_k" or "q6_k".
        weights: float32 [rows, cols], finite, cols a multiple of 256. Where they are too large for any float16 scale
            the stored weights are too small.
        importance: weights of the squared errors by column, float32 [cols], not negative; None for all ones. A group
            whose importance is zero throughout is encoded as if it were one.

    Returns:
        uint8 [rows, cols / 256 * bytes per block]. The same input gives the same bytes.

    Raises:
        ValueError: shapes don't fit, or values are not finite, or an importance is negative.
    """
    rows, columns = weights.shape
    if weights.size == 0 or columns % BLOCK:
        raise ValueError(f"{type_name} needs rows of a positive multiple of {BLOCK} columns, not {weights.shape}")
    if not np.isfinite(weights).all():
        raise ValueError("weights must be finite")
    repeated = None
    if importance is not None:
        if importance.shape != (columns,) or not np.isfinite(importance).all() or (importance < 0).any():
            raise ValueError(f"importance must be {columns} finite numbers, none of them negative")
        repeated = importance.astype(np.float32).reshape(-1, BLOCK)
    blocks = np.ascontiguousarray(weights, np.float32).reshape(-1, BLOCK)
    encode_piece = ENCODERS[type_name]
    step = PIECE // BLOCK

    def encode_from(start: int) -> U8:
        part = blocks[start : start + step]
        # Which columns these blocks are: rows follow each other.
        of_part = None if repeated is None else repeated[np.arange(start, start + len(part)) % len(repeated)]
        return encode_piece(part, of_part)

    # numpy lets other threads run while it computes.
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        return np.concatenate(list(threads.map(encode_from, range(0, len(blocks), step)))).reshape(rows, -1)


def _encode_affine(blocks: F32, importance: F32 | None, bits: int) -> U8:
    """q4_k and q5_k: bytes [blocks, 144 or 176] of weights [blocks, 256]."""
    top = np.float32(2**bits - 1)
    size, x, w = _normalized(blocks, importance, 32)
    scale, low = _affine_search(x, w, top)
    # [groups of a block, blocks] from here on. What is stored is the negated minimum.
    scale, minimum = scale.reshape(8, -1), -low.reshape(8, -1)
    x = x.reshape(32, 8, -1)
    w = None if w is None else w.reshape(32, 8, -1)
    d, dmin = _half(scale.max(0) / 63 * size), _half(minimum.max(0) / 63 * size)
    s, m, codes = _affine_integers(x, w, (scale, minimum), (_over(d, size), _over(dmin, size)), top)
    return _pack_affine(d, dmin, s.astype(np.uint8), m.astype(np.uint8), codes.astype(np.uint8), bits)


def _affine_search(x: F32, w: F32 | None, top: np.float32) -> tuple[F32, F32]:
    """Scale and minimum (not above zero) of groups [32, n] by squared error: x is about scale * code + minimum."""
    low = np.minimum(x.min(0), 0)
    extent = np.maximum(x.max(0) - low, TINY)
    y = (x - low) / extent  # 0 .. 1, so that the sums below lose no digits to an offset
    total = np.float32(len(x)) if w is None else w.sum(0)
    sum_y = y.sum(0) if w is None else (w * y).sum(0)
    # The minimum must stay at or below zero.
    highest = -low / extent
    best = np.zeros_like(low)
    best_scale, best_offset = np.zeros_like(low), np.zeros_like(low)
    codes, product = np.empty_like(y), np.empty_like(y)
    for step in AFFINE_STEPS:
        np.multiply(y, top + np.float32(step), out=codes)
        np.rint(codes, out=codes)
        np.minimum(codes, top, out=codes)
        weighted = codes if w is None else w * codes
        sum_c = weighted.sum(0)
        sum_cc = np.multiply(weighted, codes, out=product).sum(0)
        sum_cy = np.multiply(weighted, y, out=product).sum(0)
        determinant = total * sum_cc - sum_c * sum_c
        solvable = determinant > SINGULAR * total * sum_cc
        # Where all weights that count have the same code, any offset is as good as the lowest one.
        offset = np.divide(sum_cc * sum_y - sum_c * sum_cy, determinant, out=np.zeros_like(low), where=solvable)
        offset = np.minimum(offset, highest)
        scale = np.divide(total * sum_cy - sum_y * sum_c, determinant, out=np.zeros_like(low), where=solvable)
        given = ~solvable | (offset == highest)
        scale = np.where(given, (sum_cy - offset * sum_c) / np.maximum(sum_cc, TINY), scale)
        # Sum of (scale code + offset - y)^2 less that of y^2, which is the same for all trials.
        error = scale * (scale * sum_cc + 2 * (offset * sum_c - sum_cy)) + offset * (offset * total - 2 * sum_y)
        better = error < best
        best = np.where(better, error, best)
        best_scale, best_offset = np.where(better, scale, best_scale), np.where(better, offset, best_offset)
    return best_scale * extent, np.minimum(low + best_offset * extent, 0)


def _affine_integers(
    x: F32, w: F32 | None, found: tuple[F32, F32], units: tuple[F32, F32], top: np.float32
) -> tuple[F32, F32, F32]:
    """s and m [8, n] in these units, and the codes [32, 8, n].

    Beside an outlier the other groups' integers are small, so that rounding them matters: the neighbours of s are
    tried too, each with the minimum that then fits best.
    """
    (scale, minimum), (unit, unit_min) = found, units
    nearest = _integers(scale, unit, 63)
    best = np.full_like(scale, np.inf)
    best_s, best_m, best_codes = np.zeros_like(scale), np.zeros_like(scale), np.zeros_like(x)
    for step in (0, -1, 1):
        s = np.clip(nearest + np.float32(step), 0, 63)
        codes = _affine_codes(x, s * unit, minimum, top)
        m = _integers(np.maximum(_mean(codes * (s * unit) - x, w), 0), unit_min, 63)
        codes = _affine_codes(x, s * unit, m * unit_min, top)
        square = np.square(codes * (s * unit) - m * unit_min - x)
        error = _mean(square, w)
        better = error < best
        best = np.where(better, error, best)
        best_s, best_m = np.where(better, s, best_s), np.where(better, m, best_m)
        np.copyto(best_codes, codes, where=better)
    return best_s, best_m, best_codes


def _affine_codes(x: F32, scale: F32, minimum: F32, top: np.float32) -> F32:
    """The nearest codes [32, 8, n] to x [32, 8, n] = scale * code - minimum; zeros where the scale is zero."""
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    codes = (x + minimum) * inverse
    np.rint(codes, out=codes)
    return np.clip(codes, 0, top, out=codes)


def _pack_affine(d: F16, dmin: F16, s: U8, m: U8, codes: U8, bits: int) -> U8:
    """Bytes of d, dmin [blocks], s, m [8, blocks] and codes [32, 8, blocks]."""
    s, m = s.T, m.T
    scales = np.empty((len(s), 12), np.uint8)
    scales[:, 0:4] = s[:, :4] | (s[:, 4:] >> 4) << 6
    scales[:, 4:8] = m[:, :4] | (m[:, 4:] >> 4) << 6
    scales[:, 8:12] = (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4
    grouped = codes.transpose(2, 1, 0)  # [blocks, group, weight]
    low: U8 = grouped & np.uint8(15)
    parts = [_bytes(d), _bytes(dmin), scales]
    if bits == 5:
        parts.append(np.bitwise_or.reduce((grouped >> 4) << np.arange(8, dtype=np.uint8)[:, None], axis=1))
    pairs: U8 = low[:, 0::2] | low[:, 1::2] << np.uint8(4)
    parts.append(pairs.reshape(len(s), 128))
    return np.concatenate(parts, axis=1)


def _encode_q6_k(blocks: F32, importance: F32 | None) -> U8:
    """Bytes [blocks, 210] of weights [blocks, 256]."""
    size, x, w = _normalized(blocks, importance, 16)
    scale = _symmetric_search(x, w).reshape(16, -1)
    x = x.reshape(16, 16, -1)
    w = None if w is None else w.reshape(16, 16, -1)
    largest: F32 = np.take_along_axis(scale, np.abs(scale).argmax(0)[None], axis=0)[0]
    d = _half(largest * size / np.float32(-128))
    unit = _over(d, size)
    s: F32 = np.clip(np.rint(np.divide(scale, unit, out=np.zeros_like(scale), where=unit != 0)), -128, 127)
    codes = _symmetric_codes(x, s * unit)
    return _pack_q6_k(d, s.astype(np.int8), (codes + 32).astype(np.uint8))


def _symmetric_search(x: F32, w: F32 | None) -> F32:
    """Signed scale of groups [16, n] by squared error: x is about scale * code, codes -32 to 31."""
    extreme = np.take_along_axis(x, np.abs(x).argmax(0)[None], axis=0)[0]
    extreme = np.where(np.abs(extreme) > TINY, extreme, TINY)
    y = x / extreme
    best, best_scale = np.zeros_like(extreme), np.zeros_like(extreme)
    codes, product = np.empty_like(y), np.empty_like(y)
    for step in SYMMETRIC_STEPS:
        # The extreme is positive in y and takes the negative side, which has one code more.
        np.multiply(y, -(32 + np.float32(step)), out=codes)
        np.rint(codes, out=codes)
        np.clip(codes, -32, 31, out=codes)
        weighted = codes if w is None else w * codes
        sum_cc = np.multiply(weighted, codes, out=product).sum(0)
        sum_cy = np.multiply(weighted, y, out=product).sum(0)
        scale = sum_cy / np.maximum(sum_cc, TINY)
        gain = scale * sum_cy
        better = gain > best
        best, best_scale = np.where(better, gain, best), np.where(better, scale, best_scale)
    return best_scale * extreme


def _symmetric_codes(x: F32, scale: F32) -> F32:
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    codes = x * inverse
    np.rint(codes, out=codes)
    return np.clip(codes, -32, 31, out=codes)


def _pack_q6_k(d: F16, s: npt.NDArray[np.int8], codes: U8) -> U8:
    """Bytes of d [blocks], s [16, blocks] and codes [16, 16, blocks] (weight of a group, group, block)."""
    # Of each half of a block, four quarters of 32 weights share bytes.
    quarters = codes.transpose(2, 1, 0).reshape(-1, 2, 4, 32)
    low = quarters & 15
    ql = np.concatenate([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], axis=2)
    qh = np.bitwise_or.reduce((quarters >> 4) << np.array([0, 2, 4, 6], np.uint8)[:, None], axis=2)
    count = len(quarters)
    return np.concatenate(
        [ql.reshape(count, 128), qh.reshape(count, 64), np.ascontiguousarray(s.T).view(np.uint8), _bytes(d)], axis=1
    )


def _normalized(blocks: F32, importance: F32 | None, group: int) -> tuple[F32, F32, F32 | None]:
    """Each block's largest magnitude [blocks] (1 where it is zero), and weights and importance as [group, groups].

    The weights are divided by it, so that neither denormal nor huge ones upset the sums. Groups are in the order of
    their index in the block, then of the blocks. Importance has mean 1 in each group.
    """
    size = np.abs(blocks).max(1)
    size[size == 0] = 1

    def arrange(values: F32) -> F32:
        return np.ascontiguousarray(values.reshape(len(values), -1, group).transpose(2, 1, 0)).reshape(group, -1)

    if importance is None:
        return size, arrange(blocks / size[:, None]), None
    w = arrange(importance)
    w /= np.maximum(w.max(0), TINY)
    w = np.where(w.max(0) > 0, w, np.float32(1))
    return size, arrange(blocks / size[:, None]), w / w.mean(0)


def _half(values: F32) -> F16:
    """As float16 holds them, never infinite."""
    return np.clip(values, -65504, 65504).astype(np.float16)


def _over(halves: F16, size: F32) -> F32:
    """float16 scales in units of the blocks' sizes."""
    ratio: F32 = halves.astype(np.float32) / size
    return np.where(np.isfinite(ratio), ratio, np.float32(0))


def _integers(values: F32, unit: F32, top: int) -> F32:
    """Values [groups, blocks], not negative, in units [blocks]: whole numbers up to `top`."""
    quotient = np.divide(values, unit, out=np.zeros_like(values), where=unit > 0)
    return np.minimum(np.rint(quotient), np.float32(top))


def _mean(values: F32, w: F32 | None) -> F32:
    """Over the weights of a group, axis 0; importance has mean 1."""
    mean: F32 = values.mean(0) if w is None else (w * values).mean(0)
    return mean


def _bytes(halves: F16) -> U8:
    return np.ascontiguousarray(halves, "<f2").view(np.uint8).reshape(-1, 2)


ENCODERS = MappingProxyType[str, Callable[[F32, F32 | None], U8]](
    {
        "q6_k": _encode_q6_k,
        "q5_k": lambda blocks, importance: _encode_affine(blocks, importance, 5),
        "q4_k": lambda blocks, importance: _encode_affine(blocks, importance, 4),
    }
)
"""By type name: bytes of blocks [n, 256] with importance of the same shape, or None."""
