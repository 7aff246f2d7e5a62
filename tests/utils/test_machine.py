"""The cache key of a machine."""

import pytest

from d2q_edge.utils import machine


def test_key_names_patch_cpu_and_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    first = machine.cache_key("abc")
    assert first.startswith("abc-")
    assert first == machine.cache_key("abc")
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_OPENMP=OFF")
    with_options = machine.cache_key("abc")
    monkeypatch.setattr(machine, "_cpu", lambda: "another")
    assert len({first, with_options, machine.cache_key("abc")}) == 3
