"""Plan how much memory and disk a conversion will take, and where its hidden states go, before it starts.

The factors are measured: how many matrices and activations of which size the pipeline holds at a time.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from d2q_edge.calibration.hidden_states import DTYPE, Place
from d2q_edge.calibration.output_gradients import LOGITS, group_rows, guided_modules, kept_bytes
from d2q_edge.errors import D2QError
from d2q_edge.formats import k_quants
from d2q_edge.model.families import Family
from d2q_edge.model.families.experts import dense_groups, solved_groups
from d2q_edge.pipeline.expert_statistics import routing_bytes, statistics_bytes
from d2q_edge.quantize.output_hessian import piece_sizes
from d2q_edge.utils.machine import available_memory

GIB = 2**30
FLOAT = 4
"""Bytes of a float32."""
SQUARES = 9
"""Matrices [columns, columns] at once: H and dXXT, their sums and permutations, the factors, and temporaries."""
MATRICES = 9
"""Matrices [rows, columns] at once: weights, targets and their shifts, units, gradients, and temporaries."""
HIDDEN, INNER = 10, 5
"""Activations of a batch, in multiples of its hidden states and of its intermediate ones."""
GRADIENT_HIDDEN, GRADIENT_INNER = 30, 12
"""The same while a block runs backwards, which keeps what its layers read."""
TUNING = 8
"""The block in float32, as often as it is in memory while it is tuned: the original, the quantized one, latent points,
weights, gradients, moments, and temporaries."""
GRADIENT_STATES = 2 * GIB
"""Bytes of the hidden states in front of all blocks while gradients are measured, at most, in the host's memory; on a
GPU half of what is free."""
KEPT_INPUTS = GIB // 2
"""Bytes of inputs that are kept instead of computed twice, at most."""
SEARCH = 256 * 2**20
"""Bytes of one step of a codebook search."""
CUDA_SEARCH = 5 * SEARCH
"""The same on a GPU, and what torch reserves there without using it."""
ENCODING = 10
"""Bytes per weight of embeddings or lm_head while they are encoded: as stored, as floats, and the result, twice while
its pieces are put together."""
HOST_ENCODING = 7
"""The same in the host's memory where a GPU encodes: as stored, as floats if it is rotated, and the result."""
WRITING = 2
"""Finished blocks at a time while the file is written: one is copied out of a file that the system keeps in the
process's memory meanwhile."""
CUDA_ENCODING = 40 * k_quants.GPU_PIECE
"""Bytes of a GPU's temporaries while it encodes."""
PROGRAM = 700 * 2**20
"""Bytes of Python, torch and transformers themselves."""
CUDA_PROGRAM = 3 * GIB
"""The same with CUDA's libraries."""


@dataclass(frozen=True)
class MemoryPlan:
    """What a conversion takes at most, in bytes.

    Attributes:
        place: where the hidden states are kept.
        host: memory of all processes.
        device: memory of a GPU; zero without one.
        disk: beside the output, apart from the output itself.
        gradients: for the hidden states in front of all blocks while gradients are measured, before the others.
        inputs: of each process, for inputs of layers that are kept instead of computed twice.
    """

    place: Place
    host: int
    device: int
    disk: int
    gradients: int = 0
    inputs: int = 0

    def describe(self) -> str:
        """Format the plan as one line."""
        where = "on disk" if isinstance(self.place, Path) else "on the GPU" if self.place.type != "cpu" else "in memory"
        parts = [f"at most {self.host / GIB:.1f} GiB of memory"]
        if self.device:
            parts.append(f"{self.device / GIB:.1f} GiB of GPU memory")
        if self.disk >= GIB / 10:
            parts.append(f"{self.disk / GIB:.1f} GiB of disk for unfinished work")
        return f"needs {', '.join(parts)}; hidden states are kept {where}"


def plan_memory(
    family: Family,
    tokens: int,
    batch_tokens: int,
    device: torch.device,
    output: Path,
    packed: int,
    limit: int | None = None,
    processes: int = 1,
    *,
    guidance: bool = False,
    refine: bool = False,
) -> MemoryPlan:
    """Choose where the hidden states are kept, and make sure that everything fits.

    Args:
        family, tokens: of the model, and of all windows together.
        batch_tokens: of one forward pass.
        device: the computing device.
        output: the file to be written; unfinished work is kept beside it.
        packed: bytes of all finished blocks together.
        limit: bytes of memory that may be taken; None for what is free.
        processes: number of processes that share the work on this machine.
        guidance: gradients are measured.
        refine: every block is tuned, from hidden states that are kept meanwhile.

    Raises:
        D2QError: it doesn't fit in the memory (or the limit), the GPU's memory, or on the disk.
    """
    streams = (3 if refine else 2) * math.ceil(tokens / processes) * family.stream_width * DTYPE.itemsize
    working = _working(family, batch_tokens, processes, CUDA_SEARCH if device.type == "cuda" else SEARCH)
    if refine:
        working = max(working, _tuning(family, batch_tokens))
    # The main process alone writes, and nothing else is done then.
    table = max(_elements(family, f"{name}.weight") for name in (family.embedding, family.head))
    encoding = (HOST_ENCODING if device.type == "cuda" else ENCODING) * table
    writing = (encoding + WRITING * packed // family.num_layers) // processes
    free = available_memory() // processes if limit is None else limit // processes
    on_device = gradients = inputs = 0
    backward = _backward(family, batch_tokens, table) if guidance else 0
    states = kept_bytes(family, math.ceil(tokens / processes)) if guidance else 0
    routing = routing_bytes(family, tokens)
    host = PROGRAM + routing
    place: Place = torch.device("cpu")
    if device.type == "cuda":
        on_table = ENCODING * table + CUDA_ENCODING
        host, available = CUDA_PROGRAM + routing, torch.cuda.mem_get_info(device)[0]
        gradients = min(states, max(available // 2, kept_bytes(family, batch_tokens)) if guidance else 0)
        on_device = max(working, on_table, backward + gradients)
        # The hidden states are gone by then.
        if max(working + streams, on_table) <= available:
            place, on_device = device, max(working + streams, on_table, backward + gradients)
        elif on_device > available:
            raise D2QError(
                f"the GPU has {available / GIB:.1f} GiB of free memory, but this model needs "
                f"{on_device / GIB:.1f} GiB; free some, or use --device cpu"
            )
        # A block is read ahead into pinned memory, in the checkpoint's dtype, rounded up to a power of two.
        peak = host + 2 * _largest_block(family) + writing
    else:
        spare = min(GRADIENT_STATES // processes, free - host - backward)
        gradients = min(states, max(spare, kept_bytes(family, batch_tokens)))
        peak = host + max(working, writing)
    if isinstance(place, torch.device) and place.type == "cpu":
        if peak + streams <= free:
            peak += streams
        else:
            place = output.absolute().parent
    if device.type == "cpu":
        needed = host + working + (streams if place == device else 0)
        wanted = FLOAT * math.ceil(tokens / processes) * _widest_inner_input(family)
        inputs = min(wanted, KEPT_INPUTS // processes, max(0, free - needed))
        peak = max(peak, needed + inputs)
    if device.type != "cuda" and guidance:
        peak = max(peak, host + backward + gradients)  # there are no streams yet
    if peak > free:
        given = f"{free * processes / GIB:.1f} GiB are free"
        given = given if limit is None else f"--memory-limit allows {limit / GIB:.1f}"
        raise D2QError(
            f"this conversion needs {_at_least(peak * processes)} GiB of memory, but {given}; use a machine with more, "
            "or --no-calibration"
        )
    modules = sum(len(guided_modules(family, index)) for index in range(family.num_layers)) if guidance else 0
    measured = FLOAT * tokens * modules
    if guidance:
        moments = [_moments(family, index) for index in range(family.num_layers)]
        measured += processes * FLOAT * sum(moments)
    disk = packed + measured + (streams * processes if isinstance(place, Path) else 0)
    # A plan may be asked for before there is a directory.
    beside = next(parent for parent in output.absolute().parents if parent.exists())
    available = shutil.disk_usage(beside).free
    if available < disk:
        raise D2QError(
            f"{beside} has {available / GIB:.1f} GiB of free space, but unfinished work needs "
            f"{disk / GIB:.1f} GiB; free some, or write the output to another disk"
        )
    return MemoryPlan(place, peak * processes, on_device, disk, gradients, inputs)


def _tuning(family: Family, batch_tokens: int) -> int:
    """Return the bytes that tuning a block takes on the computing device, without the hidden states."""
    return TUNING * _largest_block(family) + backward_activations(family, batch_tokens)


def _at_least(size: int) -> str:
    """Format bytes as GiB, rounded up, so that a limit of what is said to be needed suffices."""
    return f"{math.ceil(10 * size / GIB) / 10:.1f}"


def _working(family: Family, batch_tokens: int, processes: int, search: int) -> int:
    """Return the bytes that quantizing a block takes on the computing device, without the hidden states."""
    solving = squares = 0
    for index in range(family.num_layers):
        columns = [family.linear_shape(index, group.linears[0])[1] for group in family.block_groups(index)]
        squares = max(squares, sum(size**2 for size in columns))
        shapes = {
            (family.linear_shape(index, group.linears[0])[1], group_rows(family, index, group))
            for group in solved_groups(family, index)
        }
        solving = max(solving, *(SQUARES * c**2 + MATRICES * rows * c // processes for c, rows in shapes))
    batch = batch_tokens * (HIDDEN * family.stream_width + INNER * _widest(family) + family.scan_width)
    blocks = 2 * _largest_block(family) + _side_tables(family)
    return blocks + FLOAT * max(solving, squares + batch) + search + statistics_bytes(family)


def _widest_inner_input(family: Family) -> int:
    """Return the most columns of a layer that reads what other layers of its sublayer put out."""
    widths = (
        family.linear_shape(index, group.linears[0])[1]
        for index in range(family.num_layers)
        for group in family.block_groups(index)
        if group.norm is None and not group.reads_stream
    )
    return max(widths, default=0)


def _side_tables(family: Family) -> int:
    """Return the bytes of what a block's own embeddings are made from: those of all tokens, and its part of a table."""
    return 2 * family.vocab_size * (family.hidden_size + family.per_layer_width) if family.per_layer_width else 0


def _widest(family: Family) -> int:
    """Return the width of the widest feed-forward layers; some blocks' may be wider than config.json says."""
    return max(family.intermediate_size, _widest_inner_input(family))


def _backward(family: Family, batch_tokens: int, table: int) -> int:
    """Return the bytes that running a block, or the lm_head, backwards takes on the computing device."""
    rows = max(
        sum(group_rows(family, index, group) for group in dense_groups(family, index))
        for index in range(family.num_layers)
    )
    # Output gradients of all layers, and those of a group side by side, weighted; the moments twice where they add up.
    observed = 2 * batch_tokens * rows + 2 * max(_moments(family, index) for index in range(family.num_layers))
    batch = backward_activations(family, batch_tokens) + FLOAT * observed
    return _largest_block(family) + _side_tables(family) + max(batch, FLOAT * table + 2 * LOGITS)


def backward_activations(family: Family, tokens: int) -> int:
    """Return the bytes of the activations of so many tokens while a block runs backwards."""
    numbers = GRADIENT_HIDDEN * family.stream_width + GRADIENT_INNER * _widest(family) + family.scan_width
    return FLOAT * tokens * numbers


def _moments(family: Family, index: int) -> int:
    """Return the number of elements of the output Hessians of block `index`."""
    groups = dense_groups(family, index)
    return sum(size**2 for group in groups for size in piece_sizes(group_rows(family, index, group)))


def _largest_block(family: Family) -> int:
    """Return the bytes of the largest block's weights as float32."""
    sizes: Counter[int | None] = Counter()
    for name in family.tensor_shapes():
        sizes[family.block_of(name)] += _elements(family, name)
    return FLOAT * max(size for index, size in sizes.items() if index is not None)


def _elements(family: Family, name: str) -> int:
    return torch.Size(family.tensor_shapes().get(name, (0,))).numel()
