"""Build comparisons without measuring: every kind of row, and everything that a conversion can report."""

from typing import Any

from d2q_edge.evaluation.comparison import GIVEN, REFERENCE, STOCK, Comparison, Row
from d2q_edge.evaluation.perplexity import Evaluation
from d2q_edge.options import ComparisonOptions

QUARTILES = {"minimum": 0.2, "p05": 0.5, "median": 1.0, "p95": 2.0, "maximum": 9.0}


def evaluation(size: int, divergence: float | None) -> Evaluation:
    compared: dict[str, Any] = {"reference_perplexity": None, "kl_divergence_mean": None}
    compared |= {"kl_divergence_p99": None, "top1_agreement": None}
    if divergence is not None:
        compared = {
            "reference_perplexity": 20.0,
            "kl_divergence_mean": divergence,
            "kl_divergence_stderr": divergence / 20,
            "kl_divergence_p99": 6 * divergence,
            "kl_divergence_p99_interval": (5 * divergence, 8 * divergence),
            "top1_agreement": 0.75,
            "top1_agreement_stderr": 0.01,
        }
    return Evaluation(21.5, 0.7, chunks=4, bytes=size, bits_per_weight=size / 1e6, scored=1020, **compared)


def conversion(blocks: int = 3) -> dict[str, Any]:
    """Return what the page needs of a `convert --report`."""
    names = [
        f"model.layers.{block}.{layer}" for block in range(blocks) for layer in ("self_attn.q_proj", "mlp.up_proj")
    ]
    norms = [f"model.layers.{block}.post_attention_layernorm" for block in range(blocks)]
    return {
        "bytes": 2_000_000,
        "types": {f"{name}.weight": "d2q2" for name in names},
        "layer_errors": {f"{name}.weight": 0.01 * (index + 1) for index, name in enumerate(names)},
        "column_scales": dict.fromkeys(names, QUARTILES),
        "norm_shifts": {
            norm: {
                "applied": index != 1,
                "norm": 0.5 + index,
                "relative_norm": 0.01 * (index + 1),
                "signal_to_noise": 0.02,
                "gain": 0.004,
                "channels": 100,
            }
            for index, norm in enumerate(norms)
        },
        "validation": {"tokens": 2048, "kl_divergence": 0.3125, "kl_divergence_stderr": 0.01},
        "seconds": {"solve": 12.0},
    }


def comparison(model: str = "Tiny", name: str = "mine", **options: Any) -> Comparison:
    """Return a reference, a file of ours with a report, one without, and two stock files, one of them beaten."""
    same = {layer: dict.fromkeys(range(3), "d2q2") for layer in ("ffn_up", "attn_q")}
    mixed = {"attn_q": dict.fromkeys(range(3), "q2_k"), "ffn_down": {0: "q3_k", 1: "q3_k", 2: "q2_k"}}
    speeds = {"prompt": 100.0, "generation": 25.0}
    rows = [
        Row("f16", REFERENCE, evaluation(16_000_000, None), {"prompt": 80.0, "generation": 5.0}),
        Row("other", GIVEN, evaluation(4_000_000, 0.02), speeds, same),
        Row("Q2_K", STOCK, evaluation(2_600_000, 0.5), {"prompt": 90.0, "generation": 20.0}, mixed),
        Row(name, GIVEN, evaluation(2_000_000, 0.3), {"prompt": 110.0, "generation": 30.0}, same, conversion()),
        Row("IQ2_XS", STOCK, evaluation(1_999_000, 0.4), {"prompt": 50.0, "generation": 9.0}, mixed),
    ]
    return Comparison(model, rows, ComparisonOptions(stock=("Q2_K", "IQ2_XS"), **options), threads=2)
