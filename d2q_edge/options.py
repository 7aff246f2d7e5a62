"""State every option of conversion, measurement and serving, and its default, once."""

from dataclasses import dataclass
from pathlib import Path

from d2q_edge.errors import D2QError

ROTATIONS = "auto", "on", "off"
REFINE_SCOPES = "auto", "blocks", "model"
LOWEST_BITS, HIGHEST_BITS = 2.31, 4.3
"""Range of --bits: the mean over the blocks' linear layers. 2.31 stands for d2q2's 2.3125."""
MIN_CONTEXT = 8
CPU_TOKENS, GPU_TOKENS = 65536, 262144
"""Calibration tokens by default."""
CACHE_TYPES = "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"
"""llama.cpp's types for the keys and values of a context."""
CHAT_CONTEXT, CHAT_TEMPERATURE = 4096, 0.7
"""Tokens of a whole conversation, and the temperature of its answers."""


@dataclass(frozen=True)
class Options:
    """What decides the content of the file.

    Attributes:
        bits: 2, 3, or the mean over the blocks' linear layers of a mixture of types.
        adapter: a LoRA adapter, a directory or an id of the hub, to merge into the model first (model/lora.py).
        calibrate: quantize with error feedback on calibration text; otherwise round to nearest, in seconds.
        calibration: a text file, a .jsonl file of conversations, or "builtin"; or several, as FILE or FILE:WEIGHT.
        calibration_tokens: how many at most; None for 65,536 on a CPU, 262,144 on a GPU.
        context: tokens per calibration window.
        seed: of the choice of windows, and of the rotation.
        rotation: "on", "off", or "auto" for what pays: today the same as "off" (model/rotated_checkpoint.py).
        dsq: give columns scales, which their neighbors absorb (quantize/dsq.py).
        dac: give norms biases against their mean shift (quantize/dac.py).
        guidance: let the gradients of the loss guide the rounding (pipeline/guidance.py).
        alpha: weight of the input's error in the feedback (quantize/gptaq.py); 0 is GPTQ; 0.5 was best on qwen3-34m.
        descent_rounds: of coordinate descent (quantize/descent.py); a third one gains less than a tenth of two.
        refine: tune scales, norms and codes by gradients (quantize/refine.py).
        refine_scope: what is tuned together: "blocks", each as soon as it is quantized (pipeline/block_refinement.py),
            "model" (pipeline/refinement.py), or "auto", the model on a GPU that it fits on, else blocks.
        embedding_type, head_type: stock types; None chooses.
        per_layer_type: of embeddings that every block has for itself, stock, d2q2 or d2q3; None chooses.
        device: "auto", "cpu", "cuda" or "mps".
        memory_limit: bytes of the computer's memory that may be taken; None for what is free.
        pre_tokenizer: llama.cpp's name for the way the tokenizer splits text; None finds it.
    """

    bits: float = 2
    adapter: str | None = None
    calibrate: bool = True
    calibration: str | tuple[str, ...] = ("builtin",)
    calibration_tokens: int | None = None
    context: int = 512
    seed: int = 0
    rotation: str = "auto"
    dsq: bool = True
    dac: bool = True
    guidance: bool = True
    alpha: float = 0.5
    descent_rounds: int = 2
    refine: bool = False
    refine_scope: str = "auto"
    embedding_type: str | None = None
    head_type: str | None = None
    per_layer_type: str | None = None
    device: str = "auto"
    memory_limit: int | None = None
    pre_tokenizer: str | None = None

    def __post_init__(self) -> None:
        """Make whole bits int, as the recipe in the file has them."""
        if self.bits in (2, 3):
            object.__setattr__(self, "bits", int(self.bits))

    def tokens_on(self, device: str) -> int:
        """Return how many tokens are wanted for calibration on a device of a type ("cpu", "cuda", "mps")."""
        return self.calibration_tokens or (CPU_TOKENS if device == "cpu" else GPU_TOKENS)

    def check(self) -> None:
        """Raise a D2QError if an option has an invalid value."""
        for name, least in (("calibration_tokens", 1), ("context", MIN_CONTEXT), ("seed", 0), ("descent_rounds", 0)):
            value = getattr(self, name)
            if value is None and name == "calibration_tokens":
                continue
            if type(value) is not int or not least <= value < 2**63:
                raise D2QError(f"{name} must be a whole number from {least}, not {value!r}")
        for name in ("bits", "alpha"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise D2QError(f"{name} must be a number, not {value!r}")
        for name, known in (("rotation", ROTATIONS), ("refine_scope", REFINE_SCOPES)):
            if getattr(self, name) not in known:
                raise D2QError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")


@dataclass(frozen=True)
class LoadOptions:
    """How llama.cpp loads a file; the defaults are its own.

    Attributes:
        lora: GGUF files of adapters, each as FILE or FILE:SCALE.
        cache_type_k, cache_type_v: of CACHE_TYPES, for the context's keys and values.
        repack: let it rearrange weights in memory for speed, where it can.
    """

    lora: tuple[str, ...] = ()
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    repack: bool = True


@dataclass(frozen=True)
class ServerOptions:
    """How a file is served.

    Attributes:
        host: address to listen on; any but a loopback address lets other machines in.
        port: to listen on; 0 takes a free one.
        context: tokens of one conversation; limited to the model's own context.
        parallel: conversations that are answered at the same time; each has memory for its context.
        api_key: bearer token that clients must send, if any.
        threads: number of CPU threads; None takes all CPUs that this process may use.
        cache_type_k, cache_type_v: types that llama.cpp stores the context's keys and values in.
        lora: GGUF files of adapters.
        repack: let llama.cpp rearrange weights in memory for speed, where it can.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    context: int = CHAT_CONTEXT
    parallel: int = 2
    api_key: str | None = None
    threads: int | None = None
    cache_type_k: str = LoadOptions.cache_type_k
    cache_type_v: str = LoadOptions.cache_type_v
    lora: tuple[Path, ...] = ()
    repack: bool = LoadOptions.repack


@dataclass(frozen=True)
class BenchmarkOptions:
    """What is measured: tokens of the prompt, tokens to generate, each number of threads to use, number of rounds.

    Without `repack`, llama.cpp uses weights as they are in the file.
    """

    prompt: int = 512
    generation: int = 64
    threads: tuple[int, ...] = (1, 2)
    rounds: int = 5
    repack: bool = True


@dataclass(frozen=True)
class ComparisonOptions:
    """What is measured: accuracy as by perplexity.evaluate; speed, with None for all CPUs, as by benchmark.

    Types in `stock` are compared with; `pure` and `calibration` are stock.StockQuantizer's.
    """

    text: str = "builtin"
    chunks: int | None = 50
    context: int = 512
    stock: tuple[str, ...] = ()
    pure: bool = False
    calibration: str | tuple[str, ...] = ("builtin",)
    speed: bool = True
    threads: int | None = None
    prompt: int = 256
    generation: int = 64
    rounds: int = 3


@dataclass(frozen=True)
class SamplingOptions:
    """Which tokens are candidates for the next one; the defaults are llama.cpp's (common/common.h).

    Attributes:
        top_k: the most likely ones, so many; 0 for all.
        top_p: the most likely ones that have this probability together; 1 for all.
        min_p: those that have this share of the most likely one's probability; 0 for all.
        repeat_penalty: divisor of the logits of the last 64 tokens; 1 for none.
    """

    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0


LOADING, SAMPLING = LoadOptions(), SamplingOptions()
"""The defaults."""
