"""Present a GGUF file of stock types as the checkpoint that it was made from.

Names, shapes, order of rows and values are the checkpoint's again (`Family.import_config`, `import_rows`,
`import_values`); what the file's types have lost stays lost. Tensors are dequantized when they are read, one at a time.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from d2q_edge.errors import D2QError
from d2q_edge.formats import tensor_types
from d2q_edge.formats.gguf_reader import GGUFFile, can_decode
from d2q_edge.model.checkpoint import ALL, Checkpoint, is_finite
from d2q_edge.model.families import Family, family_for, family_of_file
from d2q_edge.model.families.gguf_keys import GGUFKeys
from d2q_edge.model.weight_files import DTYPES, TensorEntry

_LOSSLESS = ("f32", "f16", "bf16", "q8_0")
"""Types that need no warning; the loss of q8_0 is far below that of the types that we write."""


class GGUFCheckpoint(Checkpoint):
    """An opened GGUF file; create one with `Checkpoint.open`. Its `directory` is the file."""

    gguf: GGUFFile

    def __init__(self, file: GGUFFile, config: dict[str, Any], family: Family) -> None:
        """Find a family's tensors in a file.

        Raises:
            D2QError: one is missing, of another shape, or of a type that can't be decoded, or there are others.
        """
        self._family, self._places = family, _find_tensors(file, family)
        entries = {}
        for name, (source, _) in self._places.items():
            kind = file.tensors[source].type_name.upper()
            shape = family.tensor_shapes()[name]
            entries[name] = TensorEntry(file.path, name, kind if kind in DTYPES else "F32", shape)
        super().__init__(file.path, config, entries)
        self.gguf = file

    @classmethod
    def open(cls, path: str | Path) -> "GGUFCheckpoint":
        """Read the header of a file, and check it against the family that its architecture stands for.

        Raises:
            D2QError: it is damaged, or isn't a complete language model of stock types and a supported architecture.
        """
        file = GGUFFile(path)
        _refuse_unsuitable(file)
        kind = family_of_file(file)
        keys = GGUFKeys(file, kind.gguf_arch)
        config = kind.import_config(keys)
        try:
            family = family_for(config)
        except D2QError as error:
            raise D2QError(f"{path} can't be converted (its keys are read as a config.json): {error}") from error
        if (experts := keys.whole("expert_count", 0)) != family.num_experts:
            raise D2QError(
                f"{path} has {experts} experts in every block, which isn't supported for the architecture {keys.arch}"
            )
        return cls(file, config, family)

    @property
    def notes(self) -> tuple[str, ...]:
        matrices = [info.type_name for info in self.gguf.tensors.values() if len(info.shape) > 1]
        lossy = [kind for kind, _ in Counter(matrices).most_common() if kind not in _LOSSLESS]
        if not lossy:
            return ()
        return (
            f"{self.directory} is quantized ({', '.join(lossy)}): what that has lost stays lost; where you can get the "
            "original model, convert that",
        )

    def tensor(self, name: str) -> torch.Tensor:
        """Dequantize one tensor; 16-bit floats stay as they are.

        Raises:
            D2QError: the tensor doesn't exist, or holds NaN or infinity.
        """
        dtype, shape = self.dtype(name), self.shape(name)
        source, part = self._places[name]
        if self.gguf.tensors[source].type_name.upper() in DTYPES:
            tensor = torch.from_numpy(self.gguf.raw(source, part).copy()).view(dtype).reshape(shape)
        else:
            tensor = torch.from_numpy(self.gguf.dequantize(source, part)).reshape(shape)
        if not is_finite(tensor):
            raise D2QError(f"tensor {source} in {self.directory} contains NaN or infinite values; the file is damaged")
        moved = self._family.import_values(name, self._family.import_rows(name, tensor))
        assert isinstance(moved, torch.Tensor)
        return moved.contiguous()

    def part(self, name: str, rows: slice = ALL, columns: slice = ALL) -> torch.Tensor:
        return self.tensor(name)[rows, columns]


def _refuse_unsuitable(file: GGUFFile) -> None:
    """Refuse files that aren't a whole language model of stock types."""
    path, kv = file.path, file.kv
    parts = kv.get("split.count", 1)
    if type(parts) is int and parts > 1:
        raise D2QError(f"{path} is one of {parts} parts; join them with llama.cpp's `llama-gguf-split --merge` first")
    own = {info.type_name for info in file.tensors.values() if info.type_id in tensor_types.BY_ID}
    if own or "d2q.version" in kv:
        raise D2QError(
            f"{path} is a file that d2q-edge has quantized{f' ({min(own)})' if own else ''}; convert the model that it "
            "was made from"
        )
    kind, arch = kv.get("general.type", "model"), kv.get("general.architecture")
    if kind != "model" or arch == "clip":
        what = "a model's part for images or sound" if arch == "clip" else f"of the type {kind!r:.40}"
        raise D2QError(f"{path} is {what}, not a language model; give the GGUF file of the model itself")
    pooling, causal = kv.get(f"{arch}.pooling_type", 0), kv.get(f"{arch}.attention.causal", True)
    if pooling != 0 or causal is not True:
        raise D2QError(f"{path} is a model for embeddings or ranking, not one that writes text")
    if not file.tensors:
        raise D2QError(f"{path} has keys but no tensors: it is only a vocabulary; give the whole model")


def _find_tensors(file: GGUFFile, family: Family) -> dict[str, tuple[str, int | None]]:
    """Return the place of every tensor, in the order of the file: its name in it, and the part where it is a stack."""
    parts: dict[str, list[str]] = {}
    for name in family.tensor_shapes():
        parts.setdefault(family.gguf_name(name), []).append(name)
    stacks = {family.gguf_name(stack) for stack in family.stacks}
    extra = family.extra_tensors()
    for source, names in parts.items():
        shape = family.export_shape(names[0])
        _check(file, family, source, (len(names), *shape) if source in stacks else shape)
    for source, array in extra.items():
        _check(file, family, source, array.shape)
    places: dict[str, tuple[str, int | None]] = {}
    for source in file.tensors:
        if source not in parts and source not in extra:
            raise D2QError(
                f"tensor {source} of {file.path} has no place in the architecture {family.gguf_arch} as d2q-edge knows "
                "it; converting without it would change the model"
            )
        for number, name in enumerate(parts.get(source, ())):
            places[name] = source, number if source in stacks else None
    return places


def _check(file: GGUFFile, family: Family, name: str, shape: tuple[int, ...]) -> None:
    """Refuse a file without this tensor of this shape in a type that can be decoded."""
    if name not in file.tensors:
        raise D2QError(
            f"{file.path} has no tensor {name}, which its keys call for (architecture {family.gguf_arch}, "
            f"{family.num_layers} blocks); download or convert it again"
        )
    info = file.tensors[name]
    if info.shape != shape:
        raise D2QError(
            f"tensor {name} of {file.path} has the shape {list(info.shape)}, but the file's keys imply {list(shape)}"
        )
    if not can_decode(info.type_id):
        raise D2QError(
            f"tensor {name} of {file.path} has the type {info.type_name}, which gguf-py can't decode; use a file of "
            "another type, such as q8_0 or f16"
        )
