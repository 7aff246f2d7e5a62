"""Print the table in docs/phone.md: the memory that common models need on a phone, computed from their shapes.

Types are those of `d2q-edge convert --bits 2` and `3`, so the sizes are what `--dry-run` prints; only the tokenizer's
size is an estimate. phone_models.json has the settings of each model's public config.json that decide sizes.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from d2q_edge.formats.gguf_writer import block_and_type_size
from d2q_edge.model.blocks import ATTENTION
from d2q_edge.model.families import Family, family_for
from d2q_edge.pipeline.type_plan import plan_types

MODELS = Path(__file__).with_name("phone_models.json")
CONTEXT = 4096
TOKENIZER_BYTES = 40
"""Bytes per vocabulary entry, for the token, its type, and its merge. Real files have 20 to 60."""
BATCH = 512
"""llama.cpp's default number of tokens computed at once; the cache of a sliding window holds that many more."""
PADDING = 256
"""The cache's length is a multiple of this."""
PHONES = (4, 6, 8, 12)
"""Memory of phones in GiB."""
SHARE = 0.5
"""Share of a phone's memory for one app, a rule of thumb: Android and iOS end apps that take much more."""


@dataclass(frozen=True)
class Need:
    """What a model needs.

    Attributes:
        parameters: number of weights.
        files: bytes of the file, by --bits.
        cache: bytes of the KV cache of CONTEXT tokens in f16.
    """

    parameters: int
    files: Mapping[int, int]
    cache: int

    def total(self, bits: int) -> int:
        """Return the bytes of file and KV cache; buffers that depend on the batch come on top."""
        return self.files[bits] + self.cache

    def phone(self, bits: int) -> str:
        """Return the smallest phone whose share has room for the total."""
        return next((f"{size} GB" for size in PHONES if self.total(bits) <= SHARE * size * 2**30), "none")


def cache_bytes(family: Family, context: int = CONTEXT) -> int:
    """Return the bytes of the KV cache in f16, as llama.cpp allocates it.

    A layer with a sliding window keeps the window and a batch, one without attention its state, and one that reads
    another one's keys nothing.

    Args:
        family: of the model.
        context: n_ctx, tokens.
    """
    numbers = states = 0
    for layer in range(family.num_layers):
        states += 4 * family.state_elements(layer)
        if all(sublayer.module != ATTENTION for sublayer in family.block_sublayers(layer)):
            continue
        window = family.sliding_window(layer)
        kept = context if window is None else math.ceil((window + BATCH) / PADDING) * PADDING
        numbers += min(context, kept) * family.cached_width(layer)
    return 2 * numbers + states


def need(config: Mapping[str, Any]) -> Need:
    """Compute what one model needs.

    Raises:
        D2QError: the model isn't supported.
    """
    family = family_for(config)
    shapes = family.tensor_shapes()
    files = {}
    for bits in (2, 3):
        types = plan_types(family, bits).all
        files[bits] = TOKENIZER_BYTES * family.vocab_size
        for name, shape in shapes.items():
            block, size = block_and_type_size(types.get(name, "f32"))
            files[bits] += math.prod(shape) // block * size
    return Need(sum(map(math.prod, shapes.values())), files, cache_bytes(family))


def table(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Format a Markdown table with a row for each model.

    Raises:
        D2QError: one isn't supported.
    """
    lines = [
        "| model | parameters | D2Q2 file | D2Q3 file | cache | D2Q2 total | D2Q3 total | D2Q2 from | D2Q3 from |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, config in models.items():
        own = need(config)
        sizes = (own.files[2], own.files[3], own.cache, own.total(2), own.total(3))
        cells = [name, _count(own.parameters), *(f"{size / 1e6:,.0f}" for size in sizes), own.phone(2), own.phone(3)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:,.0f} M" if parameters < 1e9 else f"{parameters / 1e9:.2f} B"


@click.command()
def main() -> None:
    """Print the table in docs/phone.md: megabytes, and the smallest phone that has room."""
    click.echo(table(json.loads(MODELS.read_text("utf-8"))))


if __name__ == "__main__":
    main()
