"""Hidden states kept in memory and in a file are the same, whatever the order in which they are touched."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from d2q_edge.calibration.hidden_states import DTYPE, HiddenStates, StreamPair
from d2q_edge.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from d2q_edge.errors import D2QError
from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for

CPU = torch.device("cpu")
WINDOWS = (3, 3, 1)
SHAPE = (5, 8)


def batches(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, *SHAPE, generator=generator) for count in WINDOWS]


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_kept_comes_back_rounded(tmp_path: Path, on_disk: bool) -> None:
    states = HiddenStates(WINDOWS, SHAPE, CPU, tmp_path / "new" if on_disk else CPU)
    assert len(states) == 3
    first, second = batches(0), batches(1)
    for index in (2, 0, 1):
        states[index] = first[index]
    states[1] = second[1]
    for index, expected in ((1, second[1]), (0, first[0]), (2, first[2])):
        assert states[index].dtype == torch.float32
        assert torch.equal(states[index], expected.bfloat16().float())
    # The file has no name: nothing is left to clean up.
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


def test_changing_what_was_read_changes_nothing(tmp_path: Path) -> None:
    for place in (CPU, tmp_path):
        states = HiddenStates(WINDOWS, SHAPE, CPU, place)
        states[0] = batches(0)[0]
        before = states[0].clone()
        states[0].zero_()
        assert torch.equal(states[0], before)


def test_the_dtype_can_be_chosen(tmp_path: Path) -> None:
    for place in (CPU, tmp_path):
        states = HiddenStates(WINDOWS, SHAPE, CPU, place, torch.float32)
        for index, batch in enumerate(batches(0)):
            states[index] = batch
        assert all(torch.equal(states[index], batch) for index, batch in enumerate(batches(0)))


def test_tokens(tmp_path: Path) -> None:
    states = HiddenStates(WINDOWS, SHAPE, CPU, CPU)
    assert [states.tokens(index) for index in range(3)] == [15, 15, 5]


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """As on a full disk: no file of this process grows beyond `size` bytes. (Python ignores the signal for that.)"""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("room", "message"),
    [
        (0, r"can't keep hidden states in .*\(File too large\); free some disk space and run the same command"),
        (8, r"can't keep hidden states in .*: the disk is full; free some and run it again"),
    ],
    ids=["nothing is written", "a part is written"],
)
def test_a_full_disk(tmp_path: Path, room: int, message: str) -> None:
    states = HiddenStates(WINDOWS, SHAPE, CPU, tmp_path)
    first, second, _ = batches(0)
    states[0] = first
    with small_files(3 * 5 * 8 * 2 + room), pytest.raises(D2QError, match=message):
        states[1] = second
    assert torch.equal(states[0], first.bfloat16().float())
    with pytest.raises(D2QError, match=r"hidden states kept in .* can't be read back; is the disk full\?"):
        states[1]


def test_a_place_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(D2QError, match="can't keep hidden states"):
        HiddenStates(WINDOWS, SHAPE, CPU, tmp_path / "file" / "below")


def test_the_dtype_is_that_of_models() -> None:
    assert torch.bfloat16 == DTYPE


class TestStreamPair:
    def test_begins_with_the_embeddings(self, make_checkpoint: Callable[..., Path]) -> None:
        checkpoint = Checkpoint.open(make_checkpoint("llama"))
        runner = BlockRunner(checkpoint, family_for(checkpoint.config), CPU)
        windows = np.random.default_rng(0).integers(0, 4096, (5, 12))
        pair = StreamPair(runner, windows, 24, CPU, SINGLE_PROCESS)
        assert pair.sizes == [2, 2, 1]
        assert len(pair) == 3
        assert list(pair.own) == [0, 1, 2]
        table = checkpoint.tensor("model.embed_tokens.weight").float()
        for states in (pair.original, pair.quantized):
            found = torch.cat([states[index] for index in range(3)])
            assert torch.equal(found, table[torch.from_numpy(windows)])
        # At least a window at a time, however long it is.
        assert StreamPair(runner, windows, 8, CPU, SINGLE_PROCESS).sizes == [1] * 5

    @torch.inference_mode()
    def test_advances_each_through_its_block(self, make_checkpoint: Callable[..., Path]) -> None:
        checkpoint = Checkpoint.open(make_checkpoint("qwen3"))
        runner = BlockRunner(checkpoint, family_for(checkpoint.config), CPU)
        windows = np.random.default_rng(0).integers(0, 4096, (5, 12))
        pair = StreamPair(runner, windows, 24, CPU, SINGLE_PROCESS, torch.float32)
        first, second = runner.load(0), runner.load(1)
        embedded = runner.embed(torch.from_numpy(windows))
        pair.advance(0, first, second)
        for states, block in ((pair.original, first), (pair.quantized, second)):
            found = torch.cat([states[index] for index in range(3)])
            torch.testing.assert_close(found, runner.forward(block, embedded), rtol=1e-5, atol=1e-5)

    def test_processes_share_the_batches(self, make_checkpoint: Callable[..., Path]) -> None:
        checkpoint = Checkpoint.open(make_checkpoint("qwen3"))
        runner = BlockRunner(checkpoint, family_for(checkpoint.config), CPU)
        windows = np.random.default_rng(0).integers(0, 4096, (5, 12))
        pairs = [StreamPair(runner, windows, 12, CPU, ProcessGroup(rank, 2)) for rank in range(2)]
        assert [list(pair.own) for pair in pairs] == [[0, 1], [2, 3, 4]]
        whole = StreamPair(runner, windows, 12, CPU, SINGLE_PROCESS)
        for pair in pairs:
            for index in pair.own:
                assert torch.equal(pair.original[index], whole.original[index])
