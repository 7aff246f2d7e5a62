"""The KL divergence on validation text: against log_softmax of all logits in double precision."""

import math

import numpy as np
import pytest
import torch

from d2q_edge.calibration.hidden_states import StreamPair
from d2q_edge.distributed.process_group import SINGLE_PROCESS
from d2q_edge.formats.quantized_block import QuantizedBlock
from d2q_edge.pipeline.validation import Validation, compare_logits, scored_positions, validate
from tests.pipeline.common import CPU, WINDOWS, Make, Setup


@pytest.mark.parametrize("positions", [1, 7, 40, 1000])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_against_whole_logits(scale: float, positions: int) -> None:
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(50, 16, generator=generator)
    original = scale * torch.randn(40, 16, generator=generator)
    quantized = original + 0.1 * scale * torch.randn(40, 16, generator=generator)
    # Logits, log-probabilities, both twice, of so many positions at a time.
    logits_bytes = positions * 50 * 4 * 4
    divergences, agreements = compare_logits(original, quantized, head, logits_bytes)
    a, b = (torch.log_softmax(hidden.double() @ head.double().T, 1) for hidden in (original, quantized))
    expected = (a.exp() * (a - b)).sum(1)
    assert divergences.dtype == torch.float64
    torch.testing.assert_close(divergences, expected, rtol=1e-3, atol=1e-5 * scale)
    assert torch.equal(agreements, a.argmax(1) == b.argmax(1))
    assert 0 < int(agreements.sum()) < 40 or scale < 1
    same, all_agree = compare_logits(original, original.clone(), head, logits_bytes)
    assert float(same.abs().max()) < 1e-6
    assert bool(all_agree.all())


def test_too_little_memory_for_one_position() -> None:
    head = torch.eye(5)
    hidden = torch.arange(15.0).view(3, 5)
    divergences, agreements = compare_logits(hidden, hidden, head, 1)
    assert len(divergences) == len(agreements) == 3


def test_the_same_probability_of_another_token() -> None:
    """Both are as sure, of tokens that are not the same."""
    head = torch.eye(20)
    original, quantized = torch.zeros(2, 1, 20)
    original[0, 3] = quantized[0, 10] = 9.0
    divergences, agreements = compare_logits(original, quantized, head)
    assert not bool(agreements)
    assert float(divergences) > 8


def test_the_second_half_is_scored() -> None:
    for context, first in ((6, 3), (5, 2)):
        hidden = torch.arange(2 * context * 3).view(2, context, 3)
        expected = [hidden[window, position].tolist() for window in (0, 1) for position in range(first, context)]
        assert scored_positions(hidden).tolist() == expected


def test_summary() -> None:
    found = Validation.of(
        torch.tensor([0.1, 0.2, 0.6], dtype=torch.float64), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    )
    assert found.tokens == 3
    assert [found.kl_divergence, found.top1_agreement] == pytest.approx([0.3, 2 / 3])
    assert found.kl_divergence_stderr == pytest.approx(math.sqrt((0.04 + 0.01 + 0.09) / 3 / 2))


@pytest.mark.parametrize("tied", [False, True])
@torch.inference_mode()
def test_the_final_norm_as_it_will_be_in_the_file(make_checkpoint: Make, tied: bool) -> None:
    """With a bias that was multiplied by the scales that the head is divided by: they cancel out."""
    setup = Setup(make_checkpoint("qwen3", tie_word_embeddings=tied))
    runner, windows = setup.runner(), WINDOWS[:5, :11]
    streams = StreamPair(runner, windows, 22, CPU, SINGLE_PROCESS, torch.float32)
    streams.advance(0, runner.load(0), runner.load(1))
    generator = np.random.default_rng(0)
    bias = generator.normal(0, 1, 64).astype(np.float32)
    scales = np.ones(64) if tied else generator.uniform(0.5, 2, 64)
    final = QuantizedBlock(norm_biases={"model.norm": bias})
    if not tied:
        final.column_scales["lm_head"] = scales.astype(np.float32)
    found = validate(streams, final, SINGLE_PROCESS)
    norm = runner.final_norm()
    head = setup.checkpoint.tensor("model.embed_tokens.weight" if tied else "lm_head.weight").double().numpy()
    original, quantized = (
        torch.cat([norm(states[index])[:, 5:].flatten(0, 1) for index in range(3)]).double().numpy()
        for states in (streams.original, streams.quantized)
    )
    a, b = (
        torch.from_numpy(logits).log_softmax(1)
        for logits in (original @ head.T, (quantized * scales + bias) @ (head / scales).T)
    )
    expected = (a.exp() * (a - b)).sum(1)
    assert found.tokens == len(expected) == 5 * 6
    assert found.kl_divergence == pytest.approx(float(expected.mean()), rel=1e-4)
    assert found.top1_agreement == pytest.approx(float((a.argmax(1) == b.argmax(1)).double().mean()))
