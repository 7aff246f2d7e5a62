"""Tuning by KL divergence: its loss, its windows, and that the best state stays, on a model that is only a table."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from d2q_edge.model.whole_model import WholeModel
from d2q_edge.quantize import refine
from d2q_edge.quantize.refine import Progress, State, tune

VOCABULARY = 11


class Table(WholeModel):
    """Logits that depend on the current token alone: a table times a gain. Remembers what it was trained on."""

    def __init__(self, noise: float) -> None:
        generator = torch.Generator().manual_seed(7)
        table = 2 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)
        table += noise * torch.randn(VOCABULARY, VOCABULARY, generator=generator)
        self.latent = nn.Parameter(table)
        self.gain = nn.Parameter(torch.ones(VOCABULARY))
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
        return states.log_softmax(-1)

    def values(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self.parameters().items()}


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


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of at most three windows of six."""
    monkeypatch.setattr(refine, "MICRO_TOKENS", 20)


@pytest.mark.parametrize(("count", "held"), [(2, [1]), (5, [4]), (32, [31]), (40, [31]), (70, [31, 63])])
def test_held_back_windows(count: int, held: list[int]) -> None:
    """The loss that is reported is that of the held-back windows, and they are never trained on."""
    original, quantized, windows = Table(0), Table(0.5), windows_of(count)
    before = slow_divergence(original, quantized, windows[held])
    progress = tune(original, quantized, windows)
    assert progress.before == pytest.approx(before, rel=1e-4)
    assert len(progress.passes) == refine.PASSES
    assert progress.after == min(progress.before, *progress.passes) < before
    assert progress.after == pytest.approx(slow_divergence(original, quantized, windows[held]), rel=1e-4)
    trained = {tuple(window) for window in quantized.trained}
    assert trained.isdisjoint(tuple(windows[index].tolist()) for index in held)
    assert original.trained == []
    # Every pass has new whole batches of the others.
    batch = min(16, count - len(held))
    per_pass = (count - len(held)) // batch * batch
    assert len(quantized.trained) == refine.PASSES * per_pass
    for index in range(refine.PASSES):
        seen = quantized.trained[index * per_pass : (index + 1) * per_pass]
        assert len({tuple(window) for window in seen}) == per_pass
    assert per_pass < 4 or quantized.trained[:per_pass] != quantized.trained[per_pass : 2 * per_pass]
    assert quantized.largest <= 20


def test_mean_over_windows_of_any_number() -> None:
    """Seven windows in parts of three, three and one."""
    original, quantized, windows = Table(0), Table(0.5), windows_of(7)
    found = refine._mean_loss(original, quantized, torch.from_numpy(windows))
    assert found == pytest.approx(slow_divergence(original, quantized, windows), rel=1e-4)


def test_gradients_are_those_of_the_mean_over_the_batch() -> None:
    original, quantized, windows = Table(0), Table(0.5), windows_of(7)
    refine._backward(original, quantized, torch.from_numpy(windows))
    for name, parameter in quantized.parameters().items():
        assert parameter.grad is not None
        for index in range(0, parameter.numel(), 5):
            flat, losses = parameter.data.view(-1), []
            for step in (1e-2, -2e-2):
                flat[index] += step
                losses.append(slow_divergence(original, quantized, windows))
            flat[index] += 1e-2
            expected = (losses[0] - losses[1]) / 2e-2
            assert float(parameter.grad.view(-1)[index]) == pytest.approx(expected, rel=2e-2, abs=2e-5), name
    assert all(parameter.grad is None for parameter in original.parameters().values())


def test_learns() -> None:
    """What only Adam could have done in that many steps, codes farther than the rest."""
    original, quantized = Table(0), Table(0.3)
    before = quantized.values()
    progress = tune(original, quantized, windows_of(1100))
    assert progress.after < 0.2 * progress.before
    travel = {name: float((value - before[name]).abs().max()) for name, value in quantized.values().items()}
    steps = refine.PASSES * (1066 // 16)
    assert travel["some.gain"] < 1.2 * steps * refine.SCALE_RATE / 2
    assert 0.005 < travel["some.gain"] < travel["some.latent"] < 1.2 * refine.CODE_TRAVEL


def test_rates_follow_a_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the full rate to none over all passes: 12 steps of each of six."""
    rates: list[list[float]] = []
    step = torch.optim.Adam.step

    def spy(optimizer: torch.optim.Adam) -> None:
        rates.append([group["lr"] for group in optimizer.param_groups])
        step(optimizer)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    monkeypatch.setattr(refine, "CODE_RATE", 10.0)
    tune(Table(0), Table(0.5), windows_of(200))
    cosine = (1 + np.cos(np.pi * np.arange(72) / 72)) / 2
    np.testing.assert_allclose(rates, cosine[:, None] * [1e-3, 2 * 16.5 / 72], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("steps", "rate"), [(1000, 0.033), (200, 0.165), (100, 0.2), (1, 0.2)])
def test_rates(steps: int, rate: float) -> None:
    parameters = {name: nn.Parameter(torch.zeros(1)) for name in ("a.latent", "a.log_scales", "b.gain", "latent.shift")}
    others, codes = refine._groups(parameters, steps)
    assert codes["peak"] == pytest.approx(rate)
    assert others["peak"] == pytest.approx(1e-3)
    assert codes["params"] == [parameters["a.latent"]]
    assert others["params"] == [parameters[name] for name in ("a.log_scales", "b.gain", "latent.shift")]
    del parameters["a.latent"]
    assert len(refine._groups(parameters, steps)) == 1


def losses_of(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> list[dict[str, torch.Tensor]]:
    """Let the held-back losses be these; returns the states they are measured at."""
    states: list[dict[str, torch.Tensor]] = []

    def measured(_original: Table, quantized: Table, _tokens: torch.Tensor) -> float:
        states.append(quantized.values())
        return values[len(states) - 1]

    monkeypatch.setattr(refine, "_mean_loss", measured)
    monkeypatch.setattr(refine, "PASSES", len(values) - 1)
    return states


@pytest.mark.parametrize(
    ("losses", "best"),
    [([1.0, 1.1, 1.2], 0), ([1.0, 0.9, 0.95, 0.97], 1), ([1.0, 2.0, 0.5, 0.6], 2), ([1.0, 0.9, 0.8], 2)],
)
def test_the_best_state_stays(monkeypatch: pytest.MonkeyPatch, losses: list[float], best: int) -> None:
    quantized = Table(0.5)
    states = losses_of(monkeypatch, losses)
    progress = tune(Table(0), quantized, windows_of(20))
    assert progress == Progress(losses[0], losses[1:])
    assert progress.after == losses[best]
    for name, value in quantized.values().items():
        assert [torch.equal(value, state[name]) for state in states].index(True) == best
        assert torch.equal(value, states[best][name])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number(monkeypatch: pytest.MonkeyPatch, bad: float) -> None:
    quantized = Table(0.5)
    states = losses_of(monkeypatch, [1.0, bad, 0.8, bad])
    assert tune(Table(0), quantized, windows_of(20)).after == 0.8
    assert all(torch.equal(value, states[2][name]) for name, value in quantized.values().items())


def test_worse_everywhere_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "SCALE_RATE", 50.0)
    monkeypatch.setattr(refine, "CODE_RATE", 500.0)
    monkeypatch.setattr(refine, "CODE_TRAVEL", 1e6)
    quantized = Table(0.01)
    before = quantized.values()
    progress = tune(Table(0), quantized, windows_of(20))
    assert min(progress.passes) > progress.before == progress.after
    assert all(torch.equal(value, before[name]) for name, value in quantized.values().items())


def test_the_seed_decides() -> None:
    results = []
    for seed in (0, 0, 1):
        quantized = Table(0.5)
        tune(Table(0), quantized, windows_of(40), seed)
        results.append((quantized.trained, quantized.values()["some.latent"]))
    assert results[0][0] == results[1][0] != results[2][0]
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][1], results[2][1])


def copied(state: State) -> State:
    """As it would come back from a file."""
    progress = Progress(state.progress.before, list(state.progress.passes))
    return State(progress, {name: tensor.clone() for name, tensor in state.tensors.items()})


@pytest.mark.parametrize("best", [1, 4], ids=["best_state_before", "best_state_after"])
def test_goes_on_after_any_pass(monkeypatch: pytest.MonkeyPatch, best: int) -> None:
    """A student made anew gets to the same end, to the last bit, and sees only the windows that were left."""
    measure, measured = refine._mean_loss, [0]

    def with_a_best_pass(original: Table, quantized: Table, tokens: torch.Tensor) -> float:
        measured[0] += 1
        return measure(original, quantized, tokens) - (measured[0] == best + 1)

    monkeypatch.setattr(refine, "_mean_loss", with_a_best_pass)
    whole, kept = Table(0.5), list[State]()
    progress = tune(Table(0), whole, windows_of(100), 3, keep=lambda state: kept.append(copied(state)))
    assert progress.after < 0, "the pass that was made the best one"
    assert [len(state.progress.passes) for state in kept] == [1, 2, 3, 4, 5]
    per_pass = len(whole.trained) // 6
    for done, state in enumerate(kept, 1):
        again, later = Table(0.9), list[State]()
        measured[0] = done + 1
        assert tune(Table(0), again, windows_of(100), 3, state=copied(state), keep=later.append) == progress
        assert again.trained == whole.trained[done * per_pass :]
        assert all(torch.equal(value, whole.values()[name]) for name, value in again.values().items())
        assert len(later) == 5 - done


def test_one_window_is_only_measured() -> None:
    original, quantized, windows = Table(0), Table(0.5), windows_of(1)
    progress = tune(original, quantized, windows)
    assert progress.passes == []
    assert progress.before == progress.after == pytest.approx(slow_divergence(original, quantized, windows), rel=1e-4)
    assert quantized.trained == []
