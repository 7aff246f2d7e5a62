"""Describe the GGUF file that a conversion writes: its tensors as planned, and where the data of each comes from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NoReturn, Protocol

import torch

from d2q_edge.export import model_file
from d2q_edge.export.scale_keys import scale_keys
from d2q_edge.formats import tensor_types
from d2q_edge.formats.gguf_writer import GGUFTensor, file_size
from d2q_edge.formats.quantized_block import QuantizedBlock
from d2q_edge.formats.tensor_types import F32, U8
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import Family
from d2q_edge.model.families.base import Values
from d2q_edge.model.tokenizer import Tokenizer
from d2q_edge.pipeline.type_plan import TypePlan
from d2q_edge.pipeline.work_dir import WorkDir
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.rtn import round_layer


class Content(Protocol):
    """Where the data of tensors comes from, by checkpoint name; the device encodes what isn't encoded yet."""

    device: torch.device = torch.device("cpu")

    def packed(self, name: str) -> U8:
        """Return a linear layer's weight in its planned type, uint8 [rows, bytes]."""

    def floats(self, name: str) -> torch.Tensor:
        """Return any other tensor as `float_tensor` wants it: a matrix on the device that is to encode it."""

    def column_scales(self, index: int) -> Mapping[str, F32]:
        """Return QuantizedBlock.column_scales of a block, or of what follows the last one; none if not overridden."""
        return {}


class RoundedContent(Content):
    """The checkpoint's weights, rounded to nearest one at a time, without calibration."""

    def __init__(self, checkpoint: Checkpoint, family: Family, types: TypePlan, device: torch.device) -> None:
        self.checkpoint, self.family, self.types, self.device = checkpoint, family, types, device
        self.searches = {name: CodebookSearch(own, device) for name, own in tensor_types.BY_NAME.items()}

    def packed(self, name: str) -> U8:
        type_name = self.types.linears[name]
        with torch.inference_mode():
            weights = self.family.arranged(name, self.checkpoint.tensor(name)).to(self.device, torch.float32)
            return round_layer(weights, self.searches[type_name]).pack(tensor_types.BY_NAME[type_name])

    def floats(self, name: str) -> torch.Tensor:
        return model_file.stored_floats(self.checkpoint, name, self.device)


class QuantizedContent(Content):
    """The finished blocks in the work directory; everything else is the checkpoint's.

    The last block that was read is kept, and the norm biases of all, which stand at the end of the file.
    """

    def __init__(
        self, checkpoint: Checkpoint, family: Family, work: WorkDir, device: torch.device, *, refined: bool
    ) -> None:
        self.checkpoint, self.family, self.work, self.device = checkpoint, family, work, device
        self.refined = refined
        self._final = work.read_block(family.num_layers, refined=refined)
        self._latest: tuple[int, QuantizedBlock] = -1, QuantizedBlock()
        self._norm_biases = {family.num_layers: self._final.norm_biases}

    def packed(self, name: str) -> U8:
        index, inner = self._split(name)
        block, layer = self._block(index), inner.removesuffix(".weight")
        if layer not in block.weights:
            raise RuntimeError(f"{name} was not quantized")
        return block.weights[layer].data

    def floats(self, name: str) -> torch.Tensor:
        index, inner = self._split(name)
        module, _, parameter = inner.rpartition(".")
        if parameter == "bias" and name not in self.family.tensor_shapes():
            return self._norm_bias(index, module)
        block = self._block(index)
        if inner in block.floats:
            return torch.from_numpy(block.floats[inner]).clone()
        values = model_file.stored_floats(self.checkpoint, name, self.device)
        if module == self.family.head and module in block.column_scales:
            scales = torch.from_numpy(block.column_scales[module]).to(self.device)
            values = values.to(torch.float32, copy=True).div_(scales)
        return values

    def column_scales(self, index: int) -> Mapping[str, F32]:
        return self._block(index).column_scales

    def _norm_bias(self, index: int, norm: str) -> torch.Tensor:
        if index not in self._norm_biases:
            self._block(index)
        bias = self._norm_biases[index].get(norm)
        # A norm without a correction gets zeros: the file's size must not depend on it.
        return torch.zeros(self.family.hidden_size) if bias is None else torch.from_numpy(bias).clone()

    def _split(self, name: str) -> tuple[int, str]:
        """Return the number of the block that a tensor belongs to, and the tensor's name in it."""
        number, inner = self.family.split_name(name)
        return self.family.num_layers if number is None else number, inner

    def _block(self, index: int) -> QuantizedBlock:
        if index == self.family.num_layers:
            return self._final
        if self._latest[0] != index:
            self._latest = -1, QuantizedBlock()  # only one in memory at a time
            self._latest = index, self.work.read_block(index, refined=self.refined)
            self._norm_biases[index] = self._latest[1].norm_biases
        return self._latest[1]


@dataclass(frozen=True)
class Output:
    """The file to be written.

    Attributes:
        checkpoint, family, tokenizer, types: of the model.
        norm_biases: full names of the norms that have a bias in the file.
        metadata: the d2q.* keys but for those of the column scales.
        file_type: general.file_type.
        scaled: whether columns are scaled.
    """

    checkpoint: Checkpoint
    family: Family
    tokenizer: Tokenizer
    types: TypePlan
    norm_biases: list[str]
    metadata: dict[str, model_file.Value]
    file_type: int
    scaled: bool = False

    def size(self) -> int:
        """Return the size of the finished file in bytes."""
        model = self.checkpoint, self.family, self.tokenizer
        add_metadata = model_file.metadata_writer(*model, self.file_type, self._keys(None))
        return file_size(self.family.gguf_arch, self._tensors(None), add_metadata)

    @property
    def bits_per_weight(self) -> float:
        """Mean over the elements of all tensors."""
        tensors = self._tensors(None)
        return 8 * sum(tensor.nbytes for tensor in tensors) / sum(math.prod(tensor.shape) for tensor in tensors)

    def write(self, path: Path, content: Content, force: bool, *, verify: bool = True) -> None:
        """Write the file.

        Raises:
            D2QError: the file can't be written, or (with `verify`) its tokenizer differs in llama.cpp.
        """
        model, extra = (self.checkpoint, self.family, self.tokenizer, self._tensors(content)), self._keys(content)
        model_file.write_model(path, *model, file_type=self.file_type, extra=extra, force=force, verify=verify)

    def _keys(self, content: Content | None) -> dict[str, model_file.Value]:
        """Return all d2q.* keys; without content, those of the column scales only have the right size."""
        if not self.scaled:
            return self.metadata
        return {**self.metadata, **scale_keys(self.family, content.column_scales if content else None)}

    def _tensors(self, content: Content | None) -> list[GGUFTensor]:
        """List the file's tensors; without content they can't be loaded."""
        packed, floats = (content.packed, content.floats) if content else (_no_data, _no_data)
        family, replacements = self.family, {}
        for name in family.tensor_shapes():
            type_name = self.types.all.get(name, "f32")
            if name == f"{family.per_layer_table}.weight":
                encode = _RowEncoder(type_name, content.device if content else torch.device("cpu"))
                replacements[name] = model_file.table_tensor(self.checkpoint, family, name, type_name, encode)
            elif type_name in tensor_types.BY_NAME and name in self.types.linears:
                replacements[name] = model_file.packed_tensor(family, name, type_name, partial(packed, name))
            else:
                replacements[name] = model_file.float_tensor(family, name, type_name, partial(floats, name))
        tensors = model_file.model_tensors(self.checkpoint, family, "f32", replacements)
        for name in (f"{norm}.bias" for norm in self.norm_biases):
            tensors.append(GGUFTensor(family.gguf_name(name), (family.hidden_size,), "f32", partial(floats, name)))
        return tensors


class _RowEncoder:
    """Rounds rows of a table to nearest, if their type is ours; a stock type is left to the writer."""

    def __init__(self, type_name: str, device: torch.device) -> None:
        self._type, self._device = tensor_types.BY_NAME.get(type_name), device

    @cached_property
    def _search(self) -> CodebookSearch:
        assert self._type is not None
        return CodebookSearch(self._type, self._device)

    def __call__(self, rows: torch.Tensor) -> Values:
        if self._type is None:
            return rows.to(self._device)
        with torch.inference_mode():
            return round_layer(rows.to(self._device, torch.float32), self._search).pack(self._type)


def _no_data(name: str) -> NoReturn:
    raise RuntimeError(f"{name} is only planned")
