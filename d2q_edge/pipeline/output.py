"""The GGUF that a conversion writes: its tensors by plan, and where the data of each comes from.

Knows which tensor is packed, which stays float and which is new (norm biases). Does not know how anything is quantized
(pipeline.py) nor the bytes of a GGUF (gguf_file.py).
"""

import math
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from d2q_edge.export.model_file import (
    Value,
    float_tensor,
    model_size,
    model_tensors,
    packed_tensor,
    stored_floats,
    write_model,
)
from d2q_edge.formats import tensor_types
from d2q_edge.formats.gguf_writer import GGUFTensor
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import Family
from d2q_edge.model.tokenizer import Tokenizer
from d2q_edge.pipeline.column_scaling import COLUMN_SCALE
from d2q_edge.pipeline.type_plan import Plan
from d2q_edge.pipeline.work_dir import Packed, Tensor, WorkDir
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.rtn import round_layer


class Content(Protocol):
    """Where the tensors' data comes from, by checkpoint name."""

    def packed(self, name: str) -> Packed:
        """A linear layer's weight in its planned type, uint8 [rows, bytes]."""

    def floats(self, name: str) -> torch.Tensor:
        """Any other tensor, as `float_tensor` wants it: a matrix on the device that is to encode it."""

    def group(self, name: str) -> int | None:
        """Tensors of one group are asked for by one thread, others meanwhile by others; those without a group one at a
        time, by the thread that writes the file, as all are unless somebody says that more at once do no harm.
        """
        return None


class PlannedContent(Content):
    """Nothing yet: enough to know the file's size."""

    def packed(self, name: str) -> Packed:
        raise RuntimeError(f"{name} is only planned")

    def floats(self, name: str) -> torch.Tensor:
        raise RuntimeError(f"{name} is only planned")


class RoundedContent(Content):
    """The checkpoint's weights, rounded to nearest one at a time, without calibration."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, device: torch.device) -> None:
        self.checkpoint, self.plan, self.device = checkpoint, plan, device
        self.searches = {kind: CodebookSearch(own, device) for kind, own in tensor_types.BY_NAME.items()}

    def packed(self, name: str) -> Packed:
        kind = self.plan.linears[name]
        with torch.inference_mode():
            weights = self.checkpoint.tensor(name).to(self.device, torch.float32)
            return round_layer(weights, self.searches[kind]).pack(tensor_types.BY_NAME[kind])

    def floats(self, name: str) -> torch.Tensor:
        return stored_floats(self.checkpoint, name, self.device)


class _Latest(threading.local):
    """The block that this thread has read last, and its number."""

    block: tuple[int, dict[str, Tensor]] = -1, {}


class QuantizedContent(Content):
    """What the pipeline left in the work directory; the rest is the checkpoint's.

    Every thread keeps one block, so that each is read once by who asks for its tensors together.
    """

    def __init__(
        self, checkpoint: Checkpoint, family: Family, work: WorkDir, device: torch.device, *, refined: bool
    ) -> None:
        self.checkpoint, self.family, self.work, self.device = checkpoint, family, work, device
        self.refined = refined
        self._latest = _Latest()

    def packed(self, name: str) -> Packed:
        data = self._changed(name)
        if data is None:
            raise RuntimeError(f"{name} was not quantized")
        return data.view(np.uint8)

    def floats(self, name: str) -> torch.Tensor:
        module, _, parameter = name.rpartition(".")
        data = self._changed(name)
        if data is not None:
            return torch.from_numpy(data.astype(np.float32))
        if parameter == "bias" and name not in self.family.tensor_shapes():
            # A norm that is better left alone: the file's size must not depend on that.
            return torch.zeros(self.family.hidden_size)
        values = stored_floats(self.checkpoint, name, self.device)
        if module == self.family.head:
            scale = self._changed(f"{module}.{COLUMN_SCALE}")
            if scale is not None:
                divisor = torch.from_numpy(scale.astype(np.float32)).to(self.device)
                values = values.to(torch.float32, copy=True).div_(divisor)
        return values

    def group(self, name: str) -> int | None:
        block = self.family.block_of(name)
        if block is None and self.device.type == "cuda":
            # A GPU has room for the tables beside each other, and neither waits for the other to be read or written.
            tables = [f"{each}.weight" for each in (self.family.embedding, self.family.head)]
            return self.family.num_layers + tables.index(name) if name in tables else None
        return block

    def _changed(self, name: str) -> Tensor | None:
        index = self.family.block_of(name)
        if index is None:
            index = self.family.num_layers
        if self._latest.block[0] != index:
            self._latest.block = -1, {}  # one block at a time
            self._latest.block = index, self.work.read_block(index, refined=self.refined)
        return self._latest.block[1].get(name)


class Output:
    """One file to be written."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        family: Family,
        tokenizer: Tokenizer,
        plan: Plan,
        norm_biases: list[str],
        metadata: dict[str, Value],
        file_type: int,
    ) -> None:
        """Describe it.

        Args:
            checkpoint, family, tokenizer, plan: of the model.
            norm_biases: names of the norms that have a bias in the file, without ".bias".
            metadata: keys of our own.
            file_type: general.file_type.
        """
        self.checkpoint, self.family, self.tokenizer, self.plan = checkpoint, family, tokenizer, plan
        self.norm_biases, self.metadata, self.file_type = norm_biases, metadata, file_type

    def size(self) -> int:
        """Bytes of the finished file."""
        tensors = self._tensors(PlannedContent())
        return model_size(self.checkpoint, self.family, self.tokenizer, tensors, self.file_type, self.metadata)

    @property
    def bits_per_weight(self) -> float:
        """Mean over the elements of all tensors."""
        tensors = self._tensors(PlannedContent())
        return 8 * sum(tensor.nbytes for tensor in tensors) / sum(math.prod(tensor.shape) for tensor in tensors)

    def write(self, path: Path, content: Content, force: bool, *, verify: bool = True) -> None:
        """Write it.

        Raises:
            D2QError: the file can't be written, or (with `verify`) its tokenizer differs in llama.cpp.
        """
        write_model(
            path,
            self.checkpoint,
            self.family,
            self.tokenizer,
            self._tensors(content),
            file_type=self.file_type,
            extra=self.metadata,
            force=force,
            verify=verify,
        )

    def _tensors(self, content: Content) -> list[GGUFTensor]:
        replacements, types = {}, self.plan.types
        for name in self.family.tensor_shapes():
            kind = types.get(name, "f32")
            if kind in tensor_types.BY_NAME and name in self.plan.linears:
                tensor = packed_tensor(self.family, name, kind, partial(content.packed, name))
            else:
                tensor = float_tensor(self.family, name, kind, partial(content.floats, name))
            replacements[name] = replace(tensor, group=content.group(name))
        biases = []
        for norm in self.norm_biases:
            name, load = f"{norm}.bias", partial(content.floats, f"{norm}.bias")
            shape, group = (self.family.hidden_size,), content.group(name)
            biases.append(GGUFTensor(self.family.gguf_name(name), shape, "f32", load, group=group))
        return [*model_tensors(self.checkpoint, self.family, "f32", replacements), *biases]
