"""The demo's table; the demo itself is a command that CI runs."""

from d2q_edge.evaluation.perplexity import Evaluation
from tools import demo


def test_table() -> None:
    original = Evaluation(32.4691, 1.2, None, None, None, None, 100, 8_500_000, 16.0)
    ours = Evaluation(1063.25, 1.2, 32.4691, 0.68253, 4.9, 0.5, 100, 2_165_984, 3.8783)
    lines = demo.table([demo.Row("F16", original, 412.34), demo.Row("D2Q2", ours, 1390.0)]).splitlines()
    assert len({len(line) for line in lines}) == 1, "columns line up"
    assert lines[0].split() == ["file", "bytes", "bits/weight", "perplexity", "KL", "divergence", "tokens/s"]
    assert lines[1].split() == ["F16", "8,500,000", "16.000", "32.469", "-", "412.3"]
    assert lines[2].split() == ["D2Q2", "2,165,984", "3.878", "1063.250", "0.6825", "1390.0"]
