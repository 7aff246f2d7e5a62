"""Learn the codebook tables of the d2q tensor types and write them in the form of d2q_edge/formats/codebooks.txt.

    python tools/learn_tables.py --device cuda --model ../shared/models/qwen3-34m --model examples/tiny-qwen3 \\
        --held-out ../shared/models/llama-54m --output /tmp/codebooks.txt

The tables in the repository are frozen: every file ever written depends on them. This tool is kept so that they can be
judged and, before the first release, replaced: copy the new file over codebooks.txt, put the checksum that is printed
here into codebooks.py, and run tools/generate_tables.py. The same seed gives a table of the same quality, not the same
bits (sums on a GPU are not ordered). On a CPU it takes hours, on a data-center GPU minutes.

256 codebooks of 16 pairs, or of 8 scalars for each of two states, are learned for groups of 32 weights; eight groups
share a scale d. A scalar's state is the low bit of the code before, so that its codes are a path through a trellis
(d2q_edge/quantize/trellis.py): neighbours in the table begin with different low bits, and the states' entries half a
step apart. The training
set is a mixture of sources of unit variance, and the loss is the weighted mean over sources of the squared error. Each
round (a) tries another d for every block, (b) assigns the best codebook to every group and the best entry to every
weight, (c) moves every entry to the weighted mean of its cell (Lloyd's algorithm), and now and then (d) drops the
codebooks whose removal costs least and seeds new ones where the loss is. The last rounds do the same on the integer
grid, with a dither that fades out, so that rounding is part of what is optimized.

The frozen tables were made by the recipes below with seed 0, from examples/tiny-qwen3 and every third layer of
qwen3-34m; llama-54m was held out.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor

from d2q_edge.formats.codebooks import CHAIN, CODEBOOKS, ENTRY_MAX, ENTRY_MIN, PAIR_TABLE, SCALAR_TABLE, table_sha256
from d2q_edge.formats.tensor_types import table_index
from d2q_edge.quantize.trellis import best_codes, by_next_state, cheapest_ways, first_cost

BLOCK, GROUP = 256, 32
TAILS = ("laplace", "student4", "lognormal", "outlier")


@dataclass(frozen=True)
class Recipe:
    """Training set and schedule of one table. At first, d is the RMS of a block over `unit`.

    A larger unit makes the integer grid finer (Gaussian weights gain up to 0.2 % between 13 and 24) and leaves less
    room for outliers (the lognormal source lost 15 % between 16 and 24 with scalars).
    """

    dimension: int  # 2: pairs, 1: scalars
    entries: int
    unit: float
    tail_weight: tuple[float, float, float, float]  # of the sources in TAILS; the Gaussian source has 1
    real_weight: float
    blocks: int  # per source
    rounds: int
    integer_rounds: int


PAIRS = Recipe(2, 16, 13.0, (0.03, 0.03, 0.03, 0.03), 0.5, 32768, 400, 120)
SCALARS = Recipe(1, 16, 18.0, (0.03, 0.03, 0.03, 0.03), 0.5, 32768, 400, 120)


def synthetic(kind: str, blocks: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Return float32 [blocks, 256] of one source, scaled to unit variance of the whole source."""
    x = torch.randn(blocks, BLOCK, generator=generator, device=device)
    if kind == "laplace":
        uniform = torch.rand(blocks, BLOCK, generator=generator, device=device)
        x = -torch.sign(x) * torch.log1p(-uniform)
    elif kind == "student4":
        chi_squared = torch.randn(blocks, BLOCK, 4, generator=generator, device=device).square().sum(-1)
        x = x / (chi_squared / 4).sqrt()
    elif kind == "lognormal":
        x = x * torch.randn(blocks, BLOCK, generator=generator, device=device).exp()
    elif kind == "outlier":
        x = torch.where(torch.rand(blocks, BLOCK, generator=generator, device=device) < 0.01, 10 * x, x)
    elif kind != "gaussian":
        raise ValueError(f"unknown source {kind}")
    return x / x.square().mean().sqrt()


def model_blocks(directory: Path, blocks: int, seed: int, device: torch.device) -> Tensor:
    """Sample [blocks, 256] from the linear layers' rows in a checkpoint, each layer scaled to unit variance."""
    parts = []
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if "layers." in name and len(tensors.get_slice(name).get_shape()) == 2:
                    weight = tensors.get_tensor(name).float()
                    usable = weight[:, : weight.shape[1] // BLOCK * BLOCK].reshape(-1, BLOCK)
                    parts.append(usable / weight.square().mean().sqrt())
    everything = torch.cat(parts)
    picked = torch.from_numpy(np.random.default_rng(seed).permutation(len(everything))[:blocks])
    return everything[picked].to(device)


def vectors(blocks: Tensor, dimension: int) -> Tensor:
    """Return the groups [n * 8, vectors, dimension] of blocks [n, 256]; a pair is the weights i and i + 16."""
    return blocks.reshape(-1, dimension, GROUP // dimension).transpose(1, 2)


def _errors_unrolled(x: Tensor, table: Tensor) -> Tensor:
    """Compute the squared errors [groups, codebooks] of groups x [groups, vectors, dimension], unrolled for fusion."""
    half_norm = table.square().sum(-1) / 2
    best = torch.full((), math.inf, device=x.device)
    for k in range(table.shape[1]):
        term = half_norm[:, k]
        for c in range(table.shape[2]):
            term = term - x[:, :, None, c] * table[:, k, c]
        best = torch.minimum(best, term)
    return 2 * best.sum(1) + x.square().sum((1, 2))[:, None]


def _path_errors(x: Tensor, table: Tensor, step: Callable[..., Tensor]) -> Tensor:
    """Compute the squared errors [groups, codebooks] of the best paths of groups x [groups, 32, 1]."""
    levels = by_next_state(table[:, :, 0])
    total: Tensor = torch.zeros((), device=x.device)
    for chain in x[:, :, 0].split(CHAIN, dim=1):
        cost = first_cost(torch.Size((len(x), len(table))), x.device)
        for value in chain.T:
            cost = step(value, levels, cost)
        total = total + cost.amin(2)
    return total


def _extend(value: Tensor, levels: Tensor, cost: Tensor) -> Tensor:
    return cheapest_ways((value[:, None, None, None] - levels).square(), cost)[0]


class Encoder:
    """Choose scales and codebooks for blocks, given a float or integer table [256, entries, dimension]."""

    def __init__(self, device: torch.device, chunk: int = 8192) -> None:
        self.compiled = device.type == "cuda"
        self.chunk = chunk if self.compiled else 64
        self.errors = torch.compile(_errors_unrolled, dynamic=False) if self.compiled else _errors_unrolled
        self.extend = torch.compile(_extend, dynamic=False) if self.compiled else _extend

    def group_errors(self, blocks: Tensor, scale: Tensor, table: Tensor) -> Tensor:
        """Compute the squared errors [n, 8, 256] of blocks [n, 256] with scales [n], in the blocks' own units."""
        out = torch.empty(len(blocks), BLOCK // GROUP, len(table), device=blocks.device)
        for start in range(0, len(blocks), self.chunk):
            part = blocks[start : start + self.chunk] / scale[start : start + self.chunk, None]
            count = len(part)
            if self.compiled:  # for one shape only
                part = torch.nn.functional.pad(part, (0, 0, 0, self.chunk - count))
            x = vectors(part, table.shape[2])
            errors = self.errors(x, table) if table.shape[2] == 2 else _path_errors(x, table, self.extend)
            errors = errors.view(len(part), BLOCK // GROUP, -1)
            out[start : start + count] = errors[:count]
        return out * scale.square()[:, None, None]

    def best_scale(self, blocks: Tensor, candidates: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best of candidates [n, c] for each block as (scale [n], squared error of the block [n])."""
        error = torch.full((len(blocks),), math.inf, device=blocks.device)
        scale = candidates[:, 0].clone()
        for candidate in candidates.T:
            trial = self.group_errors(blocks, candidate, table).amin(2).sum(1)
            better = trial < error
            error = torch.where(better, trial, error)
            scale = torch.where(better, candidate, scale)
        return scale, error

    def search(self, blocks: Tensor, table: Tensor, unit: float) -> tuple[Tensor, Tensor]:
        """Return fp16-rounded scales of a wide search, like the quantizer's, and the blocks' squared errors."""
        rms = blocks.square().mean(1).sqrt().clamp_min(1e-6)
        wide = torch.logspace(math.log10(0.5), math.log10(4.0), 19, device=blocks.device)
        scale, _ = self.best_scale(blocks, (rms[:, None] / unit * wide).half().float(), table)
        near = torch.tensor([1.0, 0.92, 0.96, 0.98, 1.02, 1.04, 1.08], device=blocks.device)
        return self.best_scale(blocks, (scale[:, None] * near).half().float(), table)


def assign(blocks: Tensor, scale: Tensor, codebooks: Tensor, table: Tensor) -> Tensor:
    """Return the best entry [n * 8, vectors] of each vector within its group's codebook [n, 8]."""
    x = vectors(blocks / scale[:, None], table.shape[2])
    if table.shape[2] == 1:
        codes = best_codes(x[:, :, 0].contiguous(), by_next_state(table[:, :, 0]), codebooks.reshape(-1))
        entries: Tensor = table_index(codes).long()
        return entries
    chosen = table[codebooks.reshape(-1)]
    return torch.baddbmm(chosen.square().sum(2)[:, None], x, chosen.mT, beta=0.5, alpha=-1).argmin(2)


def means(x: Tensor, cells: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """Return the weighted means of the vectors x in each cell (codebook * entries + entry), clamped to the range."""
    count, entries, dimension = table.shape
    total = torch.zeros(count * entries, device=x.device).index_add_(0, cells, weight)
    sums = torch.zeros(count * entries, dimension, device=x.device).index_add_(0, cells, x * weight[:, None])
    moved = torch.where(total[:, None] > 0, sums / total.clamp_min(1e-20)[:, None], table.reshape(-1, dimension))
    return moved.clamp(ENTRY_MIN, ENTRY_MAX).view_as(table)


def from_groups(x: Tensor, entries: int) -> Tensor:
    """Make codebooks [m, entries, dimension] that each fit one group of x [m, vectors, dimension]."""
    if x.shape[2] == 2:
        return x.clone()  # as many pairs as entries
    means = x.sort(1).values.view(len(x), entries // 2, -1).mean(2)
    step = torch.gradient(means, dim=1)[0]
    return torch.cat([means - step / 4, means + step / 4], 1)[:, :, None]


def learn(
    sources: list[tuple[Tensor, float]], recipe: Recipe, generator: torch.Generator, encoder: Encoder
) -> tuple[Tensor, float]:
    """Learn one table from (blocks [n, 256], weight) of each source; return (integer table as float, training loss)."""
    device = sources[0][0].device
    blocks = torch.cat([x for x, _ in sources])
    weight = torch.cat([torch.full((len(x),), w / len(x) / BLOCK, device=device) for x, w in sources])
    weight /= sum(w for _, w in sources)
    rms = blocks.square().mean(1).sqrt().clamp_min(1e-6)
    scale = rms / recipe.unit

    def draw(count: int, probability: Tensor) -> Tensor:
        """Draw indices of groups in proportion to `probability` (torch.multinomial has a limit on the number)."""
        at = torch.rand(count, generator=generator, device=device) * probability.sum()
        return torch.searchsorted(probability.double().cumsum(0), at.double()).clamp_max(len(probability) - 1)

    groups = vectors(blocks / scale[:, None], recipe.dimension)
    table = from_groups(groups[draw(CODEBOOKS, weight.repeat_interleave(8))], recipe.entries)
    table = table.clamp(ENTRY_MIN, ENTRY_MAX)
    best_loss, best_table = math.inf, table
    total_rounds = recipe.rounds + recipe.integer_rounds
    for current in range(total_rounds):
        integer = current >= recipe.rounds
        if current == recipe.rounds:
            table = table.round()
        left = 1 - current / recipe.rounds if not integer else 1 - (current - recipe.rounds) / recipe.integer_rounds
        spread = 0.02 + 0.15 * max(left, 0) if not integer else 0.03
        jump = torch.randn(len(scale), generator=generator, device=device) * spread
        errors, trial = (encoder.group_errors(blocks, s, table) for s in (scale, scale * jump.exp()))
        better = trial.amin(2).sum(1) < errors.amin(2).sum(1)
        scale = torch.where(better, scale * jump.exp(), scale)
        errors = torch.where(better[:, None, None], trial, errors)
        group_error, codebooks = errors.min(2)
        loss = (group_error.sum(1) * weight).sum().item()
        if integer and loss < best_loss:
            best_loss, best_table = loss, table
        cells = codebooks.reshape(-1, 1) * recipe.entries + assign(blocks, scale, codebooks, table)
        x = vectors(blocks / scale[:, None], recipe.dimension)
        vector_weight = (weight * scale.square()).repeat_interleave(BLOCK // recipe.dimension)
        table = means(x.reshape(-1, recipe.dimension), cells.reshape(-1), vector_weight, table)
        if integer:
            dither = torch.rand(table.shape, generator=generator, device=device) - 0.5
            table = (table + dither * max(2 * left - 1, 0)).round().clamp(ENTRY_MIN, ENTRY_MAX)
        elif current % 4 == 3 and left > 0.25:
            group_weight = weight.repeat_interleave(8)
            second = errors.scatter(2, codebooks[:, :, None], math.inf).amin(2)
            missed = (second - group_error).reshape(-1) * group_weight
            utility = torch.zeros(CODEBOOKS, device=device).index_add_(0, codebooks.reshape(-1), missed)
            cost = group_error.reshape(-1) * group_weight
            total = torch.zeros(CODEBOOKS, device=device).index_add_(0, codebooks.reshape(-1), cost)
            drop = max(int(24 * left), 2)
            dropped = utility.argsort()[:drop]
            split = total.argsort(descending=True)[: drop // 2]
            noise = 1 + 0.1 * torch.randn(len(split), recipe.entries, 1, generator=generator, device=device)
            table[dropped[: drop // 2]] = table[split] * noise
            seeds = draw(drop - drop // 2, cost)
            table[dropped[drop // 2 :]] = from_groups(x[seeds], recipe.entries).clamp(ENTRY_MIN, ENTRY_MAX)
    return best_table, best_loss


def canonical(table: Tensor) -> Tensor:
    """Return the table as int8 in a fixed order: codebooks by sum of squares, then by entries, and pairs ascending.

    Scalars keep their order, in which the low bits of their codes are states.

    Raises:
        ValueError: an entry is not an integer.
    """
    if not torch.equal(table, table.round()):
        raise ValueError("the table is not on the integer grid")
    codebooks = [[tuple(entry) for entry in codebook] for codebook in table.int().tolist()]
    if table.shape[2] == 2:
        codebooks = [sorted(codebook) for codebook in codebooks]
    codebooks.sort(key=lambda codebook: (sum(v * v for entry in codebook for v in entry), codebook))
    return torch.tensor(codebooks, dtype=torch.int8)


def format_tables(pairs: npt.NDArray[np.int8], scalars: npt.NDArray[np.int8]) -> str:
    """Return the text of codebooks.txt (pairs int8 [256, 16, 2], scalars int8 [256, 16]); parse_tables reads it."""
    lines = [
        "# The codebooks of the d2q tensor types, learned by tools/learn_tables.py. Do not edit: files depend on them.",
        "# pair INDEX then 16 entries first,second: values of the weights i and i + 16 of a group, in units of d.",
        "# scalar INDEX then 8 entries of codes after an even code, then 8 after an odd one: values of a weight.",
    ]
    lines += [f"pair {k} " + " ".join(f"{a},{b}" for a, b in codebook) for k, codebook in enumerate(pairs.tolist())]
    lines += [f"scalar {k} " + " ".join(map(str, codebook)) for k, codebook in enumerate(scalars.tolist())]
    return "\n".join(lines) + "\n"


def main(
    arguments: list[str] | None = None, recipes: tuple[Recipe, Recipe] = (PAIRS, SCALARS), test_blocks: int = 8192
) -> None:
    """Learn a table by each recipe (pairs, then scalars) and report its error on `test_blocks` blocks per source."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, action="append", default=[], help="checkpoint to learn from (repeatable)")
    parser.add_argument("--held-out", type=Path, help="checkpoint to report on")
    parser.add_argument("--only", choices=("pairs", "scalars"), help="keep the present table of the other kind")
    parser.add_argument("--output", type=Path, required=True, help="where the tables go, as text")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    encoder = Encoder(device)
    tables = {2: PAIR_TABLE, 1: SCALAR_TABLE[:, :, None]}
    for recipe in recipes:
        if options.only and options.only != ("pairs" if recipe.dimension == 2 else "scalars"):
            continue
        started = time.monotonic()
        generator = torch.Generator(device=device).manual_seed(options.seed)
        weights = dict(zip(("gaussian", *TAILS), (1.0, *recipe.tail_weight), strict=True))
        sources = [(synthetic(kind, recipe.blocks, generator, device), w) for kind, w in weights.items()]
        for directory in options.model:
            share = recipe.real_weight / len(options.model)
            sources.append((model_blocks(directory, recipe.blocks, options.seed, device), share))
        table, loss = learn(sources, recipe, generator, encoder)
        print(f"dimension {recipe.dimension}: loss {loss:.6f}, {time.monotonic() - started:.0f} s")
        test = {kind: synthetic(kind, test_blocks, generator, device) for kind in ("gaussian", *TAILS)}
        if options.held_out:
            test["held-out"] = model_blocks(options.held_out, test_blocks, options.seed, device)
        for kind, blocks in test.items():
            error = encoder.search(blocks, table, recipe.unit)[1].sum() / blocks.square().sum()
            print(f"  {kind:10} {error.item():.5f}")
        tables[recipe.dimension] = canonical(table).numpy()
    pairs, scalars = tables[2], tables[1][:, :, 0]
    options.output.write_text(format_tables(pairs, scalars), encoding="ascii")
    print(f"TABLE_SHA256 = {table_sha256(pairs, scalars)!r}")


if __name__ == "__main__":
    main()
