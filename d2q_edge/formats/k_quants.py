"""Encode llama.cpp's K-quants q4_k, q5_k and q6_k, which gguf-py can decode but not encode.

A super-block holds 256 weights in sub-blocks, whose scales (and mins) are integers in units of one (or two) float16
super-block scales (ggml-common.h):

    block_q4_K { half d, dmin; u8 scales[12]; u8 qs[128]; }                144 bytes
    block_q5_K { half d, dmin; u8 scales[12]; u8 qh[32]; u8 qs[128]; }     176 bytes
        8 sub-blocks of 32, w = d * sc * q - dmin * m; sc and m have 6 bits, q has 4 or 5.
    block_q6_K { u8 ql[128]; u8 qh[64]; i8 scales[16]; half d; }           210 bytes
        16 sub-blocks of 16, w = d * sc * (q - 32); sc has 8 bits with a sign, q has 6.

For every sub-block several step sizes are tried; each fixes the codes, and least squares gives the scale (and min) that
fit these codes best. The integers are made from the winners. The axis of the super-blocks is the last one everywhere,
so that every step is one pass over long rows; sums are taken by adding halves, in an order that depends neither on
threads nor on where in a chunk a super-block lies.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

BLOCK = 256
PIECE = 2**20
"""Weights in a CPU thread's chunk: large enough for threads not to wait for each other's Python."""
GPU_PIECE = 2**24
"""Weights in a GPU's chunk: large enough for it not to wait for Python. Takes about half a gigabyte of GPU memory."""
AFFINE_STEPS = tuple(-2 + 0.3 * i for i in range(13))
"""Trials of q4_k and q5_k: a sub-block's range is divided into the largest code plus this many steps."""
SYMMETRIC_STEPS = tuple(-3.2 + 0.4 * i for i in range(11))
"""The same for q6_k, relative to 32 steps between zero and the largest magnitude."""
TINY = 1e-30
"""Keeps quotients finite where all weights of a sub-block are zero."""
SINGULAR = 1e-6
"""Determinants below this share of their terms are rounding errors."""


def encode(type_name: str, weights: Tensor) -> Tensor:
    """Encode rows of weights, on the device where they are.

    Args:
        type_name: "q4_k", "q5_k" or "q6_k".
        weights: floats [rows, cols], finite, cols a multiple of 256; computed with as float32. Weights beyond every
            float16 scale are clipped.

    Returns:
        uint8 [rows, cols / 256 * bytes per super-block], on the same device; deterministic.

    Raises:
        ValueError: the shape doesn't fit, or values are not finite.
    """
    rows, columns = shape = tuple(weights.shape)
    if weights.numel() == 0 or columns % BLOCK:
        raise ValueError(f"{type_name} needs rows of a positive multiple of {BLOCK} columns, not {shape}")
    sub_block, encode_chunk = ENCODERS[type_name]
    blocks = weights.reshape(-1, BLOCK)
    step = (PIECE if weights.device.type == "cpu" else GPU_PIECE) // BLOCK

    def encode_from(start: int) -> Tensor:
        with torch.inference_mode():
            part = blocks[start : start + step]
            x = part.float().T.contiguous().view(-1, sub_block, len(part))  # [sub-block, weight, super-block]
            size = torch.maximum(x.amax((0, 1)), -x.amin((0, 1)))
            if not size.isfinite().all():
                raise ValueError("weights must be finite")
            size[size == 0] = 1
            # Normalized, so that neither denormal nor huge weights upset the sums.
            return encode_chunk(size, x / size)

    starts = range(0, len(blocks), step)
    threads = min(torch.get_num_threads(), len(starts)) if weights.device.type == "cpu" else 1
    if threads == 1:
        chunks = [encode_from(start) for start in starts]
    else:
        # Faster than all threads on one chunk: a chunk stays in a cache, and no thread waits for others at every step.
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                chunks = list(pool.map(encode_from, starts))
            finally:
                torch.set_num_threads(torch.get_num_threads())
    return torch.cat(chunks).view(rows, -1)


def _encode_affine(size: Tensor, x: Tensor, bits: int) -> Tensor:
    """Encode q4_k or q5_k: uint8 [n, 144 or 176] of weights [8, 32, n] in units of their super-blocks' sizes [n]."""
    top = 2**bits - 1
    spare = x.new_empty((3, *x.shape))
    scale, minimum = _affine_search(x, top, spare)
    d, dmin = _half(scale.amax(0) / 63 * size), _half(minimum.amax(0) / 63 * size)
    unit, unit_min = _over(d, size), _over(dmin, size)
    s, m = _affine_integers(x, (scale, minimum), (unit, unit_min), top, spare)
    codes = _affine_codes(x, s * unit, m * unit_min, top, spare[0])
    return _pack_affine(d, dmin, s.byte(), m.byte(), codes.byte(), bits)


def _affine_search(x: Tensor, top: int, spare: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and min [8, n], not negative, of least squared error for x = scale * code - min."""
    low = x.amin(1).clamp_(max=0)
    extent = (x.amax(1) - low).clamp_(min=TINY)
    y = (x - low[:, None]).div_(extent[:, None])  # 0 .. 1, so that the sums below lose no digits to an offset
    sum_y, total = _sum(spare[0].copy_(y)), x.shape[1]
    sums = x.new_empty((3, len(AFFINE_STEPS), *low.shape))
    codes, squares, products = spare
    for i, step in enumerate(AFFINE_STEPS):
        torch.mul(y, top + step, out=codes).round_().clamp_(max=top)
        torch.mul(codes, codes, out=squares)
        torch.mul(codes, y, out=products)
        _sum(spare, out=sums[:, i])
    sum_c, sum_cc, sum_cy = sums  # [steps, 8, n] each
    determinant = total * sum_cc - sum_c * sum_c
    offset = (sum_cc * sum_y - sum_c * sum_cy).div_(determinant)
    # Where all weights have the same code, any offset is as good as the lowest one.
    offset.masked_fill_(determinant <= SINGULAR * total * sum_cc, 0)
    offset = torch.minimum(offset, -low / extent)  # the stored min must not be negative
    rest = sum_cy - offset * sum_c
    scale = rest / sum_cc.clamp_(min=TINY)
    # Sum of (scale code + offset - y)^2 less that of y^2, which is the same for all trials.
    error = offset * (offset * total - 2 * sum_y) - scale * rest
    scale, offset = _of_lowest(error, scale, offset)
    return scale.mul_(extent), (low + offset.mul_(extent)).neg_().clamp_(min=0)


def _affine_integers(
    x: Tensor, found: tuple[Tensor, Tensor], units: tuple[Tensor, Tensor], top: int, spare: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the integer scales and mins [8, n] in these units [n].

    Beside an outlier the other sub-blocks' integers are small, so that rounding them matters: the neighbors of each
    scale are tried too, each with the min that then fits best.
    """
    (scale, minimum), (unit, unit_min) = found, units
    nearest = _integers(scale, unit, 63)
    best = torch.full_like(scale, torch.inf)
    best_s, best_m = torch.zeros_like(scale), torch.zeros_like(scale)
    for step in (0, -1, 1):
        s = (nearest + step).clamp_(0, 63)
        trial = s * unit
        excess = _affine_codes(x, trial, minimum, top, spare[0]).mul_(trial[:, None]).sub_(x)
        m = _integers(_mean(excess).clamp_(min=0), unit_min, 63)
        offset = m * unit_min
        excess = _affine_codes(x, trial, offset, top, spare[0]).mul_(trial[:, None])
        error = _mean(excess.sub_(torch.add(x, offset[:, None], out=spare[1])).square_())
        better = error < best
        best = torch.where(better, error, best)
        best_s, best_m = torch.where(better, s, best_s), torch.where(better, m, best_m)
    return best_s, best_m


def _affine_codes(x: Tensor, scale: Tensor, minimum: Tensor, top: int, out: Tensor) -> Tensor:
    """Return the codes [8, 32, n] nearest to x = scale [8, n] * code - min [8, n]; zeros where the scale is zero."""
    inverse = scale.reciprocal().masked_fill_(scale <= 0, 0)
    return torch.add(x, minimum[:, None], out=out).mul_(inverse[:, None]).round_().clamp_(0, top)


def _pack_affine(d: Tensor, dmin: Tensor, s: Tensor, m: Tensor, codes: Tensor, bits: int) -> Tensor:
    """Pack d, dmin [n], scales and mins [8, n] (as get_scale_min_k4 of ggml reads them) and codes [8, 32, n]."""
    parts = [_bytes(d), _bytes(dmin)]
    parts += [s[:4] | (s[4:] >> 4) << 6, m[:4] | (m[4:] >> 4) << 6, (s[4:] & 15) | (m[4:] & 15) << 4]
    if bits == 5:
        high = codes >> 4
        parts.append(sum(high[i] << i for i in range(1, 8)) | high[0])
        codes = codes & 15
    parts.append((codes[0::2] | codes[1::2] << 4).flatten(0, 1))
    return torch.cat(parts).T.contiguous()


def _encode_q6_k(size: Tensor, x: Tensor) -> Tensor:
    """Encode q6_k: uint8 [n, 210] of weights [16, 16, n] in units of their super-blocks' sizes [n]."""
    spare = x.new_empty((2, *x.shape))
    scale = _symmetric_search(x, spare)
    d = _half(_extreme(scale, 0) * size / -128)
    unit = _over(d, size)
    s = (scale / unit).masked_fill_(unit == 0, 0).round_().clamp_(-128, 127)
    trial = s * unit
    inverse = trial.reciprocal().masked_fill_(trial == 0, 0)
    codes = torch.mul(x, inverse[:, None], out=spare[0]).round_().clamp_(-32, 31).add_(32)
    return _pack_q6_k(d, s.to(torch.int8), codes.byte())


def _symmetric_search(x: Tensor, spare: Tensor) -> Tensor:
    """Return the signed scale [16, n] of least squared error for x = scale * code, codes -32 to 31."""
    extreme = _extreme(x, 1)
    extreme.masked_fill_(extreme.abs() <= TINY, TINY)
    y = x / extreme[:, None]
    sums = x.new_empty((2, len(SYMMETRIC_STEPS), *extreme.shape))
    codes, squares = spare
    for i, step in enumerate(SYMMETRIC_STEPS):
        # The extreme is positive in y and takes the negative side, which has one code more.
        torch.mul(y, -(32 + step), out=codes).round_().clamp_(-32, 31)
        torch.mul(codes, codes, out=squares)
        codes.mul_(y)
        _sum(spare, out=sums[:, i])
    sum_cy, sum_cc = sums  # [steps, 16, n] each
    scale = sum_cy / sum_cc.clamp_(min=TINY)
    (scale,) = _of_lowest(-scale * sum_cy, scale)
    return scale.mul_(extreme)


def _pack_q6_k(d: Tensor, s: Tensor, codes: Tensor) -> Tensor:
    """Pack d [n], scales [16, n] and codes [16, 16, n] (sub-block, weight, super-block)."""
    # In each half of a super-block, four quarters of 32 weights share bytes.
    codes = codes.view(2, 4, 32, -1)
    low, high = codes & 15, codes >> 4
    ql = low[:, :2] | low[:, 2:] << 4
    qh = high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4 | high[:, 3] << 6
    return torch.cat([ql.flatten(0, 2), qh.flatten(0, 1), s.view(torch.uint8), _bytes(d)]).T.contiguous()


def _sum(values: Tensor, out: Tensor | None = None) -> Tensor:
    """Sum over the last axis but one, a power of two long, always in the same order; overwrites the values."""
    half = values.shape[-2] // 2
    while half > 1:
        values.narrow(-2, 0, half).add_(values.narrow(-2, half, half))
        half //= 2
    return torch.add(values.select(-2, 0), values.select(-2, 1), out=out)


def _mean(values: Tensor) -> Tensor:
    """Average over the weights of a sub-block, axis 1; overwrites the values."""
    return _sum(values).div_(values.shape[1])


def _of_lowest(error: Tensor, *values: Tensor) -> list[Tensor]:
    """Return the values [sub-blocks, n] of the first lowest error [steps, sub-blocks, n]; argmin is slow."""
    lowest = error.amin(0)
    found = [value[-1] for value in values]
    for i in reversed(range(len(error) - 1)):
        here = error[i] == lowest
        found = [torch.where(here, value[i], best) for value, best in zip(values, found, strict=True)]
    return found


def _extreme(values: Tensor, axis: int) -> Tensor:
    """Return the value of largest magnitude along an axis."""
    high, low = values.amax(axis), values.amin(axis)
    return torch.where(high >= -low, high, low)


def _half(values: Tensor) -> Tensor:
    """Round to float16 without overflow."""
    return values.clamp(-65504, 65504).half()


def _over(halves: Tensor, size: Tensor) -> Tensor:
    """Return float16 scales in units of the super-blocks' sizes."""
    ratio = halves.float() / size
    return ratio.masked_fill_(~ratio.isfinite(), 0)


def _integers(values: Tensor, unit: Tensor, top: int) -> Tensor:
    """Round values [sub-blocks, n], not negative, to multiples 0 .. top of a unit [n]."""
    return (values / unit).masked_fill_(unit <= 0, 0).round_().clamp_(max=top)


def _bytes(halves: Tensor) -> Tensor:
    """Return the bytes uint8 [2, n] of float16 [n], little-endian like every machine that has torch."""
    return halves.view(torch.uint8).view(-1, 2).T


ENCODERS: dict[str, tuple[int, Callable[[Tensor, Tensor], Tensor]]] = {
    "q6_k": (16, _encode_q6_k),
    "q5_k": (32, partial(_encode_affine, bits=5)),
    "q4_k": (32, partial(_encode_affine, bits=4)),
}
"""By type name: weights of a sub-block, and the encoder of a chunk. It takes the super-blocks' sizes [n] and their
weights in these units [sub-blocks, weights, n], and returns uint8 [n, bytes]."""
