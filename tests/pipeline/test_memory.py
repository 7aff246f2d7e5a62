"""The memory plan: where hidden states go, what is refused, and that a conversion keeps to what it stated."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from d2q_edge.errors import D2QError
from d2q_edge.model.families import Family, family_for
from d2q_edge.pipeline import memory
from d2q_edge.pipeline.memory import GIB, MemoryPlan, plan_memory
from tests.paths import ROOT
from tools.random_model import GEOMETRIES, write_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ROOMY = 640 * GIB


def family(name: str, **changes: Any) -> Family:
    return family_for({**GEOMETRIES[name], "rms_norm_eps": 1e-6, "hidden_act": "silu", **changes})


def plan(
    of: str | Family,
    tmp_path: Path,
    tokens: int = 65536,
    *,
    batch: int = 4096,
    device: torch.device = CPU,
    packed: int = 1000,
    limit: int | None = ROOMY,
    processes: int = 1,
    guidance: bool = False,
    refine: bool = False,
) -> MemoryPlan:
    of = family(of) if isinstance(of, str) else of
    output = tmp_path / "out.gguf"
    return plan_memory(of, tokens, batch, device, output, packed, limit, processes, guidance=guidance, refine=refine)


@pytest.fixture
def gpu_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """gpu_memory(free): there is a GPU with this many free bytes."""

    def change(free: int) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, 2 * free))

    return change


def test_refinement_of_blocks(tmp_path: Path) -> None:
    """It keeps a third copy of the hidden states, and several of a block."""
    plain, refined = (plan("llama-3.2-1b", tmp_path, refine=refine) for refine in (False, True))
    block = 4 * (2 * 2048 * 2048 + 2 * 512 * 2048 + 3 * 8192 * 2048)
    assert refined.host - plain.host >= 65536 * 2048 * 2
    assert refined.host >= 3 * 65536 * 2048 * 2 + 8 * block


def test_hidden_states_go_where_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = 2 * 65536 * 2048 * 2
    monkeypatch.setattr(memory, "KEPT_INPUTS", 0)
    roomy = plan("llama-3.2-1b", tmp_path)
    assert roomy.place == CPU
    assert roomy.disk == 1000
    assert roomy.device == 0
    tight = plan("llama-3.2-1b", tmp_path, limit=roomy.host - 1)
    assert tight.place == tmp_path
    assert roomy.host - tight.host == streams
    assert tight.disk == 1000 + streams
    assert "on disk" in tight.describe()
    assert f"at most {roomy.host / GIB:.1f} GiB of memory" in roomy.describe()
    with pytest.raises(D2QError, match=r"needs \d\.\d GiB of memory, but --memory-limit allows \d\.\d") as caught:
        plan("llama-3.2-1b", tmp_path, limit=tight.host - 1)
    said = float(str(caught.value).split("needs ")[1].split()[0])
    assert plan("llama-3.2-1b", tmp_path, limit=int(said * GIB)), "what is said to be needed is enough"
    # Without a limit, what is free counts.
    for free, place in ((roomy.host, CPU), (roomy.host - 1, tmp_path)):
        monkeypatch.setattr(memory, "available_memory", lambda free=free: free)
        assert plan("llama-3.2-1b", tmp_path, limit=None).place == place
    monkeypatch.setattr(memory, "available_memory", lambda: tight.host - 1)
    with pytest.raises(D2QError, match=r"needs \d\.\d GiB of memory, but \d\.\d GiB are free; use a machine with more"):
        plan("llama-3.2-1b", tmp_path, limit=None)


def test_inputs_are_kept_where_memory_is_left(tmp_path: Path, gpu_memory: Callable[[int], None]) -> None:
    """They take what the hidden states leave, and never push those to the disk."""
    roomy = plan("llama-3.2-1b", tmp_path)
    assert roomy.inputs == memory.KEPT_INPUTS
    assert plan("llama-3.2-1b", tmp_path, 512).inputs == 512 * 8192 * 4
    assert plan("llama-3.2-1b", tmp_path, processes=2).inputs == memory.KEPT_INPUTS // 2
    for less in (10**6, roomy.inputs):
        tight = plan("llama-3.2-1b", tmp_path, limit=roomy.host - less)
        assert (tight.place, tight.inputs, tight.host) == (CPU, roomy.inputs - less, roomy.host - less)
    on_disk = plan("llama-3.2-1b", tmp_path, limit=roomy.host - roomy.inputs - 1)
    assert isinstance(on_disk.place, Path)
    assert on_disk.inputs > 0, "the streams have left room for them"
    gpu_memory(100 * GIB)
    assert plan("llama-3.2-1b", tmp_path, device=GPU).inputs == 0


def test_a_full_disk_is_noticed_before_the_work(tmp_path: Path) -> None:
    message = r"has \d+\.\d GiB of free space, but unfinished work needs 1048576\.0 GiB; free some"
    with pytest.raises(D2QError, match=message):
        plan("llama-3.2-1b", tmp_path, packed=2**50, limit=2**52)


def test_targets_on_paper(tmp_path: Path, gpu_memory: Callable[[int], None]) -> None:
    """A 1B model in 5 GiB; an 8B model on a GPU in 20 GiB, and 16 GiB beside it."""
    assert plan("llama-3.2-1b", tmp_path, 16 * 512).host < 5 * GIB

    def on_gpu(free: int, processes: int = 1) -> MemoryPlan:
        gpu_memory(free)
        return plan("qwen3-8b", tmp_path, 128 * 2048, device=GPU, limit=64 * GIB, processes=processes)

    large = on_gpu(100 * GIB)
    assert large.place == GPU
    assert large.device < 20 * GIB
    assert large.host < 16 * GIB
    block = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288
    assert large.host > memory.CUDA_PROGRAM + 2 * 4 * block + 7 * 151936 * 4096, "a block is read ahead"
    two = on_gpu(100 * GIB, processes=2)
    assert two.device < large.device
    assert two.host - large.host < memory.CUDA_PROGRAM + 2 * 4 * block + GIB, "only one process writes"
    assert on_gpu(large.device - 1).place == CPU
    with pytest.raises(D2QError, match=r"the GPU has 1\.0 GiB of free memory, but this model needs"):
        on_gpu(GIB)


def test_a_table_on_the_gpu(tmp_path: Path, gpu_memory: Callable[[int], None]) -> None:
    """It is encoded there when the hidden states are gone, and may be larger than anything that a block needs."""
    for tied in (True, False):
        table = 2**21 * 2048
        wide = family("llama-3.2-1b", vocab_size=2**21, tie_word_embeddings=tied)

        def on_gpu(free: int, tokens: int = 512, wide: Family = wide) -> MemoryPlan:
            gpu_memory(free)
            return plan(wide, tmp_path, tokens, batch=512, device=GPU)

        needed = on_gpu(200 * GIB)
        assert needed.device == 10 * table + memory.CUDA_ENCODING, "one table at a time"
        assert 10 * table < needed.device < 10 * table + GIB
        assert 7 * table < needed.host < 7 * table + 6 * GIB
        # 5 GiB of hidden states fit beside the blocks, and so don't count.
        many = 5 * GIB // (2 * 2048 * 2)
        assert on_gpu(200 * GIB, many).device == needed.device
        assert on_gpu(needed.device, many).place == GPU
        with pytest.raises(D2QError, match=f"needs {needed.device / GIB:.1f} GiB"):
            on_gpu(needed.device - 1)


def test_blocks_that_are_read_while_the_file_is_written(tmp_path: Path) -> None:
    """One block counts twice: in the memory that it is copied to, and in the file that it comes from."""
    wide = family("llama-3.2-1b", vocab_size=2**19)
    needed = [plan(wide, tmp_path, 512, batch=512, packed=16 * block).host for block in (0, 10**7)]
    assert needed[1] - needed[0] == 2 * 10**7


PEAK = """
import sys
from collections.abc import Callable
from d2q_edge.cli import cli
sys.argv[0] = "d2q-edge"
cli(standalone_mode=False)
# Not ru_maxrss, which begins with that of the process that started this one.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much memory a process took")
@pytest.mark.parametrize("limited", [False, True])
def test_what_is_stated_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limited: bool) -> None:
    """One wide layer and many tokens, so that statistics and hidden states are most of the memory."""
    geometry = {**GEOMETRIES["llama-3.2-1b"], "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 1}
    geometry |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096}
    monkeypatch.setitem(GEOMETRIES, "one-layer", geometry)
    write_model("one-layer", tmp_path / "model", None, CPU)
    command = [sys.executable, "-c", PEAK, "convert", str(tmp_path / "model"), "-o", str(tmp_path / "out.gguf")]
    command += ["--calibration-tokens", "65536"]
    if limited:
        # Measuring gradients takes more than the hidden states of one layer.
        monkeypatch.setattr(memory, "KEPT_INPUTS", 0)
        command += ["--no-guidance", "--memory-limit", str((plan("one-layer", tmp_path).host - 1) / GIB)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    stated = re.search(r"needs at most (\d+\.\d+) GiB of memory", done.stderr)
    assert stated is not None
    assert int(done.stdout.split()[-1]) * 1024 < (float(stated[1]) + 0.05) * GIB
    assert ("kept on disk" in done.stderr) == limited
