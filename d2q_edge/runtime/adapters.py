"""Parse which LoRA adapters a model is to be used with, and check their files before llama.cpp reads them."""

import math
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from d2q_edge.errors import D2QError
from d2q_edge.formats.column_scales import FIT, scales_hash
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.utils.files import split_number

TYPES = "f32", "f16", "bf16", "q8_0"
"""What llama.cpp's convert_lora_to_gguf.py writes."""


@dataclass(frozen=True)
class Adapter:
    """A GGUF file of an adapter, the factor of its effect, and the scales that it was rewritten for (FIT), if any."""

    path: Path
    scale: float = 1.0
    fit: str | None = None

    def misfit(self, model: GGUFFile) -> str | None:
        """Return a sentence if the adapter wasn't made for the column scales of a model's file."""
        if self.fit == scales_hash(model):
            return None
        made = "the original model" if self.fit is None else "another file"
        return (
            f"the adapter {self.path} is made for {made}, and {model.path} has scaled columns; to make one that fits: "
            f"d2q-edge adapter IN OUT --for {shlex.quote(str(model.path))}"
        )


def parse_adapters(entries: Iterable[str]) -> tuple[Adapter, ...]:
    """Return the adapters named by entries FILE or FILE:SCALE; a file that exists under the whole name wins.

    Raises:
        D2QError: a scale isn't finite, or a file isn't a GGUF of an adapter.
    """
    return tuple(map(_parse, entries))


def _parse(entry: str) -> Adapter:
    name, scale = split_number(entry)
    adapter = Adapter(Path(name), 1.0 if scale is None else scale)
    if not math.isfinite(adapter.scale):
        raise D2QError(f"the scale of the adapter {name} must be a finite number, not {adapter.scale:g}")
    if adapter.path.is_dir():
        raise D2QError(f"{adapter.path} is a directory; `d2q-edge adapter` makes a GGUF file of an adapter in it")
    file = GGUFFile(adapter.path)
    check_adapter(file)
    return replace(adapter, fit=file.kv.get(FIT))


def check_adapter(file: GGUFFile) -> None:
    """Refuse what isn't an adapter of finite numbers, or what llama.cpp would abort on.

    Raises:
        D2QError: says what is wrong.
    """
    kind, alpha = file.kv.get("general.type"), file.kv.get("adapter.lora.alpha", 0.0)
    if kind != "adapter" or file.kv.get("adapter.type") != "lora":
        raise D2QError(f"{file.path} isn't a LoRA adapter: its general.type is {kind!r:.40}")
    if not isinstance(file.kv.get("general.architecture"), str):
        raise D2QError(f"{file.path} is malformed: its general.architecture isn't text")
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise D2QError(f"{file.path} is malformed: its adapter.lora.alpha isn't a finite float")
    for name, info in file.tensors.items():
        if info.type_name not in TYPES or len(info.shape) > 3:
            raise D2QError(f"{file.path} has a {info.type_name} tensor, {name}; adapters have {', '.join(TYPES)}")
        if not np.isfinite(file.dequantize(name)).all():
            raise D2QError(f"{file.path} is damaged: NaN or infinity in {name}")
