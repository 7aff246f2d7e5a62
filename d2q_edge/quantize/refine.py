"""Refinement: gradient descent on the KL divergence from the original model to the quantized one.

The loss is the mean over all tokens of the calibration windows of KL(original || quantized) of the next-token
probabilities. Adam with a cosine schedule. What moves: block scales (by their logarithm), norm weights and biases, and,
where they are free, the codes through their latent points (tunable.py). A code's latent point starts at its entry and
Adam's step has a fixed size, so that CODE_TRAVEL, the sum of all steps, decides how consistently a gradient must
want another entry before the code changes: with half of it hardly any code changes, with three times as much one in
fourteen does, and the held-back text gets worse (measured on qwen3-34m).

Part of the windows is held back. After every pass the loss is measured on them, and in the end the best state, which
may be the first, is restored. Also after every pass comes a State with which an interrupted run can go on. Knows two
models as WholeModel; does not know files.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm import tqdm

from d2q_edge.model.whole_model import WholeModel

PASSES = 6
"""Over the windows."""
BATCH = 16
"""Windows per step."""
MICRO_TOKENS = 4096
"""Tokens per forward pass; gradients add up to a batch."""
VALIDATION_EVERY = 32
"""One window in so many is held back, or the last one."""
SCALE_RATE = 1e-3
"""Learning rate of everything but the codes."""
CODE_TRAVEL = 16.5
"""The way that a code's latent point can go in all, in units of d."""
CODE_RATE = 0.2
"""The most that it can go in one step: few steps don't tell which codes should change."""
BETAS = (0.9, 0.99)


@dataclass
class Progress:
    """KL divergence on the held-back windows, nats per token: at the start, and after each pass."""

    before: float
    passes: list[float] = field(default_factory=list)

    @property
    def after(self) -> float:
        """Of the state that was kept."""
        return min([self.before, *self.passes])


@dataclass
class State:
    """All that tuning needs to go on after a pass.

    Attributes:
        progress: so far.
        tensors: float32; every parameter NAME, its moments NAME.mean and NAME.square, and as it was in the best state,
            NAME.best.
    """

    progress: Progress
    tensors: dict[str, torch.Tensor]


def tune(
    original: WholeModel,
    quantized: WholeModel,
    windows: npt.NDArray[np.int64],
    seed: int = 0,
    *,
    state: State | None = None,
    keep: Callable[[State], None] = lambda _: None,
) -> Progress:
    """Tune the parameters of `quantized` that require gradients, in place.

    Args:
        original: the teacher.
        quantized: the student; its parameters named "latent" are codes.
        windows: calibration tokens [windows, context].
        seed: of the order of the windows.
        state: of an interrupted run with the same arguments, to go on from; its tensors are copied.
        keep: called after every pass but the last with the state, whose tensors change when it has returned.
    """
    held = np.arange(len(windows)) % VALIDATION_EVERY == min(VALIDATION_EVERY, len(windows)) - 1
    train, check = torch.from_numpy(windows[~held]), torch.from_numpy(windows[held])
    if not len(train):
        return Progress(_mean_loss(original, quantized, check))
    batch = min(BATCH, max(1, len(train)))
    steps = max(1, len(train) // batch)
    parameters = quantized.parameters()
    optimizer = torch.optim.Adam(_groups(parameters, PASSES * steps), betas=BETAS)
    if state is None:
        progress = Progress(_mean_loss(original, quantized, check))
        best = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    else:
        progress = state.progress
        best = _restore(state, parameters, optimizer, len(progress.passes) * steps)
    generator = torch.Generator().manual_seed(seed)
    done = len(progress.passes)
    with tqdm(total=PASSES * steps, initial=done * steps, desc="Refining", unit="step", disable=None) as bar:
        for number in range(PASSES):
            order = torch.randperm(len(train), generator=generator)[: steps * batch].view(steps, batch)
            if number < done:
                continue
            for step, chosen in enumerate(order):
                _set_rates(optimizer, (number * steps + step) / (PASSES * steps))
                optimizer.zero_grad()
                _backward(original, quantized, train[chosen])
                optimizer.step()
                bar.update()
            progress.passes.append(_mean_loss(original, quantized, check))
            bar.set_postfix(kld=f"{progress.passes[-1]:.4f}")
            if progress.passes[-1] == progress.after:
                for name, parameter in parameters.items():
                    best[name].copy_(parameter.detach())
            if number + 1 < PASSES:
                keep(State(progress, _tensors(parameters, optimizer, best)))
    for name, parameter in parameters.items():
        parameter.data.copy_(best[name])
    return progress


def _groups(parameters: dict[str, nn.Parameter], steps: int) -> list[dict[str, object]]:
    """What has a learning rate in common; "peak" is the rate that the schedule begins with."""
    codes = [parameter for name, parameter in parameters.items() if name.endswith(".latent")]
    others = [parameter for name, parameter in parameters.items() if not name.endswith(".latent")]
    groups: list[dict[str, object]] = [{"params": others, "peak": SCALE_RATE}]
    if codes:
        # A cosine's mean is one half.
        groups.append({"params": codes, "peak": min(2 * CODE_TRAVEL / steps, CODE_RATE)})
    return groups


def _set_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    """The cosine schedule, at a share of all steps; not torch's, which gets there only step by step."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * (1 + math.cos(math.pi * share)) / 2


def _tensors(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, best: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Of a State."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        moments = optimizer.state[parameter]
        tensors |= {
            name: parameter.detach(),
            f"{name}.mean": moments["exp_avg"],
            f"{name}.square": moments["exp_avg_sq"],
            f"{name}.best": best[name],
        }
    return tensors


def _restore(
    state: State, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, step: int
) -> dict[str, torch.Tensor]:
    """Put a State back; returns the best state."""
    for name, parameter in parameters.items():
        parameter.data.copy_(state.tensors[name])
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step)),
            "exp_avg": state.tensors[f"{name}.mean"].to(parameter.device, copy=True),
            "exp_avg_sq": state.tensors[f"{name}.square"].to(parameter.device, copy=True),
        }
    return {name: state.tensors[f"{name}.best"].to(value.device, copy=True) for name, value in parameters.items()}


def _backward(original: WholeModel, quantized: WholeModel, tokens: torch.Tensor) -> None:
    """Add the gradients of the mean loss of a batch [windows, context]."""
    for part in tokens.split(max(1, MICRO_TOKENS // tokens.shape[1])):
        with torch.no_grad():
            expected = original.log_probabilities(original.states(part))
        with torch.enable_grad():
            found = quantized.log_probabilities(quantized.states(part))
            (_divergence(expected, found) * len(part) / len(tokens)).backward()


@torch.no_grad()
def _mean_loss(original: WholeModel, quantized: WholeModel, tokens: torch.Tensor) -> float:
    total = 0.0
    for part in tokens.split(max(1, MICRO_TOKENS // tokens.shape[1])):
        expected = original.log_probabilities(original.states(part))
        total += float(_divergence(expected, quantized.log_probabilities(quantized.states(part)))) * len(part)
    return total / len(tokens)


def _divergence(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of sum_v p_v (log p_v - log q_v), from log-probabilities [..., vocabulary]."""
    return (expected.exp() * (expected - found)).sum(-1).mean()
