"""Refinement: gradient descent on the KL divergence from the original model to the quantized one.

The loss is the mean over all tokens of the calibration windows of KL(original || quantized) of the next-token
probabilities. Adam with a cosine schedule. What moves: block scales (by their logarithm), norm weights and biases, and,
where they are free, the codes through their latent points (tunable.py). A code's latent point starts at its entry and
Adam's step has a fixed size, so that CODE_TRAVEL, the sum of all steps, decides how consistently a gradient must
want another entry before the code changes: with half of it hardly any code changes, with three times as much one in
fourteen does, and the held-back text gets worse (measured on qwen3-34m).

Part of the windows is held back. After every pass the loss is measured on them, and in the end the best state, which
may be the first, is restored. Knows two models as WholeModel; does not know files.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm import tqdm

from d2q_edge.torch_evaluate import WholeModel

PASSES = 6
"""Over the windows."""
BATCH = 16
"""Windows per step."""
MICRO_TOKENS = 4096
"""Tokens per forward pass; gradients add up to a batch."""
HELD_BACK = 32
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


def tune(original: WholeModel, quantized: WholeModel, windows: npt.NDArray[np.int64], seed: int = 0) -> Progress:
    """Tune the parameters of `quantized` that require gradients, in place.

    Args:
        original: the teacher.
        quantized: the student; its parameters named "latent" are codes.
        windows: calibration tokens [windows, context].
        seed: of the order of the windows.
    """
    held = np.arange(len(windows)) % HELD_BACK == min(HELD_BACK, len(windows)) - 1
    train, check = torch.from_numpy(windows[~held]), torch.from_numpy(windows[held])
    if not len(train):
        return Progress(_mean_loss(original, quantized, check))
    batch = min(BATCH, max(1, len(train)))
    steps = max(1, len(train) // batch)
    optimizer = torch.optim.Adam(_groups(quantized.parameters(), PASSES * steps), betas=BETAS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PASSES * steps)
    generator = torch.Generator().manual_seed(seed)
    progress = Progress(_mean_loss(original, quantized, check))
    best = _state(quantized)
    with tqdm(total=PASSES * steps, desc="Refining", unit="step", disable=None) as bar:
        for _ in range(PASSES):
            order = torch.randperm(len(train), generator=generator)[: steps * batch].view(steps, batch)
            for chosen in order:
                optimizer.zero_grad()
                _backward(original, quantized, train[chosen])
                optimizer.step()
                schedule.step()
                bar.update()
            progress.passes.append(_mean_loss(original, quantized, check))
            bar.set_postfix(kld=f"{progress.passes[-1]:.4f}")
            if progress.passes[-1] == progress.after:
                best = _state(quantized)
    for name, parameter in quantized.parameters().items():
        parameter.data.copy_(best[name])
    return progress


def _groups(parameters: dict[str, nn.Parameter], steps: int) -> list[dict[str, object]]:
    codes = [parameter for name, parameter in parameters.items() if name.endswith(".latent")]
    others = [parameter for name, parameter in parameters.items() if not name.endswith(".latent")]
    groups: list[dict[str, object]] = [{"params": others, "lr": SCALE_RATE}]
    if codes:
        # A cosine's mean is one half.
        groups.append({"params": codes, "lr": min(2 * CODE_TRAVEL / steps, CODE_RATE)})
    return groups


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


def _state(model: WholeModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.parameters().items()}
