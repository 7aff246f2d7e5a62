"""Share parameter types and options among commands."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)
"""Type of a file argument; the library says what is wrong with it."""
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
