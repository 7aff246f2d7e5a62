"""Tune the quantized model as a whole by its KL divergence from the original (`--refine`; quantize/refine.py).

The finished blocks are put together to one model whose block scales, norms and codes can move; what comes out is kept
in the work directory beside them. Of the original only the lm_head's inputs for all windows are there, as bfloat16:
block after block computes them before. Backward passes run every block again rather than keep what it computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.checkpoint import checkpoint

from d2q_edge.calibration.hidden_states import HiddenStates
from d2q_edge.calibration.output_gradients import deterministic
from d2q_edge.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from d2q_edge.errors import D2QError
from d2q_edge.formats.quantized_block import QuantizedBlock
from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.families import Family
from d2q_edge.options import Options
from d2q_edge.pipeline.memory import backward_activations
from d2q_edge.pipeline.refinement_state import StateWriter, read_state
from d2q_edge.pipeline.tunable_block import TunableBlock, add_norms, biased_norms, make_norms
from d2q_edge.pipeline.work_dir import WorkDir
from d2q_edge.quantize.codebook_search import Searches
from d2q_edge.quantize.kl_divergence import LOGITS, head_divergence
from d2q_edge.quantize.matmul import matmul_precision
from d2q_edge.quantize.refine import SCHEDULE, Schedule, Tunable, tune
from d2q_edge.utils.machine import available_memory
from d2q_edge.utils.progress import track

MICRO_TOKENS = 8192
"""Tokens of a forward pass; gradients add up to a batch."""

BYTES_PER_WEIGHT = 4 + 2 * 2 + 2 + 2 + 0.25
"""Of a tunable layer on a GPU: latent point, two moments, weight, gradient; scales, and codebooks."""
SHARE = 0.9
"""Of a GPU's memory may be taken."""
REFINE_FACTOR = 8
"""The whole model is tuned on that many times the tokens that a CPU calibrates on."""


@dataclass(frozen=True)
class Refinement:
    """What refinement did.

    Attributes:
        scope: "blocks" or "model".
        before, after: of the model KL divergence on the validation windows, nats per token; of blocks the mean over
            all of the relative squared error of their outputs on those windows.
    """

    scope: str
    before: float
    after: float


def choose_scope(family: Family, options: Options, device: torch.device) -> str | None:
    """Return what is tuned together, "blocks" or "model"; None without refinement.

    Args:
        family: of the model.
        options: `refine` and `refine_scope`.
        device: the computing device.

    Raises:
        D2QError: the model doesn't fit on the device, but is asked for.
    """
    if not options.refine:
        return None
    if options.refine_scope == "blocks" or (options.refine_scope == "auto" and device.type != "cuda"):
        return "blocks"
    # All of a GPU's memory, not what is free there: a repeated command must choose the same.
    on_gpu = device.type == "cuda"
    memory = SHARE * torch.cuda.get_device_properties(device).total_memory if on_gpu else available_memory()
    need = model_bytes(family, refinement_tokens(options))
    if need > memory:
        if options.refine_scope == "auto":
            return "blocks"
        raise D2QError(
            f"refining the whole model needs {need / 2**30:.1f} GiB of memory, but there are {memory / 2**30:.1f}; use "
            "--refine-scope blocks"
        )
    return "model"


def refinement_tokens(options: Options) -> int:
    """Return how many calibration tokens the whole model is tuned on, as far as the text goes."""
    return REFINE_FACTOR * options.tokens_on("cpu")


def model_bytes(family: Family, tokens: int, micro_tokens: int = MICRO_TOKENS) -> int:
    """Return the memory that refining the whole model takes on the computing device."""
    shapes = family.tensor_shapes()
    linears = sum(torch.Size(shapes[name]).numel() for name in family.linear_weights())
    tables = [f"{family.embedding}.weight", *family.outer_tensors()]
    table = sum(torch.Size(shapes[name]).numel() for name in tables)
    # In front of every block, and what one block computes.
    states = 4 * micro_tokens * family.num_layers * family.stream_width + backward_activations(family, micro_tokens)
    expected = 2 * tokens * family.hidden_size
    return int(BYTES_PER_WEIGHT * linears) + (4 + 2) * table + states + expected + 6 * LOGITS


def refined_norms(family: Family) -> list[str]:
    """Return the full names of the norms that get a bias: all that read the residual stream."""
    blocks = [
        f"{family.block_prefix(index)}{norm}"
        for index in range(family.num_layers)
        for norm in biased_norms(family, index)
    ]
    return [*blocks, family.final_norm]


def refine(
    runner: BlockRunner,
    windows: npt.NDArray[np.int64],
    work: WorkDir,
    *,
    schedule: Schedule = SCHEDULE,
    seed: int = 0,
    processes: ProcessGroup = SINGLE_PROCESS,
    micro_tokens: int = MICRO_TOKENS,
) -> Refinement:
    """Tune the finished blocks in `work`, and keep the result there as well.

    Args:
        runner: of the original model, on the device where the tunable one fits.
        windows: calibration tokens [windows, context], some of which are used for validation.
        work: all blocks are finished.
        schedule: of the tuning.
        seed: of the order of the windows.
        processes: that share the windows; all of them call this.
        micro_tokens: tokens of a forward pass.
    """
    last = runner.family.num_layers
    with deterministic(runner.device), matmul_precision("high"):
        tokens = torch.from_numpy(windows)
        expected = original_states(runner, tokens, processes, micro_tokens)
        blocks = [work.read_block(index) for index in range(last + 1)]
        student = TunableModel(runner, blocks, quiet=not processes.is_main)
        objective = _Divergence(student, tokens, expected, processes, micro_tokens)
        layers = student.layers()
        with StateWriter(work, layers, runner.device, active=processes.is_main) as writer:
            losses = tune(
                objective,
                layers,
                len(windows),
                seed,
                schedule=schedule,
                state=read_state(work),
                keep=writer.keep,
                group=processes,
                capture=runner.capturable and processes.world_size == 1,
                quiet=not processes.is_main,
            )
    processes.barrier()
    if processes.is_main:
        for index in range(last + 1):
            work.write_block(index, student.result(index), refined=True)
        work.remove_state()
    return Refinement("model", losses.before, losses.after)


@torch.inference_mode()
def original_states(
    runner: BlockRunner, tokens: torch.Tensor, processes: ProcessGroup, batch_tokens: int
) -> torch.Tensor:
    """Return the lm_head's inputs of the original model, bfloat16 [windows, context, hidden] on the runner's device.

    Args:
        runner: of the original model, one block of which is in memory at a time.
        tokens: token ids, int64 [windows, context].
        processes: that share the windows; all of them get all states.
        batch_tokens: tokens of a forward pass.
    """
    family, context = runner.family, tokens.shape[1]
    result = torch.zeros(len(tokens), context, family.hidden_size, dtype=torch.bfloat16, device=runner.device)
    places = torch.arange(len(tokens)).split(max(1, batch_tokens // context))
    own = list(processes.shard_range(len(places)))
    shape = context, family.stream_width
    states = HiddenStates([len(place) for place in places], shape, runner.device, runner.device, torch.float32)
    for batch, hidden in zip(own, runner.embed_all([tokens[places[batch]] for batch in own]), strict=True):
        states[batch] = hidden
    for index in track(range(family.num_layers), "Running the original", "block", quiet=not processes.is_main):
        block = runner.load(index)
        for batch in own:
            states[batch] = runner.forward(block, states[batch])
    norm = runner.final_norm()
    for batch in own:
        result[places[batch].to(runner.device)] = norm(runner.stream(states[batch])).to(result.dtype)
    processes.all_reduce([result])
    return result


class TunableModel:
    """The quantized model with everything tunable that the file can hold."""

    def __init__(self, runner: BlockRunner, blocks: Sequence[QuantizedBlock], *, quiet: bool = False) -> None:
        """Build the model from its finished blocks, the last of which is what follows the last decoder block.

        `quiet` shows no progress.
        """
        family, self.runner = runner.family, runner
        searches = Searches(runner.device)
        self.blocks = [
            TunableBlock(runner, index, runner.load(index), block, searches)
            for index, block in enumerate(track(blocks[:-1], "Building the model", "block", quiet=quiet))
        ]
        self.final = blocks[-1]
        final = torch.nn.Module()
        final.add_module("norm", runner.final_norm())
        name = family.final_norm
        if f"{name}.weight" in self.final.floats:
            weight = torch.from_numpy(self.final.floats[f"{name}.weight"]).to(runner.device)
            final.get_submodule("norm").load_state_dict({"weight": weight}, assign=True)
        biases = {"norm": self.final.norm_biases[name]} if name in self.final.norm_biases else {}
        self.norm = make_norms(family, final, QuantizedBlock(norm_biases=biases), ["norm"], ["norm"])["norm"]
        self.head = runner.head()
        scales = self.final.column_scales.get(family.head)
        self._head_scales = None if scales is None else torch.from_numpy(scales).to(runner.device)
        self._table = runner.checkpoint.tensor(f"{family.embedding}.weight").to(runner.device)

    def layers(self) -> dict[str, Tunable]:
        """Return everything that is tuned, by full name."""
        family = self.runner.family
        found: dict[str, Tunable] = {family.final_norm: self.norm}
        for index, block in enumerate(self.blocks):
            found |= block.layers(family.block_prefix(index))
        return found

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return what `head` multiplies for token ids [windows, context]: float32 [windows, context, hidden]."""
        tokens = tokens.to(self.runner.device)
        hidden = self.runner.begin(torch.nn.functional.embedding(tokens, self._table), tokens)
        for block in self.blocks:
            hidden = checkpoint(block.forward, hidden, use_reentrant=False, preserve_rng_state=False)
        output: torch.Tensor = self.norm(self.runner.stream(hidden))
        # The head's columns are divided by their scales when the file is written; here its inputs are.
        return output if self._head_scales is None else output / self._head_scales

    def result(self, index: int) -> QuantizedBlock:
        """Return a block, or what follows the last one, as it is now."""
        if index < len(self.blocks):
            return self.blocks[index].result()
        result = QuantizedBlock(column_scales=self.final.column_scales, metrics=self.final.metrics)
        result.floats |= self.final.floats
        add_norms(result, {self.runner.family.final_norm: self.norm})
        return result


class _Divergence:
    """The KL divergence of windows, in nats per token."""

    def __init__(
        self,
        student: TunableModel,
        tokens: torch.Tensor,
        expected: torch.Tensor,
        processes: ProcessGroup,
        micro_tokens: int,
    ) -> None:
        self._student, self._tokens, self._expected = student, tokens.to(expected.device), expected
        self._processes, self._micro = processes, max(1, micro_tokens // tokens.shape[1])
        self._windows, self._count = torch.zeros(0, dtype=torch.int64), 0

    @torch.no_grad()
    def loss(self, items: Sequence[int]) -> float:
        total = 0.0
        for part in self._parts(self._own(items)):
            total += float(self._compare(part, self._student.states(self._tokens[part]))[0])
        return total

    def prepare(self, items: Sequence[int]) -> None:
        own = self._own(items)
        if self._windows.shape == own.shape:
            self._windows.copy_(own)
        else:
            self._windows = own
        self._count = len(items)

    def backward(self) -> None:
        for part in self._parts(self._windows):
            with torch.enable_grad():
                found = self._student.states(self._tokens[part])
            _, gradient = self._compare(part, found)
            found.backward(gradient / self._count)

    def _compare(self, windows: torch.Tensor, found: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of the windows' losses, and its gradient by `found`."""
        expected = self._expected[windows].flatten(0, 1)
        head, cap = self._student.head, self._student.runner.family.logit_cap
        total, gradient = head_divergence(expected, found.flatten(0, 1), head, cap=cap)
        context = found.shape[1]
        return total / context, gradient.view(found.shape) / context

    def _parts(self, windows: torch.Tensor) -> Sequence[torch.Tensor]:
        """Split windows, if there are any, into what one forward pass takes."""
        return windows.split(self._micro) if len(windows) else ()

    def _own(self, items: Sequence[int]) -> torch.Tensor:
        """Return this process's share, int64 [windows]."""
        own = [items[place] for place in self._processes.shard_range(len(items))]
        return torch.tensor(own, dtype=torch.int64).to(self._tokens.device)
