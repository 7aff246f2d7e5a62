"""Tune the quantized model as a whole by its KL divergence from the original (`--refine`; quantize/refine.py).

The finished blocks are put together to one model whose block scales, norms and codes can move; what comes out is kept
in the work directory beside them. Both models are in memory, in float32: about 12 bytes per weight of the original, and
another 16 where codes are tuned too.
"""

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from d2q_edge.formats import tensor_types
from d2q_edge.formats.quantized_block import QuantizedBlock, QuantizedWeight, float_array
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import Family
from d2q_edge.model.whole_model import WholeModel
from d2q_edge.pipeline.work_dir import WorkDir
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.quantized_layer import QuantizedLayer
from d2q_edge.quantize.refine import SCHEDULE, RefinementLosses, Schedule, State, tune
from d2q_edge.quantize.tunable import TunableLinear, TunableNorm
from d2q_edge.utils.machine import available_memory

BYTES_PER_CODE = 16
"""Latent value, gradient and two moments of one weight, float32."""
TENSORS_PER_PARAMETER = 4
"""Tensors of a parameter's size in a State."""


@dataclass(frozen=True)
class Refinement:
    """What refinement did.

    Attributes:
        before, after: KL divergence on the validation windows, nats per token.
        codes: whether codes were tuned; if not, memory didn't suffice.
    """

    before: float
    after: float
    codes: bool


def refined_norms(family: Family) -> list[str]:
    """Return the full names of the norms that get a bias: all that read the residual stream."""
    blocks = [
        f"{family.block_prefix(index)}{group.norm}"
        for index in range(family.num_layers)
        for group in family.block_groups(index)
        if group.norm is not None
    ]
    return [*blocks, family.final_norm]


def refine(
    checkpoint: Checkpoint,
    family: Family,
    windows: npt.NDArray[np.int64],
    work: WorkDir,
    device: torch.device,
    schedule: Schedule = SCHEDULE,
    seed: int = 0,
) -> Refinement:
    """Tune the finished blocks in `work`, and keep the result there as well.

    Args:
        checkpoint, family: the original model.
        windows: calibration tokens [windows, context], some of which are used for validation.
        work: all blocks are finished.
        device: where both models fit.
        schedule: of the tuning.
        seed: of the order of the windows.
    """
    student = _Student(checkpoint, family, work, device)
    state, codes = _read_state(work)
    if codes is None:
        codes = student.num_weights * BYTES_PER_CODE < _free_memory(device)
    if codes:
        student.free_codes()
    keep = _keeper(work, student.model, codes)
    original = WholeModel(checkpoint, family, {}, device)
    losses = tune(original, student.model, windows, seed, state=state, keep=keep, schedule=schedule)
    for index in range(family.num_layers + 1):
        work.write_block(index, student.result(index), refined=True)
    work.remove_state()
    return Refinement(losses.before, losses.after, codes)


def _read_state(work: WorkDir) -> tuple[State | None, bool | None]:
    """Return where an interrupted refinement was, and whether it tuned codes."""
    found = work.read_state()
    if found is None:
        return None, None
    arrays, metadata = found
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return State(RefinementLosses(metadata["before"], metadata["passes"]), tensors), metadata["codes"]


def _keeper(work: WorkDir, model: WholeModel, codes: bool) -> Callable[[State], None]:
    """Return what keeps the state of every pass, if there is room for it and the one before."""
    size = TENSORS_PER_PARAMETER * sum(parameter.nbytes for parameter in model.parameters().values())
    in_memory = 0 if model.device.type == "cpu" else size
    if 2 * size > shutil.disk_usage(work.path).free or in_memory > available_memory():
        print(
            f"refinement starts over if it is interrupted: to go on, it would need {2 * size / 2**30:.1f} GiB on the "
            f"disk and {in_memory / 2**30:.1f} GiB of memory",
            file=sys.stderr,
        )
        return lambda _: None

    def keep(state: State) -> None:
        arrays = {name: tensor.cpu().numpy() for name, tensor in state.tensors.items()}
        work.write_state(arrays, {"codes": codes, "before": state.losses.before, "passes": state.losses.passes})

    return keep


class _Student:
    """The quantized model with everything tunable that the file can hold."""

    def __init__(self, checkpoint: Checkpoint, family: Family, work: WorkDir, device: torch.device) -> None:
        self.family, self.device = family, device
        self.blocks = {self._prefix(index): work.read_block(index) for index in range(family.num_layers + 1)}
        floats = {
            prefix + name: torch.from_numpy(values)
            for prefix, block in self.blocks.items()
            for name, values in block.floats.items()
        }
        final = self.blocks[self._prefix(family.num_layers)]
        if family.head in final.column_scales:
            head = f"{family.head}.weight"
            floats[head] = checkpoint.tensor(head).float() / torch.from_numpy(final.column_scales[family.head])
        self.model = WholeModel(checkpoint, family, floats, device)
        self.linears = self._make_linears()
        self.norms = self._make_norms()

    @property
    def num_weights(self) -> int:
        """Number of quantized weights."""
        return sum(layer.units.numel() for layer in self.linears.values())

    def free_codes(self) -> None:
        """Let the codes be tuned too."""
        for layer in self.linears.values():
            layer.free_codes()

    def result(self, index: int) -> QuantizedBlock:
        """Return a block, or what follows the last one, as it is now."""
        prefix = self._prefix(index)
        before = self.blocks[prefix]
        result = QuantizedBlock(column_scales=before.column_scales, metrics=before.metrics)
        result.floats |= before.floats
        for layer, weight in before.weights.items():
            packed = self.linears[prefix + layer].layer().pack(weight.type)
            result.weights[layer] = QuantizedWeight(weight.type, packed)
        number = index if index < self.family.num_layers else None
        for module, norm in self.norms.items():
            block, inner = self.family.split_name(module)
            if block == number:
                tensors = norm.tensors()
                result.floats[f"{inner}.weight"] = float_array(tensors["weight"])
                if "bias" in tensors:
                    result.norm_biases[inner] = float_array(tensors["bias"])
        return result

    def _prefix(self, index: int) -> str:
        return self.family.block_prefix(index) if index < self.family.num_layers else ""

    def _make_linears(self) -> dict[str, TunableLinear]:
        """Put tunable layers in the place of the quantized ones."""
        linears = {}
        searches: dict[str, CodebookSearch] = {}
        for prefix, block in self.blocks.items():
            for layer, weight in block.weights.items():
                if weight.type.name not in searches:
                    searches[weight.type.name] = CodebookSearch(weight.type, self.device)
                bias = getattr(self.model.module(prefix + layer), "bias", None)
                linears[prefix + layer] = TunableLinear(self._unpack(weight), searches[weight.type.name], bias)
                self.model.replace(prefix + layer, linears[prefix + layer])
        return linears

    def _make_norms(self) -> dict[str, TunableNorm]:
        """Put tunable norms in the place of all norms; those that read the residual stream may have a bias."""
        norms = {}
        biased = refined_norms(self.family)
        every = [(self._prefix(i), norm) for i in range(self.family.num_layers) for norm in self.family.block_norms(i)]
        plain = [prefix + norm for prefix, norm in every]
        biases = {prefix + norm: b for prefix, block in self.blocks.items() for norm, b in block.norm_biases.items()}
        for name in dict.fromkeys([*biased, *plain]):
            start = torch.from_numpy(biases[name]).to(self.device) if name in biases else None
            norm = self.model.module(name)
            norms[name] = TunableNorm(norm, start, biased=name in biased, offset=self.family.norm_offset)
            self.model.replace(name, norms[name])
        return norms

    def _unpack(self, weight: QuantizedWeight) -> QuantizedLayer:
        parts = tensor_types.unpack(weight.type, weight.data)
        scales, codebooks, codes = (torch.from_numpy(part).to(self.device) for part in parts)
        return QuantizedLayer(scales, codebooks, codes, weight.take_values(self.device))


def _free_memory(device: torch.device) -> int:
    """Return the free bytes where the models are."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
