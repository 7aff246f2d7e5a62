"""The ablation tool on the example model, with few tokens."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2q_edge.formats import tensor_types
from d2q_edge.formats.quantized_block import QuantizedBlock, QuantizedWeight
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.options import Options
from d2q_edge.pipeline.type_plan import plan_types
from d2q_edge.pipeline.work_dir import WorkDir
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.rtn import round_layer
from tests.checkpoints import EXAMPLE, write_checkpoint
from tools import ablation
from tools.ablation import Line, Subject
from tools.torch_evaluation import Distance, Reference
from tools.whole_model import WholeModel


@pytest.mark.slow
def test_each_of_the_papers_steps_pays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "table.json"
    rows = ["RTN", "GPTQ", "GPTAQ", "+DAC"]
    few = ["--tokens", "4096", "--chunks", "3", "--device", "cpu", "--bits", "2"]
    ablation.main([str(EXAMPLE), *few, "--json", str(out), "--only", *rows])
    table = json.loads(out.read_text())
    assert [line["row"] for line in table] == ["original", *rows]
    found = {line["row"]: line["texts"]["builtin"]["kl_divergence"] for line in table}
    assert found["original"] == 0
    assert found["RTN"] > 1.2 * found["GPTQ"]
    assert found["GPTQ"] > found["GPTAQ"] > found["+DAC"]
    assert [line["bits_per_weight"] for line in table] == [None, 2.25, 2.25, 2.25, 2.25]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + len(table)
    assert all(line["row"] in text for line, text in zip(table, printed[1:], strict=True))


@pytest.mark.slow
def test_a_mixture_of_types(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--tokens", "2048", "--chunks", "2", "--device", "cpu", "--bits", "2.8", "--only", "D2Q-RTN"]
    ablation.main([str(EXAMPLE), *few])
    *_, bits, size = capsys.readouterr().out.splitlines()[-1].split()[:4]
    assert bits == "2.8" and 2.6 < float(size) <= 2.8
    with pytest.raises(SystemExit, match="has 2 or 3 bits"):
        ablation.main([str(EXAMPLE), *few[:-1], "RTN"])


@pytest.mark.slow
def test_every_row_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for family in ("llama", "qwen3"):
        write_checkpoint(tmp_path / family, family, num_hidden_layers=1, intermediate_size=64)
    few = ["--tokens", "64", "--context", "32", "--chunks", "2", "--device", "cpu", "--text", "some=builtin"]
    ablation.main([str(tmp_path / "llama"), str(tmp_path / "qwen3"), *few, "--bits", "2", "3"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    expected = [["original", "-"], *([row, bits] for bits in "23" for row in ablation.ROWS)]
    assert [line[:3] for line in lines] == [[family, *row] for family in ("llama", "qwen3") for row in expected]
    divergences = {tuple(line[:3]): float(line[-1]) for line in lines}
    for family in ("llama", "qwen3"):
        assert divergences.pop((family, "original", "-")) == 0
        for row in ablation.ROWS:
            assert 0 < divergences[family, row, "3"] < divergences[family, row, "2"] < 0.1, (family, row)


def subject(directory: Path) -> Subject:
    checkpoint = Checkpoint.open(directory)
    windows = np.random.default_rng(0).integers(0, 4096, (4, 32))
    return Subject(checkpoint, family_for(checkpoint.config), windows, windows, 0, torch.device("cpu"))


def test_what_the_pipeline_leaves_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "model", "llama", intermediate_size=128)
    model = subject(tmp_path / "model")
    name, norm = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    kind = tensor_types.BY_NAME[plan_types(model.family, 3).linears[name]]
    layer = round_layer(model.checkpoint.tensor(name).float(), CodebookSearch(kind))
    scales = np.linspace(0.5, 2, 64, dtype=np.float32)
    given = []

    def fake(
        runner: Any, types: Any, windows: Any, work: WorkDir, options: Options, *, refine_blocks: bool = False
    ) -> None:
        assert not refine_blocks
        given.append(options)
        up = {"mlp.up_proj": QuantizedWeight(kind, layer.pack(kind))}
        work.write_block(0, QuantizedBlock(weights=up, column_scales={"mlp.gate_proj": scales}))
        work.write_block(1, QuantizedBlock(norm_biases={"post_attention_layernorm": scales}))
        work.write_block(2, QuantizedBlock(floats={norm: scales}, column_scales={"lm_head": scales}))

    monkeypatch.setattr(ablation, "quantize_blocks", fake)
    options = Options(alpha=0.125)
    outcome = ablation.ours(model, 3, options)
    assert given == [options]
    bias = "model.layers.1.post_attention_layernorm.bias"
    assert set(outcome.weights) == {name, bias, norm, "lm_head.weight"}
    torch.testing.assert_close(outcome.weights[bias], torch.from_numpy(scales))
    torch.testing.assert_close(outcome.weights[name], layer.weights, rtol=0, atol=0)
    torch.testing.assert_close(outcome.weights[norm], torch.from_numpy(scales))
    head = outcome.weights["lm_head.weight"] * torch.from_numpy(scales)
    torch.testing.assert_close(head, model.checkpoint.tensor("lm_head.weight").float())
    assert outcome.bits_per_weight == 3.5


def test_rotated_rows_work_on_a_rotated_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", "qwen3", tie_word_embeddings=True)
    model = subject(tmp_path / "model")
    seen = []

    def row(rotated: Subject, bits: float) -> ablation.Outcome:
        seen.append((rotated, bits))
        return ablation.Outcome(rotated.checkpoint, rotated.family, {}, 2.0)

    outcome = ablation.rotated(model, 3, row)
    assert seen[0] == (replace(model, checkpoint=outcome.checkpoint, family=outcome.family), 3)
    assert not outcome.family.tied_embeddings
    norm = "model.layers.0.input_layernorm.weight"
    assert bool((outcome.checkpoint.tensor(norm) == 1).all())
    original, rotated = (
        WholeModel(checkpoint, family, {}, model.device)
        for checkpoint, family in ((model.checkpoint, model.family), (outcome.checkpoint, outcome.family))
    )
    assert Reference(original, model.windows).compare(rotated).kl_divergence < 1e-6


def test_layout() -> None:
    texts = {"books": Distance(38.6, 0.5), "wiki": Distance(1234.5, 1.25)}
    lines = [
        ablation.heading(list(texts)),
        ablation.format_line(Line("llama-54m", "original", None, None, 0.0, texts)),
        ablation.format_line(Line("llama-54m", "+DSQ", 2, 2.25, 3.04, texts)),
    ]
    assert len({len(line) for line in lines}) == 1, "columns line up"
    assert lines[0].split()[:6] == ["model", "row", "bits", "bpw", "seconds", "books"]
    assert lines[2].split() == ["llama-54m", "+DSQ", "2", "2.2500", "3.0", "38.600", "0.5000", "1234.500", "1.2500"]


def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--text", "books"], ["--bits", "5"], ["--only", "GPTZ"]):
        with pytest.raises(SystemExit) as caught:
            ablation.main([str(EXAMPLE), *arguments])
        assert caught.value.code == 2
    assert "'books' isn't of the form NAME=FILE" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=f"Error: there is no directory {tmp_path}/none"):
        ablation.main([str(tmp_path / "none")])
