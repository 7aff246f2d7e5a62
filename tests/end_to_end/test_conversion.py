"""Conversions from end to end: what is in the file, its size, and what the options do to it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from d2q_edge import __version__, conversion
from d2q_edge.calibration.chat_template import ChatTemplate
from d2q_edge.calibration.mixture import load_parts
from d2q_edge.calibration.text import load_calibration
from d2q_edge.calibration.windows import split_windows
from d2q_edge.conversion import Conversion
from d2q_edge.errors import D2QError
from d2q_edge.export.model_file import export, model_tokenizer
from d2q_edge.formats.codebooks import TABLE_SHA256
from d2q_edge.formats.column_scales import CODES, USERS
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import Family, family_for
from d2q_edge.model.rotated_checkpoint import RotatedCheckpoint
from d2q_edge.options import Options
from d2q_edge.pipeline import planning, sensitivity
from d2q_edge.pipeline.block_loop import quantize_blocks
from d2q_edge.pipeline.device import choose_device
from d2q_edge.pipeline.type_plan import plan_types, rounding_types
from d2q_edge.pipeline.work_dir import WorkDir
from tests.blocks import changed_tensors, finished_blocks
from tests.checkpoints import write_checkpoint
from tests.interruption import interrupted_at

Make = Callable[..., Path]
QUICK = Options(calibration_tokens=512, context=32)
SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
MODELS: dict[str, tuple[str, dict[str, Any], int, dict[str, int]]] = {
    # family, config, bits, tensors of each type
    "wide": ("llama", {"hidden_size": 256, "intermediate_size": 256}, 2, {"d2q2": 14, "q4_k": 1, "q5_k": 1}),
    "mixed": (
        "qwen3",
        {"hidden_size": 256, "intermediate_size": 320},
        3,
        {"d2q3": 10, "d2q3_64": 4, "q4_k": 1, "q6_k": 1},
    ),
    "narrow": ("qwen2", {"tie_word_embeddings": True}, 2, {"d2q2_64": 12, "q4_0": 2, "q5_1": 1}),
}
# An o_proj of qwen3 reads 4 heads of 32.


class Converted:
    """A random checkpoint and its file."""

    def __init__(self, directory: Path, name: str) -> None:
        family, config, bits, self.expected_types = MODELS[name]
        self.model = directory / name
        write_checkpoint(self.model, family, **config)
        self.checkpoint = Checkpoint.open(self.model)
        self.family: Family = family_for(self.checkpoint.config)
        self.plain = name == "mixed"
        plain: dict[str, Any] = {"dsq": False, "dac": False, "guidance": False} if self.plain else {}
        self.options = replace(QUICK, bits=bits, **plain)
        self.path = directory / f"{name}.gguf"
        self.result: Conversion = conversion.convert(self.model, self.path, self.options)
        self.file = GGUFFile(self.path)

    def floats(self, name: str) -> Any:
        """A tensor of the checkpoint with its rows in the file's order."""
        return self.family.export_rows(name, self.checkpoint.tensor(name).float().numpy())


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name != "narrow")) for name in MODELS]
)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return Converted(tmp_path_factory.mktemp("converted"), request.param)


class TestContent:
    def test_types(self, converted: Converted) -> None:
        found: dict[str, int] = {}
        for info in converted.file.tensors.values():
            found[info.type_name] = found.get(info.type_name, 0) + 1
        norms = found.pop("f32")
        assert found == converted.expected_types
        assert norms == len(converted.file.tensors) - sum(found.values())

    def test_packed_weights_are_those_of_the_pipeline(self, converted: Converted, tmp_path: Path) -> None:
        family = converted.family
        bos = 4093 if family.gguf_arch == "llama" else None
        tokenizer = AutoTokenizer.from_pretrained(converted.model)
        template = ChatTemplate.of(model_tokenizer(converted.checkpoint, family))
        windows = split_windows(tokenizer, load_parts("builtin"), template, 512, 32, 0, bos).calibration
        assert windows.shape == (16, 32)
        work = WorkDir(tmp_path / "again", {})
        runner = BlockRunner(converted.checkpoint, family, torch.device("cpu"))
        report = quantize_blocks(runner, converted.result.types.linears, windows, work, converted.options)
        assert converted.result.report is not None
        assert report.layer_errors == converted.result.report.layer_errors
        packed = 0
        for prefix, block in finished_blocks(work, family).items():
            for layer, weight in block.weights.items():
                packed += 1
                name = f"{prefix}{layer}.weight"
                assert weight.type.name == converted.result.types.all[name]
                assert converted.file.tensors[family.gguf_name(name)].type_name == weight.type.name
        assert packed == 14
        changed = changed_tensors(work, family)
        norms = [f"{family.block_prefix(index)}{norm}.weight" for index in (0, 1) for norm in family.block_norms(index)]
        absorbing = {name for name in norms if name.endswith("layernorm.weight")}
        assert (len(absorbing), absorbing & changed.keys()) == (4, set() if converted.plain else absorbing)
        for name, values in changed.items():
            found = converted.file.dequantize(family.gguf_name(name))
            assert np.array_equal(found, family.export_rows(name, values.numpy())), name

    def test_biases_of_norms(self, converted: Converted) -> None:
        """There whenever they may be: the size must not depend on what calibration finds."""
        found = {name for name in converted.file.tensors if name.endswith("norm.bias")}
        expected = {"blk.0.ffn_norm.bias", "blk.1.ffn_norm.bias", "output_norm.bias"}
        assert found == (set() if converted.plain else expected)

    def test_linear_weights_are_near_the_original(self, converted: Converted) -> None:
        if not converted.plain:
            pytest.skip("columns are scaled")
        for name in converted.family.linear_weights():
            expected = converted.floats(name)
            error = converted.file.dequantize(converted.family.gguf_name(name)) - expected
            # Rows in another order would have an error of 2.
            assert np.square(error).mean() / np.square(expected).mean() < 0.5, name

    def test_everything_else_is_as_in_a_stock_file(self, converted: Converted, tmp_path: Path) -> None:
        tables = converted.result.types.tables
        for kind in {*tables.values(), "q8_0"}:
            export(converted.model, tmp_path / f"{kind}.gguf", kind)
        stock = GGUFFile(tmp_path / "q8_0.gguf")
        of_type = {
            converted.family.gguf_name(name): GGUFFile(tmp_path / f"{kind}.gguf") for name, kind in tables.items()
        }
        assert [name for name in converted.file.tensors if not name.endswith("norm.bias")] == list(stock.tensors)
        changed = {converted.family.gguf_name(name) for name in converted.family.linear_weights()}
        if not converted.plain:
            changed |= {name for name in converted.file.tensors if "norm" in name or name == "output.weight"}
            changed |= {name for name in converted.file.tensors if name.endswith("attn_v.bias")}
        for name, info in converted.file.tensors.items():
            if name.endswith("norm.bias"):
                continue
            assert info.shape == stock.tensors[name].shape
            if name not in changed:
                other = of_type.get(name, stock)
                assert info.type_name == other.tensors[name].type_name
                assert np.array_equal(converted.file.raw(name), other.raw(name)), name
        ours = {key: value for key, value in converted.file.kv.items() if not key.startswith("d2q.")}
        assert ours.pop("general.quantized_by") == f"d2q-edge {__version__}"
        assert ours.pop("general.file_type") == {2: 80, 3: 81}[int(converted.options.bits)]
        del stock.kv["general.file_type"]
        if not converted.plain:
            # The norm biases count as parameters.
            del ours["general.size_label"], stock.kv["general.size_label"]
        assert ours == stock.kv

    def test_own_keys(self, converted: Converted) -> None:
        kv, types = converted.file.kv, converted.result.types
        assert {key for key in kv if key.startswith("d2q.")} == {
            "d2q.version", "d2q.recipe", "d2q.table_sha256", "d2q.bits_per_weight",
            *(() if converted.plain else (CODES, USERS)),
        }  # fmt: skip
        assert kv["d2q.version"] == 1
        assert kv["d2q.table_sha256"] == TABLE_SHA256
        assert json.loads(kv["d2q.recipe"]) == {
            "bits": converted.options.bits,
            "method": "gptaq",
            "rotation": False,
            "dsq": not converted.plain,
            "dac": not converted.plain,
            "guidance": not converted.plain,
            "rounds": 2,
            "refine": False,
            "alpha": 0.5,
            "calibration": "builtin",
            "calibration_sha256": load_calibration("builtin").sha256,
            "calibration_tokens": 512,
            "context": 32,
            "seed": 0,
        }
        matrices = [info for info in converted.file.tensors.values() if len(info.shape) == 2]
        bits = 8 * sum(info.nbytes for info in matrices) / sum(info.elements for info in matrices)
        assert kv["d2q.bits_per_weight"] == pytest.approx(bits)
        assert types.bits_per_weight == pytest.approx(bits)

    def test_size_is_known_before(self, converted: Converted, tmp_path: Path) -> None:
        planned = conversion.convert(converted.model, tmp_path / "out.gguf", converted.options, dry_run=True)
        assert planned.report is None
        assert planned.size == converted.result.size == converted.path.stat().st_size
        assert list(tmp_path.iterdir()) == []

    def test_nothing_else_stays(self, converted: Converted) -> None:
        assert {path.name for path in converted.path.parent.iterdir()} == {converted.model.name, converted.path.name}

    def test_planned_and_executed_is_converted(self, converted: Converted, tmp_path: Path) -> None:
        """Planning writes nothing; executing the plan gives the file that `convert` gives, to the last byte."""
        job = conversion.plan(converted.model, tmp_path / "out.gguf", converted.options)
        assert list(tmp_path.iterdir()) == []
        assert job.types == converted.result.types
        result = conversion.execute(job)
        assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
        assert (tmp_path / "out.gguf").read_bytes() == converted.path.read_bytes()
        assert result.report is not None and converted.result.report is not None
        assert result.report.layer_errors == converted.result.report.layer_errors
        assert (result.types, result.size) == (converted.result.types, converted.result.size)


class TestOptions:
    def test_without_calibration(self, make_checkpoint: Make, tmp_path: Path) -> None:
        model = make_checkpoint("llama", hidden_size=256, intermediate_size=96)
        options = Options(bits=3, calibrate=False, embedding_type="q5_0", head_type="f16")
        planned = conversion.convert(model, tmp_path / "out.gguf", options, dry_run=True)
        result = conversion.convert(model, tmp_path / "out.gguf", options)
        file = GGUFFile(tmp_path / "out.gguf")
        assert planned.size == result.size == file.size
        assert file.tensors["token_embd.weight"].type_name == "q5_0"
        assert file.tensors["output.weight"].type_name == "f16"
        recipe = {"bits": 3, "method": "rtn", "rotation": False, "dsq": False, "dac": False}
        assert json.loads(file.kv["d2q.recipe"]) == recipe
        checkpoint = Checkpoint.open(model)
        family = family_for(checkpoint.config)
        for name in family.linear_weights():
            expected = family.export_rows(name, checkpoint.tensor(name).float().numpy())
            error = file.dequantize(family.gguf_name(name)) - expected
            assert np.square(error).mean() / np.square(expected).mean() < 0.03, name

    def test_fallbacks_are_said(
        self, make_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        conversion.convert(make_checkpoint(), tmp_path / "out.gguf", QUICK, dry_run=True)
        assert capsys.readouterr().err == "2 of 14 linear layers become q4_0: 64 doesn't divide their width\n"
        conversion.convert(make_checkpoint(name="b", **SMALL), tmp_path / "out.gguf", QUICK, dry_run=True)
        assert capsys.readouterr().err == ""

    @pytest.mark.slow
    def test_mixture(self, make_checkpoint: Make, tmp_path: Path) -> None:
        """The layers that are measured as sensitive get more bits, in the file too."""
        model = make_checkpoint("llama", hidden_size=256, intermediate_size=512)
        self.silence(model, "model.layers.0.mlp")
        options = replace(QUICK, bits=2.9)
        job = conversion.plan(model, tmp_path / "out.gguf", options)
        assert job.calibration is not None
        windows = sensitivity.choose_windows(job.calibration.windows.calibration)
        types = rounding_types(job.family)
        assert (set(types.values()), windows.shape) == ({"d2q2"}, (4, 32))
        measured = sensitivity.measure(BlockRunner(job.checkpoint, job.family, torch.device("cpu")), types, windows)
        assert {name for name, divergence in measured.items() if divergence == 0} == {
            f"model.layers.0.mlp.{layer}_proj.weight" for layer in ("gate", "up", "down")
        }
        assert job.types == plan_types(job.family, 2.9, sensitivity=measured)
        planned = conversion.convert(model, tmp_path / "out.gguf", options, dry_run=True)
        result = conversion.execute(job)
        assert job.types == result.types == planned.types
        assert job.size == result.size == planned.size
        file = GGUFFile(tmp_path / "out.gguf")
        assert file.size == planned.size
        found = {name: info.type_name for name, info in file.tensors.items() if len(info.shape) == 2}
        assert {found[f"blk.0.ffn_{layer}.weight"] for layer in ("gate", "up", "down")} == {"d2q2"}
        sensitive = max(measured, key=lambda name: measured[name])
        assert found[job.family.gguf_name(sensitive)] == "q4_0"
        assert {"q4_0", "q4_k", "q6_k", "d2q2"} <= set(found.values())
        assert file.kv["general.file_type"] == 80
        assert json.loads(file.kv["d2q.recipe"])["allocation_windows"] == 4
        assert 2.8 < result.types.linear_bits_per_weight <= 2.9

    def test_another_plan_does_not_go_on(self, make_checkpoint: Make, tmp_path: Path) -> None:
        job = conversion.plan(make_checkpoint("llama", **SMALL), tmp_path / "out.gguf", QUICK)
        first, second = (
            plan_types(job.family, 3.2, sensitivity={n: float(layer in n) for n in rounding_types(job.family)})
            for layer in ("q_proj", "v_proj")
        )
        with interrupted_at("block 2/3"):
            conversion.execute(replace(job, types=first))
        with pytest.raises(D2QError, match="another types; repeat"):
            conversion.execute(replace(job, types=second))

    def silence(self, model: Path, module: str) -> None:
        """Set all weights of a module to zero, so that rounding them changes nothing."""
        tensors = load_file(model / "model.safetensors")
        for name in tensors:
            if name.startswith(f"{module}."):
                tensors[name].zero_()
        save_file(tensors, model / "model.safetensors")

    def test_other_table_types_are_said(
        self, make_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = replace(QUICK, embedding_type="Q4_K", head_type="q8_0")
        conversion.convert(make_checkpoint(**SMALL), tmp_path / "out.gguf", options, dry_run=True)
        expected = "model.embed_tokens becomes q5_0: its width isn't a multiple of Q4_K's block size\n"
        assert capsys.readouterr().err == expected

    @pytest.mark.slow
    def test_seed_decides(self, make_checkpoint: Make, tmp_path: Path) -> None:
        model = make_checkpoint(**SMALL)
        for seed in (0, 1):
            conversion.convert(model, tmp_path / f"{seed}.gguf", replace(QUICK, seed=seed))
        first, second = (GGUFFile(tmp_path / f"{seed}.gguf") for seed in (0, 1))
        assert not np.array_equal(first.raw("blk.0.attn_q.weight"), second.raw("blk.0.attn_q.weight"))
        assert json.loads(second.kv["d2q.recipe"])["seed"] == 1

    def test_own_text(self, make_checkpoint: Make, tmp_path: Path) -> None:
        (tmp_path / "own.txt").write_text("The quick brown fox. " * 50)
        options = replace(QUICK, calibration=str(tmp_path / "own.txt"))
        conversion.convert(make_checkpoint(**SMALL), tmp_path / "out.gguf", options)
        recipe = json.loads(GGUFFile(tmp_path / "out.gguf").kv["d2q.recipe"])
        assert recipe["calibration"] == "own.txt", "the user's directories are nobody's business"

    def test_short_text(self, make_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        text = tmp_path / "short.txt"
        text.write_text("Once upon a time there was a text. " * 20)
        output = tmp_path / "out.gguf"
        options = Options(calibration=str(text), calibration_tokens=4096, context=32)
        conversion.convert(make_checkpoint(**SMALL), output, options)
        recipe = json.loads(GGUFFile(output).kv["d2q.recipe"])
        assert 0 < recipe["calibration_tokens"] < 4096
        assert f"calibrating on {recipe['calibration_tokens']} of the text's " in capsys.readouterr().err

    @pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
    def test_missing_device(self, make_checkpoint: Make, tmp_path: Path) -> None:
        assert choose_device("auto").type == "cpu"
        options = replace(QUICK, device="cuda")
        with pytest.raises(D2QError, match="has no cuda device; use --device cpu"):
            conversion.convert(make_checkpoint(**SMALL), tmp_path / "out.gguf", options)
        assert [path.name for path in tmp_path.iterdir()] == ["tiny"]

    def test_llama_bpe_without_a_word_on_bos(self, make_checkpoint: Make) -> None:
        """Transformers adds none, so the file forbids it, and the calibration windows don't begin with it."""
        model = make_checkpoint("llama", **SMALL)
        before = conversion.plan(model, model.parent / "out.gguf", QUICK)
        for name, key in (("tokenizer.json", "post_processor"), ("tokenizer_config.json", "add_bos_token")):
            content = json.loads((model / name).read_text("utf-8"))
            del content[key]
            (model / name).write_text(json.dumps(content), "utf-8")
        after = conversion.plan(model, model.parent / "out.gguf", QUICK)
        assert before.calibration is not None and after.calibration is not None
        assert (before.tokenizer.bos, after.tokenizer.bos) == (4093, None)
        assert (before.calibration.windows.calibration[:, 0] == 4093).all()
        assert not (after.calibration.windows.calibration == 4093).any()


class TestRotation:
    """What is in a file that was made with rotation; that rotation is exact is tested in quantize/test_rotation.py."""

    OPTIONS = replace(QUICK, seed=5, embedding_type="f32", rotation="on", dsq=False, dac=False)

    @pytest.mark.parametrize(("calibrate", "error"), [pytest.param(True, 0.6, marks=pytest.mark.slow), (False, 0.13)])
    def test_content(self, make_checkpoint: Make, tmp_path: Path, calibrate: bool, error: float) -> None:
        model = make_checkpoint("llama", **SMALL, tie_word_embeddings=True, attention_bias=True)
        options = replace(self.OPTIONS, calibrate=calibrate, head_type="f32")
        planned = conversion.convert(model, tmp_path / "out.gguf", options, dry_run=True)
        result = conversion.convert(model, tmp_path / "out.gguf", options)
        file = GGUFFile(tmp_path / "out.gguf")
        assert planned.size == result.size == file.size
        recipe = json.loads(file.kv["d2q.recipe"])
        assert (recipe["rotation"], recipe["seed"]) == (True, 5)
        rotated = RotatedCheckpoint(Checkpoint.open(model), 5)
        family = family_for(rotated.config)
        assert {family.gguf_name(name) for name in rotated.names} == set(file.tensors)
        for name in rotated.names:
            expected = family.export_rows(name, rotated.tensor(name).numpy())
            found = file.dequantize(family.gguf_name(name))
            if name in family.linear_weights():
                assert np.square(found - expected).mean() < error * np.square(expected).mean(), name
            else:
                assert np.array_equal(found, expected), name

    @pytest.mark.slow
    def test_off_and_auto_are_the_same(self, make_checkpoint: Make, tmp_path: Path) -> None:
        model = make_checkpoint(**SMALL)
        files = {}
        for choice in ("off", "auto", "on"):
            output = tmp_path / choice
            conversion.convert(model, output, Options(calibrate=False, rotation=choice))
            files[choice] = output.read_bytes()
        assert files["auto"] == files["off"] != files["on"]

    def test_auto_does_what_pays(self, make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = make_checkpoint(**SMALL, tie_word_embeddings=True)
        seen: list[bool] = []

        def pays(family: Family) -> bool:
            seen.append(family.tied_embeddings)
            return True

        monkeypatch.setattr(planning, "rotation_pays", pays)
        for choice in ("auto", "off"):
            conversion.convert(model, tmp_path / choice, Options(calibrate=False, rotation=choice))
            assert json.loads(GGUFFile(tmp_path / choice).kv["d2q.recipe"])["rotation"] is (choice == "auto")
        assert seen == [True], "asked once, about the original"

    def test_damage_is_found_before_any_work(
        self, make_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = make_checkpoint(**SMALL)
        tensors = load_file(model / "model.safetensors")
        tensors["model.norm.weight"][5] = torch.nan
        save_file(tensors, model / "model.safetensors")
        with pytest.raises(D2QError, match=r"tensor model.norm.weight in .* contains NaN"):
            conversion.convert(model, tmp_path / "out.gguf", self.OPTIONS)
        assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
        assert "Quantizing" not in capsys.readouterr().err
