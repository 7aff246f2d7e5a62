"""Turn a checkpoint into a GGUF as llama.cpp's convert_hf_to_gguf.py does: tensors, their order and types, metadata.

With a stock type the result is the same file as that converter writes. Quantizing starts from the same list of tensors
and replaces some.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch

from d2q_edge import __version__
from d2q_edge.errors import D2QError
from d2q_edge.export.metadata import general_metadata
from d2q_edge.export.targets import check_targets
from d2q_edge.export.tokenizer_check import verify as verify_tokenizer
from d2q_edge.formats.gguf_writer import STOCK_TYPES, GGUFTensor, file_size, fitting_type, write_gguf
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import Family, family_for
from d2q_edge.model.tokenizer import Tokenizer, read_tokenizer
from d2q_edge.model.weight_files import IGNORED_SUFFIXES
from d2q_edge.utils.locks import sole_writer

_MIXTURES = {"f32": "ALL_F32", "q5_k": "MOSTLY_Q5_K_S", "q4_k": "MOSTLY_Q4_K_S"}
FILE_TYPES: dict[str, int] = {
    name: int(gguf.LlamaFileType[_MIXTURES.get(name, f"MOSTLY_{name.upper()}")]) for name in STOCK_TYPES
}
"""general.file_type of a file whose matrices have that stock type. llama.cpp has no number for files of q4_k or q5_k
alone; those of its small mixtures come nearest."""

CPU = torch.device("cpu")
Value = str | int | float | bool | Sequence[str] | Sequence[int] | Sequence[float]
AddMetadata = Callable[[gguf.GGUFWriter], None]


def stored_floats(checkpoint: Checkpoint, name: str, device: torch.device = CPU) -> torch.Tensor:
    """Load a tensor of the checkpoint for `float_tensor`.

    A matrix keeps its stored dtype, on the device that is to encode it: 16 bits move faster than 32, and a whole table
    never needs to exist in float32. Anything else becomes float32 on the CPU; families compute with norms.
    """
    tensor = checkpoint.tensor(name)
    return tensor.to(device) if tensor.dim() > 1 else tensor.float()


def float_tensor(
    family: Family, hf_name: str, type_name: str, load: Callable[[], npt.NDArray[Any] | torch.Tensor]
) -> GGUFTensor:
    """Describe a tensor that is encoded in a stock type when it is written.

    As in llama.cpp's converter, everything one-dimensional and routers become f32, and a matrix whose width doesn't fit
    the type's blocks gets another type (`fitting_type`).

    Args:
        family: the checkpoint's.
        hf_name: the tensor's name in the checkpoint.
        type_name: stock type of a matrix.
        load: as of GGUFTensor; returns floats in the checkpoint's row order, norms as float32.
    """
    name = family.gguf_name(hf_name)
    shape = family.tensor_shapes()[hf_name]
    is_matrix = len(shape) >= 2 and name.endswith(".weight") and not family.is_router(hf_name)
    type_name = fitting_type(type_name, shape[-1]) if is_matrix else "f32"
    return GGUFTensor(
        name, shape, type_name, lambda: family.export_rows(hf_name, family.export_values(hf_name, load()))
    )


def packed_tensor(
    family: Family, hf_name: str, type_name: str, load: Callable[[], npt.NDArray[np.uint8]]
) -> GGUFTensor:
    """Describe a weight packed by `tensor_types.pack`; `load` returns uint8 [rows, bytes] in the checkpoint's order."""
    shape = family.tensor_shapes()[hf_name]
    return GGUFTensor(family.gguf_name(hf_name), shape, type_name, lambda: family.export_rows(hf_name, load()))


def model_tensors(
    checkpoint: Checkpoint, family: Family, type_name: str, replacements: Mapping[str, GGUFTensor] | None = None
) -> list[GGUFTensor]:
    """Return all tensors of the file, in the order of llama.cpp's converter.

    Args:
        checkpoint: checked against `family.tensor_shapes()`.
        family: the checkpoint's.
        type_name: the stock type of the matrices.
        replacements: by checkpoint name, what to write in place of the checkpoint's own tensor.
    """
    replacements = replacements or {}
    tensors = {}
    for name in checkpoint.names:
        if name in replacements:
            tensors[name] = replacements[name]
        elif not name.endswith(IGNORED_SUFFIXES) and not (family.tied_embeddings and name == f"{family.head}.weight"):
            tensors[name] = float_tensor(family, name, type_name, partial(stored_floats, checkpoint, name))
    extra = family.extra_tensors().items()
    constants = [GGUFTensor(name, array.shape, "f32", partial(np.asarray, array)) for name, array in extra]
    return [*constants, *_stack(family, tensors)]


def _stack(family: Family, tensors: Mapping[str, GGUFTensor]) -> list[GGUFTensor]:
    """Stack experts; all stacks of a block go where the last of their parts is, as in llama.cpp's converter."""
    missing = Counter(family.block_of(part) for parts in family.stacks.values() for part in parts)
    parts_of_stacks = {part for parts in family.stacks.values() for part in parts}
    result = []
    for name, tensor in tensors.items():
        if name not in parts_of_stacks:
            result.append(tensor)
            continue
        block = family.block_of(name)
        missing[block] -= 1
        if not missing[block]:
            for stack, parts in family.stacks.items():
                if family.block_of(stack) == block:
                    result.append(GGUFTensor.stack(family.gguf_name(stack), [tensors[part] for part in parts]))
    return result


def model_tokenizer(checkpoint: Checkpoint, family: Family, pre_tokenizer: str | None = None) -> Tokenizer:
    """Return the checkpoint's tokenizer as the file will have it; see `read_tokenizer`.

    Raises:
        D2QError: it can't be exported.
    """
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
    """Write tensors with the model's metadata and tokenizer.

    Args:
        path: the file to write.
        checkpoint: where the metadata comes from.
        family: the checkpoint's.
        tokenizer: the checkpoint's, from `model_tokenizer`.
        tensors: what to write, from `model_tensors`.
        file_type: general.file_type, llama.cpp's number for the mixture of types.
        extra: keys of our own ("d2q.*"). When given, the file also says that d2q-edge quantized it.
        force: replace an existing file.
        verify: keep the file only if llama.cpp tokenizes with it as transformers does with the model.

    Returns:
        The file's size in bytes.

    Raises:
        D2QError: the tokenizer differs in llama.cpp, or the file can't be written.
    """
    add_metadata = _metadata_writer(checkpoint, family, file_type, extra, tokenizer, quiet=False)

    def check(file: Path) -> None:
        verify_tokenizer(file, checkpoint.directory, tokenizer)

    return write_gguf(path, family.gguf_arch, tensors, add_metadata, force=force, check=check if verify else None)


def check_tokenizer(checkpoint: Checkpoint, family: Family, tokenizer: Tokenizer) -> None:
    """Verify the tokenizer before the work as `write_model` does after it, with a file without tensors.

    Raises:
        D2QError: the tokenizer differs in llama.cpp.
    """
    add_metadata = _metadata_writer(checkpoint, family, 0, None, tokenizer)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "vocabulary.gguf"
        write_gguf(file, family.gguf_arch, [], add_metadata)
        verify_tokenizer(file, checkpoint.directory, tokenizer, quiet=True)


def model_size(
    checkpoint: Checkpoint,
    family: Family,
    tokenizer: Tokenizer,
    tensors: Sequence[GGUFTensor],
    file_type: int,
    extra: Mapping[str, Value] | None = None,
) -> int:
    """Return the bytes of the file that `write_model` would write; no tensor is loaded.

    Raises:
        D2QError: the metadata can't be exported.
    """
    return file_size(family.gguf_arch, tensors, _metadata_writer(checkpoint, family, file_type, extra, tokenizer))


def _metadata_writer(
    checkpoint: Checkpoint,
    family: Family,
    file_type: int,
    extra: Mapping[str, Value] | None,
    tokenizer: Tokenizer,
    *,
    quiet: bool = True,
) -> AddMetadata:
    """Return a function that adds all keys and, unless `quiet`, reports on stderr what the card loses."""

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
        for key, value in (extra or {}).items():
            _add_value(writer, key, value)

    return add_metadata


def _add_value(writer: gguf.GGUFWriter, key: str, value: Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_int64(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def export(
    model: str | Path,
    path: Path,
    type_name: str,
    *,
    force: bool = False,
    pre_tokenizer: str | None = None,
    verify: bool = True,
) -> int:
    """Convert a checkpoint directory to a GGUF of a stock type: every matrix, embeddings and head included.

    Args:
        model: the directory.
        path: the file to write.
        type_name: one of STOCK_TYPES.
        force: replace an existing file.
        pre_tokenizer: see `read_tokenizer`.
        verify: see `write_model`.

    Returns:
        The file's size in bytes.

    Raises:
        D2QError: anything wrong with the checkpoint, the type's name or the output.
    """
    if type_name not in STOCK_TYPES:
        raise D2QError(f"{type_name!r} isn't a stock type that can be written; these are: {', '.join(STOCK_TYPES)}")
    with sole_writer(path):
        checkpoint = Checkpoint.open(model)
        check_targets({"the output": path}, checkpoint.directory)
        family = family_for(checkpoint.config)
        checkpoint.check(family.tensor_shapes())
        tokenizer = model_tokenizer(checkpoint, family, pre_tokenizer)
        for note in (*checkpoint.notes, *tokenizer.notes, *family.notes):
            print(note, file=sys.stderr)
        tensors = model_tensors(checkpoint, family, type_name)
        matrices = [tensor for tensor in tensors if len(tensor.shape) >= 2]
        routers = {family.gguf_name(name) for name in family.tensor_shapes() if family.is_router(name)}
        if others := [tensor for tensor in matrices if tensor.type != type_name and tensor.name not in routers]:
            kinds = ", ".join(sorted({tensor.type for tensor in others}))
            print(
                f"{len(others)} of {len(matrices)} matrices become {kinds}: their width isn't a multiple of "
                f"{type_name}'s block size",
                file=sys.stderr,
            )
        file_type = FILE_TYPES[type_name]
        return write_model(
            path, checkpoint, family, tokenizer, tensors, file_type=file_type, force=force, verify=verify
        )


def file_name(checkpoint: Checkpoint, family: Family, encoding: str) -> str:
    """Return a name by GGUF's convention, BaseName-SizeLabel-FineTune-Version-Encoding.gguf."""
    metadata, _ = general_metadata(checkpoint, family.parameters(), quantized=False)
    name = gguf.naming_convention(
        metadata.name, metadata.basename, metadata.finetune, metadata.version, metadata.size_label, encoding
    )
    return f"{name}.gguf"
