"""Two processes that refine one model: the same as one alone, but for the order of sums."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from d2q_edge.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from d2q_edge.formats import tensor_types
from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.options import Options
from d2q_edge.pipeline.block_loop import quantize_blocks
from d2q_edge.pipeline.refinement import refine
from d2q_edge.pipeline.type_plan import plan_types
from d2q_edge.pipeline.work_dir import WorkDir
from d2q_edge.quantize.refine import Schedule
from tests.checkpoints import write_checkpoint
from tests.distributed.test_process_group import torchrun

CPU = torch.device("cpu")
# Repeated, as random tokens teach nothing about others.
WINDOWS = np.tile(np.random.default_rng(4).integers(0, 300, (8, 24)), (8, 1))
SCHEDULE = Schedule(passes=2, batch=8, scale_rate=3e-3, code_rate=0.5)
SHARED = """
import json, sys
from pathlib import Path
from d2q_edge.distributed.process_group import ProcessGroup
from tests.distributed.test_shared_refinement import CPU, model_refined, quantized
processes = ProcessGroup.from_environment(CPU)
processes.connect()
model, alone, both = map(Path, sys.argv[1:])
found = [quantized(model, both.with_name("blocks.gguf"), processes), model_refined(model, alone, both, processes)]
open(f"{both}-{processes.rank}.json", "w").write(json.dumps(found))
"""


def runner(model: Path) -> BlockRunner:
    checkpoint = Checkpoint.open(model)
    return BlockRunner(checkpoint, family_for(checkpoint.config), CPU)


def quantized(model: Path, output: Path, processes: ProcessGroup, refine_blocks: bool = True) -> list[float]:
    """Quantize and maybe refine block by block; return the blocks' errors."""
    run, work = runner(model), processes.main_first(lambda: WorkDir(output, {}))
    types = plan_types(run.family, 2).linears
    options = Options(guidance=False, descent_rounds=0)
    more = {"processes": processes, "refine_blocks": refine_blocks, "batch_tokens": 48}
    quantize_blocks(run, types, WINDOWS, work, options, **more)  # type: ignore[arg-type]
    return [error for index in (0, 1) for error in work.read_block(index).metrics.output_errors]


def model_refined(model: Path, blocks: Path, output: Path, processes: ProcessGroup) -> list[float]:
    """Refine finished blocks together, in another work directory; return the losses."""

    def prepare() -> WorkDir:
        finished, work = WorkDir(blocks, {}), WorkDir(output, {})
        for index in range(3 if processes.is_main else 0):
            work.write_block(index, finished.read_block(index))
        return work

    work = processes.main_first(prepare)
    result = refine(runner(model), WINDOWS, work, schedule=SCHEDULE, processes=processes)
    return [result.before, result.after]


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    model, script = tmp_path / "model", tmp_path / "shared.py"
    write_checkpoint(model, "qwen2", vocab_size=300, hidden_size=64, intermediate_size=128)
    script.write_text(SHARED)
    blocks, alone, both = (tmp_path / name for name in ("one.gguf", "alone.gguf", "both.gguf"))
    errors = quantized(model, tmp_path / "refined.gguf", SINGLE_PROCESS)
    quantized(model, blocks, SINGLE_PROCESS, refine_blocks=False)
    losses = model_refined(model, blocks, alone, SINGLE_PROCESS)
    assert losses[1] < losses[0]
    done = torchrun(script, model, blocks, both)
    assert done.code == 0, done.err
    found = [json.loads((tmp_path / f"both.gguf-{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    # Codes near a tie differ in the first block already, before it is tuned.
    assert found[0][0] == pytest.approx(errors, rel=0.1)
    assert found[0][1] == pytest.approx(losses, rel=2e-3)
    one, two = (WorkDir(path, {}) for path in (alone, both))
    same = []
    for index in range(2):
        first, second = (work.read_block(index, refined=True) for work in (one, two))
        for layer, weight in first.weights.items():
            codes = [tensor_types.unpack(each.type, each.data)[2] for each in (weight, second.weights[layer])]
            same.append(float((codes[0] == codes[1]).mean()))
    assert np.mean(same) > 0.99
