"""Hidden states kept in memory and in a file are the same, whatever the order in which they are touched."""

from pathlib import Path

import pytest
import torch

from d2q_edge.calibration import hidden_states
from d2q_edge.calibration.hidden_states import Stream
from d2q_edge.errors import D2QError

CPU = torch.device("cpu")
WINDOWS = (3, 3, 1)
SHAPE = (5, 8)


def batches(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, *SHAPE, generator=generator) for count in WINDOWS]


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_kept_comes_back_rounded(tmp_path: Path, on_disk: bool) -> None:
    stream = Stream(WINDOWS, SHAPE, CPU, tmp_path / "new" if on_disk else CPU)
    assert len(stream) == 3
    first, second = batches(0), batches(1)
    for index in (2, 0, 1):
        stream[index] = first[index]
    stream[1] = second[1]
    for index, expected in ((1, second[1]), (0, first[0]), (2, first[2])):
        assert stream[index].dtype == torch.float32
        assert torch.equal(stream[index], expected.bfloat16().float())
    # The file has no name: nothing is left to clean up.
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


def test_changing_what_was_read_changes_nothing(tmp_path: Path) -> None:
    for place in (CPU, tmp_path):
        stream = Stream(WINDOWS, SHAPE, CPU, place)
        stream[0] = batches(0)[0]
        before = stream[0].clone()
        stream[0].zero_()
        assert torch.equal(stream[0], before)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(WINDOWS, SHAPE, CPU, tmp_path)

    class Full:
        def seek(self, _: int) -> None: ...

        def write(self, data: memoryview) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(stream, "_file", Full())
    with pytest.raises(D2QError, match=r"can't keep hidden states in .*No space left on device.*free some disk space"):
        stream[0] = batches(0)[0]


def test_a_place_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(D2QError, match="can't keep hidden states"):
        Stream(WINDOWS, SHAPE, CPU, tmp_path / "file" / "below")


def test_the_dtype_is_that_of_models() -> None:
    assert torch.bfloat16 == hidden_states.DTYPE
