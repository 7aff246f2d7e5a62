"""The progress bar of a conversion: how much of the weights is done, the time left, and how each layer came out.

Knows which layers there will be and how large they are: time goes with size, and the first blocks may have other types
than the last. Shown on a terminal only.
"""

from collections.abc import Mapping
from types import TracebackType

import torch
from tqdm import tqdm

from d2q_edge.model.families import Family

FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


class Progress:
    """A bar over the weights of all linear layers that are quantized. Use in a with block."""

    def __init__(self, family: Family, types: Mapping[str, str], *, quiet: bool) -> None:
        """Begin.

        Args:
            family: of the model.
            types: by the full name of every linear layer's weight, as the pipeline has them.
            quiet: show nothing, not even on a terminal.
        """
        shapes = family.tensor_shapes()
        self._family = family
        self._left = {name: torch.Size(shapes[name]).numel() for name in types}
        total = sum(self._left.values())
        self._bar = tqdm(total=total, desc="Quantizing", bar_format=FORMAT, disable=True if quiet else None)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def layer(self, name: str, error: float) -> None:
        """A layer is done: the full name of its weight, and the relative squared error of its output."""
        block = self._family.block_of(name) or 0
        inner = name.removeprefix(self._family.block_prefix(block)).removesuffix(".weight")
        place = f"block {block + 1}/{self._family.num_layers}"
        self._bar.set_postfix_str(f"{place} {inner} error {error:.4f}", refresh=False)
        self._bar.update(self._left.pop(name, 0))

    def skip_block(self, index: int) -> None:
        """A block was done by an earlier run."""
        prefix = self._family.block_prefix(index)
        for name in [name for name in self._left if name.startswith(prefix)]:
            self._bar.update(self._left.pop(name))
