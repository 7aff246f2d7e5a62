"""Show the progress of the block loop: by weights, because time goes with size, and one line per block in a log."""

import math
from collections.abc import Iterable, Mapping

from d2q_edge.model.families import Family
from d2q_edge.utils.progress import Progress


class BlockProgress(Progress):
    """Progress over the weights of all linear layers. Use in a with block."""

    def __init__(self, family: Family, types: Mapping[str, str], *, quiet: bool) -> None:
        """Start; `types` has the full name of every linear layer's weight."""
        shapes = family.tensor_shapes()
        self._family = family
        self._left = {name: math.prod(shapes[name]) for name in types}
        total = sum(self._left.values())
        super().__init__("Quantizing", total, "weights", unit_scale=True, interval=math.inf, quiet=quiet)

    def add_layers(self, index: int, errors: Mapping[str, float]) -> None:
        """Count layers of a block that are quantized; `errors` are the relative squared errors of their outputs."""
        for layer, error in errors.items():
            self.set_status(f"{self._block(index)} {layer} error {error:.4f}")
            self._count_weights([f"{self._family.block_prefix(index)}{layer}.weight"])

    def finish_block(self, index: int, errors: Mapping[str, float]) -> None:
        """Count what is left of a block, and print its line; `errors` are those of its layers."""
        mean = f", mean error {sum(errors.values()) / len(errors):.4f}" if errors else ""
        self.set_status(f"{self._block(index)}{mean}")
        self._count_weights(self._names(index))
        self.print_line()

    def skip_block(self, index: int) -> None:
        """Count a block that an earlier run has quantized; it doesn't count for the time that is left."""
        self.skip(sum(self._left.pop(name) for name in self._names(index)))

    def _block(self, index: int) -> str:
        return f"block {index + 1}/{self._family.num_layers}"

    def _names(self, index: int) -> list[str]:
        return [name for name in self._left if name.startswith(self._family.block_prefix(index))]

    def _count_weights(self, names: Iterable[str]) -> None:
        self.update(sum(self._left.pop(name, 0) for name in names))
