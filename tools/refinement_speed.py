"""Measure time and memory of refining a whole model: some steps on random tokens, of weights rounded to nearest.

    python -m tools.refinement_speed MODEL [--steps 20] [--bits 2] [--device cuda]

Prints seconds per step and per million tokens, the GPU's peak memory, and what `convert` expects it to be.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from d2q_edge.formats import tensor_types
from d2q_edge.formats.quantized_block import QuantizedBlock, QuantizedWeight
from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.pipeline.refinement import model_bytes, refine
from d2q_edge.pipeline.type_plan import plan_types
from d2q_edge.pipeline.work_dir import WorkDir
from d2q_edge.quantize import refine as tuning
from d2q_edge.quantize.codebook_search import Searches
from d2q_edge.quantize.refine import Schedule
from d2q_edge.quantize.rtn import round_layer

SCHEDULE = Schedule(passes=1)


def measure(checkpoint: Checkpoint, bits: float, steps: int, context: int, device: torch.device) -> dict[str, float]:
    """Return the seconds of everything, of a step and of a million tokens, and bytes of GPU memory."""
    family = family_for(checkpoint.config)
    runner, searches = BlockRunner(checkpoint, family, device), Searches(device)
    types = plan_types(family, bits).linears
    generator = np.random.default_rng(0)
    # Every 32nd window is for validation.
    windows = generator.integers(0, family.vocab_size, (steps * SCHEDULE.batch * 32 // 31 + 1, context))
    times: list[float] = []

    class Timed(tuning._Step):
        def __call__(self, items: object, rates: object, number: object) -> None:
            super().__call__(items, rates, number)  # type: ignore[arg-type]
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter())

    before, tuning._Step = tuning._Step, Timed  # type: ignore[misc]
    try:
        with tempfile.TemporaryDirectory() as directory:
            work = WorkDir(Path(directory) / "out.gguf", {})
            for index in range(family.num_layers):
                work.write_block(index, _rounded(runner, index, types, searches))
            work.write_block(family.num_layers, QuantizedBlock())
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
            refine(runner, windows, work, schedule=SCHEDULE)
            whole = time.perf_counter() - start
    finally:
        tuning._Step = before  # type: ignore[misc]
    # The first steps compile kernels and record the graph.
    step = float(np.median(np.diff(times)[len(times) // 3 :]))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {
        "seconds": whole,
        "seconds_per_step": step,
        "seconds_per_million_tokens": step / (SCHEDULE.batch * context) * 1e6,
        "peak_gib": peak / 2**30,
        "planned_gib": model_bytes(family, windows.size) / 2**30,
    }


@torch.inference_mode()
def _rounded(runner: BlockRunner, index: int, types: Mapping[str, str], searches: Searches) -> QuantizedBlock:
    block, result = runner.load(index), QuantizedBlock()
    for layer in runner.family.block_linears(index):
        kind = types[f"{runner.family.block_prefix(index)}{layer}.weight"]
        weight = block.get_submodule(layer).get_parameter("weight")
        if kind in tensor_types.BY_NAME:
            own = tensor_types.BY_NAME[kind]
            result.weights[layer] = QuantizedWeight(own, round_layer(weight, searches[kind]).pack(own))
    return result


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Measure time and memory of refining a whole model.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--bits", type=float, default=2)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    given = parser.parse_args()
    print(json.dumps(measure(Checkpoint.open(given.model), given.bits, given.steps, given.context, given.device)))


if __name__ == "__main__":
    main()
