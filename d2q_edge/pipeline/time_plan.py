"""Estimate how long a conversion will take on this machine, before it starts.

The work is counted: products of matrices while both models run, products for the statistics, and weights to be solved
for. How fast this machine does each is measured, in a few seconds, by multiplying and solving a small one. The
overheads were fitted to conversions of SmolLM2-135M, qwen3-34m and llama-54m on two cores of an AMD EPYC.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from d2q_edge.calibration.output_gradients import group_rows
from d2q_edge.distributed.process_group import SINGLE_PROCESS
from d2q_edge.formats import tensor_types
from d2q_edge.model.families import Family, LinearGroup, Sublayer
from d2q_edge.model.families.experts import solved_groups
from d2q_edge.options import Options
from d2q_edge.pipeline.column_scaling import ENERGY_BATCH_STRIDE
from d2q_edge.pipeline.guidance import OUTPUT_TOKENS
from d2q_edge.pipeline.solver import GroupSolver
from d2q_edge.pipeline.type_plan import TypePlan
from d2q_edge.quantize.matmul import has_bfloat16, is_accelerator, matmul_precision
from d2q_edge.quantize.output_hessian import piece_sizes
from d2q_edge.quantize.routing import MINIMUM_TOKENS_PER_CHANNEL
from d2q_edge.quantize.statistics import InputStatistics
from d2q_edge.utils.progress import duration

SAMPLE_TOKENS, SAMPLE_COLUMNS = 2048, 1024
"""Of the activations that are multiplied to measure the speed."""
SOLVED_ROWS, SOLVED_COLUMNS = 1024, 256
"""Of the matrix that is solved."""
FORWARD = 1.4
"""Time of a forward pass, in multiples of its products: norms, activations, copies, hidden states."""
ATTENTION = 1.3
"""Time of scores and their sums per product, in multiples of a linear layer's."""
BACKWARD = 4
"""Forward passes that measuring gradients is worth: two forward, one backward."""
STATISTICS = 1.3
"""Time of statistics, in multiples of their products."""
ROW_PRODUCTS, COLUMN_PRODUCTS = 8.5, 1.5
"""Products per weight and column, and per cubed column, that solving takes beside the search."""
START = 15.0
"""Seconds for imports, checks, and the text."""
WRITING = 1e-8
"""Seconds per parameter to read the checkpoint and to write the file."""


@dataclass(frozen=True)
class Speed:
    """What a device was measured to do.

    Attributes:
        products: multiplications and additions per second of a matrix product of activations.
        search: seconds per weight of each tensor type of ours, apart from products.
    """

    products: float
    search: dict[str, float]


@dataclass(frozen=True)
class TimePlan:
    """Seconds by phase."""

    phases: dict[str, float]

    @property
    def seconds(self) -> float:
        """All phases together."""
        return sum(self.phases.values())

    def describe(self) -> str:
        """Format the plan as one line."""
        parts = ", ".join(f"{phase} {duration(seconds)}" for phase, seconds in self.phases.items())
        return f"takes about {duration(self.seconds)} on this machine, if nothing else runs: {parts}"


def plan_time(
    family: Family, types: TypePlan, tokens: int, context: int, options: Options, device: torch.device
) -> TimePlan:
    """Measure this machine, and estimate a conversion without refinement.

    Args:
        family, types: of the model.
        tokens, context: calibration tokens, and how many are in a window.
        options: guidance, dsq and dac count here.
        device: the computing device.
    """
    own = [kind for kind in dict.fromkeys(types.linears.values()) if kind in tensor_types.BY_NAME]
    return estimate(family, types, tokens, context, options, measure_speed(own, device, options))


def measure_speed(types: Iterable[str], device: torch.device, options: Options) -> Speed:
    """Measure how fast a device multiplies activations, and solves for weights of each of these tensor types."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(SAMPLE_TOKENS, SAMPLE_COLUMNS, generator=generator).to(device)
    weights = torch.randn(SOLVED_ROWS, SOLVED_COLUMNS, generator=generator).to(device)
    square = torch.randn(SAMPLE_COLUMNS, SAMPLE_COLUMNS, generator=generator).to(device)
    with torch.inference_mode(), matmul_precision("high"):
        dtype = torch.bfloat16 if has_bfloat16(device) else torch.float32
        left, right = inputs.to(dtype), square.to(dtype)
        taken = _fastest(lambda: left @ right, device, repeats=5)
        products = inputs.numel() * SAMPLE_COLUMNS / taken
        statistics = InputStatistics(SOLVED_COLUMNS, device)
        seen = inputs[:, :SOLVED_COLUMNS]
        statistics.add_batch(seen, seen + 0.1 * seen.roll(1, 0))
        solver = GroupSolver(device, options.alpha, options.descent_rounds, SINGLE_PROCESS)
        search = {}
        for kind in types:
            solve = partial(solver.solve, {"": weights}, {"": kind}, statistics)
            taken = _fastest(solve, device, repeats=1)
            multiplied = _solving_products(SOLVED_ROWS, SOLVED_COLUMNS) / products
            search[kind] = max(0.0, taken - multiplied) / weights.numel()
    return Speed(products, search)


def estimate(family: Family, types: TypePlan, tokens: int, context: int, options: Options, speed: Speed) -> TimePlan:
    """Estimate the seconds of every phase for a device of known speed; arguments are those of `plan_time`."""
    forward = statistics = solving = whole = observed = 0.0
    for index in range(family.num_layers):
        sublayers = family.block_sublayers(index)
        costs = [_sublayer_products(family, index, sublayer, tokens, context) for sublayer in sublayers]
        # Both models pass once, and the original's sublayers before a corrected norm once more.
        forward += 2 * sum(costs) + (sum(costs[:-1]) if options.dac else 0)
        forward += sum(costs) / ENERGY_BATCH_STRIDE if options.dsq else 0
        whole += sum(costs)
        for group in solved_groups(family, index):
            columns, share = family.linear_shape(index, group.linears[0])[1], _token_share(family, index, group, tokens)
            moments = 1.5 + (0.5 / ENERGY_BATCH_STRIDE if options.dsq else 0)
            statistics += share * tokens * columns**2 * moments
            kind = types.linears[f"{family.block_prefix(index)}{group.linears[0]}.weight"]
            rows = group_rows(family, index, group)
            if kind in speed.search:
                solving += _solving_products(rows, columns) / speed.products
                solving += rows * columns * speed.search[kind]
                if options.guidance and not _is_expert(family, index, group):
                    # Output Hessians, and the shifts of the rows still to come: half of each is zero or symmetric.
                    halves = sum(size**2 for size in piece_sizes(rows)) / 2
                    observed += halves * min(tokens, OUTPUT_TOKENS)
                    solving += halves * columns / speed.products
    head = tokens * family.hidden_size * family.vocab_size
    backward = BACKWARD * whole + observed + 3 * head
    phases = {"gradients": backward * FORWARD / speed.products} if options.guidance else {}
    phases |= {
        "forward": forward * FORWARD / speed.products,
        "statistics": statistics * STATISTICS / speed.products,
        "solve": solving,
        "the rest": START + WRITING * sum(math.prod(shape) for shape in family.tensor_shapes().values()),
    }
    return TimePlan(phases)


def _sublayer_products(family: Family, index: int, sublayer: Sublayer, tokens: int, context: int) -> float:
    """Return the multiplications of running all tokens through a sublayer once."""
    products = 0.0
    own = {layer for group in family.sublayer_groups(index, sublayer) for layer in group.linears}
    for group in solved_groups(family, index):
        if group.linears[0] in own:
            share = _token_share(family, index, group, tokens)
            products += share * tokens * sum(math.prod(family.linear_shape(index, layer)) for layer in group.linears)
    if sublayer.module == "self_attn":
        # A token sees half of the window on average.
        products += ATTENTION * tokens * context * family.num_heads * family.head_dim
    return products


def _is_expert(family: Family, index: int, group: LinearGroup) -> bool:
    """Tell whether a group of block `index` is an expert's."""
    experts = family.block_experts(index)
    return experts is not None and group.linears[0].startswith(experts.prefix)


def _token_share(family: Family, index: int, group: LinearGroup, tokens: int) -> float:
    """Return the share of the tokens that a group's layers see; experts see their own, or the fewest that they need."""
    if not _is_expert(family, index, group):
        return 1.0
    least = MINIMUM_TOKENS_PER_CHANNEL * family.hidden_size / tokens
    return min(1.0, max(family.experts_per_token / family.num_experts, least))


def _solving_products(rows: int, columns: int) -> float:
    """Return the multiplications of solving for a matrix, apart from the search."""
    return ROW_PRODUCTS * rows * columns**2 + COLUMN_PRODUCTS * columns**3


def _fastest(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the least seconds of some runs after one to warm up."""
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if is_accelerator(device):
            torch.accelerator.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])
