"""The benchmark of dot products: its ratios and its Markdown by hand; it needs no compiler for either."""

from tools import bench_kernels


def test_ratio_is_the_median_over_rounds_and_widths() -> None:
    names = {name for pair in bench_kernels.PAIRS for name in pair}
    one = {name: [(2.0, 4.0)] * 3 for name in names} | {"d2q2": [(1.0, 4.0), (10.0, 4.0), (1.0, 2.0)]}
    other = {name: [(2.0, 4.0)] for name in names}
    assert bench_kernels.ratios([one, other], 0)["d2q2/q2_K"] == 0.75  # of 0.5, 5, 0.5 and 1
    assert bench_kernels.ratios([one, other], 1)["d2q2/q2_K"] == 1.0


def test_markdown() -> None:
    seen = {f"{ours}/{stock}": 0.5 for ours, stock in bench_kernels.PAIRS}
    lines = bench_kernels.markdown({"avx2": seen, "native": seen | {"d2q2/q2_K": 0.789}}).splitlines()
    assert lines[:3] == ["| time of a dot product | avx2 | native |", "|---|---|---|", "| d2q2 / Q2_K | 0.50 | 0.79 |"]
    assert len(lines) == 2 + len(bench_kernels.PAIRS)
