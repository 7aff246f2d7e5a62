"""Read how a model scales its rotary embeddings, and write it as llama.cpp's converter does (conversion/base.py).

Linear scaling divides all positions by a factor. YaRN (arXiv 2309.00071) does so for slow rotations only, and
multiplies cosines and sines by 0.1 ln(factor) + 1. transformers reads its limits of slow and fast, and another
multiplier, from config.json; llama.cpp has the limits built in.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import gguf

from d2q_edge.errors import D2QError
from d2q_edge.model.families.settings import Settings, positive_float

_ORIGINAL = "original_max_position_embeddings"
_LIMITS = {"beta_fast": 32, "beta_slow": 1}  # rotations within the original context, as llama.cpp has them


class RotaryEmbedding(Settings):
    """The part of a family that concerns its rotary embeddings.

    The config sets rope_type, rope_theta and rope_scaling (a mapping).
    """

    rope_types: ClassVar[tuple[str, ...]] = ("default", "linear", "yarn")  # those that the GGUF can express
    default_rope_theta: ClassVar[float] = 10000.0
    gguf_arch: ClassVar[str]
    context_length: int

    def _add_rope(self, writer: gguf.GGUFWriter) -> None:
        """Add scaling and rotary base, in the order of llama.cpp's converter."""
        scaling = self.rope_scaling
        if self.rope_type in ("linear", "yarn"):
            writer.add_rope_scaling_type(gguf.RopeScalingType(self.rope_type))
            writer.add_rope_scaling_factor(scaling["factor"])
        if self.rope_type == "yarn":
            writer.add_rope_scaling_orig_ctx_len(scaling.get(_ORIGINAL, self.context_length))
            given = {**scaling, "attention_factor": scaling.get("attention_factor", scaling.get("attn_factor"))}
            for key, add in (
                ("extrapolation_factor", writer.add_rope_scaling_yarn_ext_factor),
                ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
                ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
                ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
            ):
                if given.get(key) is not None:
                    add(given[key])
            # The converter's key for the multiplier is one that llama.cpp doesn't read for these architectures.
            if not math.isclose(self._multiplier, 1):
                writer.add_rope_scaling_attn_factors(self._multiplier)
        writer.add_rope_freq_base(self.rope_theta)

    @property
    def _own_multiplier(self) -> float:
        """Return llama.cpp's multiplier of cosines and sines in YaRN."""
        return 0.1 * math.log(max(float(self.rope_scaling["factor"]), 1.0)) + 1

    @property
    def _multiplier(self) -> float:
        """Return transformers' multiplier of cosines and sines in YaRN, relative to llama.cpp's."""
        scaling, logarithm = self.rope_scaling, 0.1 * math.log(max(float(self.rope_scaling["factor"]), 1.0))
        if scaling.get("attention_factor") is not None:
            return float(scaling["attention_factor"]) / self._own_multiplier
        over, under = scaling.get("mscale"), scaling.get("mscale_all_dim")
        wanted = (over * logarithm + 1) / (under * logarithm + 1) if over and under else logarithm + 1
        return float(wanted / self._own_multiplier)

    @property
    def _rope_notes(self) -> tuple[str, ...]:
        """Return a sentence for a context that is shorter than the scaling makes it."""
        original = self.rope_scaling.get(_ORIGINAL)
        if self.rope_type != "yarn" or original is None:
            return ()
        scaled = float(self.rope_scaling["factor"]) * original
        if scaled <= self.context_length:
            return ()
        return (
            f"YaRN scales the model's context to {scaled:.0f} tokens, but max_position_embeddings in config.json, "
            f"which the file repeats, says {self.context_length}",
        )

    def _ropes_by_type(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Return the settings of layers with full attention and with a sliding window, where they differ."""
        both = self.config.get("rope_parameters") or {}
        if not isinstance(both, Mapping) or not both.keys() <= {"full_attention", "sliding_attention"}:
            raise D2QError("config.json: rope_parameters must be an object with full_attention and sliding_attention")
        full, sliding = (both.get(kind) or {} for kind in ("full_attention", "sliding_attention"))
        scaling = self.config.get("rope_scaling") or {}
        if not all(isinstance(settings, Mapping) for settings in (full, sliding, scaling)):
            raise D2QError("config.json: rope_scaling must be an object")
        if sliding.get("rope_type", "default") != "default":
            raise D2QError("config.json: scaled rotary embeddings of the sliding-window layers aren't supported")
        self._read_rotary_share(sliding)
        return {**full, **scaling}, sliding

    def _rope_settings(self) -> Mapping[str, Any]:
        """Return `rope_parameters` (transformers 5), or else `rope_scaling`, which lacks rope_theta."""
        new, old = self.config.get("rope_parameters"), self.config.get("rope_scaling")
        if new and old and new != old:
            raise D2QError("config.json has both rope_parameters and rope_scaling, and they differ; remove one of them")
        settings = new or old or {}
        if not isinstance(settings, Mapping):
            raise D2QError("config.json: rope_scaling must be an object")
        return settings

    def _read_rope(self) -> None:
        settings = self._rope_settings()
        kind = settings.get("rope_type") or settings.get("type") or "default"
        if kind not in self.rope_types or any(isinstance(value, Mapping) for value in settings.values()):
            advice = f"llama.cpp's {self.gguf_arch} has no such scaling"
            if kind == "dynamic":
                advice = (
                    "llama.cpp can't scale by the length of a text; up to max_position_embeddings tokens the model is "
                    "the same without scaling, so remove rope_scaling to convert it for these"
                )
            raise D2QError(
                f"config.json: rope_scaling of type {kind!r} isn't supported for {self.gguf_arch} "
                f"(supported: {', '.join(self.rope_types)}): {advice}"
            )
        self.rope_type: str = kind
        self.rope_scaling: Mapping[str, Any] = settings
        theta = settings.get("rope_theta", self.config.get("rope_theta"))
        self.rope_theta = positive_float("rope_theta", self.default_rope_theta if theta is None else theta)
        self._read_rotary_share(settings)
        if kind in ("linear", "yarn"):
            positive_float("rope_scaling's factor", settings.get("factor"))
        if kind == "yarn":
            self._check_yarn(settings)

    def _check_yarn(self, settings: Mapping[str, Any]) -> None:
        """Refuse invalid numbers, and what llama.cpp can't compute."""
        for key in ("extrapolation_factor", "attention_factor", "attn_factor", "mscale", "mscale_all_dim", *_LIMITS):
            if settings.get(key) not in (None, 0):
                positive_float(f"rope_scaling's {key}", settings[key])
        original = settings.get(_ORIGINAL, self.context_length)
        if type(original) is not int or not 0 < original < 2**31:
            raise D2QError(f"config.json: rope_scaling's {_ORIGINAL} must be a whole number, not {original!r}")
        if (other := self.config.get(_ORIGINAL, original)) != original:
            raise D2QError(
                f"config.json: {_ORIGINAL} is {other!r}, but the rotary embeddings are scaled for {original}; write "
                "the right number into rope_scaling and remove the other one"
            )
        for key, value in _LIMITS.items():
            if (settings.get(key) or value) != value:
                raise D2QError(
                    f"config.json: rope_scaling's {key} is {settings[key]:g}, but llama.cpp's {self.gguf_arch} always "
                    f"computes with {value}; the model can't be converted without changing it"
                )
        if settings.get("truncate", True) is not True:
            raise D2QError(
                "config.json: rope_scaling's truncate is off, but llama.cpp always rounds the limits of YaRN; the "
                "model can't be converted without changing it"
            )

    def _read_rotary_share(self, settings: Mapping[str, Any]) -> None:
        for place in (self.config, settings):
            if place.get("partial_rotary_factor", 1.0) not in (1, None):
                raise D2QError("config.json: a partial_rotary_factor other than 1 isn't supported")
