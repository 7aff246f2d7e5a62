"""Tune the parameters of quantized layers by gradient descent on any loss, such as a KL divergence.

Adam with a cosine schedule tunes block scales (their logarithms), norm weights and biases, and the codes (latent
points, see tunable.py). As Adam's step has a fixed size, the sum of all steps, Schedule.code_travel, decides how
consistently the gradients must ask for another entry before a code changes: with half of it hardly any code changes;
with three times as much one in fourteen does, and the validation loss rises (measured on qwen3-34m).

The loss is a mean over items, such as windows of text. Some items are for validation: their loss is measured after
every pass, and in the end the best state, which may be the first, is restored.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from d2q_edge.quantize.adam import Moments, corrected
from d2q_edge.quantize.captured_step import CapturedStep
from d2q_edge.quantize.collective import SINGLE_PROCESS, Collective
from d2q_edge.utils.progress import Progress

EARLY_STOPPING_EVERY = 32
"""One item in so many, or the last one, isn't tuned on; its loss chooses the best pass."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to tune.

    Attributes:
        passes: over the items.
        batch: items per step.
        scale_rate: initial learning rate of everything but the codes.
        code_travel: how far a code's latent point can move in all, in units of d.
        code_rate: the same for one step: few steps don't tell which codes should change.
    """

    passes: int = 12
    batch: int = 16
    scale_rate: float = 1e-3
    code_travel: float = 16.5
    code_rate: float = 0.2

    def rates(self, step: int, steps: int) -> tuple[float, float]:
        """Return the learning rates of a step out of so many: of everything but the codes, and of the codes."""
        cosine = (1 + math.cos(math.pi * (step / steps))) / 2
        # The mean of the cosine schedule is one half.
        return self.scale_rate * cosine, min(2 * self.code_travel / steps, self.code_rate) * cosine


SCHEDULE = Schedule()


class Tunable(Protocol):
    """A layer that is tuned; its nn.Parameters collect gradients."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return what a backward pass collects gradients for."""

    def tuned(self) -> dict[str, torch.Tensor]:
        """Return what may be changed in place before `refresh`, float32, by name; "latent" are codes."""

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the gradient of each of `tuned`, float32, with its name."""

    def refresh(self) -> None:
        """Make what forward passes use of what was changed."""

    def kept(self) -> dict[str, torch.Tensor]:
        """Return a copy, on the CPU, that `restore` makes the present layer of."""

    def restore(self, kept: dict[str, torch.Tensor], /) -> None:
        """Go back to what `kept` returned."""


class Objective(Protocol):
    """What is tuned, and the loss of items, which are numbered from 0."""

    def loss(self, items: Sequence[int], /) -> float:
        """Return the sum of the losses of this process's share of the items."""

    def prepare(self, items: Sequence[int], /) -> None:
        """Put what `backward` reads of the items to where it was for the last ones."""

    def backward(self) -> None:
        """Add this process's share of the gradients of the mean loss of the prepared items."""


@dataclass
class RefinementLosses:
    """Losses of the validation items: before the first pass, and after each pass."""

    before: float
    passes: list[float] = field(default_factory=list)

    @property
    def after(self) -> float:
        """The loss of the state that was kept."""
        return min([self.before, *self.passes])


@dataclass
class State:
    """What a run needs to resume after a pass.

    Attributes:
        losses: so far.
        tensors: everything that is tuned by LAYER.NAME, float32; Adam's moments LAYER.NAME.mean and LAYER.NAME.square,
            bfloat16; and LAYER.NAME.best, what the layer kept in the best state.
    """

    losses: RefinementLosses
    tensors: dict[str, torch.Tensor]


def tune(
    objective: Objective,
    layers: Mapping[str, Tunable],
    count: int,
    seed: int = 0,
    *,
    schedule: Schedule = SCHEDULE,
    state: State | None = None,
    keep: Callable[[State], None] = lambda _: None,
    group: Collective = SINGLE_PROCESS,
    capture: bool = False,
    quiet: bool = False,
) -> RefinementLosses:
    """Tune layers in place.

    Args:
        objective: the loss, and its gradients.
        layers: by name.
        count: number of items.
        seed: of the order of the items.
        schedule: how long and how fast.
        state: of an interrupted run with the same arguments, to resume from; its tensors are copied.
        keep: called with the state after every pass but the last; the next pass changes the state's tensors.
        group: processes that share the items, and tune the same layers in the same way.
        capture: replay steps as a CUDA graph: all of a step runs on a GPU, and waits for nothing.
        quiet: show no progress.
    """
    held = min(EARLY_STOPPING_EVERY, count)
    check = [item for item in range(count) if item % EARLY_STOPPING_EVERY == held - 1]
    train = torch.tensor([item for item in range(count) if item % EARLY_STOPPING_EVERY != held - 1])
    if not len(train):
        return RefinementLosses(_mean_loss(objective, check, group))
    batch = min(schedule.batch, len(train))
    per_pass = len(train) // batch
    steps = schedule.passes * per_pass
    moments = {name: {own: Moments(value) for own, value in layer.tuned().items()} for name, layer in layers.items()}
    take_step = _Step(objective, layers, moments, group, capture=capture)
    if state is None:
        losses = RefinementLosses(_mean_loss(objective, check, group))
        best = {name: layer.kept() for name, layer in layers.items()}
    else:
        losses = state.losses
        best = _restore(state, layers, moments)
    generator = torch.Generator().manual_seed(seed)
    done = len(losses.passes)
    with Progress("Refining", steps, initial=done * per_pass, quiet=quiet) as progress:
        for number in range(schedule.passes):
            order = torch.randperm(len(train), generator=generator)[: per_pass * batch].view(per_pass, batch)
            if number < done:
                continue
            for step, chosen in enumerate(order, number * per_pass):
                take_step(train[chosen].tolist(), schedule.rates(step, steps), step + 1)
                progress.update()
            losses.passes.append(_mean_loss(objective, check, group))
            progress.set_status(f"loss {losses.passes[-1]:.4f}")
            if losses.passes[-1] == losses.after:
                best = {name: layer.kept() for name, layer in layers.items()}
            if number + 1 < schedule.passes:
                keep(State(losses, _tensors(layers, moments, best)))
    for name, layer in layers.items():
        layer.restore(best[name])
    return losses


class _Step:
    """A step of the descent: gradients of some items, and everything moved by them."""

    def __init__(
        self,
        objective: Objective,
        layers: Mapping[str, Tunable],
        moments: Mapping[str, Mapping[str, Moments]],
        group: Collective,
        *,
        capture: bool,
    ) -> None:
        self._objective, self._layers, self._moments, self._group = objective, layers, moments, group
        device = next(iter(next(iter(layers.values())).tuned().values())).device
        # Rate and correction of everything but the codes, and of the codes.
        self._rates = torch.zeros(2, 2, device=device)
        self._run = CapturedStep(self._compute, capture=capture)

    def __call__(self, items: Sequence[int], rates: tuple[float, float], number: int) -> None:
        self._objective.prepare(items)
        self._rates.copy_(torch.tensor([corrected(rate, number) for rate in rates]))
        self._run()

    def _compute(self) -> None:
        self._zero_gradients()
        self._objective.backward()
        others, codes = self._rates.unbind()
        for name, layer in self._layers.items():
            # Gradients of only one layer at a time are in memory in float32.
            self._group.all_reduce([parameter.grad for parameter in layer.parameters() if parameter.grad is not None])
            tuned = layer.tuned()
            for own, gradient in layer.gradients():
                self._moments[name][own].step(tuned[own], gradient, *(codes if own == "latent" else others))
            layer.refresh()

    def _zero_gradients(self) -> None:
        """Begin with zeros; where no token comes by, such as an expert's, they stay."""
        for layer in self._layers.values():
            for parameter in layer.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                else:
                    parameter.grad.zero_()


def _tensors(
    layers: Mapping[str, Tunable],
    moments: Mapping[str, Mapping[str, Moments]],
    best: Mapping[str, Mapping[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """Return the tensors of a State."""
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        for own, value in layer.tuned().items():
            full, moment = f"{name}.{own}", moments[name][own]
            tensors |= {full: value, f"{full}.mean": moment.mean, f"{full}.square": moment.square}
        tensors |= {f"{name}.{own}.best": value for own, value in best[name].items()}
    return tensors


def _restore(
    state: State, layers: Mapping[str, Tunable], moments: Mapping[str, Mapping[str, Moments]]
) -> dict[str, dict[str, torch.Tensor]]:
    """Restore layers and moments from a State; return what the layers kept in the best one."""
    best: dict[str, dict[str, torch.Tensor]] = {}
    for name, layer in layers.items():
        for own, value in layer.tuned().items():
            full, moment = f"{name}.{own}", moments[name][own]
            value.copy_(state.tensors[full])
            moment.mean.copy_(state.tensors[f"{full}.mean"])
            moment.square.copy_(state.tensors[f"{full}.square"])
        best[name] = {own: state.tensors[f"{name}.{own}.best"].clone() for own in layer.tuned()}
        layer.refresh()
    return best


def _mean_loss(objective: Objective, items: Sequence[int], group: Collective) -> float:
    total = torch.tensor([objective.loss(items)], dtype=torch.float64)
    group.all_reduce([total])
    return float(total) / len(items)
