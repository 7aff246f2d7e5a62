"""Give a checkpoint outlier channels without changing its function, to test how a quantizer handles them.

    python tools/make_outliers.py ../shared/models/qwen3-34m -o /tmp/qwen3-34m-outliers

Unlike small models, large ones have a few channels with far larger weights than the others. Such channels can be made,
because a decoder's function doesn't change if a channel is divided by a factor where it is produced and multiplied by
the same factor where it is consumed:

- a norm's weights, and the columns of the layers that read the norm (q, k, v; gate, up; lm_head unless it is tied);
- the rows of v (with their biases), and the columns of o: one factor per channel of a key-value head, shared by all
  query heads of its group;
- the rows of up (with their biases), and the columns of down.

Most factors are lognormal; one in a hundred (at least one per set of channels) is uniform between 10 and 30. The result
is stored in float32, so that almost no precision is lost. Tokenizer and generation settings are copied.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from d2q_edge.errors import D2QError
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import Family, family_for

OUTLIERS = 0.01
"""The fraction of channels that become outliers."""
OUTLIER_RANGE = (10.0, 30.0)
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass
class Scales:
    """The scales of one tensor, float64 vectors or None: rows (or elements of a vector) are divided by `rows`, columns
    are multiplied by `columns`."""

    rows: npt.NDArray[np.float64] | None = None
    columns: npt.NDArray[np.float64] | None = None


def draw_factors(width: int, sigma: float, generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """Draw one positive factor per channel, float64 [width]."""
    factors = np.exp(sigma * generator.standard_normal(width))
    outliers = generator.choice(width, max(1, round(OUTLIERS * width)), replace=False)
    factors[outliers] = generator.uniform(*OUTLIER_RANGE, len(outliers))
    return factors


def draw_scales(family: Family, sigma: float, seed: int) -> dict[str, Scales]:
    """Draw the scales of every tensor of a model, which together leave its function unchanged.

    Args:
        family: the model's.
        sigma: standard deviation of the logarithm of the factors that aren't outliers.
        seed: for the factors.

    Returns:
        The scales by tensor name.
    """
    generator = np.random.default_rng(seed)
    scales = {name: Scales() for name in family.tensor_shapes()}
    for index in range(family.num_layers):
        prefix = family.block_prefix(index)
        for group in family.block_groups(index):
            if group.norm is not None:
                factors = draw_factors(family.hidden_size, sigma, generator)
                scales[f"{prefix}{group.norm}.weight"].rows = factors
                for linear in group.linears:
                    scales[f"{prefix}{linear}.weight"].columns = factors
            if group.absorber is not None:
                factors = draw_factors(family.linear_shape(index, group.absorber)[0], sigma, generator)
                scales[f"{prefix}{group.absorber}.weight"].rows = factors
                if group.absorber in family.biased_linears():
                    scales[f"{prefix}{group.absorber}.bias"].rows = factors
                for linear in group.linears:
                    scales[f"{prefix}{linear}.weight"].columns = factors[family.absorber_rows(index, group.absorber)]
    if not family.tied_embeddings:
        factors = draw_factors(family.hidden_size, sigma, generator)
        scales[f"{family.final_norm}.weight"].rows = factors
        scales[f"{family.head}.weight"].columns = factors
    return scales


def apply_scales(tensor: torch.Tensor, scales: Scales) -> torch.Tensor:
    """Return the scaled tensor, float64, of the same shape."""
    scaled = tensor.double()
    if scales.columns is not None:
        scaled = scaled * torch.from_numpy(scales.columns)
    if scales.rows is not None:
        rows = torch.from_numpy(scales.rows)
        scaled = scaled / (rows[:, None] if scaled.dim() == 2 else rows)
    return scaled


def scaled_tensors(checkpoint: Checkpoint, family: Family, sigma: float, seed: int) -> dict[str, torch.Tensor]:
    """Return all tensors of the variant by name, float64, without a redundant lm_head beside tied embeddings."""
    scales = draw_scales(family, sigma, seed)
    return {name: apply_scales(checkpoint.tensor(name), scales[name]) for name in family.tensor_shapes()}


def make_outliers(model: Path, output: Path, sigma: float, seed: int) -> None:
    """Write the variant of a checkpoint directory to a new directory.

    Raises:
        D2QError: the checkpoint is invalid, or the output exists or can't be written.
    """
    checkpoint = Checkpoint.open(model)
    family = family_for(checkpoint.config)
    checkpoint.check(family.tensor_shapes())
    tensors = {name: tensor.float() for name, tensor in scaled_tensors(checkpoint, family, sigma, seed).items()}
    config = {key: value for key, value in checkpoint.config.items() if key != "dtype"} | {"torch_dtype": "float32"}
    try:
        output.mkdir(parents=True)
        (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in COPIED:
            if (checkpoint.directory / name).is_file():
                shutil.copyfile(checkpoint.directory / name, output / name)
        save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    except FileExistsError as error:
        raise D2QError(f"{output} exists already; remove it or name another directory") from error
    except OSError as error:
        raise D2QError(f"can't write {output}: {error.strerror or error}") from error


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The directory to write.")
@click.option(
    "--sigma",
    type=click.FloatRange(0, 3),
    default=0.5,
    show_default=True,
    help="Standard deviation of the logarithm of the factors that aren't outliers.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed for the factors.")
def main(model: Path, output: Path, sigma: float, seed: int) -> None:
    """Write a variant of the checkpoint directory MODEL that computes the same, but has outlier channels.

    Norm weights, rows of v and rows of up are divided by random factors, and the columns of the layers that read them
    are multiplied by the same factors; one factor in a hundred is between 10 and 30.
    """
    try:
        make_outliers(model, output, sigma, seed)
    except D2QError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{output}: sigma {sigma:g}, seed {seed}")


if __name__ == "__main__":
    main()
