"""Turn a checkpoint into a GGUF as llama.cpp's convert_hf_to_gguf.py does: tensors, their order and types, metadata.

With a stock type the file is that converter's to the byte; quantizing replaces some of its tensors.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch

from d2q_edge import __version__
from d2q_edge.errors import D2QError
from d2q_edge.export.metadata import general_metadata
from d2q_edge.export.targets import check_targets
from d2q_edge.export.tokenizer_check import verify as verify_tokenizer
from d2q_edge.formats import gguf_writer, tensor_types
from d2q_edge.formats.gguf_writer import STOCK_TYPES, AddMetadata, GGUFTensor, Load, fitting_type
from d2q_edge.model.adapted_checkpoint import adapted
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import Family, family_for
from d2q_edge.model.families.base import Values
from d2q_edge.model.peft_files import adapter_files
from d2q_edge.model.tokenizer import Tokenizer, read_tokenizer, tokenizer_of
from d2q_edge.model.weight_files import IGNORED_SUFFIXES
from d2q_edge.utils.locks import sole_writer

_MIXTURES = {"f32": "ALL_F32", "q5_k": "MOSTLY_Q5_K_S", "q4_k": "MOSTLY_Q4_K_S"}
FILE_TYPES: dict[str, int] = {
    name: int(gguf.LlamaFileType[_MIXTURES.get(name, f"MOSTLY_{name.upper()}")]) for name in STOCK_TYPES
}
"""general.file_type by the stock type of a file's matrices; for q4_k and q5_k, that of llama.cpp's small mixtures."""
TABLE_ROWS = 8192
"""Rows of a table of per-layer embeddings that are in memory at a time."""
Value = str | int | float | bool | bytes | Sequence[str] | Sequence[int] | Sequence[float]


def stored_floats(checkpoint: Checkpoint, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """Load a tensor for `float_tensor`: a matrix in its stored dtype on the device, all else in float32 on the CPU.

    16 bits move faster than 32, and a whole table never needs to exist in float32; families compute with norms.
    """
    tensor = checkpoint.tensor(name)
    return tensor.to(device) if tensor.dim() > 1 else tensor.float()


def float_tensor(family: Family, hf_name: str, type_name: str, load: Load) -> GGUFTensor:
    """Describe a tensor that is encoded when it is written; `load` returns floats in the checkpoint's order of rows.

    As in llama.cpp's converter, everything one-dimensional, routers and constants become f32, and a matrix whose width
    doesn't fit the blocks of the stock type `type_name` gets another one (`fitting_type`).
    """
    name, shape = family.gguf_name(hf_name), family.export_shape(hf_name)
    is_matrix = len(shape) >= 2 and name.endswith(".weight") and not family.stays_float(hf_name)
    kind = fitting_type(type_name, shape[-1]) if is_matrix else "f32"

    def values() -> Values:
        return family.export_rows(hf_name, family.export_values(hf_name, load())).reshape(shape)

    return GGUFTensor(name, shape, kind, values)


def table_tensor(
    checkpoint: Checkpoint, family: Family, hf_name: str, type_name: str, encode: Callable[[torch.Tensor], Values]
) -> GGUFTensor:
    """Describe a table that is too large to be in memory at once: it is read, encoded and written some rows at a time.

    `encode` makes of rows in their stored dtype what GGUFTensor's `load` returns.
    """
    shape, parts = family.export_shape(hf_name), []
    kind = type_name if type_name in tensor_types.BY_NAME else fitting_type(type_name, shape[1])

    def load(rows: slice) -> Values:
        return encode(checkpoint.part(hf_name, rows))

    for start in range(0, shape[0], TABLE_ROWS):
        rows = slice(start, min(start + TABLE_ROWS, shape[0]))
        parts.append(GGUFTensor("", (rows.stop - start, shape[1]), kind, partial(load, rows)))
    return GGUFTensor(family.gguf_name(hf_name), shape, kind, parts[0].load, tuple(parts))


def packed_tensor(family: Family, hf_name: str, type_name: str, load: Load) -> GGUFTensor:
    """Describe a weight packed by `tensor_types.pack`; `load` returns uint8 [rows, bytes] in the checkpoint's order."""
    shape = family.tensor_shapes()[hf_name]
    return GGUFTensor(family.gguf_name(hf_name), shape, type_name, lambda: family.export_rows(hf_name, load()))


def model_tensors(
    checkpoint: Checkpoint, family: Family, type_name: str, replacements: Mapping[str, GGUFTensor] = {}
) -> list[GGUFTensor]:
    """Return all tensors of the file, matrices in a stock type, in the order of llama.cpp's converter.

    `replacements` has by checkpoint name what is written in place of the checkpoint's own tensors. The checkpoint must
    have been checked against `family.tensor_shapes()`.
    """
    tensors = {}
    for name in checkpoint.names:
        if name in replacements:
            tensors[name] = replacements[name]
        elif name == f"{family.per_layer_table}.weight":
            tensors[name] = table_tensor(checkpoint, family, name, type_name, lambda rows: rows)
        elif not name.endswith(IGNORED_SUFFIXES) and not (family.tied_embeddings and name == f"{family.head}.weight"):
            tensors[name] = float_tensor(family, name, type_name, partial(stored_floats, checkpoint, name))
    extra = family.extra_tensors().items()
    constants = [GGUFTensor(name, array.shape, "f32", partial(np.asarray, array)) for name, array in extra]
    return [*constants, *_stack(family, tensors)]


def _stack(family: Family, tensors: Mapping[str, GGUFTensor]) -> list[GGUFTensor]:
    """Stack experts; all stacks of a block go where the last of their parts is, as in llama.cpp's converter."""
    parts_of_stacks = {part for parts in family.stacks.values() for part in parts}
    last = {family.block_of(name): name for name in tensors if name in parts_of_stacks}
    result = []
    for name, tensor in tensors.items():
        if name not in parts_of_stacks:
            result.append(tensor)
        elif name == last[family.block_of(name)]:
            for stack, parts in family.stacks.items():
                if family.block_of(stack) == family.block_of(name):
                    result.append(GGUFTensor.stack(family.gguf_name(stack), [tensors[part] for part in parts]))
    return result


def model_tokenizer(checkpoint: Checkpoint, family: Family, pre_tokenizer: str | None = None) -> Tokenizer:
    """Return the checkpoint's tokenizer as the file will have it; raises as `read_tokenizer` and `tokenizer_of` do."""
    if checkpoint.gguf is not None:
        if pre_tokenizer is not None:
            raise D2QError(
                f"--pre-tokenizer has no meaning for {checkpoint.directory}, which names its own; leave it out"
            )
        return tokenizer_of(checkpoint.gguf, family.vocab_size)
    return read_tokenizer(checkpoint.directory, checkpoint.config, family.vocab_size, pre_tokenizer)


def write_model(
    path: Path,
    checkpoint: Checkpoint,
    family: Family,
    tokenizer: Tokenizer,
    tensors: Sequence[GGUFTensor],
    *,
    file_type: int,
    extra: Mapping[str, Value] | None = None,
    force: bool = False,
    verify: bool = True,
) -> int:
    """Write tensors with the model's metadata and tokenizer, and return the file's size in bytes.

    Args:
        path: the file to write.
        checkpoint, family, tokenizer, tensors: of the model, the latter from `model_tokenizer` and `model_tensors`.
        file_type: general.file_type, llama.cpp's number for the mixture of types.
        extra: keys of our own ("d2q.*"). When given, the file also says that d2q-edge quantized it.
        force: replace an existing file.
        verify: keep the file only if llama.cpp tokenizes with it as transformers does with the model.

    Raises:
        D2QError: the tokenizer differs in llama.cpp, or the file can't be written.
    """
    add_metadata = metadata_writer(checkpoint, family, tokenizer, file_type, extra, quiet=False)
    check = None
    if verify and checkpoint.gguf is None:  # whose tokenizer's keys are written as they are
        check = partial(verify_tokenizer, directory=checkpoint.directory, tokenizer=tokenizer)
    return gguf_writer.write_gguf(path, family.gguf_arch, tensors, add_metadata, force=force, check=check)


def check_tokenizer(checkpoint: Checkpoint, family: Family, tokenizer: Tokenizer) -> None:
    """Verify the tokenizer before the work as `write_model` does after it, with a file without tensors.

    Raises:
        D2QError: the tokenizer differs in llama.cpp.
    """
    if checkpoint.gguf is not None:
        return
    add_metadata = metadata_writer(checkpoint, family, tokenizer, 0, None)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "vocabulary.gguf"
        gguf_writer.write_gguf(file, family.gguf_arch, [], add_metadata)
        verify_tokenizer(file, checkpoint.directory, tokenizer, quiet=True)


def metadata_writer(
    checkpoint: Checkpoint,
    family: Family,
    tokenizer: Tokenizer,
    file_type: int,
    extra: Mapping[str, Value] | None,
    *,
    quiet: bool = True,
) -> AddMetadata:
    """Return a function that adds all keys and, unless `quiet`, says on stderr what of the card is left out."""

    def add_metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_type(gguf.GGUFType.MODEL)
        metadata, notes = general_metadata(checkpoint, writer.get_total_parameter_count(), quantized=extra is not None)
        for note in () if quiet else notes:
            print(note, file=sys.stderr)
        if extra is not None:
            metadata.quantized_by = f"d2q-edge {__version__}"
        metadata.set_gguf_meta_model(writer)
        family.add_metadata(writer, file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        tokenizer.add_to(writer, space_prefix=family.records_space_prefix)
        adders = {bool: writer.add_bool, int: writer.add_int64, float: writer.add_float32, str: writer.add_string}
        for key, value in (extra or {}).items():
            adders.get(type(value), writer.add_array)(key, value)

    return add_metadata


def export(
    model: str | Path,
    path: Path,
    type_name: str,
    *,
    force: bool = False,
    adapter: str | None = None,
    pre_tokenizer: str | None = None,
    verify: bool = True,
) -> int:
    """Convert a checkpoint to a GGUF of a stock type, embeddings and head included; return its size in bytes.

    `type_name` is one of STOCK_TYPES; `adapter` as in `adapted`, `pre_tokenizer` as in `read_tokenizer`, `force` and
    `verify` as in `write_model`.

    Raises:
        D2QError: anything wrong with the checkpoint, the type's name or the output.
    """
    if type_name not in STOCK_TYPES:
        raise D2QError(f"{type_name!r} isn't a stock type that can be written; these are: {', '.join(STOCK_TYPES)}")
    with sole_writer(path):
        checkpoint = Checkpoint.open(model)
        check_targets({"the output": path}, checkpoint.directory, [] if adapter is None else adapter_files(adapter))
        checkpoint.check(family_for(checkpoint.config).tensor_shapes())
        checkpoint = adapted(checkpoint, adapter)
        family = family_for(checkpoint.config)
        tokenizer = model_tokenizer(checkpoint, family, pre_tokenizer)
        for note in (*checkpoint.notes, *tokenizer.notes, *family.notes):
            print(note, file=sys.stderr)
        tensors = model_tensors(checkpoint, family, type_name)
        matrices = [tensor for tensor in tensors if len(tensor.shape) >= 2]
        floats = {family.gguf_name(name) for name in family.tensor_shapes() if family.stays_float(name)}
        if others := [tensor for tensor in matrices if tensor.type != type_name and tensor.name not in floats]:
            kinds = ", ".join(sorted({tensor.type for tensor in others}))
            found = f"{len(others)} of {len(matrices)} matrices become {kinds}"
            print(f"{found}: their width isn't a multiple of {type_name}'s block size", file=sys.stderr)
        kind = FILE_TYPES[type_name]
        return write_model(path, checkpoint, family, tokenizer, tensors, file_type=kind, force=force, verify=verify)


def file_name(checkpoint: Checkpoint, family: Family, encoding: str) -> str:
    """Return a name by GGUF's convention, BaseName-SizeLabel-FineTune-Version-Encoding.gguf."""
    found, _ = general_metadata(checkpoint, family.parameters(), quantized=False)
    parts = found.name, found.basename, found.finetune, found.version, found.size_label
    return f"{gguf.naming_convention(*parts, encoding)}.gguf"
