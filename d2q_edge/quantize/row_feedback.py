"""Feed the error of quantized rows forward to the rows still to come: error feedback across a layer's outputs.

Rounding with a Kronecker-factored Hessian, after YAQA (arXiv 2505.22988): with G from output_hessian.py and the error
E = Q - T of all rows, the loss grows by tr(G E H E^T). Whatever H is, the best unrounded rows R for the errors
of the finished rows D have

    E_R = -inv(G_RR) G_RD E_D,

which is the recursion of GPTQ (arXiv 2210.17323) with rows in the place of columns: with U = chol(inv(G)), upper, a
class s of rows that misses its target by e shifts the targets of all later rows by (inv(U_ss) U_sR)^T e.

Rows are quantized in CLASSES classes, every so-manieth row in one: neighbors, such as the channels of one head, depend
on each other most, and inside a class rows don't see each other.
"""

import torch

from d2q_edge.quantize import matmul
from d2q_edge.quantize.cholesky import inverse_cholesky
from d2q_edge.quantize.output_hessian import TINY, OutputHessian

CLASSES = 16
"""More gain nothing on qwen3-34m, 8 lose a quarter of the gain."""
ACCELERATOR_COLUMNS = 16384
"""Columns of all classes of a wide layer together, on an accelerator: it takes as long for few rows as for all."""
SHRINKAGE = 0.2
"""Share by which the correlations of G are lowered: they come from few tokens, and the loss isn't quadratic."""
LEAST_ROWS = 4
"""Rows of a class, at least."""
FLOOR = 1e-4
"""The least diagonal element of G, as a share of their mean."""


def most_classes(columns: int, device: torch.device) -> int:
    """Return how many classes the rows of so many columns are split into at most."""
    if not matmul.is_accelerator(device):
        return CLASSES
    return max(2, min(CLASSES, ACCELERATOR_COLUMNS // columns))


class RowFeedback:
    """The classes of a layer's rows, and the shifts of their targets."""

    def __init__(self, rows: int, columns: int, hessian: OutputHessian | None, device: torch.device) -> None:
        """Order the rows.

        Args:
            rows, columns: of the matrix.
            hessian: G of the rows, on the device; None takes rows for independent: one class, no shifts.
            device: of the matrix.

        Raises:
            D2QError: G can't be factored.
        """
        self._pieces: list[_Piece] = []
        self._shifts = torch.zeros(0, device=device)
        if hessian is None:
            self.classes = [torch.arange(rows, device=device)]
            return
        self._shifts = torch.zeros(rows, columns, device=device)
        smallest = min(len(moments) for moments in hessian.pieces)
        count = max(1, min(most_classes(columns, device), smallest // LEAST_ROWS))
        start = 0
        for moments in hessian.pieces:
            self._pieces.append(_Piece(start, moments, count))
            start += len(moments)
        parts = zip(*(piece.classes for piece in self._pieces), strict=True)
        self.classes = [torch.cat(part) for part in parts]

    def shift(self, number: int) -> torch.Tensor | None:
        """Return what is added to the targets of class `number`, float32 [rows, columns]; None for nothing."""
        return self._shifts[self.classes[number]] if self._pieces else None

    def add_error(self, number: int, error: torch.Tensor) -> None:
        """Shift the targets of all later classes by what class `number` misses its own by, float32 [rows, columns]."""
        if not self._pieces or number + 1 == len(self.classes):
            return
        own = error.split([len(piece.classes[number]) for piece in self._pieces])
        for piece, part in zip(self._pieces, own, strict=True):
            later, shift = piece.shift(number, part)
            self._shifts[later] += shift


class _Piece:
    """Rows from `start` on, whose errors depend on each other."""

    def __init__(self, start: int, moments: torch.Tensor, count: int) -> None:
        size, device = len(moments), moments.device
        own = [torch.arange(number, size, count, device=device) for number in range(count)]
        order = torch.cat(own)
        self.classes = [start + rows for rows in own]
        self._order = start + order
        diagonal = moments.diagonal()
        # In units in which G's diagonal is one, where SHRINKAGE is what damping is to H.
        self._unit = diagonal.clamp(min=max(float(diagonal.mean()) * FLOOR, TINY)).sqrt()[order]
        correlation = moments[order[:, None], order] / self._unit[:, None] / self._unit
        correlation.diagonal().fill_(1)
        self._U, _ = inverse_cholesky(correlation, SHRINKAGE / (1 - SHRINKAGE))
        self._ends = torch.tensor([len(rows) for rows in own]).cumsum(0).tolist()

    def shift(self, number: int, error: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows after class `number`, int64 [later], and the shift of their targets for its error."""
        stop = self._ends[number]
        here, later = slice(stop - len(error), stop), slice(stop, None)
        factor = torch.linalg.solve_triangular(self._U[here, here], self._U[here, later], upper=True)
        shift = factor.T @ (error * self._unit[here, None])
        return self._order[later], shift / self._unit[later, None]
