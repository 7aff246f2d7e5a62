"""The frozen tables: their checksum, their properties, and the C header made from them."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from d2q_edge.errors import D2QError
from d2q_edge.formats.codebooks import (
    PAIR_TABLE,
    SCALAR_TABLE,
    TABLE_FILE,
    TABLE_SHA256,
    load_tables,
    parse_tables,
    table_sha256,
)
from tests.paths import ROOT
from tools.learn_tables import format_tables

HEADER = ROOT / "cpp_patch" / "src" / "d2q-tables.h"
GENERATOR = ROOT / "tools" / "generate_tables.py"


def generate(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(GENERATOR), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_tables_are_the_frozen_ones() -> None:
    assert PAIR_TABLE.dtype == np.int8 and PAIR_TABLE.shape == (256, 16, 2)
    assert SCALAR_TABLE.dtype == np.int8 and SCALAR_TABLE.shape == (256, 16)
    assert hashlib.sha256(PAIR_TABLE.tobytes() + SCALAR_TABLE.tobytes()).hexdigest() == TABLE_SHA256
    assert table_sha256(PAIR_TABLE, SCALAR_TABLE) == TABLE_SHA256


def test_entries_fit_seven_bits_and_use_them() -> None:
    for table in (PAIR_TABLE, SCALAR_TABLE):
        assert table.min() == -64 and table.max() == 63


def test_tables_are_in_order() -> None:
    """The encoder's first guess looks at every fourth codebook and needs all sizes among them."""
    for table in (PAIR_TABLE, SCALAR_TABLE[:, :, None]):
        sizes = np.square(table.astype(int)).sum((1, 2))
        assert (np.diff(sizes) >= 0).all()
    # Neighbors differ in the low bit, the state of the trellis: both states have entries everywhere. So learning
    # begins; a few entries have moved past their neighbors.
    assert (np.diff(SCALAR_TABLE.reshape(256, 2, 8).astype(int), axis=2) >= 0).mean() > 0.99


def test_codebooks_differ() -> None:
    assert len(np.unique(PAIR_TABLE.reshape(256, -1), axis=0)) == 256
    assert len(np.unique(SCALAR_TABLE, axis=0)) == 256


def test_tables_cannot_be_changed_by_accident() -> None:
    with pytest.raises(ValueError, match="read-only"):
        PAIR_TABLE[0, 0, 0] = 1


def test_text_form_is_exact() -> None:
    assert format_tables(PAIR_TABLE, SCALAR_TABLE) == TABLE_FILE.read_text(encoding="ascii")
    pairs, scalars = parse_tables(format_tables(PAIR_TABLE, SCALAR_TABLE))
    np.testing.assert_array_equal(pairs, PAIR_TABLE)
    np.testing.assert_array_equal(scalars, SCALAR_TABLE)


@pytest.mark.parametrize(
    ("pattern", "replacement", "message"),
    [
        ("pair 7 ", "pair 8 ", "expected the next"),
        ("scalar 255 .*\n", "", "256 codebooks"),
        ("scalar 0 -?[0-9]+", "scalar 0 64", "outside"),
        ("scalar 0 -?[0-9]+", "scalar 0 x", "invalid literal"),
    ],
)
def test_malformed_text_is_refused(pattern: str, replacement: str, message: str) -> None:
    text = re.sub(pattern, replacement, format_tables(PAIR_TABLE, SCALAR_TABLE), count=1)
    with pytest.raises(ValueError, match=message):
        parse_tables(text)


def test_changed_or_missing_file_is_one_clear_sentence(tmp_path: Path) -> None:
    changed = PAIR_TABLE.copy()
    changed[3, 4, 1] += 1
    path = tmp_path / "codebooks.txt"
    path.write_text(format_tables(changed, SCALAR_TABLE), encoding="ascii")
    with pytest.raises(D2QError, match="not the frozen ones; reinstall"):
        load_tables(path)
    with pytest.raises(D2QError, match="can't be read"):
        load_tables(tmp_path / "absent.txt")


def test_header_holds_the_same_numbers() -> None:
    """Read with a parser of its own, so that the generator is not its own judge."""
    text = HEADER.read_text(encoding="ascii")
    assert f'#define D2Q_TABLE_SHA256 "{TABLE_SHA256}"' in text
    tables = {}
    for name, body in re.findall(r"int8_t (d2q_\w+)(?:\[\d+\])+ = \{(.*?)\};", text, flags=re.DOTALL):
        tables[name] = np.array(re.findall(r"-?\d+", body), dtype=int)
    np.testing.assert_array_equal(tables["d2q_pair_table"].reshape(256, 2, 16), PAIR_TABLE.transpose(0, 2, 1))
    np.testing.assert_array_equal(tables["d2q_scalar_table"].reshape(256, 16), SCALAR_TABLE)


def test_generator_checks_and_writes(tmp_path: Path) -> None:
    assert generate("--check").returncode == 0, "run python tools/generate_tables.py"
    directory = tmp_path / "deep" / "src"
    assert generate("--check", "--output", str(directory)).returncode == 1
    for name, old, new in (("d2q-tables.h", "-1,", "-2,"), ("d2q-tables-metal.h", "0xF9F6,", "0xF9F5,")):
        assert generate("--output", str(directory)).returncode == 0
        assert generate("--check", "--output", str(directory)).returncode == 0
        other = directory / name
        assert other.read_bytes() == (HEADER.parent / name).read_bytes()
        other.write_text(other.read_text(encoding="ascii").replace(old, new, 1), encoding="ascii")
        stale = generate("--check", "--output", str(directory))
        assert stale.returncode == 1 and f"{name} is stale" in stale.stderr
