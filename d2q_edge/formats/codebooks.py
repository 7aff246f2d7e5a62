"""Load the two frozen codebook tables of the d2q tensor types (learned by tools/learn_tables.py).

codebooks.txt is their only source: Python reads it here, C includes a header that tools/generate_tables.py makes of it,
and both check the same SHA-256, so that a file's writer and reader agree about what a code means.
"""

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from d2q_edge.errors import D2QError

CODEBOOKS = 256
"""Codebooks in each table; a byte selects one for a group of 32 weights."""
PAIR_CODES, SCALAR_CODES = 16, 8
"""Codes of a codebook: a 4-bit code selects the entry of two weights, a 3-bit code that of a single weight."""
SCALAR_STATES = 2
"""A scalar's entry also depends on the low bit of the code before it: its index is code + SCALAR_CODES * that bit."""
CHAIN = 16
"""Weights in a row that depend on each other's codes: each 16th weight has none before it, which counts as a zero."""
ENTRY_MIN, ENTRY_MAX = -64, 63
"""Range of every entry: entry + 64 must be an unsigned 7-bit number for the multiply-add instructions of x86."""
TABLE_FILE = Path(__file__).with_name("codebooks.txt")
TABLE_SHA256 = "6d747f3b867d88490b4a2ab809c7c2e19a64ed50a71d6d109299e1e6dac5ea63"
"""SHA-256 over the bytes of PAIR_TABLE, then of SCALAR_TABLE (C order). Changing it breaks every file."""
I8 = npt.NDArray[np.int8]


def table_sha256(pairs: I8, scalars: I8) -> str:
    """Return the SHA-256 in hex over the bytes of both tables, pairs [256, 16, 2] first, then scalars [256, 16]."""
    return hashlib.sha256(pairs.astype(np.int8).tobytes() + scalars.astype(np.int8).tobytes()).hexdigest()


def parse_tables(text: str) -> tuple[I8, I8]:
    """Parse codebooks.txt, whose comments describe its lines, into (pairs int8 [256, 16, 2], scalars int8 [256, 16]).

    Raises:
        ValueError: a line is malformed, a codebook is missing, or an entry is outside ENTRY_MIN..ENTRY_MAX.
    """
    tables: dict[str, list[list[int]]] = {"pair": [], "scalar": []}
    for number, line in enumerate(text.splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        kind, index, *entries = line.split()
        if kind not in tables or int(index) != len(tables[kind]):
            raise ValueError(f"line {number}: expected the next 'pair' or 'scalar' codebook, found {kind} {index}")
        tables[kind].append([int(value) for entry in entries for value in entry.split(",")])
    pairs, scalars = np.array(tables["pair"], np.int64), np.array(tables["scalar"], np.int64)
    if pairs.shape != (CODEBOOKS, 2 * PAIR_CODES) or scalars.shape != (CODEBOOKS, SCALAR_STATES * SCALAR_CODES):
        raise ValueError(f"expected tables of {CODEBOOKS} codebooks, found shapes {pairs.shape} and {scalars.shape}")
    if min(pairs.min(), scalars.min()) < ENTRY_MIN or max(pairs.max(), scalars.max()) > ENTRY_MAX:
        raise ValueError(f"a table entry is outside {ENTRY_MIN}..{ENTRY_MAX}")
    return pairs.reshape(CODEBOOKS, PAIR_CODES, 2).astype(np.int8), scalars.astype(np.int8)


def load_tables(path: Path = TABLE_FILE, sha256: str = TABLE_SHA256) -> tuple[I8, I8]:
    """Read both tables from `path`, check them against `sha256` and return them as parse_tables does, read-only.

    Raises:
        D2QError: the file is missing, malformed, or not the frozen one.
    """
    try:
        pairs, scalars = parse_tables(path.read_text(encoding="ascii"))
    except (OSError, ValueError) as error:
        raise D2QError(f"the codebook tables in {path} can't be read ({error}); reinstall d2q-edge") from error
    if table_sha256(pairs, scalars) != sha256:
        raise D2QError(f"the codebook tables in {path} are not the frozen ones; reinstall d2q-edge")
    pairs.flags.writeable = scalars.flags.writeable = False
    return pairs, scalars


PAIR_TABLE, SCALAR_TABLE = load_tables()
