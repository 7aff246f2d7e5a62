"""Fixtures of the quantizer's tests."""

import pytest

from d2q_edge.quantize import matmul, native
from d2q_edge.quantize.native.library import library


@pytest.fixture
def accelerated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the CPU count as an accelerator: triangular inverses by matrix products, and lazy updates span by span."""
    monkeypatch.setattr(matmul, "is_accelerator", lambda _: True)


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the CPU from using the compiled kernels."""
    monkeypatch.setattr(native, "is_available", lambda *_: False)


@pytest.fixture(params=["torch", "native"])
def either(request: pytest.FixtureRequest) -> None:
    """Run a test twice: in torch and in the kernels that are compiled for the CPU."""
    if request.param == "torch":
        request.getfixturevalue("in_torch")
    else:
        assert library() is not None
