"""The model families that can be converted, one file each; a new family is a new file and an entry in FAMILIES."""

from collections.abc import Mapping
from typing import Any

from d2q_edge.errors import D2QError
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.model.families.base import Family
from d2q_edge.model.families.ernie4_5 import Ernie4p5
from d2q_edge.model.families.gemma3 import Gemma3
from d2q_edge.model.families.gemma4 import Gemma4
from d2q_edge.model.families.granite import Granite
from d2q_edge.model.families.granite_hybrid import GraniteHybrid
from d2q_edge.model.families.layout import LinearGroup, RoutedExperts, Sublayer
from d2q_edge.model.families.lfm2 import Lfm2
from d2q_edge.model.families.lfm2_moe import Lfm2Moe
from d2q_edge.model.families.llama import Llama
from d2q_edge.model.families.ministral3 import Ministral3
from d2q_edge.model.families.mistral import Mistral
from d2q_edge.model.families.olmo2 import Olmo2, Olmo3
from d2q_edge.model.families.olmoe import Olmoe
from d2q_edge.model.families.phi3 import Phi3
from d2q_edge.model.families.qwen2 import Qwen2
from d2q_edge.model.families.qwen3 import Qwen3
from d2q_edge.model.families.qwen3_5 import Qwen3p5
from d2q_edge.model.families.qwen3_moe import Qwen3Moe
from d2q_edge.model.families.smollm3 import SmolLM3

__all__ = ["FAMILIES", "Family", "LinearGroup", "RoutedExperts", "Sublayer", "family_for", "family_of_file"]

FAMILIES: tuple[type[Family], ...] = (
    Llama,
    Mistral,
    Ministral3,
    Qwen2,
    Qwen3,
    SmolLM3,
    Gemma3,
    Gemma4,
    Phi3,
    Granite,
    Ernie4p5,
    Lfm2,
    Olmo2,
    Olmo3,
    Qwen3p5,
    Qwen3Moe,
    Olmoe,
    Lfm2Moe,
    GraniteHybrid,
)

REFUSED = {
    "GptOssForCausalLM": (
        "its experts have biases and limit what gate and up put out, neither of which d2q-edge's experts do, and they "
        "are published in 4 bits already"
    ),
}
"""Known architectures that are left out on purpose, with the reason."""


def family_of_file(file: GGUFFile) -> type[Family]:
    """Return the family of a GGUF file's model, by its architecture: Mistral's files are Llama's.

    Raises:
        D2QError: the architecture isn't supported.
    """
    arch = file.kv.get("general.architecture")
    for family in FAMILIES:
        if family.gguf_arch == arch:
            return family
    supported = ", ".join(sorted({family.gguf_arch for family in FAMILIES}))
    raise D2QError(f"{file.path} has the architecture {arch!r:.40}, which isn't supported; these are: {supported}")


def family_for(config: Mapping[str, Any]) -> Family:
    """Return the family of a config.json's content, bound to it.

    Raises:
        D2QError: the architecture isn't supported, or the config has settings that the GGUF can't express.
    """
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise D2QError("config.json names no architecture (its architectures entry is missing or empty)")
    for family in FAMILIES:
        if architectures[0] in family.architectures:
            return family(config)
    if isinstance(architectures[0], str) and architectures[0] in REFUSED:
        raise D2QError(f"the architecture {architectures[0]} isn't supported: {REFUSED[architectures[0]]}")
    supported = ", ".join(sorted(name for family in FAMILIES for name in family.architectures))
    raise D2QError(f"the architecture {architectures[0]} isn't supported; these are: {supported}")
