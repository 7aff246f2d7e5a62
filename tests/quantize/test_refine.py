"""Tuning: its items, its rates, and that the best state stays, on a model that is only a table."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from d2q_edge.quantize.kl_divergence import kl_divergence
from d2q_edge.quantize.refine import RefinementLosses, Schedule, State, tune

VOCABULARY = 11
SCHEDULE = Schedule()


class Table:
    """Logits that depend on the current token alone: a table times a gain."""

    def __init__(self, noise: float) -> None:
        generator = torch.Generator().manual_seed(7)
        table = 2 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)
        table += noise * torch.randn(VOCABULARY, VOCABULARY, generator=generator)
        self.latent = nn.Parameter(table)
        self.gain = nn.Parameter(torch.ones(VOCABULARY))
        self.refreshed = 0

    def parameters(self) -> Iterator[nn.Parameter]:
        yield from (self.latent, self.gain)

    def tuned(self) -> dict[str, torch.Tensor]:
        return {"latent": self.latent.detach(), "gain": self.gain.detach()}

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in (("latent", self.latent), ("gain", self.gain)):
            assert parameter.grad is not None
            yield name, parameter.grad

    def refresh(self) -> None:
        self.refreshed += 1

    def kept(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.tuned().items()}

    def restore(self, kept: dict[str, torch.Tensor]) -> None:
        for name, value in self.tuned().items():
            value.copy_(kept[name])

    def log_probabilities(self, tokens: torch.Tensor) -> torch.Tensor:
        one_hot = nn.functional.one_hot(tokens, VOCABULARY).float()
        return (one_hot @ self.latent * self.gain).log_softmax(-1)


class Divergence:
    """The KL divergence of windows; remembers what it was trained on. Measured losses can be given."""

    def __init__(
        self,
        original: Table,
        quantized: Table,
        windows: npt.NDArray[np.int64],
        *,
        offsets: Mapping[int, float] = {},
        losses: Sequence[float] = (),
    ) -> None:
        """`offsets` are added to the measured loss, by the measurement's number; `losses` replace it."""
        self.original, self.quantized, self.windows = original, quantized, torch.from_numpy(windows)
        self.offsets, self.losses, self.items = offsets, losses, list[int]()
        self.trained: list[int] = []
        self.seen: list[dict[str, torch.Tensor]] = []
        """The parameters at each measurement."""

    def _mean(self, items: Sequence[int]) -> torch.Tensor:
        tokens = self.windows[list(items)]
        found = self.quantized.log_probabilities(tokens)
        return kl_divergence(self.original.log_probabilities(tokens).detach(), found).mean()

    @torch.no_grad()
    def loss(self, items: Sequence[int]) -> float:
        number = len(self.seen)
        self.seen.append(self.quantized.kept())
        mean = self.losses[number] if self.losses else float(self._mean(items)) + self.offsets.get(number, 0.0)
        return mean * len(items)

    def prepare(self, items: Sequence[int]) -> None:
        self.items = list(items)

    def backward(self) -> None:
        self.trained += self.items
        self._mean(self.items).backward()


def run(
    objective: Divergence, seed: int = 0, *, schedule: Schedule = SCHEDULE, layer: Any = None, **more: Any
) -> RefinementLosses:
    layers = {"some": layer or objective.quantized}
    return tune(objective, layers, len(objective.windows), seed, schedule=schedule, **more)


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
            values = {name: value.double().numpy() for name, value in model.tuned().items()}
            row = values["latent"][token] * values["gain"]
            logits.append(row - np.log(np.exp(row).sum()))
        total.append(float((np.exp(logits[0]) * (logits[0] - logits[1])).sum()))
    return float(np.mean(total))


@pytest.mark.parametrize(("count", "validation"), [(2, [1]), (5, [4]), (32, [31]), (40, [31]), (70, [31, 63])])
def test_validation_items(count: int, validation: list[int]) -> None:
    """The loss that is reported is that of the validation items, and they are never trained on."""
    original, quantized, windows = Table(0), Table(0.5), windows_of(count)
    before = slow_divergence(original, quantized, windows[validation])
    objective = Divergence(original, quantized, windows)
    losses = run(objective)
    assert losses.before == pytest.approx(before, rel=1e-4)
    assert len(losses.passes) == SCHEDULE.passes
    assert losses.after == min(losses.before, *losses.passes) < before
    assert losses.after == pytest.approx(slow_divergence(original, quantized, windows[validation]), rel=1e-4)
    assert set(objective.trained).isdisjoint(validation)
    # Every pass has new whole batches of the others.
    batch = min(16, count - len(validation))
    per_pass = (count - len(validation)) // batch * batch
    assert len(objective.trained) == SCHEDULE.passes * per_pass
    for index in range(SCHEDULE.passes):
        assert len(set(objective.trained[index * per_pass : (index + 1) * per_pass])) == per_pass
    assert per_pass < 4 or objective.trained[:per_pass] != objective.trained[per_pass : 2 * per_pass]


@pytest.mark.slow
def test_learns() -> None:
    """What only Adam could have done in that many steps, codes farther than the rest."""
    original, quantized = Table(0), Table(0.3)
    before = quantized.kept()
    losses = run(Divergence(original, quantized, windows_of(1100)), schedule=replace(SCHEDULE, passes=6))
    assert losses.after < 0.2 * losses.before
    travel = {name: float((value - before[name]).abs().max()) for name, value in quantized.tuned().items()}
    steps = 6 * (1066 // 16)
    assert quantized.refreshed == steps
    assert travel["gain"] < 1.2 * steps * SCHEDULE.scale_rate / 2
    assert 0.005 < travel["gain"] < travel["latent"] < 1.2 * SCHEDULE.code_travel


@pytest.mark.parametrize(("steps", "rate"), [(1000, 0.033), (200, 0.165), (100, 0.2), (1, 0.2)])
def test_rates_follow_a_cosine(steps: int, rate: float) -> None:
    """From the full rate to none over all steps."""
    found = [Schedule().rates(step, steps) for step in range(steps)]
    cosine = (1 + np.cos(np.pi * np.arange(steps) / steps)) / 2
    np.testing.assert_allclose(found, cosine[:, None] * [1e-3, rate], rtol=1e-6, atol=1e-9)


def test_the_rates_are_used() -> None:
    """Where a gradient keeps its sign, Adam moves by the sum of the rates, and nowhere farther: two steps."""
    quantized = Table(0.5)
    before, schedule = quantized.kept(), replace(SCHEDULE, passes=2, code_rate=10.0, code_travel=0.01)
    run(Divergence(Table(0), quantized, windows_of(17)), schedule=schedule)
    for name, rate in (("gain", 1e-3), ("latent", 0.01)):
        travel = float((quantized.tuned()[name] - before[name]).abs().max())
        assert travel == pytest.approx(rate * (1 + (1 + math.cos(math.pi / 2)) / 2), rel=0.02)


def test_what_gets_no_gradient_stays() -> None:
    """As an expert that no token is routed to: its gradient is zero, not missing."""
    idle = Table(0.5)
    before, objective = idle.kept(), Divergence(Table(0), Table(0.5), windows_of(17))
    tune(objective, {"busy": objective.quantized, "idle": idle}, 17, schedule=replace(SCHEDULE, passes=2))
    assert all(torch.equal(value, before[name]) for name, value in idle.tuned().items())


@pytest.mark.parametrize(
    ("losses", "best"),
    [([1.0, 1.1, 1.2], 0), ([1.0, 0.9, 0.95, 0.97], 1), ([1.0, 2.0, 0.5, 0.6], 2), ([1.0, 0.9, 0.8], 2)],
)
def test_the_best_state_stays(losses: list[float], best: int) -> None:
    objective = Divergence(Table(0), Table(0.5), windows_of(20), losses=losses)
    found = run(objective, schedule=replace(SCHEDULE, passes=len(losses) - 1))
    assert [found.before, *found.passes] == pytest.approx(losses, rel=1e-5)
    assert found.after == pytest.approx(losses[best], rel=1e-5)
    assert_kept(objective, best)


def assert_kept(objective: Divergence, best: int) -> None:
    """The model is in the state of that measurement, and of no earlier one."""
    for name, value in objective.quantized.tuned().items():
        assert [torch.equal(value, state[name]) for state in objective.seen].index(True) == best


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number(bad: float) -> None:
    objective = Divergence(Table(0), Table(0.5), windows_of(20), losses=[1.0, bad, 0.8, bad])
    found = run(objective, schedule=replace(SCHEDULE, passes=3))
    assert found.after == pytest.approx(0.8, rel=1e-5)
    assert_kept(objective, 2)


def test_worse_everywhere_changes_nothing() -> None:
    quantized = Table(0.01)
    before = quantized.kept()
    schedule = replace(SCHEDULE, scale_rate=50.0, code_rate=500.0, code_travel=1e6)
    losses = run(Divergence(Table(0), quantized, windows_of(20)), schedule=schedule)
    assert min(losses.passes) > losses.before == losses.after
    assert all(torch.equal(value, before[name]) for name, value in quantized.tuned().items())


def test_the_seed_decides() -> None:
    results = []
    for seed in (0, 0, 1):
        objective = Divergence(Table(0), Table(0.5), windows_of(40))
        run(objective, seed)
        results.append((objective.trained, objective.quantized.kept()["latent"]))
    assert results[0][0] == results[1][0] != results[2][0]
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][1], results[2][1])


def copied(state: State) -> State:
    """As it would come back from a file."""
    losses = RefinementLosses(state.losses.before, list(state.losses.passes))
    return State(losses, {name: tensor.clone() for name, tensor in state.tensors.items()})


@pytest.mark.parametrize("best", [1, 4], ids=["best_state_before", "best_state_after"])
def test_resumes_after_any_pass(best: int) -> None:
    """A student made anew gets to the same end, to the last bit, and sees only the items that were left."""
    schedule, kept = replace(SCHEDULE, passes=6), list[State]()
    # An offset of minus one makes a pass the best one.
    whole = Divergence(Table(0), Table(0.5), windows_of(64), offsets={best: -1.0})
    losses = run(whole, 3, schedule=schedule, keep=lambda state: kept.append(copied(state)))
    assert losses.after < 0, "the pass that was made the best one"
    assert [len(state.losses.passes) for state in kept] == [1, 2, 3, 4, 5]
    per_pass = len(whole.trained) // 6
    for done, state in enumerate(kept, 1):
        later = list[State]()
        # There is no measurement before the first pass of a resumed run.
        again = Divergence(Table(0), Table(0.9), windows_of(64), offsets={best - done - 1: -1.0})
        assert run(again, 3, schedule=schedule, state=copied(state), keep=later.append) == losses
        assert again.trained == whole.trained[done * per_pass :]
        end = whole.quantized.tuned()
        assert all(torch.equal(value, end[name]) for name, value in again.quantized.tuned().items())
        assert len(later) == 5 - done


def test_one_item_is_only_measured() -> None:
    original, quantized, windows = Table(0), Table(0.5), windows_of(1)
    losses = run(Divergence(original, quantized, windows))
    assert losses.passes == []
    assert losses.before == losses.after == pytest.approx(slow_divergence(original, quantized, windows), rel=1e-4)
