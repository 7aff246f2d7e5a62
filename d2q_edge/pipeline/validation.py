"""How far the quantized model is from the original on calibration text that took no part in quantizing.

Some windows flow through both streams beside those that are calibrated on. Behind the last block their hidden states
become logits here: KL divergence and agreement of the most likely token, at the second half of each window, as in
llama-perplexity's protocol. The embeddings and the head are the original's on both sides, which the file's are not
quite; what the estimate is for is the blocks, and it costs a few passes instead of a second run over the model.

Logits are made a part of the vocabulary at a time: all of them would not fit beside a large model. Does not know how a
block is quantized.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from d2q_edge.calibration.hidden_states import Place, Stream
from d2q_edge.distributed.process_group import ProcessGroup
from d2q_edge.model.blocks import BlockRunner

PART = 8192
"""Rows of the head at a time."""


@dataclass(frozen=True)
class Validation:
    """Results.

    Attributes:
        tokens: positions that the numbers are means over.
        kl_divergence: of the quantized model's predictions from the original's, in nats.
        kl_divergence_stderr: its standard error.
        top1_agreement: share of positions where both put the same token first.
    """

    tokens: int
    kl_divergence: float
    kl_divergence_stderr: float
    top1_agreement: float

    @staticmethod
    def of(divergences: torch.Tensor, agreements: torch.Tensor) -> "Validation":
        """Summarize: float64 [tokens], and as many zeros and ones."""
        count = len(divergences)
        spread = float(divergences.std(correction=0)) / math.sqrt(max(1, count - 1))
        return Validation(count, float(divergences.mean()), spread, float(agreements.double().mean()))


class ValidationStreams:
    """The hidden states of the held-back windows in both models, between two blocks."""

    def __init__(
        self,
        runner: BlockRunner,
        windows: npt.NDArray[np.int64],
        batch_tokens: int,
        place: Place,
        processes: ProcessGroup,
    ) -> None:
        """Embed the windows, int64 [windows, context]; `place` is where they are kept, see streams.py."""
        self.runner, self.processes, self._shape = runner, processes, windows.shape
        batches = torch.from_numpy(windows).split(max(1, batch_tokens // windows.shape[1]))
        self.own = processes.shard_range(len(batches))
        shape = windows.shape[1], runner.family.hidden_size
        self._sizes = [len(part) for part in batches]
        self.original, self.quantized = (Stream(self._sizes, shape, runner.device, place) for _ in range(2))
        for index, hidden in zip(self.own, runner.embed_all([batches[index] for index in self.own]), strict=True):
            self.original[index] = self.quantized[index] = hidden

    def move(self, teacher: nn.Module, student: nn.Module) -> None:
        """Past a block: the original and the quantized one."""
        for stream, block in ((self.original, teacher), (self.quantized, student)):
            for index in self.own:
                for sublayer in self.runner.family.sublayers:
                    stream[index] = self.runner.sublayer_forward(block, sublayer, stream[index])

    def measure(self, bias: torch.Tensor) -> Validation:
        """The distance of both behind the last block.

        Args:
            bias: of the final norm, or zero; float32 [hidden] or [1], as it is without the head's column scales.
        """
        family, norm = self.runner.family, self.runner.final_norm()
        head = self.runner.checkpoint.tensor(f"{family.embedding if family.tied_embeddings else family.head}.weight")
        bias = bias.to(self.runner.device)
        # Every process has its part of the tokens; added up, they are all there.
        per_window = self._shape[1] - self._shape[1] // 2
        divergences, agreements = torch.zeros(2, sum(self._sizes) * per_window, dtype=torch.float64)
        for index in self.own:
            start = sum(self._sizes[:index]) * per_window
            part = slice(start, start + self._sizes[index] * per_window)
            teacher, student = scored(norm(self.original[index])), scored(norm(self.quantized[index]) + bias)
            divergences[part], agreements[part] = compare_logits(teacher, student, head_parts(head))
        self.processes.all_reduce([divergences, agreements])
        return Validation.of(divergences, agreements)


def scored(hidden: torch.Tensor) -> torch.Tensor:
    """The positions that are scored: of [windows, context, channels] the second half, as [tokens, channels]."""
    return hidden[:, hidden.shape[1] // 2 :].flatten(0, 1)


def compare_logits(
    teacher: torch.Tensor, student: torch.Tensor, head: Iterable[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL divergence of the student's predictions from the teacher's, in one pass over the head.

    With logits a, b of one token and sums over the vocabulary, D = sum e^a (a - b) / sum e^a - log sum e^a + log sum
    e^b; the three sums grow part by part, relative to the largest logit so far (the online softmax of Milakov and
    Gimelshein, arXiv 1805.02867).

    Args:
        teacher, student: behind the final norm, float32 [tokens, hidden].
        head: parts of the head's weight, [rows, hidden], in the order of the vocabulary.

    Returns:
        float64 [tokens], and whether the same token comes first, bool [tokens]; on the CPU.
    """
    sums = _Sums(teacher), _Sums(student)
    weighted = torch.zeros(len(teacher), dtype=torch.float64, device=teacher.device)
    for part in head:
        weights = part.to(teacher.device).float()
        a, b = teacher @ weights.T, student @ weights.T
        shrink = sums[0].add(a)
        sums[1].add(b)
        weighted = weighted * shrink + (torch.exp(a - sums[0].largest[:, None]) * (a - b)).double().sum(1)
    divergences = weighted / sums[0].total - sums[0].log() + sums[1].log()
    return divergences.cpu(), (sums[0].first == sums[1].first).cpu()


def head_parts(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """A head's weight in parts."""
    yield from weight.split(PART)


class _Sums:
    """Of the exponentials of one model's logits, and the first of the largest ones."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.largest = torch.full((len(hidden),), -math.inf, device=hidden.device)
        self.total = torch.zeros(len(hidden), dtype=torch.float64, device=hidden.device)
        self.first = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        self._seen = 0

    def add(self, logits: torch.Tensor) -> torch.Tensor:
        """Take in a part, [tokens, rows]; returns by what earlier sums must be multiplied, float64 [tokens]."""
        value, index = logits.max(1)
        self.first = torch.where(value > self.largest, index + self._seen, self.first)
        before, self.largest = self.largest, torch.maximum(self.largest, value)
        self._seen += logits.shape[1]
        shrink = torch.exp((before - self.largest).double())
        self.total = self.total * shrink + torch.exp(logits - self.largest[:, None]).double().sum(1)
        return shrink

    def log(self) -> torch.Tensor:
        """log sum exp, float64 [tokens]."""
        return self.total.log() + self.largest.double()
