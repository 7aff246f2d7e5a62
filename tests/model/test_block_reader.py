"""Test that reading blocks ahead (here into unpinned memory) yields the same tensors and errors from a thread."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2q_edge.errors import D2QError
from d2q_edge.model.block_reader import BlockReader
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for

Make = Callable[..., Path]


class Watched(Checkpoint):
    """Record which thread read which tensor."""

    readers: dict[str, str]

    def tensor(self, name: str) -> torch.Tensor:
        self.readers[name] = threading.current_thread().name
        return super().tensor(name)


def reader_for(path: Path, *, ahead: bool) -> tuple[BlockReader, Watched]:
    opened = Checkpoint.open(path)
    checkpoint = Watched(opened.directory, opened.config, opened._entries)
    checkpoint.readers = {}
    return BlockReader(checkpoint, family_for(checkpoint.config), ahead=ahead, pin=False), checkpoint


def read(reader: BlockReader, index: int) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in reader.read(index)}


def poisoned(path: Path, tensor: str) -> Path:
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors[tensor].view(-1)[3] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_tensors(make_checkpoint: Make, dtype: torch.dtype) -> None:
    path = make_checkpoint("qwen3", dtype=dtype, hidden_size=96)
    plain, (ahead, checkpoint) = reader_for(path, ahead=False)[0], reader_for(path, ahead=True)
    for index in (0, 1, 0):
        ahead.begin(index)
        expected, found = read(plain, index), read(ahead, index)
        assert found.keys() == expected.keys()
        assert "mlp.down_proj.weight" in found
        for name, tensor in expected.items():
            assert found[name].dtype == dtype
            assert torch.equal(found[name], tensor)
    assert threading.current_thread().name not in checkpoint.readers.values()


def test_another_block_than_the_one_begun(make_checkpoint: Make) -> None:
    path = make_checkpoint("qwen3")
    plain, ahead = reader_for(path, ahead=False)[0], reader_for(path, ahead=True)[0]
    ahead.begin(1)
    for index in (0, 1):
        for name, tensor in read(plain, index).items():
            assert torch.equal(dict(ahead.read(index))[name], tensor)


def test_nothing_is_read_ahead_without_a_gpu_or_after_the_last_block(make_checkpoint: Make) -> None:
    path = make_checkpoint("qwen3")
    for ahead, index in ((False, 0), (True, 2)):
        reader, checkpoint = reader_for(path, ahead=ahead)
        reader.begin(index)
        read(reader, 1)
        assert set(checkpoint.readers.values()) == {threading.current_thread().name}


def test_a_damaged_block_is_reported_when_it_is_read(make_checkpoint: Make) -> None:
    path = poisoned(make_checkpoint("qwen3"), "model.layers.1.mlp.up_proj.weight")
    messages = []
    for ahead in (False, True):
        reader, _ = reader_for(path, ahead=ahead)
        reader.begin(0)
        read(reader, 0)
        reader.begin(1)
        with pytest.raises(D2QError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight .* contains NaN") as caught:
            read(reader, 1)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
