"""Use d2q-edge from Python: convert a model to 2 bits, and measure its distance from the original.

    python examples/convert_and_evaluate.py examples/tiny-qwen3 out

The model is a Hugging Face directory. `out` receives the original as F16 and the quantized file. Needs the runtime:
`d2q-edge runtime install`.
"""

import sys
from pathlib import Path

from d2q_edge import D2QError, Options, convert, evaluate
from d2q_edge.export.model_file import export


def main(model: Path, out: Path, calibration_tokens: int = 65536, chunks: int = 20) -> None:
    """Write both files, and print size, perplexity and KL divergence."""
    out.mkdir(parents=True, exist_ok=True)
    original, quantized = out / "original.gguf", out / "d2q2.gguf"
    export(model, original, "f16", force=True)
    conversion = convert(model, quantized, Options(bits=2, calibration_tokens=calibration_tokens), force=True)
    print(conversion.describe(quantized))

    result = evaluate(quantized, reference=original, chunks=chunks)
    print(f"{result.bytes / original.stat().st_size:.0%} of the original's {original.stat().st_size:,} bytes")
    print(f"perplexity {result.perplexity:.2f}, of the original {result.reference_perplexity:.2f}")
    print(f"KL divergence {result.kl_divergence_mean:.4f} nats per token")
    print(f"the same most likely token in {result.top1_agreement:.1%} of all places")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} MODEL OUT")
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except D2QError as error:
        sys.exit(f"Error: {error}")
