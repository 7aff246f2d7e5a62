"""Show and change the keys of a finished GGUF file, ours or a stock one; its tensors are copied byte for byte.

The new header is made of the old one's bytes and of the changed values. It goes with the tensors' data into a temporary
file, which takes the file's name when it is complete. Keys that describe the tensors or the vocabulary can't be
changed, and whatever else makes llama.cpp refuse a file that it could load before is refused here.
"""

import json
import math
import re
import shutil
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf

from d2q_edge.calibration.chat_template import ChatTemplate
from d2q_edge.errors import D2QError, printable
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.formats.gguf_writer import cannot_write, check_output, pack_string, pack_value, partial_file
from d2q_edge.runtime.chat import TEMPLATE_KEY
from d2q_edge.runtime.trial_load import why_not
from d2q_edge.utils import files
from d2q_edge.utils.json_files import parse_json
from d2q_edge.utils.progress import Progress

TYPES: dict[str, gguf.GGUFValueType] = {
    kind.name.lower(): kind for kind in gguf.GGUFValueType if kind != gguf.GGUFValueType.ARRAY
}
"""GGUF's value types by name, but for arrays, whose type is that of their items."""
MAX_TEMPLATE = 1 << 20
"""Bytes of a chat template; llama.cpp takes minutes to parse larger ones."""
CHUNK = 1 << 22
_FIXED = re.compile(
    r"general\.(architecture|type|alignment|quantization_version)|tokenizer\.ggml\.model|(d2q|split)\..*|"
    r"[\w-]+\.(block_count|embedding_length|vocab_size|feed_forward_length|expert\w*_length|expert_(used_)?count|"
    r"attention\.(head_count|head_count_kv|key_length|value_length)|rope\.dimension_count)"
)
"""Keys that say what the tensors are, or how the file was made."""
_SHOWN_ITEMS, _SHOWN_CHARACTERS = 3, 200


def describe(file: GGUFFile) -> str:
    """Format all keys for a terminal, with their types; long values are cut."""
    types = {key: type_name(file, key) for key in file.kv}
    widths = [max(map(len, column), default=0) for column in (types, types.values())]
    return "\n".join(
        printable(f"{key:{widths[0]}}  {types[key]:{widths[1]}}  {_shown(value)}") for key, value in file.kv.items()
    )


def type_name(file: GGUFFile, key: str) -> str:
    """Return the type of a key's value ("uint32"), of an array with its length ("string[3]")."""
    kind, items = value_types(file, key)
    return kind.name.lower() if items is None else f"{items.name.lower()}[{len(file.kv[key])}]"


def read_template(path: Path) -> str:
    """Return the text of a chat template's file; raise D2QError if it can't be read, isn't UTF-8 or is too large."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TEMPLATE + 1)
        if len(content) > MAX_TEMPLATE:
            raise D2QError(f"{path} is larger than {MAX_TEMPLATE:,} bytes, which no chat template is")
        return content.decode("utf-8")
    except OSError as error:
        raise D2QError(f"can't read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise D2QError(f"{path} isn't UTF-8; a chat template is a text file") from error


def edit(
    path: Path,
    changes: Mapping[str, str],
    removals: Iterable[str] = (),
    output: Path | None = None,
    *,
    force: bool = False,
) -> int:
    """Change keys of a file, and return the new file's size in bytes.

    Args:
        path: the GGUF file.
        changes: new values as text, by key. A value keeps its type; arrays are written in JSON. A new key is named
            with a type, as in "general.revision:uint32", or gets one that suits its value.
        removals: keys to remove; they may be set anew with another type.
        output: where to write; None replaces the file itself.
        force: let the output replace another file.

    Raises:
        D2QError: the file is malformed, a key can't be changed or a value isn't of its type, llama.cpp couldn't load
            the result, or it can't be written. The file is then what it was before.
    """
    file = GGUFFile(path)
    if output is None and path.is_symlink():
        raise D2QError(f"{path} is a link to {path.resolve()}: name that file, or write another one with -o")
    values: dict[str, bytes | memoryview] = dict(file.raw_values)
    for key in removals:
        if key not in file.kv:
            raise D2QError(f"{path} has no key {key}")
        _refuse_fixed(file, key)
        values.pop(key, None)
    for name, text in changes.items():
        key, kind, items = _target(file, name, text, kept=values)
        _refuse_fixed(file, key)
        value = _parse(key, text, kind, items)
        _check_value(file, key, value)
        try:
            values[key] = struct.pack("<I", kind) + pack_value(value, kind, items)
        except (TypeError, ValueError, OverflowError, struct.error) as error:
            raise _not_of_type(key, text, kind, items) from error
    _write(file, values, output or path, force=force or output is None)
    return (output or path).stat().st_size


def value_types(file: GGUFFile, key: str) -> tuple[gguf.GGUFValueType, gguf.GGUFValueType | None]:
    """Return the type of a key's value, and that of its items if it is an array."""
    kind, items = struct.unpack("<2I", bytes(file.raw_values[key][:8]).ljust(8, b"\0"))
    is_array = kind == gguf.GGUFValueType.ARRAY
    return gguf.GGUFValueType(kind), gguf.GGUFValueType(items) if is_array else None


def _target(
    file: GGUFFile, name: str, text: str, kept: Mapping[str, object]
) -> tuple[str, gguf.GGUFValueType, gguf.GGUFValueType | None]:
    """Return the key that is meant, KEY or KEY:TYPE, the type of its value, and that of an array's items."""
    key, colon, wanted = name.rpartition(":")
    if not colon or name in kept:
        key, wanted = name, ""
    if wanted and wanted not in TYPES:
        raise D2QError(f"there is no type {wanted!r}; these are: {', '.join(TYPES)}")
    if key in kept:
        kind, items = value_types(file, key)
        if wanted and TYPES[wanted] != kind:
            raise D2QError(
                f"{key} is of the type {type_name(file, key)}, not {wanted}; to change that, remove the key in the "
                "same command"
            )
        return key, kind, items
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,200}", key):
        raise D2QError(f"{key!r} can't be a key: keys are made of letters, digits, underscores, hyphens and dots")
    return (key, TYPES[wanted], None) if wanted else (key, *_inferred(key, text))


def _inferred(key: str, text: str) -> tuple[gguf.GGUFValueType, gguf.GGUFValueType | None]:
    """Choose the type of a new key's value. llama.cpp reads whole numbers as uint32, and names and the like as text."""
    is_text = key.startswith((TEMPLATE_KEY, "general.")) and not key.startswith("general.sampling.")
    try:
        value = parse_json(text.encode())
    except ValueError:
        value = text
    if isinstance(value, list):
        kinds = {_scalar_type(item) for item in value}
        if len(kinds) == 1 and None not in kinds:
            return gguf.GGUFValueType.ARRAY, kinds.pop()
        raise D2QError(f"the new key {key} can't hold {text!r:.80}: the items of an array must be of one simple type")
    kind = None if is_text and not key.endswith(".count") else _scalar_type(value)
    return kind or gguf.GGUFValueType.STRING, None


def _scalar_type(value: Any) -> gguf.GGUFValueType | None:
    """Return the type for a value that was parsed from JSON; None for what isn't a scalar."""
    if type(value) is int:
        fitting = (("uint32", 0, 32), ("int32", 2**31, 31), ("uint64", 0, 64), ("int64", 2**63, 63))
        return next((TYPES[name] for name, below, bits in fitting if -below <= value < 2**bits), None)
    return {bool: TYPES["bool"], float: TYPES["float32"], str: TYPES["string"]}.get(type(value))


def _parse(key: str, text: str, kind: gguf.GGUFValueType, items: gguf.GGUFValueType | None) -> Any:
    """Return a value of a type from its text."""
    try:
        if items is not None:
            return [_scalar(item, items) for item in _list(text)]
        if kind == gguf.GGUFValueType.STRING:
            return _scalar(text, kind)
        return _scalar(parse_json(text.strip().lower().encode()), kind)
    except ValueError as error:
        raise _not_of_type(key, text, kind, items) from error


def _list(text: str) -> list[Any]:
    value = parse_json(text.encode())
    if not isinstance(value, list) or not value:
        raise ValueError("not a list")
    return value


def _scalar(value: Any, kind: gguf.GGUFValueType) -> Any:
    """Return a parsed value if it is of a type, a whole number also as a float; raise ValueError otherwise."""
    if kind == gguf.GGUFValueType.STRING:
        if type(value) is str and "\0" not in value:
            return value
    elif kind == gguf.GGUFValueType.BOOL:
        if type(value) is bool:
            return value
    elif kind in (gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.FLOAT64):
        if type(value) in (int, float) and abs(value) < math.inf:
            return value
    elif type(value) is int:
        return value
    raise ValueError("another type")


def _not_of_type(key: str, text: str, kind: gguf.GGUFValueType, items: gguf.GGUFValueType | None) -> D2QError:
    wanted = f"a {kind.name.lower()}" if items is None else f"a JSON list of {items.name.lower()} items"
    return D2QError(f"{key} can't become {text[:80]!r}: its value must be {wanted}")


def _refuse_fixed(file: GGUFFile, key: str) -> None:
    is_vocabulary = key.startswith("tokenizer.") and isinstance(file.kv.get(key), list)
    if _FIXED.fullmatch(key) or is_vocabulary:
        what = "the vocabulary" if is_vocabulary else "what the file's tensors are, or how it was made"
        raise D2QError(f"{key} says {what}, and can't be changed in a finished file; convert the model again")


def _check_value(file: GGUFFile, key: str, value: Any) -> None:
    """Refuse a chat template that isn't one, and a token that doesn't exist."""
    if key.startswith(TEMPLATE_KEY) and isinstance(value, str) and (reason := ChatTemplate(value, {}).syntax_error):
        raise D2QError(f"the new {key} isn't a valid template: {reason}")
    tokens = file.kv.get("tokenizer.ggml.tokens")
    if key.endswith("_token_id") and isinstance(tokens, list) and not 0 <= value < len(tokens):
        raise D2QError(f"{key} can't become {value}: the vocabulary has {len(tokens)} tokens")


def _write(file: GGUFFile, values: Mapping[str, bytes | memoryview], target: Path, *, force: bool) -> None:
    """Write a header with these values and the file's tensors."""
    head = struct.pack("<4sIQQ", b"GGUF", gguf.GGUF_VERSION, len(file.tensors), len(values))
    header = b"".join([head, *(pack_string(key) + bytes(value) for key, value in values.items()), file.raw_infos])
    size, start = max(file.size - file.data_start, 0), -(-len(header) // file.alignment) * file.alignment
    check_output(target, force=force, size=start + size)
    try:
        with partial_file(target) as partial:
            # Read, not mapped: mapped pages count as the process's memory.
            with (
                file.path.open("rb") as source,
                partial.open("wb") as out,
                Progress("Writing", size, "B", unit_scale=True) as progress,
            ):
                out.write(header)
                source.seek(file.data_start)
                out.seek(start)
                while chunk := source.read(CHUNK):
                    progress.update(out.write(chunk))
            if target.exists():
                shutil.copymode(target, partial)
            _check_loads(partial, file)
            files.replace(partial, target)
    except OSError as error:
        raise cannot_write(target, error) from error


def _check_loads(partial: Path, original: GGUFFile) -> None:
    """Refuse a file that llama.cpp can't load if it could load the original."""
    if "split.count" in original.kv:
        return  # the parts of a split file are loaded by their names
    if (reason := why_not(partial)) is not None and why_not(original.path) is None:
        raise D2QError(f"with these changes llama.cpp couldn't load the file: {reason}")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        more = ", ..." if len(value) > _SHOWN_ITEMS else ""
        return f"[{', '.join(map(_shown, value[:_SHOWN_ITEMS]))}{more}]"
    text = f"{value:.7g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
