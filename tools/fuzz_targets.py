"""Define the targets of tools/fuzz.py: one function per kind of file, which damages a file and reads it.

Damage is done to the bytes (bits flipped, ranges cut, duplicated, replaced) or, for JSON, to the structure (values
replaced by odd ones, keys deleted, duplicated, renamed), because random bytes in JSON rarely get past the parser.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import random
import struct
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save

from d2q_edge.conversion import convert
from d2q_edge.export import inspection
from d2q_edge.export.model_file import export, file_name, model_tokenizer
from d2q_edge.formats import tensor_types
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.formats.gguf_writer import GGUFTensor, write_gguf
from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.model.multimodal import is_multimodal, text_config
from d2q_edge.model.tokenizer.original import load_original
from d2q_edge.options import Options
from d2q_edge.utils.json_files import read_json_object

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-qwen3"
TOKENS = 300
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "bos_token_id": None,
    "eos_token_id": TOKENS - 1,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": TOKENS,
}
WITH_VISION: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "text_config": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "model_type": "gemma3_text",
        "num_hidden_layers": 8,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 64,
        "vocab_size": TOKENS,
    },
    "vision_config": {"hidden_size": 32, "model_type": "siglip_vision_model"},
}
DEEP = "@deep@"
"""Stands for a value that is nested too deep for Python's json module."""
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 64, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, -(2**63), 10**30, 10**400),
    *(
        0.5,
        -0.5,
        1e-320,
        1e308,
        math.inf,
        -math.inf,
        math.nan,
        "",
        "0",
        "a",
        "\x00\x1b[2J",
        "\ud800",
        "🦙" * 9,
        "x" * 5000,
    ),
    *([], {}, [0], [[]], ["a", "b"], [None] * 9, {"a": None}, {"": {"": {}}}, {"type": "default"}, DEEP),
)
NUMBERS = (
    *(0, 1, 2, 7, 8, 31, 32, 127, 128, 255, 256, 2**15, 2**16, 2**22, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62),
    *(2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1),
)


def damage_bytes(rng: random.Random, data: bytes, interesting: int | None = None) -> bytes:
    """Change bytes, mostly among the first `interesting` ones."""
    content = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        end = interesting if interesting and rng.random() < 0.9 else len(content)
        position = rng.randrange(max(1, min(end, len(content))))
        other = rng.randrange(max(1, len(content)))
        length = rng.choice((1, 2, 4, 8, rng.randint(1, 64)))
        match rng.randrange(8):
            case 0:
                content[position : position + 1] = bytes([rng.randrange(256)])
            case 1:
                content[position : position + 1] = bytes([content[position] ^ 1 << rng.randrange(8)] if content else [])
            case 2:
                content[position : position + 8] = struct.pack("<Q", rng.choice(NUMBERS))
            case 3:
                content[position : position + 4] = struct.pack("<I", rng.choice(NUMBERS) & 0xFFFFFFFF)
            case 4:
                del content[position : position + length]
            case 5:
                content[position:position] = content[other : other + length]
            case 6:
                content[position : position + length] = content[other : other + length]
            case 7:
                del content[rng.randrange(len(content) + 1) :]
    return bytes(content)


def damage_json(rng: random.Random, value: Any) -> bytes:
    """Change values and keys of parsed JSON and return text, which is mostly JSON."""
    changed = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        changed = _change(rng, changed)
    text = json.dumps(changed, ensure_ascii=rng.random() < 0.5).replace(f'"{DEEP}"', "[" * 5000 + "]" * 5000)
    if rng.random() < 0.1:
        text = text.replace("{", '{"vocab_size": 5, ', 1)
    data = text.encode("utf-8", "surrogatepass")
    return damage_bytes(rng, data) if rng.random() < 0.1 else data


def _change(rng: random.Random, value: Any) -> Any:
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.05:
        if isinstance(value, (int, float)) and rng.random() < 0.3:
            # Whole numbers can be larger than any float.
            half = value // 2 + 0.5 if abs(value) < 1e300 else value // 2
            return rng.choice((value + 1, value - 1, -value, value * 2, half, str(value), [value]))
        return copy.deepcopy(rng.choice(VALUES))
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    action = rng.random()
    if action < 0.75:
        value[key] = _change(rng, value[key])
    elif action < 0.85:
        del value[key]
    elif isinstance(value, dict):
        other = rng.choice(("", "a\nb", "\ud800", str(key) + " ", rng.choice(list(value))))
        value[other] = value.pop(key)
    else:
        value.insert(key, copy.deepcopy(rng.choice((value[key], rng.choice(VALUES)))))
    return value


def damage_gguf(seed: int, directory: Path) -> None:
    """Damage a GGUF with our types and others; read, decode and describe it."""
    rng = random.Random(f"gguf {seed}")
    path = directory / "x.gguf"
    path.write_bytes(damage_bytes(rng, _gguf(), 1000))
    json.dumps(inspection.inspect(path))
    inspection.describe(inspection.inspect(path))
    file = GGUFFile(path)
    for name in file.tensors:
        file.dequantize(name)


def change_gguf(rng: random.Random, path: Path) -> None:
    """Rewrite a GGUF file, with odd values of some keys and sometimes with other tensors."""
    file = GGUFFile(path)
    keys = {key: (gguf.GGUFValueType(kind), bytes(data)) for key, (kind, data) in file.packed.items()}
    del keys["general.architecture"]
    changed = rng.sample(sorted(keys), rng.choice((0, 1, 1, 2)))
    tensors = [
        GGUFTensor(name, info.shape, info.type_name, partial(np.array, file.raw(name)))
        for name, info in file.tensors.items()
    ]
    if not changed or rng.random() < 0.1:
        index = rng.randrange(len(tensors))
        old = tensors.pop(index)
        if rng.random() < 0.7:
            shape = rng.choice((old.shape[::-1], (1, *old.shape), (math.prod(old.shape),)))
            name = rng.choice((old.name, "rope_freqs.weight", "blk.2.attn_k.bias", old.name + "x"))
            tensors.insert(index, GGUFTensor(name, shape, rng.choice((old.type, "f32")), partial(np.zeros, shape)))

    def add_metadata(writer: gguf.GGUFWriter) -> None:
        for key, (kind, data) in keys.items():
            writer.add_key_value(key, memoryview(data), kind)
        for key in changed:
            del writer.kv_data[0][key]
            match rng.randrange(6):
                case 0:
                    writer.add_uint64(key, rng.choice(NUMBERS))
                case 1:
                    writer.add_int64(key, -rng.choice(NUMBERS[:30]) % 2**31)
                case 2:
                    writer.add_float64(key, rng.choice((0.0, -1.0, 1e-320, 1e300, math.inf, math.nan)))
                case 3:
                    writer.add_string(key, rng.choice(("", "a", "yarn", "\x1b[2J", "x" * 5000)))
                case 4:
                    writer.add_array(key, rng.choice(([1], [2] * TOKENS, ["a"], ["a"] * TOKENS, [0.5, math.nan])))

    write_gguf(path, "qwen3", tensors, add_metadata, force=True)


def damage_gguf_model(seed: int, directory: Path) -> None:
    """Damage the keys or tensors of a GGUF that is to be converted; plan that, read all tensors and load one block."""
    rng = random.Random(f"gguf model {seed}")
    path = directory / "model.gguf"
    path.write_bytes(_gguf_model())
    if rng.random() < 0.1:
        path.write_bytes(damage_bytes(rng, _gguf_model()))
    else:
        change_gguf(rng, path)
    _plan(path, directory)
    checkpoint = Checkpoint.open(path)
    family = family_for(checkpoint.config)
    file_name(checkpoint, family, "D2Q2")
    model_tokenizer(checkpoint, family).bos  # noqa: B018
    for name in checkpoint.names:
        checkpoint.tensor(name)
    BlockRunner(checkpoint, family, torch.device("cpu")).load(0)


def damage_weights(seed: int, directory: Path) -> None:
    """Damage the one weight file of a model, mostly its header."""
    rng = random.Random(f"weights {seed}")
    model = _model(directory, shards=1)
    file = model / "model.safetensors"
    data = _files(1)[file.name]
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.5:
        header = damage_json(rng, json.loads(data[8 : 8 + length]))
        data = struct.pack("<Q", len(header)) + header + data[8 + length :]
    else:
        data = damage_bytes(rng, data, 8 + length)
    file.write_bytes(data)
    _read_weights(model)


def damage_index(seed: int, directory: Path) -> None:
    """Damage the index of a model in shards, or swap or delete shards."""
    rng = random.Random(f"index {seed}")
    model = _model(directory, shards=3)
    index = model / "model.safetensors.index.json"
    names = [name for name in _files(3) if name.startswith("model-")]
    action = rng.random()
    if action < 0.8:
        index.write_bytes(damage_json(rng, json.loads(_files(3)[index.name])))
    elif action < 0.9:
        (model / rng.choice(names)).write_bytes(_files(3)[rng.choice(names)])
    else:
        (model / rng.choice(names)).unlink()
    _read_weights(model)


def damage_config(seed: int, directory: Path) -> None:
    """Damage config.json; compute the output's size and load one block in torch."""
    rng = random.Random(f"config {seed}")
    model = _model(directory, shards=1)
    (model / "config.json").write_bytes(damage_json(rng, CONFIG))
    _plan(model, directory)
    checkpoint = Checkpoint.open(model)
    family = family_for(checkpoint.config)
    file_name(checkpoint, family, "D2Q2")
    BlockRunner(checkpoint, family, torch.device("cpu")).load(0)


def damage_text_config(seed: int, directory: Path) -> None:
    """Damage the config.json of a model that takes images; bind the family of its text part."""
    rng = random.Random(f"text config {seed}")
    (directory / "config.json").write_bytes(damage_json(rng, WITH_VISION))
    config = read_json_object(directory / "config.json", strict=True)
    config = text_config(config) if is_multimodal(config) else config
    family_for(config)
    json.dumps(config)


def damage_tokenizer(seed: int, directory: Path) -> None:
    """Damage the tokenizer's files, or others that end up in the output: model card, templates, generation settings."""
    rng = random.Random(f"tokenizer {seed}")
    model = _model(directory, shards=1)
    name = rng.choice(
        ("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md")
    )
    data = _files(1)[name]
    (model / name).write_bytes(damage_bytes(rng, data) if name == "README.md" else damage_json(rng, json.loads(data)))
    _plan(model, directory)
    checkpoint = Checkpoint.open(model)
    model_tokenizer(checkpoint, family_for(checkpoint.config))
    tokenizer = load_original(checkpoint.directory)
    tokenizer("The quick brown fox", add_special_tokens=False)


TARGETS: dict[str, Callable[[int, Path], None]] = {
    "gguf": damage_gguf,
    "gguf-model": damage_gguf_model,
    "weights": damage_weights,
    "index": damage_index,
    "config": damage_config,
    "text-config": damage_text_config,
    "tokenizer": damage_tokenizer,
}


def _read_weights(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    for name in checkpoint.names:
        checkpoint.tensor(name)
    checkpoint.check(family_for(checkpoint.config).tensor_shapes())


def _plan(model: Path, directory: Path) -> None:
    convert(model, directory / "out.gguf", Options(calibrate=False), dry_run=True)


def _model(directory: Path, *, shards: int) -> Path:
    """Write an undamaged model."""
    model = directory / f"model-{shards}"
    model.mkdir(exist_ok=True)
    for name, data in _files(shards).items():
        (model / name).write_bytes(data)
    return model


@functools.cache
def _files(shards: int) -> dict[str, bytes]:
    """Return name and content of the files of an undamaged model."""
    generator = torch.Generator().manual_seed(0)
    shapes = family_for(CONFIG).tensor_shapes()
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    files = {"config.json": json.dumps(CONFIG).encode(), **_tokenizer()}
    if shards == 1:
        return {**files, "model.safetensors": save(tensors)}
    weight_map = {}
    for index in range(shards):
        name = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[index::shards])
        files[name] = save(part)
        weight_map.update(dict.fromkeys(part, name))
    return {**files, "model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": weight_map}).encode()}


def _tokenizer() -> dict[str, bytes]:
    """Return the example's tokenizer, cut down to TOKENS tokens, and the other small files of a model."""
    content = json.loads((EXAMPLE / "tokenizer.json").read_text(encoding="utf-8"))
    kept = TOKENS - len(content["added_tokens"])
    model = content["model"]
    model["vocab"] = {token: index for token, index in model["vocab"].items() if index < kept}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    for index, token in enumerate(content["added_tokens"]):
        token["id"] = kept + index
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": "{{ messages }}",
    }
    card = "---\nlicense: mit\nbase_model: a/b\ndatasets: [c/d]\ntags: [x, y]\nlanguage: en\n---\n# A model\n"
    return {
        "tokenizer.json": json.dumps(content).encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
        "generation_config.json": json.dumps({"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}).encode(),
        "README.md": card.encode(),
    }


@functools.cache
def _gguf() -> bytes:
    """Return the bytes of an undamaged GGUF."""
    rng = np.random.default_rng(0)
    floats = rng.standard_normal((2, 256)).astype(np.float32)
    tensors = [
        GGUFTensor(f"blk.{i}.{kind}", (2, 256), kind, lambda: floats) for i, kind in enumerate(("f16", "q8_0", "q4_k"))
    ]
    for own in tensor_types.ALL:
        tensors.append(GGUFTensor(own.name, (2, 256), own.name, partial(np.zeros, (2, own.row_bytes(256)), np.uint8)))

    def add_metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_string("general.name", "A file")
        writer.add_string("d2q.recipe", '{"bits": 2}')
        writer.add_array("texts", ["a", "b"])
        writer.add_array("numbers", [1, 2, 3])
        writer.add_uint32("llama.context_length", 512)

    with tempfile.TemporaryDirectory() as directory:
        write_gguf(Path(directory) / "x.gguf", "llama", tensors, add_metadata)
        return (Path(directory) / "x.gguf").read_bytes()


@functools.cache
def _gguf_model() -> bytes:
    """Return the bytes of an undamaged GGUF of a whole model."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "out.gguf"
        export(_model(Path(directory), shards=1), out, "q8_0", verify=False)
        return out.read_bytes()
