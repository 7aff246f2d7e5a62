"""Several calibration texts: how they are named, and who gets how many tokens."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2q_edge.calibration.mixture import digest, load_parts, names, share_out
from d2q_edge.errors import D2QError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in ("a.txt", "b.txt", "b.txt:2"):
        (tmp_path / name).write_text(f"This is {name}")
    return tmp_path


def test_one_text(directory: Path) -> None:
    (part,) = parts = load_parts(str(directory / "a.txt"))
    assert (part.text.source, part.weight, part.path) == ("a.txt", 1, directory / "a.txt")
    assert (names(parts), digest(parts)) == ("a.txt", part.text.sha256)
    (bundled,) = load_parts(("builtin",))
    assert (bundled.text.source, bundled.path) == ("builtin", None)


def test_weights(directory: Path) -> None:
    parts = load_parts([f"{directory}/a.txt:0.5", "builtin:3", f"{directory}/b.txt:2", f"{directory}/b.txt"])
    assert [(part.text.source, part.weight) for part in parts] == [
        ("a.txt", 0.5),
        ("builtin", 3),
        ("b.txt:2", 1),  # a file that exists under the whole name
        ("b.txt", 1),
    ]
    assert names(parts) == "a.txt:0.5, builtin:3, b.txt:2:1, b.txt:1"
    assert digest(parts) != digest(parts[:-1])


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_wrong_weight(directory: Path, weight: str) -> None:
    with pytest.raises(D2QError, match=rf"a.txt must be a positive number, not {weight}$"):
        load_parts(f"{directory}/a.txt:{weight}")


def test_what_is_no_weight_belongs_to_the_name(directory: Path) -> None:
    with pytest.raises(D2QError, match=r"can't read the text .*a.txt:much \(No such file"):
        load_parts(f"{directory}/a.txt:much")
    with pytest.raises(D2QError, match="there is no calibration text"):
        load_parts(())


def test_shares() -> None:
    assert share_out(100, [1, 1], [500, 500]) == [50, 50]
    assert share_out(100, [1, 3], [500, 500]) == [25, 75]
    assert share_out(100, [1, 1, 2], [10, 500, 500]) == [10, 30, 60]
    assert share_out(100, [1, 1], [10, 20]) == [10, 20]
    assert share_out(2, [1, 1, 1], [5, 5, 5]) == [1, 1, 0]
    assert share_out(5, [1, 1], [0, 9]) == [0, 5]


@given(st.integers(0, 1000), st.lists(st.tuples(st.floats(0.01, 100), st.integers(0, 200)), min_size=1, max_size=6))
def test_shares_add_up(total: int, parts: list[tuple[float, int]]) -> None:
    weights, limits = [weight for weight, _ in parts], [limit for _, limit in parts]
    counts = share_out(total, weights, limits)
    assert sum(counts) == min(total, sum(limits))
    assert all(0 <= count <= limit for count, limit in zip(counts, limits, strict=True))
    for i, count in enumerate(counts):
        for j, other in enumerate(counts):
            # Nobody below its limit has less by weight than another, but for rounding.
            if count < limits[i] and other:
                assert (count + 1) / weights[i] >= (other - 1) / weights[j] - 1e-9
