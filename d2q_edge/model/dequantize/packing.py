"""Unpack small integers from 32-bit words.

Value i of a row occupies the bits from i * bits, counted through the row's words from each word's lowest bit. That is
how GPTQ packs 2, 3, 4 and 8 bits, and compressed-tensors all widths from 1 to 8.
"""

import torch

WORD = 32
"""Bits of a word."""


def packed_words(count: int, bits: int) -> int:
    """Return the number of words that so many values take."""
    return -(-count * bits // WORD)


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the first `count` values of every row as uint8 [rows, count]; words are int32 [rows, packed_words]."""
    values = torch.empty(len(words), count, dtype=torch.uint8)
    # Every 32nd value begins a word: these lie at the same place in every group of `bits` words.
    for start in range(min(WORD, count)):
        own = values[:, start::WORD]
        first, shift = divmod(start * bits, WORD)
        low = words[:, first::bits][:, : own.shape[1]] >> shift
        taken = WORD - shift
        if taken < bits:
            # The rest is in the next word; >> has filled the upper bits with copies of the sign.
            high = words[:, first + 1 :: bits][:, : own.shape[1]] << taken
            low = (low & ((1 << taken) - 1)) | high
        own.copy_(low & ((1 << bits) - 1))
    return values
