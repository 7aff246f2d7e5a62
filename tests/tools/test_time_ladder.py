"""The table of sizes is what the plans say."""

from d2q_edge.pipeline.time_plan import Speed
from tools.time_ladder import OWN, SIZES, family_of, row


def test_a_row() -> None:
    slow, fast = Speed(1e10, dict.fromkeys(OWN, 1e-6)), Speed(4e10, dict.fromkeys(OWN, 2.5e-7))
    name, *times, memory, least, disk = row("Llama-3.2-1B", [slow, fast]).strip("| ").split(" | ")
    assert name == "Llama-3.2-1B"
    assert all(" / " in each and each.split()[1] == "h" for each in times[:1])
    assert float(least) < float(memory) < 7
    # Packed blocks, squared gradients, and 65,536 tokens of hidden states of two models.
    assert float(disk) >= 0.8


def test_sizes_are_what_they_are_called() -> None:
    weights = {name: sum(rows * columns for rows, columns in matrices(name)) for name in SIZES}
    for name, billions in (("Qwen3-0.6B", 0.44), ("Llama-3.2-1B", 0.97), ("Qwen3-4B", 3.63), ("Qwen3-8B", 6.95)):
        assert abs(weights[name] / 1e9 - billions) < 0.02, name
    assert abs(weights["SmolLM2-135M"] / 1e6 - 106.2) < 0.1


def matrices(name: str) -> list[tuple[int, int]]:
    family = family_of(name)
    blocks = range(family.num_layers)
    return [family.linear_shape(index, each) for index in blocks for each in family.block_linears(index)]
