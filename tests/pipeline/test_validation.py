"""The estimate on held-back text: against log_softmax of all logits in double precision."""

import math

import pytest
import torch

from d2q_edge.pipeline import validation
from d2q_edge.pipeline.validation import Validation, compare_logits, head_parts, scored


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_against_whole_logits(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "PART", 7)
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(50, 16, generator=generator)
    teacher = scale * torch.randn(40, 16, generator=generator)
    student = teacher + 0.1 * scale * torch.randn(40, 16, generator=generator)
    divergences, agreements = compare_logits(teacher, student, head_parts(head))
    a, b = (torch.log_softmax(hidden.double() @ head.double().T, 1) for hidden in (teacher, student))
    expected = (a.exp() * (a - b)).sum(1)
    assert divergences.dtype == torch.float64
    torch.testing.assert_close(divergences, expected, rtol=1e-3, atol=1e-5 * scale)
    assert torch.equal(agreements, a.argmax(1) == b.argmax(1))
    assert 0 < int(agreements.sum()) < 40 or scale < 1
    same, all_agree = compare_logits(teacher, teacher.clone(), head_parts(head))
    assert float(same.abs().max()) < 1e-6
    assert bool(all_agree.all())


def test_parts_are_the_whole_head() -> None:
    head = torch.arange(20000 * 2).view(20000, 2)
    parts = list(head_parts(head))
    assert len(parts) == 3
    assert torch.equal(torch.cat(parts), head)


def test_the_second_half_is_scored() -> None:
    hidden = torch.arange(2 * 6 * 3).view(2, 6, 3)
    assert scored(hidden).tolist() == [hidden[w, p].tolist() for w in (0, 1) for p in (3, 4, 5)]


def test_summary() -> None:
    found = Validation.of(
        torch.tensor([0.1, 0.2, 0.6], dtype=torch.float64), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    )
    assert found.tokens == 3
    assert [found.kl_divergence, found.top1_agreement] == pytest.approx([0.3, 2 / 3])
    assert found.kl_divergence_stderr == pytest.approx(math.sqrt((0.04 + 0.01 + 0.09) / 3 / 2))


def test_tokens_of_different_parts_are_different(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "PART", 7)
    head = torch.eye(20)
    teacher, student = torch.zeros(2, 1, 20)
    teacher[0, 3] = student[0, 3 + 7] = 9.0
    assert not bool(compare_logits(teacher, student, head_parts(head))[1])
