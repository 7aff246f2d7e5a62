"""The two frozen codebook tables of the d2q tensor types.

Knows the tables, their text form and their checksum. Does not know how they were learned (tools/learn_tables.py), how
blocks are laid out (tensor_types.py) or how codes are chosen (encoder.py). The text file codebooks.txt is the only
source: Python reads it here, C reads a header that tools/generate_tables.py makes from it, and both carry the same
checksum, so that a file's writer and its reader can't disagree about what a code means.
"""

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from d2q_edge.errors import D2QError

CODEBOOKS = 256
"""Codebooks in each table: a group of 32 weights names one with a byte."""
PAIR_ENTRIES = 16
"""Entries of a pair codebook: a pair of weights names one with 4 bits."""
SCALAR_ENTRIES = 8
"""Entries of a scalar codebook: a weight names one with 3 bits."""
ENTRY_MIN, ENTRY_MAX = -64, 63
"""Range of every table entry: entry + 64 must be an unsigned 7-bit number for the x86 multiply-add instructions."""

TABLE_FILE = Path(__file__).with_name("codebooks.txt")
TABLE_SHA256 = "d0f2acd1bc4165f5566530eb6601a3c9cf9fb2aefbf065b3d2551ae77fe8f2e5"
"""Hex digest of SHA-256 over the bytes of PAIR_TABLE, then of SCALAR_TABLE (C order). Changing it breaks every file."""


def table_sha256(pairs: npt.NDArray[np.int8], scalars: npt.NDArray[np.int8]) -> str:
    """Hex digest of SHA-256 over the bytes of both tables, pairs [256, 16, 2] first, then scalars [256, 8]."""
    return hashlib.sha256(pairs.astype(np.int8).tobytes() + scalars.astype(np.int8).tobytes()).hexdigest()


def format_tables(pairs: npt.NDArray[np.int8], scalars: npt.NDArray[np.int8]) -> str:
    """The text form of both tables (pairs int8 [256, 16, 2], scalars int8 [256, 8]); the inverse of parse_tables."""
    lines = [
        "# The codebooks of the d2q tensor types, learned by tools/learn_tables.py. Do not edit: files depend on them.",
        "# pair INDEX then 16 entries first,second: values of the weights i and i + 16 of a group, in units of d.",
        "# scalar INDEX then 8 entries in ascending order: values of one weight, in units of d.",
    ]
    lines += [f"pair {k} " + " ".join(f"{a},{b}" for a, b in book) for k, book in enumerate(pairs.tolist())]
    lines += [f"scalar {k} " + " ".join(str(a) for a in book) for k, book in enumerate(scalars.tolist())]
    return "\n".join(lines) + "\n"


def parse_tables(text: str) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int8]]:
    """Read the text form: (pairs int8 [256, 16, 2], scalars int8 [256, 8]).

    Raises:
        ValueError: a line is malformed, a codebook is missing, or an entry is outside ENTRY_MIN..ENTRY_MAX.
    """
    books: dict[str, list[list[int]]] = {"pair": [], "scalar": []}
    for number, line in enumerate(text.splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        kind, index, *entries = line.split()
        if kind not in books or int(index) != len(books[kind]):
            raise ValueError(f"line {number}: expected the next 'pair' or 'scalar' codebook, found {kind} {index}")
        books[kind].append([int(value) for entry in entries for value in entry.split(",")])
    pairs = np.array(books["pair"], dtype=np.int64)
    scalars = np.array(books["scalar"], dtype=np.int64)
    if pairs.shape != (CODEBOOKS, 2 * PAIR_ENTRIES) or scalars.shape != (CODEBOOKS, SCALAR_ENTRIES):
        raise ValueError(f"expected tables of {CODEBOOKS} codebooks, found shapes {pairs.shape} and {scalars.shape}")
    for table in (pairs, scalars):
        if table.min() < ENTRY_MIN or table.max() > ENTRY_MAX:
            raise ValueError(f"a table entry is outside {ENTRY_MIN}..{ENTRY_MAX}")
    return pairs.reshape(CODEBOOKS, PAIR_ENTRIES, 2).astype(np.int8), scalars.astype(np.int8)


def load_tables(
    path: Path = TABLE_FILE, sha256: str = TABLE_SHA256
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int8]]:
    """Read both tables from `path` and check them against `sha256`; the arrays are read-only.

    Raises:
        D2QError: the file is missing, malformed, or not the frozen one.
    """
    try:
        pairs, scalars = parse_tables(path.read_text(encoding="ascii"))
    except (OSError, ValueError) as error:
        raise D2QError(f"the codebook tables in {path} can't be read ({error}); reinstall d2q-edge") from error
    if table_sha256(pairs, scalars) != sha256:
        raise D2QError(f"the codebook tables in {path} are not the frozen ones; reinstall d2q-edge")
    pairs.flags.writeable = False
    scalars.flags.writeable = False
    return pairs, scalars


PAIR_TABLE, SCALAR_TABLE = load_tables()
