"""Print what converting models of several sizes takes, by the estimate of `convert --dry-run`, as a Markdown table.

    python -m tools.time_ladder [--products 5e10 --search 1e-6] [--cores 2 8 16]

Without numbers, this machine is measured; other numbers of cores are taken to be as many times faster, which is the
most that they can be. Memory is what is planned with and without enough for the hidden states.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from d2q_edge.errors import D2QError
from d2q_edge.model.families import Family, family_for
from d2q_edge.options import CPU_TOKENS, Options
from d2q_edge.pipeline.block_loop import BATCH_TOKENS
from d2q_edge.pipeline.memory import GIB, MemoryPlan, plan_memory
from d2q_edge.pipeline.time_plan import Speed, estimate, measure_speed
from d2q_edge.pipeline.type_plan import plan_types
from d2q_edge.utils.machine import usable_cpus
from d2q_edge.utils.progress import duration
from tools.random_model import GEOMETRIES

QWEN3, LLAMA = GEOMETRIES["qwen3-8b"], GEOMETRIES["llama-3.2-1b"]
TIED: dict[str, Any] = {"tie_word_embeddings": True}
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
SIZES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {**LLAMA, **SMOLLM2, "num_attention_heads": 9, "num_key_value_heads": 3},
    "Qwen3-0.6B": {
        **QWEN3,
        **TIED,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "Llama-3.2-1B": LLAMA,
    "Qwen3-4B": {**QWEN3, **TIED, "hidden_size": 2560, "intermediate_size": 9728},
    "Qwen3-8B": QWEN3,
    "Qwen3-30B-A3B": GEOMETRIES["qwen3-30b-a3b"],
}
OWN = "d2q2", "d2q2_64"
LIMITS = range(GIB // 2, 64 * GIB, GIB // 10)


def family_of(name: str) -> Family:
    """Return the family of a size."""
    return family_for({**SIZES[name], "rms_norm_eps": 1e-6, "hidden_act": "silu"})


def row(name: str, speeds: list[Speed]) -> str:
    """Format a size's row: time without and with guidance for every speed, memory, and disk beside the file."""
    family = family_of(name)
    types = plan_types(family, 2)
    cells = [name]
    for speed in speeds:
        plain, guided = (
            estimate(family, types, CPU_TOKENS, 512, Options(guidance=guidance), speed).seconds
            for guidance in (False, True)
        )
        cells.append(f"{duration(plain)} / {duration(guided)}")

    def plan(limit: int) -> MemoryPlan | None:
        place = torch.device("cpu"), Path("out.gguf"), types.linear_bytes, limit
        try:
            return plan_memory(family, CPU_TOKENS, BATCH_TOKENS, *place, guidance=True)
        except D2QError:
            return None

    roomy = plan(LIMITS.stop)
    least, tight = next((limit, found) for limit in LIMITS if (found := plan(limit)))
    if roomy is None:
        raise D2QError("there is too little free disk space to plan with")
    cells += [f"{roomy.host / GIB:.1f}", f"{least / GIB:.1f}", f"{tight.disk / GIB:.1f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--products", type=float, help="multiplications per second, of all cores of this machine")
    parser.add_argument("--search", type=float, help="seconds per weight")
    parser.add_argument("--cores", type=int, nargs="+", default=[2, 8, 16])
    arguments = parser.parse_args()
    if arguments.products and arguments.search:
        speed = Speed(arguments.products, dict.fromkeys(OWN, arguments.search))
    else:
        speed = measure_speed(OWN, torch.device("cpu"), Options())
    print(f"{usable_cpus()} cores: {speed.products:.3g} products/s, search {speed.search} s per weight")
    print(f"| model | {' | '.join(f'{n} cores' for n in arguments.cores)} | memory | least | disk |")
    print("|---|" + "---|" * (len(arguments.cores) + 3))
    for name in SIZES:
        factors = [usable_cpus() / cores for cores in arguments.cores]
        scaled = [Speed(speed.products / f, {kind: each * f for kind, each in speed.search.items()}) for f in factors]
        print(row(name, scaled), flush=True)


if __name__ == "__main__":
    main()
