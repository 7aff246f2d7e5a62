"""Rewrite a LoRA adapter that was made for the original model, so that it has the same effect on a file of ours.

Column scales (quantize/dsq.py) make a layer's weight W in the file W' = rows W / columns, and its input and output
x' = columns x and y' = rows y. An adapter adds B A x to y; with A' = A / columns and B' = rows B it adds the same to
what y' stands for. formats/column_scales.py has them. An adapter for a file without column scales stays as it is.

A PEFT adapter becomes a GGUF file as llama.cpp's convert_lora_to_gguf.py writes it, in float32.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from d2q_edge.errors import D2QError
from d2q_edge.export.metadata_edit import value_types
from d2q_edge.export.targets import check_targets
from d2q_edge.formats.column_scales import FIT, ColumnScales, read_scales, scales_hash
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.formats.gguf_writer import GGUFTensor, write_gguf
from d2q_edge.formats.tensor_types import F32
from d2q_edge.model import lora
from d2q_edge.model.families import FAMILIES
from d2q_edge.model.families.delta_net import MODULE as DELTA_NET
from d2q_edge.model.families.llama import Llama, interleave_halves
from d2q_edge.runtime.adapters import check_adapter

_INTERLEAVED = {family.gguf_arch for family in FAMILIES if issubclass(family, Llama)}
"""Architectures whose rows of q and k llama.cpp's converter reorders (families/llama.py)."""
_A, _B = ".lora_a", ".lora_b"


@dataclass
class _Adapter:
    """An adapter by GGUF names: pairs (A [rank, in], B [out, rank]), and keys with their types."""

    pairs: dict[str, tuple[F32, F32]] = field(default_factory=dict)
    keys: dict[str, tuple[Any, Any, Any]] = field(default_factory=dict)


def rewrite_adapter(source: str, file: str | Path, output: Path, *, force: bool = False) -> int:
    """Write the GGUF adapter that has on a file the effect that `source` has on the original; return its bytes.

    Args:
        source: a GGUF file, or a PEFT adapter's directory or id of the hub.
        file: the GGUF file that the adapter is to be used with.
        output: the GGUF file to write.
        force: replace an existing output.

    Raises:
        D2QError: the adapter can't be read, isn't for this model, or changes what llama.cpp's adapters can't; or the
            file doesn't say how its columns were scaled.
    """
    check_targets({"the output": output}, Path(source), [Path(source), Path(file)])
    model = GGUFFile(file)
    architecture = model.kv.get("general.architecture")
    if not isinstance(architecture, str) or model.kv.get("general.type", "model") != "model":
        raise D2QError(f"{model.path} isn't a model; name the GGUF file that the adapter is to be used with")
    scales = read_scales(model)
    adapter = _read_gguf(GGUFFile(source), architecture) if Path(source).is_file() else _read_peft(source, model)
    tensors = list(_tensors(adapter, model, scales))
    fit = scales_hash(model)

    def add_keys(writer: gguf.GGUFWriter) -> None:
        for key, (value, kind, items) in adapter.keys.items():
            writer.add_key_value(key, value, kind, items)
        if fit is not None:
            writer.add_string(FIT, fit)

    return write_gguf(output, architecture, tensors, add_keys, force=force)


def _tensors(adapter: _Adapter, model: GGUFFile, scales: ColumnScales) -> Iterator[GGUFTensor]:
    """Scale all pairs; raise D2QError where one doesn't fit its tensor in the model."""
    for name, (a, b) in adapter.pairs.items():
        info = model.tensors.get(name)
        if info is None or len(info.shape) != 2 or (b.shape[0], a.shape[1]) != info.shape or len(a) != b.shape[1]:
            there = f"has the shape {list(info.shape)} in" if info else "doesn't exist in"
            raise D2QError(
                f"the adapter changes {name} by matrices of the shapes {list(a.shape)} and {list(b.shape)}, but it "
                f"{there} {model.path}; the adapter is for another model"
            )
        if name in scales.columns:
            a = a / scales.columns[name]
        if name in scales.rows:
            b = b * scales.rows[name][:, None]
        for suffix, matrix in ((_A, a), (_B, b)):
            values = np.ascontiguousarray(matrix, np.float32)
            yield GGUFTensor(name + suffix, values.shape, "f32", partial(np.asarray, values))


def _read_gguf(file: GGUFFile, architecture: str) -> _Adapter:
    """Read an adapter that was made for the original."""
    check_adapter(file)
    if FIT in file.kv:
        raise D2QError(f"{file.path} was rewritten for a file already; take the adapter that it was made of")
    if file.kv["general.architecture"] != architecture:
        raise D2QError(f"{file.path} is an adapter for the architecture {file.kv['general.architecture']!r:.40}")
    adapter = _Adapter()
    for key, value in file.kv.items():
        if key not in ("general.architecture", "general.alignment"):
            adapter.keys[key] = (value, *value_types(file, key))
    for name in file.tensors:
        base, suffix = name[: -len(_A)], name[-len(_A) :]
        if suffix not in (_A, _B) or base + _A not in file.tensors or base + _B not in file.tensors:
            raise D2QError(
                f"{file.path} has a tensor {name} that isn't one of a pair for a layer, which isn't supported"
            )
        if suffix == _A:
            pair = file.dequantize(name), file.dequantize(base + _B)
            if base.startswith("token_embd.") or any(matrix.ndim != 2 for matrix in pair):
                raise _unsupported(base)
            adapter.pairs[base] = pair
    return adapter


def _read_peft(source: str, model: GGUFFile) -> _Adapter:
    """Read a PEFT adapter, and name and order it as the model's file."""
    try:
        found = lora.read_adapter(source)
    except OSError as error:
        raise D2QError(f"can't read {source}: {error.strerror or error}") from error
    for note in found.notes:
        print(note, file=sys.stderr)
    if found.replacements:
        raise _unsupported(next(iter(found.replacements)))
    alphas = {name: each.scale * each.a.shape[0] for name, each in found.loras.items()}
    # llama.cpp has one alpha for all, and takes 0 for none.
    alpha = next((value for value in alphas.values() if value), 1.0)
    kinds = gguf.GGUFValueType
    adapter = _Adapter()
    adapter.keys = {
        "general.type": ("adapter", kinds.STRING, None),
        "adapter.type": ("lora", kinds.STRING, None),
        "general.name": (found.directory.resolve().name, kinds.STRING, None),
        "adapter.lora.alpha": (alpha, kinds.FLOAT32, None),
    }
    names = _gguf_names(model)
    for name, each in found.loras.items():
        known = names.get_name(name, try_suffixes=(".weight",))
        # DeltaNet's heads have another order in the file (families/delta_net.py).
        moved = f".{DELTA_NET}." in name
        if each.is_embedding or each.magnitude is not None or known is None or moved:
            raise _unsupported(name)
        a, b = (lora.read(entry).float().numpy() for entry in (each.a, each.b))
        adapter.pairs[str(known)] = a, _ordered(model, name, b * np.float32(alphas[name] / alpha))
    return adapter


def _gguf_names(model: GGUFFile) -> Any:
    architecture = model.kv["general.architecture"]
    arch = next((arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    blocks = model.kv.get(f"{architecture}.block_count")
    if arch is None or type(blocks) is not int or not 0 < blocks < 10_000:
        raise D2QError(f"{model.path} has no known architecture, or no number of blocks")
    return gguf.get_tensor_name_map(arch, blocks)


def _ordered(model: GGUFFile, name: str, b: F32) -> F32:
    """Return B with its rows in the file's order."""
    architecture = model.kv["general.architecture"]
    key = {"q_proj": "head_count", "k_proj": "head_count_kv"}.get(name.split(".")[-2])
    if key is None or architecture not in _INTERLEAVED:
        return b
    heads = model.kv.get(f"{architecture}.attention.{key}")
    if type(heads) is not int or heads < 1 or len(b) % (2 * heads):
        raise D2QError(f"{model.path} has {heads!r:.40} heads, which don't suit the adapter's {len(b)} rows for {name}")
    return np.asarray(interleave_halves(b, heads), np.float32)


def _unsupported(name: str) -> D2QError:
    expert = ".experts." in name or "_exps." in name
    how = "which belongs to experts and" if expert else "in a way that llama.cpp's adapters can't express or that"
    return D2QError(
        f"the adapter changes {name}{',' * expert} {how} isn't supported here; merge it into the model by `d2q-edge "
        "convert MODEL --adapter DIR`"
    )
