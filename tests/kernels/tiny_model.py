"""Write tiny random models as GGUF files without a tokenizer, and run them with the installed llama_cpp."""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import numpy.typing as npt

from d2q_edge.formats.tensor_types import TensorType
from tests.gguf_files import finish

F32 = npt.NDArray[np.float32]
WIDTH, FEED_FORWARD, HEADS, VOCABULARY = 256, 512, 4, 96
HEAD_DIM = WIDTH // HEADS
EXPERTS, USED_EXPERTS = 4, 2
ARCHITECTURES = (
    "llama",
    "qwen2",
    "qwen3",
    "smollm3",
    "gemma3",
    "phi3",
    "mistral3",
    "granite",
    "ernie4_5",
    "qwen3moe",
    "olmoe",
)


def kv_heads(arch: str) -> int:
    """Return 2, or the number of heads where the architecture has no other."""
    return HEADS if arch == "olmoe" else 2


def random_tensors(arch: str, seed: int = 0) -> dict[str, F32]:
    """Make the tensors of a model of one block, of one of the ARCHITECTURES."""
    rng = np.random.default_rng(seed)

    def matrix(*shape: int) -> F32:
        drawn: F32 = (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
        return drawn

    def norm(size: int) -> F32:
        return rng.uniform(0.5, 1.5, size).astype(np.float32)

    kv = kv_heads(arch) * HEAD_DIM
    tensors = {
        "token_embd.weight": matrix(VOCABULARY, WIDTH) * 16,
        "output.weight": matrix(VOCABULARY, WIDTH),
        "output_norm.weight": norm(WIDTH),
        "blk.0.attn_norm.weight": norm(WIDTH),
        "blk.0.attn_q.weight": matrix(WIDTH, WIDTH),
        "blk.0.attn_k.weight": matrix(kv, WIDTH),
        "blk.0.attn_v.weight": matrix(kv, WIDTH),
        "blk.0.attn_output.weight": matrix(WIDTH, WIDTH),
        "blk.0.ffn_norm.weight": norm(WIDTH),
        "blk.0.ffn_gate.weight": matrix(FEED_FORWARD, WIDTH),
        "blk.0.ffn_up.weight": matrix(FEED_FORWARD, WIDTH),
        "blk.0.ffn_down.weight": matrix(WIDTH, FEED_FORWARD),
    }
    if arch == "qwen2":
        for name, size in (("q", WIDTH), ("k", kv), ("v", kv)):
            tensors[f"blk.0.attn_{name}.bias"] = np.zeros(size, np.float32)
    if arch in ("qwen3", "gemma3", "qwen3moe", "olmoe"):
        for name in ("q", "k"):
            tensors[f"blk.0.attn_{name}_norm.weight"] = norm(WIDTH if arch == "olmoe" else HEAD_DIM)
    if arch == "gemma3":
        for name in ("attention", "ffw"):
            tensors[f"blk.0.post_{name}_norm.weight"] = norm(WIDTH)
    if arch == "phi3":
        fused = {"attn_qkv": ("attn_q", "attn_k", "attn_v"), "ffn_up": ("ffn_gate", "ffn_up")}
        for name, parts in fused.items():
            rows = [tensors.pop(f"blk.0.{part}.weight") for part in parts]
            tensors[f"blk.0.{name}.weight"] = np.concatenate(rows)
    if arch in ("qwen3moe", "olmoe"):
        for name in ("gate", "up", "down"):
            rows, columns = tensors.pop(f"blk.0.ffn_{name}.weight").shape
            tensors[f"blk.0.ffn_{name}_exps.weight"] = matrix(EXPERTS, rows, columns)
        tensors["blk.0.ffn_gate_inp.weight"] = matrix(EXPERTS, WIDTH)
    return tensors


def _number(value: int) -> gguf.GGMLQuantizationType:
    """Stand in for a type number that gguf doesn't know; its writer only needs value and name."""
    number = int.__new__(gguf.GGMLQuantizationType, value)
    number._name_, number._value_ = f"TYPE_{value}", value
    return number


def write(
    path: Path,
    arch: str,
    tensors: dict[str, F32],
    packed: dict[str, npt.NDArray[np.uint8]] | None = None,
    packed_type: TensorType | None = None,
    text: dict[str, str] | None = None,
) -> Path:
    """Write the model, with the tensors named in `packed` as those rows of `packed_type`."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(kv_heads(arch))
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCABULARY)
    if arch in ("qwen3moe", "olmoe"):
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(USED_EXPERTS)
        writer.add_expert_feed_forward_length(FEED_FORWARD)
    if arch == "granite":
        writer.add_logit_scale(1.0)
    writer.add_tokenizer_model("no_vocab")
    for key, value in (text or {}).items():
        writer.add_string(key, value)
    for name, tensor in tensors.items():
        if packed_type is not None and packed is not None and name in packed:
            number = _number(packed_type.id)
            gguf.GGML_QUANT_SIZES[number] = (packed_type.block_size, packed_type.type_size)
            writer.add_tensor(name, packed[name], raw_dtype=number)
        else:
            writer.add_tensor(name, tensor)
    finish(writer)
    return path


def logits(
    llama_cpp: ModuleType, path: Path, tokens: Sequence[int], batch: int = 64, repack: bool = True
) -> F32 | None:
    """Return logits, float32 [len(tokens), VOCABULARY], of `batch` tokens at a time; None if loading fails.

    `repack` lets llama.cpp interleave rows.
    """
    model_parameters = llama_cpp.llama_model_default_params()
    model_parameters.use_extra_bufts = repack
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_parameters)
    if not model:
        return None
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = 64, 64, 64
    parameters.n_threads = parameters.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model, parameters)
    out = np.zeros((len(tokens), VOCABULARY), np.float32)
    for start in range(0, len(tokens), batch):
        part = tokens[start : start + batch]
        request = llama_cpp.llama_batch_init(len(part), 0, 1)
        request.n_tokens = len(part)
        for i, token in enumerate(part):
            request.token[i], request.pos[i], request.logits[i] = token, start + i, 1
            request.n_seq_id[i], request.seq_id[i][0] = 1, 0
        if llama_cpp.llama_decode(context, request):
            raise RuntimeError("llama_decode failed")
        for i in range(len(part)):
            row = llama_cpp.llama_get_logits_ith(context, i)
            out[start + i] = np.ctypeslib.as_array(ctypes.cast(row, ctypes.POINTER(ctypes.c_float)), (VOCABULARY,))
        llama_cpp.llama_batch_free(request)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return out
