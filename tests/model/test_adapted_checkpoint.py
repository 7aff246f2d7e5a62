"""A merged adapter is the formula in float64, tied tables become what peft's unmerged model computes with, and every
adapter that can't be merged is refused with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2q_edge.errors import D2QError
from d2q_edge.model.adapted_checkpoint import adapted
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.model.rotated_checkpoint import RotatedCheckpoint
from tests.adapters import ALPHA, PREFIX, RANK, configure, rewrite_adapter, write_adapter
from tests.quantized_checkpoints import quantize

Make = Callable[..., Path]
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def merged(model: Path, adapter: Path) -> Checkpoint:
    source = Checkpoint.open(model)
    source.check(family_for(source.config).tensor_shapes())
    checkpoint = adapted(source, str(adapter))
    checkpoint.check(family_for(checkpoint.config).tensor_shapes())
    return checkpoint


def formula(model: Path, adapter: Path, module: str, scale: float) -> torch.Tensor:
    """W + scale * B A, and DoRA's norms, in float64."""
    stored = load_file(adapter / "adapter_model.safetensors")
    checkpoint = Checkpoint.open(model)
    weight = checkpoint.tensor(f"{module if f'{module}.weight' in checkpoint.names else EMBEDDING}.weight").double()
    parts: dict[str, torch.Tensor]
    parts = {name.partition(".lora_")[2]: value.double() for name, value in stored.items() if f".{module}.lora" in name}
    if "embedding_A" in parts:
        result = weight + scale * (parts["embedding_B"] @ parts["embedding_A"]).T
        axis = 0
    else:
        result = weight + scale * parts["B.weight"] @ parts["A.weight"]
        axis = 1
    if "magnitude_vector" in parts:
        norms = result.pow(2).sum(axis, keepdim=True).sqrt()
        result = result / norms * parts["magnitude_vector"].unsqueeze(axis)
    return result


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether these differ by no more than a rounding of the dtype."""
    return torch.allclose(found.double(), expected, rtol=torch.finfo(found.dtype).eps, atol=1e-6)


class TestMerging:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        ("settings", "scale"),
        [({}, ALPHA / RANK), ({"use_rslora": True}, ALPHA / math.sqrt(RANK)), ({"use_dora": True}, ALPHA / RANK)],
        ids=["lora", "rslora", "dora"],
    )
    def test_formula(
        self, make_checkpoint: Make, tmp_path: Path, dtype: torch.dtype, settings: dict[str, Any], scale: float
    ) -> None:
        model = make_checkpoint("qwen3", dtype=dtype)
        modules = [Q, DOWN, EMBEDDING, HEAD]
        checkpoint = merged(model, write_adapter(tmp_path / "adapter", model, modules, dtype=dtype, **settings))
        original = Checkpoint.open(model)
        for name in checkpoint.names:
            found, module = checkpoint.tensor(name), name.removesuffix(".weight")
            assert found.dtype == checkpoint.dtype(name) == dtype
            if module in modules:
                assert close(found, formula(model, tmp_path / "adapter", module, scale)), name
                assert not torch.allclose(found, original.tensor(name), rtol=0.1)
            else:
                assert torch.equal(found, original.tensor(name))
        assert checkpoint.config == original.config
        (note,) = checkpoint.notes
        assert note.endswith("adapter, which was trained on tiny-org/base, changes 4 tensors")

    def test_every_load_is_fresh(self, make_checkpoint: Make, tmp_path: Path) -> None:
        model = make_checkpoint("qwen3", dtype=torch.float32)
        checkpoint = merged(model, write_adapter(tmp_path / "adapter", model, [Q]))
        first = checkpoint.tensor(f"{Q}.weight").clone()
        checkpoint.tensor(f"{Q}.weight").zero_()
        assert torch.equal(checkpoint.tensor(f"{Q}.weight"), first)

    def test_patterns(self, make_checkpoint: Make, tmp_path: Path) -> None:
        """The first that matches counts: a name, its end after a dot, or all of it."""
        model = make_checkpoint("qwen3", dtype=torch.float32)
        other = "model.layers.1.self_attn.q_proj"
        adapter = write_adapter(
            tmp_path / "adapter", model, [Q, DOWN, other], ranks={Q: 2, DOWN: 8},
            rank_pattern={"^model.layers.0.self_attn.q_proj$": 2, r"mlp\.down_proj": 8, "proj": 7, "^q_proj": 1},
            alpha_pattern={"layers.0.self_attn.q_proj": 3, "self_attn.q_proj": 5},
        )  # fmt: skip
        checkpoint = merged(model, adapter)
        for module, scale in ((Q, 3 / 2), (DOWN, ALPHA / 8), (other, 5 / RANK)):
            assert close(checkpoint.tensor(f"{module}.weight"), formula(model, adapter, module, scale))

    def test_tensors_trained_in_full(self, make_checkpoint: Make, tmp_path: Path) -> None:
        """As modules_to_save and biases are; in the model's dtype."""
        model = make_checkpoint("qwen2", dtype=torch.bfloat16)
        names = ["lm_head.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"]
        adapter = write_adapter(tmp_path / "adapter", model, [DOWN], replaced=names, bias="all")
        stored = load_file(adapter / "adapter_model.safetensors")
        checkpoint = merged(model, adapter)
        for name in names:
            assert torch.equal(checkpoint.tensor(name), stored[PREFIX + name].bfloat16())

    @pytest.mark.parametrize("inner", ["modules_to_save", "modules_to_save.default"])
    def test_older_names(self, make_checkpoint: Make, tmp_path: Path, inner: str) -> None:
        model = make_checkpoint("qwen2", dtype=torch.float32)
        adapter = write_adapter(tmp_path / "adapter", model, [Q], replaced=["lm_head.weight"])
        expected = {name: merged(model, adapter).tensor(name) for name in (f"{Q}.weight", "lm_head.weight")}

        def rename(tensors: dict[str, torch.Tensor]) -> None:
            head = tensors.pop(f"{PREFIX}lm_head.weight")
            tensors[f"{PREFIX}lm_head.{inner}.weight"] = head
            tensors[f"{PREFIX}lm_head.original_module.weight"] = head + 1
            for part in "AB":
                tensors[f"{PREFIX}{Q}.lora_{part}.default.weight"] = tensors.pop(f"{PREFIX}{Q}.lora_{part}.weight")

        rewrite_adapter(adapter, rename)
        assert all(torch.equal(merged(model, adapter).tensor(name), value) for name, value in expected.items())

    def test_resized_base_layer_comes_first(self, make_checkpoint: Make, tmp_path: Path) -> None:
        """With a LoRA on the embeddings, peft also saves these themselves."""
        model = make_checkpoint("qwen2", dtype=torch.float32)
        adapter = write_adapter(tmp_path / "adapter", model, [EMBEDDING])
        weight = torch.randn(4100, 64, dtype=torch.float32)
        rewrite_adapter(adapter, lambda tensors: tensors.update({f"{PREFIX}{EMBEDDING}.base_layer.weight": weight}))
        stored = load_file(model / "model.safetensors")
        save_file({**stored, f"{EMBEDDING}.weight": weight}, tmp_path / "model.safetensors")
        found = merged(model, adapter).tensor(f"{EMBEDDING}.weight")
        (tmp_path / "model.safetensors").replace(model / "model.safetensors")
        assert close(found, formula(model, adapter, EMBEDDING, ALPHA / RANK))

    @pytest.mark.parametrize(
        ("family", "module"),
        [("qwen3moe", "model.layers.0.mlp.experts.3.gate_proj"), ("qwen3moe", "model.layers.1.mlp.gate")],
    )
    def test_experts_and_routers(self, make_checkpoint: Make, tmp_path: Path, family: str, module: str) -> None:
        model = make_checkpoint(family, dtype=torch.float32)
        adapter = write_adapter(tmp_path / "adapter", model, [module])
        found = merged(model, adapter).tensor(f"{module}.weight")
        assert close(found, formula(model, adapter, module, ALPHA / RANK))

    @pytest.mark.parametrize("prefix", ["base_model.model._orig_mod.", "", "base_model.model.language_model."])
    def test_other_prefixes(self, make_checkpoint: Make, tmp_path: Path, prefix: str) -> None:
        model = make_checkpoint("qwen3", dtype=torch.float32)
        expected = merged(model, write_adapter(tmp_path / "a", model, [Q])).tensor(f"{Q}.weight")
        found = merged(model, write_adapter(tmp_path / "b", model, [Q], prefix=prefix)).tensor(f"{Q}.weight")
        assert torch.equal(found, expected)

    def test_on_a_quantized_model(self, make_checkpoint: Make, tmp_path: Path) -> None:
        model = make_checkpoint("qwen3", hidden_size=192, intermediate_size=320, num_hidden_layers=1)
        quantize(model, "awq")
        adapter = write_adapter(tmp_path / "adapter", model, [Q])
        found = merged(model, adapter).tensor(f"{Q}.weight")
        assert found.dtype == torch.float32 and close(found, formula(model, adapter, Q, ALPHA / RANK))


class TestTiedTables:
    @pytest.mark.parametrize("module", [EMBEDDING, HEAD])
    @pytest.mark.parametrize("redundant", [False, True])
    def test_a_change_of_one_unties(self, make_checkpoint: Make, tmp_path: Path, module: str, redundant: bool) -> None:
        model = make_checkpoint("qwen3", tie_word_embeddings=True, dtype=torch.float32)
        original = Checkpoint.open(model).tensor(f"{EMBEDDING}.weight")
        if redundant:
            stored = load_file(model / "model.safetensors")
            save_file({**stored, f"{HEAD}.weight": original}, model / "model.safetensors")
        adapter = write_adapter(tmp_path / "adapter", model, [Q, module])
        checkpoint = merged(model, adapter)
        assert not family_for(checkpoint.config).tied_embeddings
        assert "embeddings and lm_head differently" in checkpoint.notes[-1]
        assert next(iter(checkpoint.names)) == "lm_head.weight"
        for table in (EMBEDDING, HEAD):
            expected = formula(model, adapter, table, ALPHA / RANK) if table == module else original.double()
            assert close(checkpoint.tensor(f"{table}.weight"), expected)

    def test_two_trained_tables(self, make_checkpoint: Make, tmp_path: Path) -> None:
        model = make_checkpoint("qwen3", tie_word_embeddings=True, dtype=torch.float32)
        names = [f"{EMBEDDING}.weight", f"{HEAD}.weight"]
        adapter = write_adapter(tmp_path / "adapter", model, [Q], replaced=names)
        stored = load_file(adapter / "adapter_model.safetensors")
        checkpoint = merged(model, adapter)
        assert all(torch.equal(checkpoint.tensor(name), stored[PREFIX + name]) for name in names)
        # Equal ones stay tied.
        same = stored[PREFIX + names[0]]
        rewrite_adapter(adapter, lambda tensors: tensors.update({PREFIX + names[1]: same.clone()}))
        checkpoint = merged(model, adapter)
        assert family_for(checkpoint.config).tied_embeddings and HEAD not in checkpoint.names
        assert torch.equal(checkpoint.tensor(names[0]), same)

    def test_tables_that_were_kept_tied(self, make_checkpoint: Make, tmp_path: Path) -> None:
        """With ensure_weight_tying, peft gives lm_head the embeddings' matrices, transposed."""
        model = make_checkpoint("qwen3", tie_word_embeddings=True, dtype=torch.float32)
        adapter = write_adapter(tmp_path / "adapter", model, [EMBEDDING, HEAD], ensure_weight_tying=True)
        checkpoint = merged(model, adapter)
        assert family_for(checkpoint.config).tied_embeddings
        assert close(checkpoint.tensor(f"{EMBEDDING}.weight"), formula(model, adapter, EMBEDDING, ALPHA / RANK))

    def test_other_changes_leave_them_tied(self, make_checkpoint: Make, tmp_path: Path) -> None:
        model = make_checkpoint("qwen3", tie_word_embeddings=True)
        assert family_for(merged(model, write_adapter(tmp_path / "adapter", model, [Q])).config).tied_embeddings

    def test_rotation_of_an_untied_one(self, make_checkpoint: Make, tmp_path: Path) -> None:
        model = make_checkpoint("qwen3", tie_word_embeddings=True)
        checkpoint = merged(model, write_adapter(tmp_path / "adapter", model, [HEAD]))
        rotated = RotatedCheckpoint(checkpoint, 0)
        assert rotated.notes == checkpoint.notes
        norm, expected = (float(each.tensor("lm_head.weight").float().norm()) for each in (rotated, checkpoint))
        assert norm == pytest.approx(expected, rel=0.1)  # the final norm's weights are near one


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "pattern"),
        [
            ({"peft_type": "IA3"}, "is an adapter of the type 'IA3'; only LoRA can be merged"),
            ({"peft_type": "PROMPT_TUNING"}, "is an adapter of the type 'PROMPT_TUNING'"),
            ({"peft_type": None}, "is an adapter of the type None"),
            ({"lora_bias": True}, "lora_bias in adapter_config.json isn't supported; merge the adapter with peft"),
            ({"layer_replication": [[0, 2]]}, "layer_replication"),
            ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
            ({"trainable_token_indices": [1]}, "trainable_token_indices"),
            ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the model's own weights"),
            ({"r": 5}, r"matrices of the shapes \[4, 64\] and \[128, 4\], but adapter_config.json says .* rank is 5"),
            ({"r": 0}, "rank of an adapter must be a positive whole number, not 0"),
            ({"r": "4"}, "not '4'"),
            ({"lora_alpha": None}, "lora_alpha must be a number, not None"),
            ({"lora_alpha": float("nan")}, "lora_alpha must be a number, not nan"),
            ({"rank_pattern": {"(a+)+b": 4}}, r"rank_pattern has the pattern '\(a\+\)\+b', but only names of modules"),
            ({"alpha_pattern": [1]}, "alpha_pattern must be an object"),
            ({"use_dora": True}, "q_proj isn't complete, or contradicts adapter_config.json"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_settings(self, make_checkpoint: Make, tmp_path: Path, settings: dict[str, Any], pattern: str) -> None:
        model = make_checkpoint()
        adapter = write_adapter(tmp_path / "adapter", model, [Q])
        configure(adapter, **settings)
        with pytest.raises(D2QError, match=pattern):
            merged(model, adapter)

    @pytest.mark.parametrize(
        ("name", "shape", "pattern"),
        [
            (f"{Q}.lora_B.weight", None, "isn't complete"),
            (f"{Q}.lora_B.weight", (4, 128), "matrices of the shapes"),
            (f"{Q}.lora_B.weight", (96, 4), r"has a .*q_proj.weight of shape \[96, 64\], not \[128, 64\] as the model"),
            (f"{Q}.lora_A.weight", (4,), "matrices of the shapes"),
            (f"{Q}.lora_B.weight", (4,), "matrices of the shapes"),
            (f"{Q}.lora_magnitude_vector", (128,), "contradicts adapter_config.json"),
            ("model.layers.9.mlp.up_proj.lora_A.weight", (4, 64), "isn't complete"),
            ("model.layers.0.mlp.up_proj.lora_B.bias", (96,), "has no such tensor; it was trained on tiny-org/base"),
            ("model.layers.0.nonsense.weight", (2,), "changes model.layers.0.nonsense.weight, but the model in"),
            ("lm_head.weight", (4200, 64), r"\[4100, 64\] as the model; .*if tokens were added in training, add them"),
        ],
    )
    def test_tensors(
        self, make_checkpoint: Make, tmp_path: Path, name: str, shape: tuple[int, ...] | None, pattern: str
    ) -> None:
        model = make_checkpoint()
        adapter = write_adapter(tmp_path / "adapter", model, [Q])

        def change(tensors: dict[str, torch.Tensor]) -> None:
            tensors.pop(PREFIX + name, None)
            if shape is not None:
                tensors[PREFIX + name] = torch.ones(shape)

        rewrite_adapter(adapter, change)
        with pytest.raises(D2QError, match=pattern):
            merged(model, adapter)

    def test_another_model(self, make_checkpoint: Make, tmp_path: Path) -> None:
        adapter = write_adapter(tmp_path / "adapter", make_checkpoint(), ["model.layers.1.mlp.up_proj"])
        with pytest.raises(D2QError, match=r"layers.1.mlp.up_proj.weight, but the model in .* has no such tensor"):
            merged(make_checkpoint(name="other", num_hidden_layers=1), adapter)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_damaged_values(self, make_checkpoint: Make, tmp_path: Path, value: float) -> None:
        model = make_checkpoint()
        adapter = write_adapter(tmp_path / "adapter", model, [Q])
        rewrite_adapter(adapter, lambda tensors: tensors[f"{PREFIX}{Q}.lora_A.weight"].__setitem__((0, 0), value))
        with pytest.raises(D2QError, match=r"q_proj.lora_A.weight in .* contains NaN or infinite values; the adapter"):
            merged(model, adapter).tensor(f"{Q}.weight")

    def test_sums_that_overflow(self, make_checkpoint: Make, tmp_path: Path) -> None:
        model = make_checkpoint(dtype=torch.float16)
        adapter = write_adapter(tmp_path / "adapter", model, [Q], lora_alpha=1e30)
        with pytest.raises(D2QError, match=r"makes tensor .*q_proj.weight NaN or infinite"):
            merged(model, adapter).tensor(f"{Q}.weight")

    def test_integers(self, make_checkpoint: Make, tmp_path: Path) -> None:
        model = make_checkpoint()
        adapter = write_adapter(tmp_path / "adapter", model, [Q])
        rewrite_adapter(
            adapter, lambda tensors: tensors.update({f"{PREFIX}{Q}.lora_A.weight": torch.ones(4, 64).int()})
        )
        with pytest.raises(D2QError, match=r"has dtype I32, which no LoRA adapter has"):
            merged(model, adapter)

    def test_files(self, make_checkpoint: Make, tmp_path: Path) -> None:
        model = make_checkpoint()
        with pytest.raises(D2QError, match=r"there is no directory .*absent; give one that holds adapter_config.json"):
            merged(model, tmp_path / "absent")
        with pytest.raises(D2QError, match=r"has no adapter_config.json, so it isn't a PEFT adapter"):
            merged(model, model)
        adapter = write_adapter(tmp_path / "adapter", model, [Q])
        weights = adapter / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-4])
        with pytest.raises(D2QError, match=r"adapter_model.safetensors is truncated"):
            merged(model, adapter)
        save_file({}, weights)
        with pytest.raises(D2QError, match=r"holds no tensors"):
            merged(model, adapter)
        weights.rename(adapter / "adapter_model.bin")
        with pytest.raises(
            D2QError, match=r"PyTorch pickle file only, which can run any code .* recent version of peft"
        ):
            merged(model, adapter)
        (adapter / "adapter_model.bin").unlink()
        with pytest.raises(D2QError, match=r"has no adapter_model.safetensors; complete the download"):
            merged(model, adapter)

    def test_link_out_of_the_directory(self, make_checkpoint: Make, tmp_path: Path) -> None:
        model = make_checkpoint()
        adapter = write_adapter(tmp_path / "adapter", model, [Q])
        (adapter / "adapter_model.safetensors").rename(tmp_path / "elsewhere.safetensors")
        (adapter / "adapter_model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
        with pytest.raises(D2QError, match=r"is a symbolic link to .*, outside of its directory"):
            merged(model, adapter)

    def test_an_adapter_given_as_a_model(self, make_checkpoint: Make, tmp_path: Path) -> None:
        adapter = write_adapter(tmp_path / "my adapter", make_checkpoint(), [Q])
        with pytest.raises(D2QError, match=r"is a PEFT adapter of tiny-org/base, not a model; run d2q-edge convert "
                           r"tiny-org/base --adapter '.*/my adapter'"):  # fmt: skip
            Checkpoint.open(adapter)
        configure(adapter, base_model_name_or_path=None)
        with pytest.raises(D2QError, match=r"is a PEFT adapter of another model, .* convert BASE --adapter"):
            Checkpoint.open(adapter)

    def test_a_model_with_an_adapter_beside_it(self, make_checkpoint: Make, tmp_path: Path) -> None:
        model = make_checkpoint()
        (model / "adapter_config.json").write_text("{}")
        assert Checkpoint.open(model).names
