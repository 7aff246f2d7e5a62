"""Tune a quantized model by gradient descent on its KL divergence from the original model.

The loss is the mean of KL(original || quantized) of the next-token probabilities over all tokens. Adam with a cosine
schedule tunes block scales (their logarithms), norm weights and biases and, where they are free, the codes (latent
points, see tunable.py). As Adam's step has a fixed size, the sum of all steps, Schedule.code_travel, decides how
consistently the gradients must ask for another entry before a code changes: with half of it hardly any code changes;
with three times as much one in fourteen does, and the validation loss rises (measured on qwen3-34m).

Some windows are for validation: their loss is measured after every pass, and in the end the best state, which may be
the first, is restored.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from d2q_edge.quantize.kl_divergence import kl_divergence
from d2q_edge.utils.progress import Progress

EARLY_STOPPING_EVERY = 32
"""One window in so many, or the last one, isn't tuned on; its loss chooses the best pass."""
BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to tune.

    Attributes:
        passes: over the windows.
        batch: windows per step.
        micro_tokens: tokens per forward pass; gradients add up to a batch.
        scale_rate: initial learning rate of everything but the codes.
        code_travel: how far a code's latent point can move in all, in units of d.
        code_rate: the same for one step: few steps don't tell which codes should change.
    """

    passes: int = 6
    batch: int = 16
    micro_tokens: int = 4096
    scale_rate: float = 1e-3
    code_travel: float = 16.5
    code_rate: float = 0.2

    def rates(self, step: int, steps: int) -> tuple[float, float]:
        """Return the learning rates of a step out of so many: of everything but the codes, and of the codes."""
        cosine = (1 + math.cos(math.pi * (step / steps))) / 2
        # The mean of the cosine schedule is one half.
        return self.scale_rate * cosine, min(2 * self.code_travel / steps, self.code_rate) * cosine


SCHEDULE = Schedule()


class LanguageModel(Protocol):
    """A model as refinement uses it."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return all parameters that require gradients, by name."""

    def states(self, tokens: torch.Tensor, /) -> torch.Tensor:
        """Return the lm_head's inputs for tokens [windows, context]: [windows, context, hidden]."""

    def log_probabilities(self, states: torch.Tensor, /) -> torch.Tensor:
        """Return the log-probabilities of all next tokens: [..., vocabulary]."""


@dataclass
class RefinementLosses:
    """KL divergence on the validation windows, nats per token: before the first pass, and after each pass."""

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
        tensors: float32: every parameter NAME, Adam's moments NAME.mean and NAME.square, and NAME.best, the parameter
            in the best state.
    """

    losses: RefinementLosses
    tensors: dict[str, torch.Tensor]


def tune(
    original: LanguageModel,
    quantized: LanguageModel,
    windows: npt.NDArray[np.int64],
    seed: int = 0,
    *,
    schedule: Schedule = SCHEDULE,
    state: State | None = None,
    keep: Callable[[State], None] = lambda _: None,
) -> RefinementLosses:
    """Tune the parameters of `quantized` that require gradients, in place.

    Args:
        original: the teacher.
        quantized: the student; its parameters named "latent" are codes.
        windows: calibration tokens [windows, context].
        seed: of the order of the windows.
        schedule: how long and how fast.
        state: of an interrupted run with the same arguments, to resume from; its tensors are copied.
        keep: called with the state after every pass but the last; the next pass changes the state's tensors.
    """
    validation = np.arange(len(windows)) % EARLY_STOPPING_EVERY == min(EARLY_STOPPING_EVERY, len(windows)) - 1
    train = torch.from_numpy(windows[~validation])
    check = _micro_batches(torch.from_numpy(windows[validation]), schedule)
    if not len(train):
        return RefinementLosses(_mean_loss(original, quantized, check))
    batch = min(schedule.batch, len(train))
    per_pass = len(train) // batch
    steps = schedule.passes * per_pass
    parameters = quantized.parameters()
    codes = [name for name in parameters if name.endswith(".latent")]
    groups = [[parameters[name] for name in parameters if name not in codes], [parameters[name] for name in codes]]
    optimizer = torch.optim.Adam([{"params": group} for group in groups if group], betas=BETAS)
    if state is None:
        losses = RefinementLosses(_mean_loss(original, quantized, check))
        best = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    else:
        losses = state.losses
        best = _restore(state, parameters, optimizer, len(losses.passes) * per_pass)
    generator = torch.Generator().manual_seed(seed)
    done = len(losses.passes)
    with Progress("Refining", steps, initial=done * per_pass) as progress:
        for number in range(schedule.passes):
            order = torch.randperm(len(train), generator=generator)[: per_pass * batch].view(per_pass, batch)
            if number < done:
                continue
            for step, chosen in enumerate(order, number * per_pass):
                for group, rate in zip(optimizer.param_groups, schedule.rates(step, steps), strict=False):
                    group["lr"] = rate
                optimizer.zero_grad()
                _backward(original, quantized, _micro_batches(train[chosen], schedule))
                optimizer.step()
                progress.update()
            losses.passes.append(_mean_loss(original, quantized, check))
            progress.set_status(f"KL divergence {losses.passes[-1]:.4f}")
            if losses.passes[-1] == losses.after:
                for name, parameter in parameters.items():
                    best[name].copy_(parameter.detach())
            if number + 1 < schedule.passes:
                keep(State(losses, _tensors(parameters, optimizer, best)))
    for name, parameter in parameters.items():
        parameter.data.copy_(best[name])
    return losses


def _tensors(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, best: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the tensors of a State."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        moments = optimizer.state[parameter]
        tensors |= {name: parameter.detach(), f"{name}.best": best[name]}
        tensors |= {f"{name}.mean": moments["exp_avg"], f"{name}.square": moments["exp_avg_sq"]}
    return tensors


def _restore(
    state: State, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, step: int
) -> dict[str, torch.Tensor]:
    """Restore parameters and moments from a State; return the best parameters."""
    for name, parameter in parameters.items():
        parameter.data.copy_(state.tensors[name])
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step)),
            "exp_avg": state.tensors[f"{name}.mean"].to(parameter.device, copy=True),
            "exp_avg_sq": state.tensors[f"{name}.square"].to(parameter.device, copy=True),
        }
    return {name: state.tensors[f"{name}.best"].to(value.device, copy=True) for name, value in parameters.items()}


def _micro_batches(tokens: torch.Tensor, schedule: Schedule) -> Sequence[torch.Tensor]:
    """Split windows [windows, context] into what one forward pass takes."""
    return list(tokens.split(max(1, schedule.micro_tokens // tokens.shape[1])))


def _loss(original: LanguageModel, quantized: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        expected = original.log_probabilities(original.states(tokens))
    return kl_divergence(expected, quantized.log_probabilities(quantized.states(tokens))).mean()


@torch.enable_grad()
def _backward(original: LanguageModel, quantized: LanguageModel, batch: Sequence[torch.Tensor]) -> None:
    """Add the gradients of the mean loss of a batch."""
    for part in batch:
        (_loss(original, quantized, part) * len(part) / sum(map(len, batch))).backward()


@torch.no_grad()
def _mean_loss(original: LanguageModel, quantized: LanguageModel, batch: Sequence[torch.Tensor]) -> float:
    total = sum(float(_loss(original, quantized, part)) * len(part) for part in batch)
    return total / sum(map(len, batch))
