"""Rotation matrices against dense ones from Sylvester's definition."""

import math
from functools import partial

import pytest
import torch

from d2q_edge.quantize.rotation import Rotation, group_size, walsh_hadamard


def dense(rotated: Rotation) -> torch.Tensor:
    """Q [width, width], from Sylvester's definition: entry (i, j) of H is (-1)^(number of ones in i AND j)."""
    group, width = rotated.group, len(rotated.signs)
    signs = [[(-1) ** (i & j).bit_count() for j in range(group)] for i in range(group)]
    hadamard = torch.tensor(signs, dtype=torch.float64) / math.sqrt(group)
    blocks: torch.Tensor = torch.block_diag(*[hadamard] * (width // group))
    return rotated.signs[:, None] * blocks


@pytest.mark.parametrize(
    ("width", "group"), [(4096, 128), (128, 128), (896, 128), (576, 64), (96, 32), (100, 4), (64, 64), (7, 1)]
)
def test_group_size(width: int, group: int) -> None:
    assert group_size(width) == group


def test_walsh_hadamard_by_hand() -> None:
    vector = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    assert walsh_hadamard(vector).tolist() == [6.0, -2.0, -3.0, 1.0]
    assert walsh_hadamard(vector[:1]).tolist() == [1.0]
    for size in (0, 3, 12):
        with pytest.raises(ValueError, match=f"{size} is not a power of two"):
            walsh_hadamard(torch.zeros(2, size))


class TestMatrix:
    @pytest.mark.parametrize("width", [96, 384])
    @pytest.mark.parametrize("chunk", [1, 1000, 1 << 17])
    def test_against_dense(self, width: int, chunk: int) -> None:
        turn = Rotation(width, 3, chunk=chunk)
        matrix = dense(turn)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-14)
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(40, width, generator=generator)
        norm = torch.randn(width, generator=generator)
        double = weight.double()
        exact = partial(torch.testing.assert_close, rtol=0, atol=1e-13)
        found = turn.inputs(weight, norm, torch.float64)
        exact(found, double @ torch.diag(norm.double()) @ matrix)
        exact(turn.inputs(weight, dtype=torch.float64), double @ matrix)
        exact(turn.inputs(weight[0], dtype=torch.float64), double[0] @ matrix)
        exact(turn.outputs(weight.T, torch.float64), matrix.T @ double.T)
        # Rounded once, at the end.
        assert torch.equal(turn.inputs(weight, norm), found.float())
        assert torch.equal(turn.outputs(weight.T), turn.outputs(weight.T, torch.float64).float())
        assert turn.outputs(weight.T).is_contiguous()

    def test_signs(self) -> None:
        signs = Rotation(4096, 0).signs
        assert set(signs.tolist()) == {-1.0, 1.0}
        assert abs(signs.mean()) < 0.1
        groups = signs.reshape(-1, 128)
        assert len(groups.unique(dim=0)) == 32, "every group has its own"
        assert torch.equal(signs, Rotation(4096, 0).signs)
        assert not torch.equal(signs, Rotation(4096, 1).signs)

    def test_bits_for_a_seed_are_frozen(self) -> None:
        """The same seed must give the same file on other machines and with other versions of torch."""
        assert Rotation(16, 0).signs.tolist() == [-1, 1, 1, -1, 1, 1, 1, 1, 1, 1, 1, -1, -1, 1, -1, -1]
