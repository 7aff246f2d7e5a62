"""Fixtures of the quantizer's tests."""

import pytest

from d2q_edge.quantize import matmul


@pytest.fixture
def accelerated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the CPU count as an accelerator: triangular inverses by matrix products, and lazy updates span by span."""
    monkeypatch.setattr(matmul, "is_accelerator", lambda _: True)
