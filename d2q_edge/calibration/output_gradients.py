"""Measure how much the loss of the original model depends on each layer's output for each token.

GuidedQuant (arXiv 2505.07004, equation 7) and OAC (arXiv 2405.15025): an error in the output z of a layer changes the
loss to second order by about (g^T error)^2, with g = dL/dz. This computes the mean of g^2 over the output channels, for
L the cross entropy of the next tokens, summed over the text; and, from some of the tokens, the second moments of g
(quantize/output_hessian.py).

Memory holds one block at a time: a first pass keeps the hidden states in front of every block; then block after block
from the last one is run again with gradients.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.families import Family, LinearGroup
from d2q_edge.model.families.experts import dense_groups
from d2q_edge.quantize.kl_divergence import cap_logits
from d2q_edge.quantize.output_hessian import OutputHessian

LOGITS = 2**28
"""Bytes of logits at a time."""
KEPT = torch.bfloat16
"""Dtype of the hidden states that are kept."""


def guided_modules(family: Family, index: int) -> list[str]:
    """Return what gradients are measured of in block `index`: linear layers, but a mixture of experts as one."""
    experts = family.block_experts(index)
    names = [layer for group in dense_groups(family, index) for layer in group.linears]
    return names + ([experts.module] if experts else [])


def group_rows(family: Family, index: int, group: LinearGroup) -> int:
    """Return the rows of the layers of a group of block `index`, one below the other."""
    return sum(family.linear_shape(index, layer)[0] for layer in group.linears)


def kept_bytes(family: Family, tokens: int) -> int:
    """Return the memory that the hidden states of so many tokens take."""
    return (family.num_layers + 1) * tokens * family.stream_width * KEPT.itemsize


@dataclass(frozen=True)
class BlockGradients:
    """What is measured of one block.

    Attributes:
        index: of the block.
        squares: means over the channels, by the module's name in the block, for every batch: float32
            [windows * context], on the CPU.
        hessians: second moments of the gradients of all layers of a group, by the first layer's name in the block.
    """

    index: int
    squares: dict[str, list[torch.Tensor]]
    hessians: dict[str, OutputHessian]


def output_gradients(
    runner: BlockRunner,
    batches: Sequence[torch.Tensor],
    observed: int = 0,
    earlier: Callable[[int], Mapping[str, OutputHessian]] = lambda _: {},
) -> Iterator[BlockGradients]:
    """Measure the gradients by the outputs of every guided module, block by block from the last one.

    Args:
        runner: of the original model.
        batches: token ids, each int64 [windows, context].
        observed: number of batches, the first ones, that count in the second moments.
        earlier: returns the second moments of a block over earlier batches, to add to.
    """
    family, device = runner.family, runner.device
    with torch.inference_mode(False), deterministic(device):
        states = [[hidden.to(KEPT)] for hidden in runner.embed_all(batches)]
        for index in range(family.num_layers):
            block = runner.load(index)
            with torch.no_grad():
                for kept in states:
                    kept.append(runner.forward(block, kept[-1].float()).to(KEPT))
        gradients = _loss_gradients(runner, batches, [kept.pop() for kept in states])
        for index in reversed(range(family.num_layers)):
            block = runner.load(index, following=index - 1)
            squares: dict[str, list[torch.Tensor]] = defaultdict(list)
            before = earlier(index)
            hessians: dict[tuple[str, ...], OutputHessian] = {}
            for group in dense_groups(family, index) if observed else ():
                known = before.get(group.linears[0], OutputHessian.zeros(group_rows(family, index, group)))
                hessians[group.linears] = known.to(device)
            for number, kept in enumerate(states):
                found, gradients[number] = _block_gradients(runner, index, block, kept.pop(), gradients[number])
                for name, values in found.items():
                    squares[name].append(values.square().mean(-1).cpu())
                if number < observed:
                    for layers, hessian in hessians.items():
                        hessian.add_batch(torch.cat([found[name] for name in layers], 1))
            yield BlockGradients(index, squares, {layers[0]: sums.complete() for layers, sums in hessians.items()})


def _loss_gradients(
    runner: BlockRunner, batches: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Return for every batch the gradient of the summed loss by the last block's output: float32, of its shape."""
    norm, head = runner.final_norm(), runner.head()
    return [
        _loss_gradient(runner, norm, head, tokens[:, 1:].to(runner.device), hidden)
        for tokens, hidden in zip(batches, outputs, strict=True)
    ]


def _loss_gradient(
    runner: BlockRunner, norm: nn.Module, head: torch.Tensor, targets: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    gradient = torch.zeros_like(hidden, dtype=torch.float32)
    step = max(1, LOGITS // (4 * 4 * len(head)))
    # The last token of a window predicts nothing.
    flat = hidden[:, :-1].flatten(0, 1)
    parts = []
    for states, wanted in zip(flat.split(step), targets.flatten().split(step), strict=True):
        states = states.float().requires_grad_()
        logits = cap_logits(norm(runner.stream(states)) @ head.T, runner.family.logit_cap)
        loss = nn.functional.cross_entropy(logits, wanted, reduction="sum")
        parts += torch.autograd.grad(loss, states)
    gradient[:, :-1] = torch.cat(parts).view(*targets.shape, -1)
    return gradient


def _block_gradients(
    runner: BlockRunner, index: int, block: nn.Module, hidden: torch.Tensor, gradient: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Run a block backwards: return the gradients by the modules' outputs [tokens, channels], and that by its input."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, values: torch.Tensor) -> None:
        found[name] = values.flatten(0, -2)

    def hook(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        tensor.register_hook(partial(keep, name))

    handles = [
        block.get_submodule(name).register_forward_hook(partial(hook, name))
        for name in guided_modules(runner.family, index)
    ]
    try:
        inputs = hidden.float().requires_grad_()
        with torch.enable_grad():
            output = runner.forward(block, inputs)
        (before,) = torch.autograd.grad(output, inputs, gradient)
    finally:
        for handle in handles:
            handle.remove()
    return found, before


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Make CUDA's attention add gradients in a fixed order, so that a repeated conversion gives the same file."""
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    # That is for programs which read what they didn't write, and takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
