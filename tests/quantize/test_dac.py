"""The guarded mean shift against a slow float64 loop over channels, and what it must leave alone."""

import math

import numpy as np
import pytest
import torch

from d2q_edge.quantize.dac import MeanShift

Batches = list[torch.Tensor]
CHANNELS = 40
SHIFTED = {3: 0.5, 17: -0.3, 30: 1.0}
"""Channels with a real shift; the noise has deviation 1."""


def streams(batches: int, shifts: dict[int, float], *, tokens: int = 300, seed: int = 0) -> tuple[Batches, Batches]:
    """Teacher and student, whose difference is noise and these shifts; batches of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    shift = torch.zeros(CHANNELS)
    for channel, value in shifts.items():
        shift[channel] = value
    student = [torch.randn(tokens + 7 * index, CHANNELS, generator=generator) for index in range(batches)]
    teacher = [part + torch.randn(part.shape, generator=generator) + shift for part in student]
    return teacher, student


def validation(batches: int) -> list[int]:
    return [index for index in range(batches) if index % 4 == 3] or [batches - 1]


def mean_shift(teacher: Batches, student: Batches) -> torch.Tensor | None:
    shift = MeanShift(teacher[0].shape[-1], len(teacher))
    for index, (wanted, reached) in enumerate(zip(teacher, student, strict=True)):
        shift.add_batch(index, wanted, reached)
    return shift.bias()


def slow_mean_shift(teacher: Batches, student: Batches) -> list[float] | None:
    """Channel by channel, with squared errors computed as they are defined."""
    differences = [(a.double() - b.double()).numpy() for a, b in zip(teacher, student, strict=True)]
    checked = validation(len(differences))
    result, before, after = [], 0.0, 0.0
    for channel in range(CHANNELS):
        fit = np.concatenate([part[:, channel] for index, part in enumerate(differences) if index not in checked])
        check = np.concatenate([differences[index][:, channel] for index in checked])
        mu, variance = math.fsum(fit) / len(fit), np.var(fit)
        plain, corrected = math.fsum(check**2), math.fsum((check - mu) ** 2)
        before += plain
        if corrected < plain and mu**2 / (mu**2 + variance) > 1e-3:
            after += corrected
            result.append(math.fsum([*fit, *check]) / (len(fit) + len(check)))
        else:
            after += plain
            result.append(0.0)
    return result if (before - after) / before > 1e-3 else None


@pytest.mark.parametrize("batches", [2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("shifts", [SHIFTED, {5: 0.2}, {0: 3.0, 1: 0.04}], ids=["three", "one", "large"])
def test_against_the_slow_version(shifts: dict[int, float], batches: int) -> None:
    teacher, student = streams(batches, shifts, seed=batches)
    found, expected = mean_shift(teacher, student), slow_mean_shift(teacher, student)
    assert found is not None
    assert expected is not None
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scale", [0.021, 0.025, 0.03, 0.04, 0.05])
def test_the_thresholds(scale: float) -> None:
    """Shifts in every channel, near where they stop being signal, and where a norm stops being worth it."""
    decided = []
    for seed in range(6):
        teacher, student = streams(8, dict.fromkeys(range(CHANNELS), scale), tokens=1000, seed=seed)
        found, expected = mean_shift(teacher, student), slow_mean_shift(teacher, student)
        assert (found is None) == (expected is None)
        decided.append(found is None)
        if found is not None:
            torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-7)
    if scale in (0.021, 0.05):
        assert decided == [scale == 0.021] * 6


def test_finds_the_real_shift_and_nothing_else() -> None:
    found = mean_shift(*streams(8, SHIFTED, tokens=2000))
    assert found is not None
    for channel in range(CHANNELS):
        expected = SHIFTED.get(channel, 0.0)
        # Five deviations of the mean of 16,000 tokens.
        assert float(found[channel]) == pytest.approx(expected, abs=0.04 if expected else 0), channel


def test_noise_is_left_alone() -> None:
    for seed in range(10):
        assert mean_shift(*streams(8, {}, tokens=1000, seed=seed)) is None


def test_gain_is_relative_to_the_validation_error() -> None:
    """The same shift everywhere is worth it where the rest of the error is small, not where it is large."""
    teacher, student = streams(8, dict.fromkeys(range(CHANNELS), 0.08), tokens=1000)
    assert mean_shift(teacher, student) is not None
    for index in validation(8):
        noise = torch.randn(teacher[index].shape, generator=torch.Generator().manual_seed(index))
        teacher[index] += 3 * (noise - noise.mean(0))
    assert mean_shift(teacher, student) is None
    assert slow_mean_shift(teacher, student) is None


@pytest.mark.parametrize("batches", [2, 4, 8])
def test_a_shift_that_reverses_is_refused(batches: int) -> None:
    teacher, student = streams(batches, {5: 0.5})
    honest = mean_shift(teacher, student)
    assert honest is not None
    assert float(honest[5]) > 0.3
    for index in validation(batches):
        teacher[index][:, 5] = 2 * student[index][:, 5] - teacher[index][:, 5]
    found = mean_shift(teacher, student)
    assert found is None or float(found[5]) == 0


def test_a_shift_that_others_do_not_have_is_refused() -> None:
    """A fifth of it is there too: some of the shift would help, but all of it doesn't."""
    teacher, student = streams(4, {5: 1.0, 6: 1.0})
    teacher[3][:, 5] -= 0.8
    found = mean_shift(teacher, student)
    assert found is not None
    assert float(found[5]) == 0
    assert float(found[6]) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("batches", [2, 4, 9])
def test_validation_error_never_grows(batches: int) -> None:
    """In no channel, whatever the shifts are."""
    for seed in range(20):
        generator = np.random.default_rng(seed)
        shifts = dict(enumerate(generator.normal(size=CHANNELS) * 0.1))
        teacher, student = streams(batches, shifts, tokens=60, seed=seed)
        found = mean_shift(teacher, student)
        assert found is not None
        for index in range(batches):  # a shift of its own
            teacher[index] += torch.from_numpy(generator.normal(size=CHANNELS) * 0.1).float()
        found = mean_shift(teacher, student)
        if found is None:
            continue
        difference = torch.cat([teacher[index] - student[index] for index in validation(batches)]).double()
        before, after = difference.square().sum(0), (difference - found).square().sum(0)
        assert bool((after <= before * (1 + 1e-6)).all())
        assert float(after.sum()) < float(before.sum())


def test_one_batch_is_not_enough() -> None:
    assert mean_shift(*streams(1, SHIFTED)) is None


def test_equal_streams() -> None:
    _, student = streams(4, {})
    assert mean_shift(student, student) is None


@pytest.mark.parametrize("shifts", [SHIFTED, {5: 0.5}, {}], ids=["three", "one", "none"])
def test_stats(shifts: dict[int, float]) -> None:
    """Against the definitions, in float64, over all tokens at once."""
    teacher, student = streams(8, shifts)
    measured = MeanShift(CHANNELS, len(teacher))
    for index, (wanted, reached) in enumerate(zip(teacher, student, strict=True)):
        measured.add_batch(index, wanted, reached)
    stats, bias = measured.stats(), measured.bias()
    difference = (torch.cat(teacher).double() - torch.cat(student).double()).numpy()
    mean = difference.mean(0)
    assert stats.norm == pytest.approx(np.linalg.norm(mean), rel=1e-4)
    assert stats.signal_to_noise == pytest.approx((mean**2).sum() / difference.var(0).sum(), rel=1e-4)
    length = math.sqrt((torch.cat(teacher).double() ** 2).sum(1).mean())
    assert stats.relative_norm == pytest.approx(np.linalg.norm(mean) / length, rel=1e-4)
    assert stats.applied == (bias is not None) == bool(shifts)
    if bias is not None:
        assert stats.channels == int((bias != 0).sum())
        checked = np.concatenate([(teacher[index] - student[index]).double().numpy() for index in validation(8)])
        fitted = [
            (teacher[index] - student[index]).double().numpy() for index in range(8) if index not in validation(8)
        ]
        shift = np.where(bias.numpy() != 0, np.concatenate(fitted).mean(0), 0)
        gain = 1 - ((checked - shift) ** 2).sum() / (checked**2).sum()
        assert stats.gain == pytest.approx(gain, rel=1e-4)


def test_stats_without_any_error() -> None:
    measured = MeanShift(CHANNELS, 4)
    for index in range(4):
        measured.add_batch(index, torch.ones(3, CHANNELS), torch.ones(3, CHANNELS))
    assert measured.bias() is None
    assert (measured.stats().applied, measured.stats().gain, measured.stats().signal_to_noise) == (False, 0, 0)
