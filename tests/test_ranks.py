"""Two processes of one conversion, over gloo on the CPU: what they exchange, and the file that comes out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d2q_edge.conversion import convert
from d2q_edge.gguf_reader import GGUFFile
from d2q_edge.ranks import ALONE, Ranks
from d2q_edge.recipe import Options
from tests.checkpoints import EXAMPLE

TOKENS = "2048"

EXCHANGE = """
import json, sys
import torch
from d2q_edge.ranks import Ranks
ranks = Ranks.join(torch.device("cpu"))
total = torch.tensor([1.0 + ranks.rank, 10.0])
ranks.sum([total])
matrix = torch.arange(14.0).view(7, 2)
part = ranks.part(matrix) * 2
whole = ranks.join_parts(part, 7)
order = []
ranks.in_turn(lambda: order.append(1))
facts = [ranks.rank, ranks.count, total.tolist(), len(part), whole.tolist(), list(ranks.own(5)), order]
open(f"{sys.argv[1]}/{ranks.rank}.json", "w").write(json.dumps(facts))
"""


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)


def test_alone() -> None:
    tensor = torch.ones(3, 2)
    ALONE.sum([tensor])
    ALONE.wait()
    assert torch.equal(tensor, torch.ones(3, 2))
    assert torch.equal(ALONE.join_parts(ALONE.part(tensor), 3), tensor)
    assert list(ALONE.own(3)) == [0, 1, 2]
    assert ALONE.is_first
    assert ALONE.in_turn(lambda: 5) == 5


def test_every_batch_has_one_owner() -> None:
    assert sorted(number for rank in range(3) for number in Ranks(rank, 3).own(8)) == list(range(8))
    # Every fourth of them, which the column scales look at, is spread as evenly as it goes.
    fourths = [[number for number in Ranks(rank, 2).own(64) if number % 4 == 0] for rank in range(2)]
    assert [len(each) for each in fourths] == [8, 8]


def test_what_two_processes_exchange(tmp_path: Path) -> None:
    script = tmp_path / "exchange.py"
    script.write_text(EXCHANGE)
    done = torchrun(str(script), str(tmp_path))
    assert done.returncode == 0, done.stderr
    doubled = (torch.arange(14.0).view(7, 2) * 2).tolist()
    for rank, rows in ((0, 4), (1, 3)):
        facts = json.loads((tmp_path / f"{rank}.json").read_text())
        assert facts == [rank, 2, [3.0, 20.0], rows, doubled, [[0, 1], [2, 3, 4]][rank], [1]]


def test_two_processes_make_the_same_model(tmp_path: Path) -> None:
    """Sums are in another order, so that a few codes near a tie differ; the layers' errors don't."""
    alone, shared = tmp_path / "alone.gguf", tmp_path / "shared.gguf"
    conversion = convert(EXAMPLE, alone, Options(calibration_tokens=int(TOKENS)))
    report = tmp_path / "report.json"
    done = torchrun(
        *("-m", "d2q_edge.cli", "convert", str(EXAMPLE), "-o", str(shared)),
        *("--calibration-tokens", TOKENS, "--report", str(report)),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bits per weight") == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["alone.gguf", "report.json", "shared.gguf"]
    assert conversion.report is not None
    errors = json.loads(report.read_text())["layer_errors"]
    assert errors.keys() == conversion.report.layer_errors.keys()
    for name, error in conversion.report.layer_errors.items():
        assert errors[name] == pytest.approx(error, rel=0.03), name
    one, two = GGUFFile(alone), GGUFFile(shared)
    assert one.tensors.keys() == two.tensors.keys()
    assert alone.stat().st_size == shared.stat().st_size
