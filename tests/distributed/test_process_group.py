"""Two or three processes of one conversion, connected by gloo: their collectives, and the file that they write."""

import json
from pathlib import Path

import pytest
import torch

from d2q_edge.conversion import convert
from d2q_edge.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.formats.tensor_types import BY_NAME
from d2q_edge.options import Options
from d2q_edge.quantize import cholesky, matmul
from d2q_edge.quantize.cholesky import inverse_cholesky
from d2q_edge.quantize.dsq import InputEnergy
from d2q_edge.quantize.gptaq import layer_feedback
from d2q_edge.quantize.statistics import InputStatistics
from tests.checkpoints import EXAMPLE
from tests.command_line import Result, run_python

TOKENS = "2048"

EXCHANGE = """
import json, sys
import torch
from d2q_edge.distributed.process_group import ProcessGroup
processes = ProcessGroup.from_environment(torch.device("cpu"))
processes.connect()
total = torch.tensor([1.0 + processes.rank, 10.0])
processes.all_reduce([total])
matrix = torch.arange(14.0).view(7, 2)
part = processes.shard(matrix) * 2
whole = processes.all_gather(part, 7)
shared = torch.zeros(3, 6)
made = []
processes.compute_sharded(
    list(shared.split(2, 1)), [3, 9, 5], lambda number: made.append(number) or torch.full((3, 2), number + 1.0)
)
order = []
processes.main_first(lambda: order.append(1))
facts = [processes.rank, processes.world_size, total.tolist(), len(part), whole.tolist()]
facts += [list(processes.shard_range(5)), order]
facts += [shared.tolist(), made]
open(f"{sys.argv[1]}/{processes.rank}.json", "w").write(json.dumps(facts))
"""


def torchrun(*arguments: object, processes: int = 2) -> Result:
    """Run a program in several processes, all of which print."""
    launcher = "-m", "torch.distributed.run", "--nproc-per-node", processes, "--standalone"
    return run_python(*launcher, *arguments, timeout=600)


def test_alone() -> None:
    tensor = torch.ones(3, 2)
    SINGLE_PROCESS.all_reduce([tensor])
    SINGLE_PROCESS.barrier()
    assert torch.equal(tensor, torch.ones(3, 2))
    assert torch.equal(SINGLE_PROCESS.all_gather(SINGLE_PROCESS.shard(tensor), 3), tensor)
    assert list(SINGLE_PROCESS.shard_range(3)) == [0, 1, 2]
    assert SINGLE_PROCESS.is_main
    assert SINGLE_PROCESS.main_first(lambda: 5) == 5


def test_every_batch_has_one_owner() -> None:
    assert sorted(number for rank in range(3) for number in ProcessGroup(rank, 3).shard_range(8)) == list(range(8))
    # Column scales use every fourth batch: these are spread evenly, too.
    fourths = [[number for number in ProcessGroup(rank, 2).shard_range(64) if number % 4 == 0] for rank in range(2)]
    assert [len(each) for each in fourths] == [8, 8]


@pytest.mark.slow
def test_what_two_processes_exchange(tmp_path: Path) -> None:
    script = tmp_path / "exchange.py"
    script.write_text(EXCHANGE)
    done = torchrun(script, tmp_path)
    assert done.code == 0, done.err
    doubled = (torch.arange(14.0).view(7, 2) * 2).tolist()
    for rank, rows in ((0, 4), (1, 3)):
        facts = json.loads((tmp_path / f"{rank}.json").read_text())
        assert facts[:-2] == [rank, 2, [3.0, 20.0], rows, doubled, [[0, 1], [2, 3, 4]][rank], [1]]
        assert facts[-2:] == [[[1.0, 1.0, 2.0, 2.0, 3.0, 3.0]] * 3, [[1], [0, 2]][rank]]


FACTORS = """
import sys
import torch
from d2q_edge.quantize import cholesky, matmul
from d2q_edge.distributed.process_group import ProcessGroup
from tests.distributed.test_process_group import factors
cholesky.STRIP = 100
matmul.is_accelerator = lambda _: True
processes = ProcessGroup.from_environment(torch.device("cpu"))
processes.connect()
found = factors(processes)
real, calls = torch.linalg.cholesky_ex, []

def failing(matrix):
    calls.append(matrix.dtype)
    lower, failed = real(matrix)
    return lower, failed + (processes.rank == 1 and len(calls) == 1)

torch.linalg.cholesky_ex = failing
again, _ = cholesky.inverse_cholesky(torch.eye(256) + torch.ones(256, 256), 0.01, processes)
assert calls == [torch.float32, torch.float64]
torch.save([*found, again], f"{sys.argv[1]}/{processes.rank}.pt")
"""


def factors(processes: ProcessGroup) -> list[torch.Tensor]:
    """What is computed of the statistics of a layer's input, of 256 columns."""
    inputs = torch.randn(2, 300, 256, generator=torch.Generator().manual_seed(0))
    statistics, energy = InputStatistics(256), InputEnergy(256)
    statistics.add_batch(*inputs)
    energy.add_batch(inputs[0])
    feedback = layer_feedback(statistics, BY_NAME["d2q2"], 0.5, processes=processes)
    assert feedback.dXXT_UT is not None
    assert feedback.P is not None
    return [feedback.U, feedback.dXXT_UT, feedback.P, energy.conditional()]


@pytest.mark.slow
def test_two_processes_share_factorizations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They get the same as one alone; a factorization that fails in one of them is repeated in all."""
    script = tmp_path / "factors.py"
    script.write_text(FACTORS)
    done = torchrun(script, tmp_path)
    assert done.code == 0, done.err
    monkeypatch.setattr(cholesky, "STRIP", 100)
    monkeypatch.setattr(matmul, "is_accelerator", lambda _: True)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    again, _ = inverse_cholesky(torch.eye(256) + torch.ones(256, 256), 0.01)
    for found, other, expected in zip(first, second, [*factors(SINGLE_PROCESS), again], strict=True):
        assert torch.equal(found, other)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


ONE_FAILS = """
import torch
from d2q_edge.errors import D2QError
from d2q_edge.distributed.process_group import ProcessGroup
processes = ProcessGroup.from_environment(torch.device("cpu"))
processes.connect()

def compute(number):
    if number == 1:
        raise D2QError("one of them can't")
    return torch.ones(2)

processes.compute_sharded([torch.zeros(2), torch.zeros(2)], [2, 1], compute)
"""


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_others(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text(ONE_FAILS)
    done = torchrun(script)
    assert done.code == 1
    assert "one of them can't" in done.err


def test_tasks_are_assigned_by_their_costs() -> None:
    assert ProcessGroup(0, 2).assign([1, 5, 2, 4]) == [0, 0, 1, 1]
    assert SINGLE_PROCESS.assign([3, 1]) == [0, 0]
    costs = [number**2 for number in range(1, 13)]
    loads = [0] * 4
    for cost, owner in zip(costs, ProcessGroup(3, 4).assign(costs), strict=True):
        loads[owner] += cost
    assert max(loads) < 1.1 * sum(costs) / 4


SLOW_TRIAL = """
import time
from contextlib import contextmanager
import torch.distributed
from d2q_edge.cli import main
from d2q_edge.formats import gguf_writer

trial = gguf_writer.partial_file

@contextmanager
def slow(path):
    with trial(path) as partial:
        time.sleep(0.5)
        yield partial

def leave(farewell=torch.distributed.destroy_process_group):
    # gloo's sockets must not close while another process still reads the last barrier's messages.
    time.sleep(2)
    farewell()

gguf_writer.partial_file = slow
torch.distributed.destroy_process_group = leave
main()
"""


@pytest.mark.slow
def test_three_processes_make_the_same_model(tmp_path: Path) -> None:
    """Sums have another order, so that a few codes near a tie differ, but hardly the layers' errors. Nor do two of them
    try at the same time whether the output can be written."""
    script = tmp_path / "slow_trial.py"
    script.write_text(SLOW_TRIAL)
    alone, shared = tmp_path / "alone.gguf", tmp_path / "shared.gguf"
    conversion = convert(EXAMPLE, alone, Options(calibration_tokens=int(TOKENS)))
    report = tmp_path / "report.json"
    done = torchrun(
        *(script, "convert", EXAMPLE, "-o", shared, "--calibration-tokens", TOKENS, "--report", report),
        processes=3,
    )
    assert done.code == 0, done.err
    assert done.out.count("bits per weight") == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        *("alone.gguf", "report.json", "shared.gguf", "slow_trial.py")
    ]
    assert conversion.report is not None
    errors = json.loads(report.read_text())["layer_errors"]
    assert errors.keys() == conversion.report.layer_errors.keys()
    for name, error in conversion.report.layer_errors.items():
        assert errors[name] == pytest.approx(error, rel=0.03), name
    one, two = GGUFFile(alone), GGUFFile(shared)
    assert one.tensors.keys() == two.tensors.keys()
    assert alone.stat().st_size == shared.stat().st_size


@pytest.mark.slow
def test_two_processes_plan_a_mixture(tmp_path: Path) -> None:
    """What rank 0 measures is the plan of all."""
    arguments = "--bits", "2.5", "--dry-run", "-o", tmp_path / "out.gguf", "--calibration-tokens", TOKENS
    done = torchrun("-m", "d2q_edge.cli", "convert", EXAMPLE, *arguments)
    assert done.code == 0, done.err
    assert "d2q3" in done.out
