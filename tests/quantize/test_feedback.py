"""Error feedback inside a group against a slow float64 loop over rows and columns."""

import numpy as np
import pytest
import torch

from d2q_edge.formats.tensor_types import D2Q2, D2Q3, Q4_0, TensorType
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.feedback import diagonal_blocks, invert_code_blocks, quantize_group
from tests.quantize.slow_feedback import F64, slow_group

KINDS = pytest.mark.parametrize("kind", [D2Q2, D2Q3, Q4_0], ids=lambda kind: kind.name)


class Case:
    def __init__(self, kind: TensorType, rows: int, *, with_P: bool, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.search = CodebookSearch(kind)
        self.width = self.search.levels.shape[2]

        def upper(size: float, diagonal: torch.Tensor) -> torch.Tensor:
            return torch.randn(32, 32, generator=generator).triu(1) * size + torch.diag(diagonal)

        self.weights = torch.randn(rows, 32, generator=generator) * 30
        self.codebooks = torch.randint(0, len(self.search.levels), (rows,), generator=generator)
        self.scales = torch.rand(rows, generator=generator) + 0.5
        self.U = upper(0.3, 1 + torch.rand(32, generator=generator))
        self.P = upper(0.1, torch.zeros(32)) if with_P else None

    def quantize(self) -> tuple[torch.Tensor, ...]:
        inv_U_jj = invert_code_blocks(self.U, self.width)
        return quantize_group(self.weights, self.search, self.codebooks, self.scales, self.U, inv_U_jj, self.P)

    def slowly(self, row: int) -> tuple[list[int], F64, F64, F64]:
        levels = self.search.levels[self.codebooks[row]].double().numpy() * float(self.scales[row])
        u = self.U.double().numpy()
        p = np.zeros((32, 32)) if self.P is None else self.P.double().numpy()
        windowed = self.search.tensor_type.windowed
        return slow_group(self.weights[row].double().numpy(), levels, u, p, self.width, windowed=windowed)


@KINDS
@pytest.mark.parametrize("with_P", [False, True])
def test_against_a_slow_loop(kind: TensorType, with_P: bool) -> None:
    case = Case(kind, 12, with_P=with_P)
    found_codes, *found = case.quantize()
    assert found_codes.dtype == torch.uint8
    for row in range(12):
        codes, *arrays = case.slowly(row)
        assert found_codes[row].tolist() == codes
        for array, tensor in zip(arrays, found, strict=True):
            np.testing.assert_allclose(tensor[row].numpy(), array, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("width", [1, 2])
def test_code_blocks_are_inverted(width: int) -> None:
    factors = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0)).triu() + 3 * torch.eye(32)
    found = invert_code_blocks(factors, width)
    assert found.shape == (3, 32 // width, width, width)
    for index in range(3):
        for code in range(32 // width):
            j = slice(code * width, (code + 1) * width)
            torch.testing.assert_close(found[index, code], torch.linalg.inv(factors[index, j, j]))


def test_diagonal_blocks() -> None:
    matrix = torch.arange(96.0 * 96).view(96, 96)
    found = diagonal_blocks(matrix)
    assert found.shape == (3, 32, 32)
    for index in range(3):
        here = slice(32 * index, 32 * index + 32)
        assert torch.equal(found[index], matrix[here, here])
