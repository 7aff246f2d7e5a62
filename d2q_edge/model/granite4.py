"""Present a dense Granite 4 as the Granite 3 that it is.

The checkpoints (GraniteMoeHybridForCausalLM) are those of a hybrid mixture of experts that has neither state-space
blocks nor experts: what is left is Granite's block, whose gate and up are one tensor under another name. llama.cpp's
converter (conversion/granite.py, GraniteHybridModel) also writes such a model as one of the architecture "granite". It
adds keys of the parts that are not there, which llama.cpp doesn't read and we leave out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from d2q_edge.errors import D2QError
from d2q_edge.model.weight_files import TensorEntry

ARCHITECTURE = "GraniteMoeHybridForCausalLM"
_INPUTS, _OUTPUT = ".shared_mlp.input_linear.", ".shared_mlp.output_linear."


@dataclass(frozen=True)
class _Rows(TensorEntry):
    """Some rows of a tensor."""

    whole: TensorEntry
    start: int

    def load(self) -> torch.Tensor:
        return self.whole.load()[self.start : self.start + self.shape[0]]


def is_granite4(config: Mapping[str, Any]) -> bool:
    """Return whether config.json describes a Granite 4, dense or not."""
    architectures = config.get("architectures")
    return isinstance(architectures, list) and architectures[:1] == [ARCHITECTURE]


def granite_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of the same model as a GraniteForCausalLM.

    Raises:
        D2QError: it has blocks without attention, or experts, or no rotary embedding.
    """
    types, layers = config.get("layer_types"), config.get("num_hidden_layers")
    attention = isinstance(types, list) and all(kind in ("attention", "full_attention") for kind in types)
    if not attention or len(types or ()) != layers or config.get("num_local_experts", 8) != 0:
        raise D2QError(
            f"config.json: of {ARCHITECTURE} only dense models are supported, with attention in every block "
            "(layer_types) and without experts (num_local_experts)"
        )
    if config.get("position_embedding_type") != "rope":
        raise D2QError("config.json: position_embedding_type must be rope, which llama.cpp's granite always has")
    left_out = ("layer_types", "num_local_experts", "num_experts_per_tok", "shared_intermediate_size")
    kept = {key: value for key, value in config.items() if key not in left_out and not key.startswith("mamba_")}
    width = config.get("shared_intermediate_size", 1024)
    return {**kept, "architectures": ["GraniteForCausalLM"], "model_type": "granite", "intermediate_size": width}


def granite_entries(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Name the tensors as Granite 3's, and cut those that hold gate and up; raise D2QError for one of odd shape."""
    result: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        if _INPUTS not in name:
            result[name.replace(_OUTPUT, ".mlp.down_proj.")] = entry
            continue
        if len(entry.shape) != 2 or entry.shape[0] % 2:
            raise D2QError(f"tensor {name} in {entry.file} has the shape {list(entry.shape)}: it must be gate and up")
        half, columns = entry.shape[0] // 2, entry.shape[1]
        for part, start in (("gate", 0), ("up", half)):
            cut = _Rows(entry.file, entry.name, entry.dtype, (half, columns), entry, start)
            result[name.replace(_INPUTS, f".mlp.{part}_proj.")] = cut
    return result
