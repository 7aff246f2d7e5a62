"""Share parameter types and options among commands."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

from d2q_edge.options import CACHE_TYPES, LoadOptions, SamplingOptions

PATH = click.Path(path_type=Path)
"""Type of a file argument; the library says what is wrong with it."""
T = TypeVar("T")
MAX_THREADS = 512
"""ggml's limit; beyond it, ggml aborts the process."""


class Number(click.FloatRange):
    """A finite number in a range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Convert and check a value."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a number in the range {self._describe_range()}.", param, ctx)
        return number


def field_option(options: type, name: str, **attributes: Any) -> Callable[..., Any]:
    """Make the option that sets a dataclass's field, with its name and default; one that is True gets a --no- form."""
    default, flag = getattr(options, name), f"--{name.replace('_', '-')}"
    if isinstance(default, bool):
        attributes["is_flag"] = True
        flag += f"/--no-{flag[2:]}" if default else ""
    return click.option(flag, name, default=default, **attributes)


def loading_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options whose values make LoadOptions, see `take`."""
    for option in (
        field_option(LoadOptions, "repack", help="Let llama.cpp rearrange weights for speed."),
        field_option(LoadOptions, "cache_type_v", **CACHE, help="Type of the context's values."),
        field_option(LoadOptions, "cache_type_k", **CACHE, help="Type of the context's keys."),
        field_option(LoadOptions, "lora", **LORA, help="Adapters to use the model with."),
    ):
        command = option(command)
    return command


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options whose values make SamplingOptions, see `take`."""
    for option in (
        field_option(SamplingOptions, "repeat_penalty", type=Number(0.01, 100), help="Against repetitions; 1 is none."),
        field_option(SamplingOptions, "min_p", type=Number(0, 1), help="Least share of the best one's probability."),
        field_option(SamplingOptions, "top_p", type=Number(0, 1), help="Candidates' total probability; 1 for all."),
        field_option(SamplingOptions, "top_k", type=click.IntRange(0, 2**31 - 1), help="Candidates; 0 for all."),
    ):
        command = option(command)
    return command


def take(options: type[T], values: dict[str, Any]) -> T:
    """Make a dataclass of the values that belong to its fields, which are removed from `values`."""
    return options(**{field.name: values.pop(field.name) for field in fields(options)})  # type: ignore[arg-type]


CACHE: dict[str, Any] = {"type": click.Choice(CACHE_TYPES), "metavar": "TYPE"}
LORA: dict[str, Any] = {"multiple": True, "metavar": "FILE[:SCALE]"}
THREADS = click.IntRange(1, MAX_THREADS)
threads_option = click.option("--threads", type=THREADS, help="CPU threads.  [default: one for each CPU]")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def print_result(result: Any, as_json: bool) -> None:
    """Print what the library returned, an object with to_json() and describe()."""
    click.echo(json.dumps(result.to_json()) if as_json else result.describe())


def wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait; call it before torch or llama.cpp is loaded.

    They spin otherwise, and while anything else uses the CPU, small operations become 40 times slower (measured).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
