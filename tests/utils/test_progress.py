"""Progress where there is no terminal: lines with counts, a status, and the time that is left."""

import pytest

from d2q_edge.utils import progress
from d2q_edge.utils.progress import Progress, duration, track


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_line_now_and_then(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("Working", 10, "block", interval=30) as bar:
        bar.update(2)
        assert capsys.readouterr().err == ""
        clock.now += 40
        bar.set_status("error 0.5")
        bar.update(2)
        assert capsys.readouterr().err == "Working: 4/10 block, error 0.5, 40 s elapsed, about 1 min 0 s left\n"
        clock.now += 29
        bar.update()
        assert capsys.readouterr().err == ""


def test_earlier_steps_dont_count_for_the_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("Working", 10, "block", initial=8) as bar:
        clock.now += 60
        bar.update()
    assert capsys.readouterr().err == "Working: 9/10 block, 1 min 0 s elapsed, about 1 min 0 s left\n"


def test_lines_when_they_are_asked_for(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("Writing", 2e9, "B", unit_scale=True, interval=float("inf")) as bar:
        clock.now += 1000
        bar.update(1e9)
        assert capsys.readouterr().err == ""
        bar.print_line()
        assert "Writing: 1.00G/2.00G B, 16 min 40 s elapsed" in capsys.readouterr().err
        bar.update(1e9)
        bar.print_line()
        assert "left" not in capsys.readouterr().err


def test_quiet(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in track([1, 2], "Working", "step", quiet=True):
        clock.now += 1000
    assert capsys.readouterr().err == ""


def test_track(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    for item in track(iter("abc"), "Working", "letter"):
        seen.append(item)
        clock.now += 45
    assert seen == ["a", "b", "c"]
    assert capsys.readouterr().err.splitlines() == [
        "Working: 1/3 letter, 45 s elapsed, about 1 min 30 s left",
        "Working: 2/3 letter, 1 min 30 s elapsed, about 45 s left",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (7500, "2 h 5 min"), (3599.7, "1 h 0 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
