"""The memory plan: where hidden states go, what is refused, and that a conversion keeps to what it stated."""

import re
import shutil
import subprocess
import sys
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

CPU = torch.device("cpu")


def family(name: str) -> Family:
    return family_for({**GEOMETRIES[name], "rms_norm_eps": 1e-6, "hidden_act": "silu"})


def plan(name: str, tmp_path: Path, tokens: int = 65536, **options: Any) -> MemoryPlan:
    return plan_memory(family(name), tokens, 4096, CPU, tmp_path / "out.gguf", 1000, **options)


def test_hidden_states_go_where_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = 2 * 65536 * 2048 * 2
    monkeypatch.setattr(memory, "free_memory", lambda: 64 * GIB)
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
    monkeypatch.setattr(memory, "free_memory", lambda: tight.host - 1)
    with pytest.raises(D2QError, match=r"needs \d\.\d GiB of memory, but \d\.\d GiB are free; use a machine with more"):
        plan("llama-3.2-1b", tmp_path)


def test_a_full_disk_is_noticed_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 999})())
    monkeypatch.setattr(memory, "free_memory", lambda: 64 * GIB)
    with pytest.raises(D2QError, match=r"has 0\.0 GiB of free space, but unfinished work needs 0\.0 GiB"):
        plan("llama-3.2-1b", tmp_path)


def test_targets_on_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 1B model in 5 GiB; an 8B model on a GPU in 20 GiB, and 16 GiB beside it."""
    monkeypatch.setattr(memory, "free_memory", lambda: 64 * GIB)
    assert plan("llama-3.2-1b", tmp_path, 16 * 512).host < 5 * GIB
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (100 * GIB, 100 * GIB))
    large = plan_memory(family("qwen3-8b"), 128 * 2048, 4096, torch.device("cuda"), tmp_path / "out.gguf", 1000)
    assert large.place == torch.device("cuda")
    assert large.device < 20 * GIB
    assert large.host < 16 * GIB
    block = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288
    assert large.host > memory.CUDA_PROGRAM + 2 * 4 * block + 7 * 2 * 151936 * 4096, "a block is read ahead"
    two = plan_memory(
        family("qwen3-8b"), 128 * 2048, 4096, torch.device("cuda"), tmp_path / "out.gguf", 1000, processes=2
    )
    assert two.device < large.device
    assert two.host - large.host < memory.CUDA_PROGRAM + 2 * 4 * block + GIB, "only one process writes"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (large.device - 1, 100 * GIB))
    assert (
        plan_memory(family("qwen3-8b"), 128 * 2048, 4096, torch.device("cuda"), tmp_path / "out.gguf", 1000).place
        == CPU
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (GIB, 100 * GIB))
    with pytest.raises(D2QError, match=r"the GPU has 1\.0 GiB of free memory, but this model needs"):
        plan_memory(family("qwen3-8b"), 128 * 2048, 4096, torch.device("cuda"), tmp_path / "out.gguf", 1000)


def test_a_table_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is encoded there, and may be larger than anything that a block needs."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (100 * GIB, 100 * GIB))
    monkeypatch.setattr(memory, "free_memory", lambda: 64 * GIB)
    monkeypatch.setitem(GEOMETRIES, "wide", {**GEOMETRIES["llama-3.2-1b"], "vocab_size": 2**21})
    needed = plan_memory(family("wide"), 512, 512, torch.device("cuda"), tmp_path / "out.gguf", 1000).device
    assert 2**21 * 2048 * 10 < needed < 2**21 * 2048 * 10 + GIB


def test_two_tables_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a time, when the hidden states are gone."""
    monkeypatch.setattr(memory, "free_memory", lambda: 640 * GIB)
    table = 2**21 * 2048
    geometry = {**GEOMETRIES["llama-3.2-1b"], "vocab_size": 2**21, "tie_word_embeddings": False}
    monkeypatch.setitem(GEOMETRIES, "wide", geometry)

    def plan(available: int, tokens: int = 512) -> memory.MemoryPlan:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (available, available))
        return plan_memory(family("wide"), tokens, 512, torch.device("cuda"), tmp_path / "out.gguf", 1000)

    needed = plan(200 * GIB)
    assert needed.device == 2 * (10 * table + memory.CUDA_ENCODING)
    assert 2 * 7 * table < needed.host < 2 * 7 * table + 6 * GIB
    # 5 GiB of hidden states fit beside the blocks, and so don't count.
    many = 5 * GIB // (2 * 2048 * 2)
    assert plan(200 * GIB, many).device == needed.device
    assert plan(needed.device, many).place == torch.device("cuda")
    with pytest.raises(D2QError, match=f"needs {needed.device / GIB:.1f} GiB"):
        plan(needed.device - 1)


def test_blocks_that_are_read_while_a_table_is_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 64 * GIB)
    monkeypatch.setitem(GEOMETRIES, "wide", {**GEOMETRIES["llama-3.2-1b"], "vocab_size": 2**19})
    needed = [
        plan_memory(family("wide"), 512, 512, CPU, tmp_path / "out.gguf", 16 * block).host for block in (0, 10**7)
    ]
    assert needed[1] - needed[0] == 2 * 10**7


def test_free_memory() -> None:
    assert 2**26 < memory.free_memory() < 2**46


PEAK = """
import sys
from d2q_edge.cli import cli
sys.argv[0] = "d2q-edge"
cli(standalone_mode=False)
# Not ru_maxrss, which begins with that of the process that started this one.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


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
        monkeypatch.setattr(memory, "free_memory", lambda: 64 * GIB)
        command += ["--memory-limit", str((plan("one-layer", tmp_path).host - 1) / GIB)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    stated = re.search(r"needs at most (\d+\.\d+) GiB of memory", done.stderr)
    assert stated is not None
    assert int(done.stdout.split()[-1]) * 1024 < (float(stated[1]) + 0.05) * GIB
    assert ("kept on disk" in done.stderr) == limited
