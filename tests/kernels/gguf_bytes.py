"""Assemble minimal GGUF files byte by byte, including ones that a writer refuses to write."""

import struct


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def one_tensor_file(type_id: int, columns: int, rows: int, data: bytes, text: dict[str, str] | None = None) -> bytes:
    """Assemble a GGUF (version 3) of string metadata and one tensor "weight", of a type number and raw data."""
    pairs = text or {}
    head = struct.pack("<4sIQQ", b"GGUF", 3, 1, len(pairs))
    for key, value in pairs.items():
        head += _string(key) + struct.pack("<I", 8) + _string(value)
    head += _string("weight") + struct.pack("<IQQIQ", 2, columns, rows, type_id, 0)
    return head + bytes(-len(head) % 32) + data + bytes(-len(data) % 32)
