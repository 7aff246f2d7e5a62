"""`--refine`: tune a quantized model as a whole by its KL divergence from the original (DESIGN section 3).

Knows how to put the pipeline's result together as one model, to tune it (quantize/refine.py) and to put it back into
the work directory, which after every pass also gets what an interrupted refinement needs to go on. Both models are in
memory, in float32, so that this needs about 12 bytes per weight of the original, and another 16 where codes are tuned
too.
"""

import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from d2q_edge.formats import tensor_types
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import Family
from d2q_edge.model.whole_model import WholeModel
from d2q_edge.pipeline.column_scaling import COLUMN_SCALE
from d2q_edge.pipeline.memory import free_memory
from d2q_edge.pipeline.work_dir import Tensor, WorkDir
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.quantized_layer import QuantizedLayer
from d2q_edge.quantize.refine import RefinementLosses, State, tune
from d2q_edge.quantize.tunable import TunableLinear, TunableNorm

BYTES_PER_CODE = 16
"""Latent value, gradient and two moments, float32, of one weight."""
TENSORS_PER_PARAMETER = 4
"""Of its size, in a State."""


@dataclass(frozen=True)
class Refinement:
    """What it did.

    Attributes:
        before, after: KL divergence on the held-back windows, nats per token.
        codes: whether codes were tuned; if not, memory didn't suffice.
    """

    before: float
    after: float
    codes: bool


def refined_norms(family: Family) -> list[str]:
    """Full names of the norms that get a bias: all that read the residual stream."""
    inner = [group.norm for group in family.linear_groups if group.norm is not None]
    blocks = [f"{family.block_prefix(index)}{norm}" for index in range(family.num_layers) for norm in inner]
    return [*blocks, family.final_norm]


def refine(
    checkpoint: Checkpoint,
    family: Family,
    types: Mapping[str, str],
    windows: npt.NDArray[np.int64],
    work: WorkDir,
    device: torch.device,
) -> Refinement:
    """Tune the finished blocks in `work`, and keep the result there as well.

    Args:
        checkpoint, family: the original model.
        types: type of every linear layer's weight.
        windows: calibration tokens [windows, context]; some are held back.
        work: all blocks are finished.
        device: where both models fit.
    """
    blocks = [work.read_block(index) for index in range(family.num_layers + 1)]
    student = _Student(checkpoint, family, types, blocks, device)
    state, codes = _read_state(work)
    if codes is None:
        codes = student.weights * BYTES_PER_CODE < _free_memory(device)
    if codes:
        student.free_codes()
    keep = _keeper(work, student.model, codes)
    progress = tune(WholeModel(checkpoint, family, {}, device), student.model, windows, state=state, keep=keep)
    for index, block in enumerate(blocks):
        work.write_block(index, student.result(index, block), refined=True)
    work.remove_state()
    return Refinement(progress.before, progress.after, codes)


def _read_state(work: WorkDir) -> tuple[State | None, bool | None]:
    """Where an interrupted refinement was, and whether it tuned codes."""
    found = work.read_state()
    if found is None:
        return None, None
    arrays, facts = found
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return State(RefinementLosses(facts["before"], facts["passes"]), tensors), facts["codes"]


def _keeper(work: WorkDir, model: WholeModel, codes: bool) -> Callable[[State], None]:
    """What keeps the state of every pass, if there is room for it and the one before."""
    parameters = model.parameters().values()
    size = TENSORS_PER_PARAMETER * sum(parameter.nbytes for parameter in parameters)
    in_memory = 0 if model.device.type == "cpu" else size
    if 2 * size > shutil.disk_usage(work.path).free or in_memory > free_memory():
        print(
            f"refinement starts over if it is interrupted: to go on, it would need {2 * size / 2**30:.1f} GiB on the "
            f"disk and {in_memory / 2**30:.1f} GiB of memory",
            file=sys.stderr,
        )
        return lambda _: None

    def keep(state: State) -> None:
        tensors = {name: tensor.cpu().numpy() for name, tensor in state.tensors.items()}
        work.write_state(tensors, {"codes": codes, "before": state.losses.before, "passes": state.losses.passes})

    return keep


class _Student:
    """The quantized model with everything tunable that the file can hold."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        family: Family,
        types: Mapping[str, str],
        blocks: list[dict[str, Tensor]],
        device: torch.device,
    ) -> None:
        self.family, self.types, self.device = family, types, device
        tensors = {name: data for block in blocks for name, data in block.items()}
        floats = {
            name: torch.from_numpy(data.astype(np.float32, copy=False))
            for name, data in tensors.items()
            if data.dtype != np.uint8 and name in family.tensor_shapes()
        }
        head = f"{family.head}.weight"
        scale = tensors.get(f"{family.head}.{COLUMN_SCALE}")
        if scale is not None:
            floats[head] = checkpoint.tensor(head).float() / torch.from_numpy(scale)
        self.model = WholeModel(checkpoint, family, floats, device)
        self.linears: dict[str, TunableLinear] = {}
        self.norms: dict[str, TunableNorm] = {}
        searches: dict[str, CodebookSearch] = {}
        for name, data in tensors.items():
            if data.dtype == np.uint8:
                module = name.removesuffix(".weight")
                kind = types[name]
                searches.setdefault(kind, CodebookSearch(tensor_types.BY_NAME[kind], device))
                bias = getattr(self.model.module(module), "bias", None)
                self.linears[module] = TunableLinear(self._layer(kind, data.view(np.uint8)), searches[kind], bias)
                self.model.replace(module, self.linears[module])
        biased = refined_norms(family)
        plain = [
            f"{family.block_prefix(index)}{norm}" for index in range(family.num_layers) for norm in family.block_norms()
        ]
        for name in dict.fromkeys([*biased, *plain]):
            bias = tensors.get(f"{name}.bias")
            start = None if bias is None else torch.from_numpy(bias).to(device)
            norm = self.model.module(name)
            self.norms[name] = TunableNorm(norm, start, biased=name in biased, offset=family.norm_offset)
            self.model.replace(name, self.norms[name])

    @property
    def weights(self) -> int:
        """Number of quantized weights."""
        return sum(layer.units.numel() for layer in self.linears.values())

    def free_codes(self) -> None:
        for layer in self.linears.values():
            layer.free_codes()

    def result(self, index: int, block: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a block, or of what follows the last one, as they are now."""
        place = index if index < self.family.num_layers else None
        result = dict(block)
        for module, layer in self.linears.items():
            if self.family.block_of(module) == place:
                kind = tensor_types.BY_NAME[self.types[f"{module}.weight"]]
                result[f"{module}.weight"] = layer.layer().pack(kind)
        for module, norm in self.norms.items():
            if self.family.block_of(module) == place:
                result |= {f"{module}.{name}": values.cpu().numpy() for name, values in norm.tensors().items()}
        return result

    def _layer(self, kind: str, packed: npt.NDArray[np.uint8]) -> QuantizedLayer:
        own = tensor_types.BY_NAME[kind]
        scales, codebooks, codes = (torch.from_numpy(part).to(self.device) for part in tensor_types.unpack(own, packed))
        weights = torch.from_numpy(tensor_types.dequantize(own, packed)).to(self.device)
        return QuantizedLayer(scales, codebooks, codes, weights)


def _free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory()
