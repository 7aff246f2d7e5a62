"""The fuzzer: a few cases of every target find nothing, and what there is to find would be found."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from d2q_edge.errors import D2QError
from tools import fuzz, fuzz_targets


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz_targets.TARGETS)
def test_damaged_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    for seed in range(40):
        assert fuzz.run_case(fuzz_targets.TARGETS[name], seed, tmp_path) is None, f"--target {name} --seed {seed}"


@pytest.mark.parametrize("name", fuzz_targets.TARGETS)
def test_files_that_are_not_damaged_are_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise damage would hide behind the first thing that is always refused."""
    monkeypatch.setattr(fuzz_targets, "damage_bytes", lambda rng, data, interesting=None: data)
    monkeypatch.setattr(fuzz_targets, "damage_json", lambda rng, value: json.dumps(value).encode())
    fuzz_targets.TARGETS[name](0, tmp_path)


def bad_target(seed: int, directory: Path) -> None:
    """Cases 2 to 5 go wrong, each in its way."""
    (directory / "file").write_text("x")
    if seed == 2:
        raise ValueError("two\nlines")
    if seed == 3:
        os.abort()
    if seed == 4:
        time.sleep(1000)
    if seed == 5:
        bytearray(64 << 30)
    if seed == 6:
        raise D2QError("refused")
    if seed == 7:
        raise D2QError("")


def test_what_there_is_to_find_is_found() -> None:
    found = {finding.seed: finding.what for finding in fuzz.run_cases("bad", bad_target, range(9), time_limit=1.0)}
    assert list(found) == [2, 3, 4, 5, 7]
    assert found[2].startswith("ValueError: two lines (test_fuzz.py:")
    assert found[3] == "crash: -6"
    assert found[4] == "hang"
    assert found[5].startswith("MemoryError")
    assert found[7].startswith("no sentence")


def test_cases_are_repeatable(tmp_path: Path) -> None:
    written = []
    for _ in range(2):
        with pytest.raises(D2QError):
            fuzz_targets.damage_gguf(0, tmp_path)
        written.append((tmp_path / "x.gguf").read_bytes())
    assert written[0] == written[1]
