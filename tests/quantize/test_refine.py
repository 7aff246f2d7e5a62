"""Tuning by KL divergence: its loss, its windows, and that the best state stays, on a model that is only a table."""

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from d2q_edge.quantize.refine import RefinementLosses, Schedule, State, tune

VOCABULARY = 11
SCHEDULE = Schedule(micro_tokens=20)
"""At most three windows of six per forward pass."""


class Table:
    """Logits that depend on the current token alone: a table times a gain. Remembers what it was trained on."""

    def __init__(self, noise: float, offsets: Mapping[int, float] = {}) -> None:
        """Make a model; `offsets` are added to its measured KL divergence, by the measurement's number."""
        generator = torch.Generator().manual_seed(7)
        table = 2 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)
        table += noise * torch.randn(VOCABULARY, VOCABULARY, generator=generator)
        self.latent = nn.Parameter(table)
        self.gain = nn.Parameter(torch.ones(VOCABULARY))
        self.offsets, self.measured = offsets, 0
        self.trained: list[list[int]] = []
        self.largest = 0

    def parameters(self) -> dict[str, nn.Parameter]:
        return {"some.latent": self.latent, "some.gain": self.gain}

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        self.largest = max(self.largest, tokens.numel())
        if torch.is_grad_enabled():
            self.trained += tokens.tolist()
        one_hot = nn.functional.one_hot(tokens, VOCABULARY).float()
        states: torch.Tensor = one_hot @ self.latent * self.gain
        return states

    def log_probabilities(self, states: torch.Tensor) -> torch.Tensor:
        found = states.log_softmax(-1)
        if torch.is_grad_enabled():
            return found
        self.measured += 1
        return found - self.offsets.get(self.measured - 1, 0.0)

    def values(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self.parameters().items()}


class Scripted(Table):
    """A model whose measured losses are given: the original's probabilities, less a constant."""

    def __init__(self, original: Table, losses: list[float]) -> None:
        super().__init__(0.5)
        self.original, self.losses = original, losses
        self.seen: list[dict[str, torch.Tensor]] = []
        """The parameters at each measurement."""

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().states(tokens) if torch.is_grad_enabled() else self.original.states(tokens)

    def log_probabilities(self, states: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return super().log_probabilities(states)
        self.seen.append(self.values())
        return states.log_softmax(-1) - self.losses[len(self.seen) - 1]


def windows_of(count: int, context: int = 6) -> npt.NDArray[np.int64]:
    """All different."""
    windows = np.random.default_rng(count).integers(0, VOCABULARY, (count, context))
    for place in range(3):
        windows[:, place] = np.arange(count) // VOCABULARY**place % VOCABULARY
    return windows


def slow_divergence(original: Table, quantized: Table, windows: npt.NDArray[np.int64]) -> float:
    """Token by token, in float64."""
    total = []
    for token in windows.reshape(-1):
        logits = []
        for model in (original, quantized):
            values = {name: value.detach().double().numpy() for name, value in model.parameters().items()}
            row = values["some.latent"][token] * values["some.gain"]
            logits.append(row - np.log(np.exp(row).sum()))
        total.append(float((np.exp(logits[0]) * (logits[0] - logits[1])).sum()))
    return float(np.mean(total))


@pytest.mark.parametrize(("count", "validation"), [(2, [1]), (5, [4]), (32, [31]), (40, [31]), (70, [31, 63])])
def test_validation_windows(count: int, validation: list[int]) -> None:
    """The loss that is reported is that of the validation windows, and they are never trained on."""
    original, quantized, windows = Table(0), Table(0.5), windows_of(count)
    before = slow_divergence(original, quantized, windows[validation])
    losses = tune(original, quantized, windows, schedule=SCHEDULE)
    assert losses.before == pytest.approx(before, rel=1e-4)
    assert len(losses.passes) == SCHEDULE.passes == 6
    assert losses.after == min(losses.before, *losses.passes) < before
    assert losses.after == pytest.approx(slow_divergence(original, quantized, windows[validation]), rel=1e-4)
    trained = {tuple(window) for window in quantized.trained}
    assert trained.isdisjoint(tuple(windows[index].tolist()) for index in validation)
    assert original.trained == []
    # Every pass has new whole batches of the others.
    batch = min(16, count - len(validation))
    per_pass = (count - len(validation)) // batch * batch
    assert len(quantized.trained) == 6 * per_pass
    for index in range(6):
        seen = quantized.trained[index * per_pass : (index + 1) * per_pass]
        assert len({tuple(window) for window in seen}) == per_pass
    assert per_pass < 4 or quantized.trained[:per_pass] != quantized.trained[per_pass : 2 * per_pass]
    assert quantized.largest <= 20


def test_mean_over_windows_of_any_number() -> None:
    """Seven validation windows in parts of three, three and one."""
    original, quantized, windows = Table(0), Table(0.5), windows_of(7 * 32)
    expected = slow_divergence(original, quantized, windows[31::32])
    found = tune(original, quantized, windows, schedule=replace(SCHEDULE, passes=1))
    assert found.before == pytest.approx(expected, rel=1e-4)


def test_gradients_are_those_of_the_mean_over_the_batch() -> None:
    """Those of a single step, of seven windows in parts of three, three and one, at the parameters before it."""
    original, quantized, windows = Table(0), Table(0.5), windows_of(8)
    tune(original, quantized, windows, schedule=replace(SCHEDULE, passes=1))
    assert len(quantized.trained) == 7
    start = Table(0.5)
    for name, parameter in quantized.parameters().items():
        assert parameter.grad is not None
        for index in range(0, parameter.numel(), 5):
            flat, losses = start.parameters()[name].data.view(-1), []
            for step in (1e-2, -2e-2):
                flat[index] += step
                losses.append(slow_divergence(original, start, windows[:7]))
            flat[index] += 1e-2
            expected = (losses[0] - losses[1]) / 2e-2
            assert float(parameter.grad.view(-1)[index]) == pytest.approx(expected, rel=2e-2, abs=2e-5), name
    assert all(parameter.grad is None for parameter in original.parameters().values())


@pytest.mark.slow
def test_learns() -> None:
    """What only Adam could have done in that many steps, codes farther than the rest."""
    original, quantized = Table(0), Table(0.3)
    before = quantized.values()
    losses = tune(original, quantized, windows_of(1100), schedule=SCHEDULE)
    assert losses.after < 0.2 * losses.before
    travel = {name: float((value - before[name]).abs().max()) for name, value in quantized.values().items()}
    steps = 6 * (1066 // 16)
    assert travel["some.gain"] < 1.2 * steps * SCHEDULE.scale_rate / 2
    assert 0.005 < travel["some.gain"] < travel["some.latent"] < 1.2 * SCHEDULE.code_travel


@pytest.mark.parametrize(("steps", "rate"), [(1000, 0.033), (200, 0.165), (100, 0.2), (1, 0.2)])
def test_rates_follow_a_cosine(steps: int, rate: float) -> None:
    """From the full rate to none over all steps."""
    found = [Schedule().rates(step, steps) for step in range(steps)]
    cosine = (1 + np.cos(np.pi * np.arange(steps) / steps)) / 2
    np.testing.assert_allclose(found, cosine[:, None] * [1e-3, rate], rtol=1e-6, atol=1e-9)


def test_the_rates_are_used() -> None:
    """Where a gradient keeps its sign, Adam moves by the sum of the rates, and nowhere farther: two steps."""
    quantized = Table(0.5)
    before, schedule = quantized.values(), replace(SCHEDULE, passes=2, code_rate=10.0, code_travel=0.01)
    tune(Table(0), quantized, windows_of(17), schedule=schedule)
    for name, rate in (("some.gain", 1e-3), ("some.latent", 0.01)):
        travel = float((quantized.values()[name] - before[name]).abs().max())
        assert travel == pytest.approx(rate * (1 + (1 + math.cos(math.pi / 2)) / 2), rel=0.02)


def test_without_codes() -> None:
    class Fixed(Table):
        def parameters(self) -> dict[str, nn.Parameter]:
            return {"some.gain": self.gain}

    quantized = Fixed(0.5)
    before, latent = quantized.values(), quantized.latent.detach().clone()
    tune(Table(0), quantized, windows_of(17), schedule=replace(SCHEDULE, passes=1))
    assert torch.equal(quantized.latent, latent)
    travel = float((quantized.values()["some.gain"] - before["some.gain"]).abs().max())
    assert travel == pytest.approx(1e-3, rel=0.01)


def assert_kept(quantized: Scripted, best: int) -> None:
    """The model is in the state of that measurement, and of no earlier one."""
    for name, value in quantized.values().items():
        assert [torch.equal(value, state[name]) for state in quantized.seen].index(True) == best


@pytest.mark.parametrize(
    ("losses", "best"),
    [([1.0, 1.1, 1.2], 0), ([1.0, 0.9, 0.95, 0.97], 1), ([1.0, 2.0, 0.5, 0.6], 2), ([1.0, 0.9, 0.8], 2)],
)
def test_the_best_state_stays(losses: list[float], best: int) -> None:
    original = Table(0)
    quantized = Scripted(original, losses)
    found = tune(original, quantized, windows_of(20), schedule=replace(SCHEDULE, passes=len(losses) - 1))
    assert [found.before, *found.passes] == pytest.approx(losses, rel=1e-5)
    assert found.after == pytest.approx(losses[best], rel=1e-5)
    assert_kept(quantized, best)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number(bad: float) -> None:
    original = Table(0)
    quantized = Scripted(original, [1.0, bad, 0.8, bad])
    found = tune(original, quantized, windows_of(20), schedule=replace(SCHEDULE, passes=3))
    assert found.after == pytest.approx(0.8, rel=1e-5)
    assert_kept(quantized, 2)


def test_worse_everywhere_changes_nothing() -> None:
    quantized = Table(0.01)
    before = quantized.values()
    schedule = replace(SCHEDULE, scale_rate=50.0, code_rate=500.0, code_travel=1e6)
    losses = tune(Table(0), quantized, windows_of(20), schedule=schedule)
    assert min(losses.passes) > losses.before == losses.after
    assert all(torch.equal(value, before[name]) for name, value in quantized.values().items())


def test_the_seed_decides() -> None:
    results = []
    for seed in (0, 0, 1):
        quantized = Table(0.5)
        tune(Table(0), quantized, windows_of(40), seed, schedule=SCHEDULE)
        results.append((quantized.trained, quantized.values()["some.latent"]))
    assert results[0][0] == results[1][0] != results[2][0]
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][1], results[2][1])


def copied(state: State) -> State:
    """As it would come back from a file."""
    losses = RefinementLosses(state.losses.before, list(state.losses.passes))
    return State(losses, {name: tensor.clone() for name, tensor in state.tensors.items()})


@pytest.mark.parametrize("best", [1, 4], ids=["best_state_before", "best_state_after"])
def test_resumes_after_any_pass(best: int) -> None:
    """A student made anew gets to the same end, to the last bit, and sees only the windows that were left."""
    # Two validation windows at a time; an offset of minus one makes a pass the best one.
    whole, kept = Table(0.5, {best: -1.0}), list[State]()
    losses = tune(Table(0), whole, windows_of(64), 3, schedule=SCHEDULE, keep=lambda state: kept.append(copied(state)))
    assert losses.after < 0, "the pass that was made the best one"
    assert [len(state.losses.passes) for state in kept] == [1, 2, 3, 4, 5]
    per_pass = len(whole.trained) // 6
    for done, state in enumerate(kept, 1):
        # There is no measurement before the first pass of a resumed run.
        again, later = Table(0.9, {best - done - 1: -1.0}), list[State]()
        resumed = tune(Table(0), again, windows_of(64), 3, schedule=SCHEDULE, state=copied(state), keep=later.append)
        assert resumed == losses
        assert again.trained == whole.trained[done * per_pass :]
        assert all(torch.equal(value, whole.values()[name]) for name, value in again.values().items())
        assert len(later) == 5 - done


def test_one_window_is_only_measured() -> None:
    original, quantized, windows = Table(0), Table(0.5), windows_of(1)
    losses = tune(original, quantized, windows)
    assert losses.passes == []
    assert losses.before == losses.after == pytest.approx(slow_divergence(original, quantized, windows), rel=1e-4)
    assert quantized.trained == []
