"""What a file gets from the work directory and what from the checkpoint, and its size before it is written."""

import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2q_edge.errors import D2QError
from d2q_edge.export.model_file import model_tokenizer
from d2q_edge.formats import tensor_types
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.pipeline.block_loop import Method, corrected_norms
from d2q_edge.pipeline.output import Output, PlannedContent, QuantizedContent, RoundedContent
from d2q_edge.pipeline.refinement import refined_norms
from d2q_edge.pipeline.type_plan import plan_types
from d2q_edge.pipeline.work_dir import Tensor, WorkDir
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.rtn import round_layer

Make = Callable[..., Path]
CPU = torch.device("cpu")
HIDDEN = 64
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", {"intermediate_size": 128}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "dtype": torch.float32}),
    ("qwen3", {"tie_word_embeddings": True}),
]


class Setup:
    """A checkpoint, and a work directory with random tensors of every kind, of which refined ones are others."""

    def __init__(self, model: Path) -> None:
        self.checkpoint = Checkpoint.open(model)
        self.family = family_for(self.checkpoint.config)
        # q4_0 is also a type of our own layers.
        self.plan = plan_types(self.family, 2, None if self.family.tied_embeddings else "q4_0")
        self.work = WorkDir(model.parent / "out.gguf", {})
        self.blocks = {refined: self._blocks(np.random.default_rng(refined), refined) for refined in (False, True)}
        for refined, blocks in self.blocks.items():
            for index, block in enumerate(blocks):
                self.work.write_block(index, block, refined=refined)

    def _blocks(self, generator: np.random.Generator, refined: bool) -> list[dict[str, Tensor]]:
        shapes = self.family.tensor_shapes()

        def floats(size: int) -> Tensor:
            return generator.normal(1, 0.1, size).astype(np.float32)

        blocks: list[dict[str, Tensor]] = []
        for index in range(2):
            block: dict[str, Tensor] = {}
            for name, kind in self.plan.linears.items():
                if self.family.block_of(name) == index:
                    own = tensor_types.BY_NAME[kind]
                    codes = generator.integers(0, 16, (shapes[name][0], own.row_bytes(shapes[name][1])))
                    block[name] = codes.astype(np.uint8)
                    block[name][:, :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
            prefix = self.family.block_prefix(index)
            norms = ["input_layernorm", "post_attention_layernorm"]
            block |= {f"{prefix}{norm}.weight": floats(HIDDEN) for norm in norms}
            # Without refinement the second block's is a norm that was left alone.
            block |= {
                f"{prefix}{norm}.bias": floats(HIDDEN) for norm in norms[not refined : 2 if refined else 2 - index]
            }
            name = f"{prefix}self_attn.v_proj.bias"
            if name in shapes:
                block[name] = floats(shapes[name][0])
            block[f"{prefix}self_attn.q_proj.column_scale"] = floats(HIDDEN)
            blocks.append(block)
        last = {"model.norm.weight": floats(HIDDEN), "model.norm.bias": floats(HIDDEN)}
        if not self.family.tied_embeddings:
            last["lm_head.column_scale"] = floats(HIDDEN)
        return [*blocks, last]

    def content(self, *, refined: bool) -> QuantizedContent:
        return QuantizedContent(self.checkpoint, self.family, self.work, CPU, refined=refined)

    def output(self, norms: list[str]) -> Output:
        tokenizer = model_tokenizer(self.checkpoint, self.family)
        return Output(self.checkpoint, self.family, tokenizer, self.plan, norms, {"d2q.version": 1}, 80)


@pytest.fixture(params=MODELS, ids=lambda model: model[0])
def setup(request: pytest.FixtureRequest, make_checkpoint: Make) -> Setup:
    return Setup(make_checkpoint(request.param[0], **request.param[1]))


@pytest.mark.parametrize("refined", [False, True])
class TestQuantizedContent:
    def test_everything(self, setup: Setup, refined: bool) -> None:
        content = setup.content(refined=refined)
        changed: dict[str, Tensor] = {}
        for block in setup.blocks[refined]:
            changed |= block
        names = [*setup.family.tensor_shapes()]
        # Also in an order that goes back and forth between blocks.
        for name in [*names, *names[::7], *names[::-5]]:
            if name in setup.plan.linears:
                found: Tensor = content.packed(name)
                expected = changed[name]
            else:
                found = content.floats(name).float().numpy()
                expected = changed.get(name, setup.checkpoint.tensor(name).float().numpy())
                if name == "lm_head.weight":
                    expected = setup.checkpoint.tensor(name).float().numpy() / changed["lm_head.column_scale"]
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected, err_msg=name)

    def test_biases_of_norms(self, setup: Setup, refined: bool) -> None:
        content = setup.content(refined=refined)
        zeros = []
        for norm in refined_norms(setup.family):
            name = f"{norm}.bias"
            found = content.floats(name)
            assert found.dtype == torch.float32
            index = setup.family.block_of(name)
            expected = setup.blocks[refined][2 if index is None else index].get(name)
            np.testing.assert_array_equal(found, np.zeros(HIDDEN) if expected is None else expected)
            assert found.shape == (HIDDEN,)
            zeros += [name] if expected is None else []
        assert len(zeros) == (0 if refined else 3)

    def test_checkpoint_stays(self, setup: Setup, refined: bool) -> None:
        """What is handed out may be changed, and another time it is the same."""
        content = setup.content(refined=refined)
        for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.q_proj.bias"):
            if name in setup.family.tensor_shapes():
                first = content.floats(name)
                expected = first.clone()
                first += 1
                assert torch.equal(content.floats(name), expected)

    def test_where_matrices_are_encoded(self, setup: Setup, refined: bool) -> None:
        """On the conversion's device, where they come in 16 bits; the head as floats, divided there."""
        meta = torch.device("meta")
        content = QuantizedContent(setup.checkpoint, setup.family, setup.work, meta, refined=refined)
        rounded = RoundedContent(setup.checkpoint, setup.plan, CPU)
        rounded.device = meta  # a search couldn't be there
        for found in (content, rounded):
            table = found.floats("model.embed_tokens.weight")
            assert (table.device, table.dtype) == (meta, setup.checkpoint.dtype("model.embed_tokens.weight"))
            assert found.floats("model.norm.weight").device == CPU
        if not setup.family.tied_embeddings:
            head = content.floats("lm_head.weight")
            assert (head.device, head.dtype) == (meta, torch.float32)


class TestThreads:
    """How the blocks get into the file."""

    @pytest.mark.parametrize("refined", [False, True])
    def test_every_block_is_read_once(
        self, setup: Setup, tmp_path: Path, refined: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And the file is the one that a single thread writes."""
        read, reads = WorkDir.read_block, []

        def note(work: WorkDir, index: int, *, refined: bool = False) -> dict[str, Tensor]:
            reads.append((index, refined))
            return read(work, index, refined=refined)

        monkeypatch.setattr(WorkDir, "read_block", note)
        output, content = setup.output(refined_norms(setup.family)), setup.content(refined=refined)
        output.write(tmp_path / "threads.gguf", content, False)
        assert sorted(reads) == [(index, refined) for index in range(3)]
        monkeypatch.setattr(content, "group", lambda _: None)
        output.write(tmp_path / "one.gguf", content, False)
        assert len(reads) > 6
        assert (tmp_path / "threads.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()

    def test_who_asks_for_what(self, setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Tables, which take much memory, are this thread's; without calibration everything is."""
        asked: dict[str, bool] = {}

        def noting(ask: Callable[[str], Any]) -> Callable[[str], Any]:
            def note(name: str) -> Any:
                asked[name] = threading.current_thread() is threading.main_thread()
                return ask(name)

            return note

        names = setup.family.tensor_shapes()
        outside = {name: setup.family.block_of(name) is None for name in names}
        for content, expected in (
            (setup.content(refined=True), outside),
            (RoundedContent(setup.checkpoint, setup.plan, CPU), dict.fromkeys(names, True)),
        ):
            for method in ("packed", "floats"):
                monkeypatch.setattr(content, method, noting(getattr(content, method)))
            setup.output([]).write(tmp_path / "out.gguf", content, True)
            assert asked == expected

    def test_a_gpu_takes_both_tables_at_a_time(self, setup: Setup) -> None:
        content = setup.content(refined=True)
        content.device = torch.device("cuda")
        names = list(setup.family.tensor_shapes())
        alone = [name for name in names if content.group(name) is None]
        assert alone == ["model.norm.weight"]
        tables = [content.group(name) for name in names if setup.family.block_of(name) is None and name not in alone]
        assert len(set(tables)) == len(tables)
        assert not {setup.family.block_of(name) for name in names} & set(tables)

    def test_a_damaged_block(self, setup: Setup, tmp_path: Path) -> None:
        file = setup.work.path / "block-0001.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        with pytest.raises(D2QError, match=r"block-0001.safetensors is damaged \(its checksum is wrong\)"):
            setup.output([]).write(tmp_path / "file.gguf", setup.content(refined=False), False)
        assert not list(tmp_path.glob("*file.gguf*"))

    def test_a_thread_keeps_one_block(self, setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
        """The last one is gone before the next is read."""
        read, kept = WorkDir.read_block, list[weakref.ref[Any]]()

        def note(work: WorkDir, index: int, *, refined: bool = False) -> dict[str, Tensor]:
            assert all(array() is None for array in kept)
            block = read(work, index, refined=refined)
            kept[:] = [weakref.ref(array) for array in block.values()]
            return block

        monkeypatch.setattr(WorkDir, "read_block", note)
        content = setup.content(refined=True)
        for name in setup.plan.linears:
            content.packed(name)
        assert kept


def test_a_layer_that_is_missing(setup: Setup) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    setup.work.write_block(1, {})
    with pytest.raises(RuntimeError, match=f"{name} was not quantized"):
        setup.content(refined=False).packed(name)


def test_planned_content_has_no_data() -> None:
    for method in (PlannedContent().packed, PlannedContent().floats):
        with pytest.raises(RuntimeError, match="some name is only planned"):
            method("some name")


def test_rounded_content(setup: Setup) -> None:
    content = RoundedContent(setup.checkpoint, setup.plan, CPU)
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.k_proj.weight"):
        kind = tensor_types.BY_NAME[setup.plan.linears[name]]
        layer = round_layer(setup.checkpoint.tensor(name).float(), CodebookSearch(kind))
        np.testing.assert_array_equal(content.packed(name), layer.pack(kind))
    norm = content.floats("model.norm.weight")
    assert norm.dtype == torch.float32
    np.testing.assert_array_equal(norm, setup.checkpoint.tensor("model.norm.weight").float().numpy())


@pytest.mark.parametrize("which", ["none", "corrected", "refined"])
def test_size_and_file(setup: Setup, tmp_path: Path, which: str) -> None:
    family = setup.family
    norms = {
        "none": [],
        "corrected": corrected_norms(family, Method()),
        "refined": refined_norms(family),
    }[which]
    assert len(norms) == {"none": 0, "corrected": 3, "refined": 5}[which]
    assert corrected_norms(family, Method(dac=False)) == []
    output, path = setup.output(norms), tmp_path / "file.gguf"
    content = setup.content(refined=which == "refined")
    expected = output.size()
    output.write(path, content, False)
    assert path.stat().st_size == expected
    file = GGUFFile(path)
    gguf = {f"{norm}.bias": family.gguf_name(f"{norm}.bias") for norm in norms}
    shapes = family.tensor_shapes()
    assert set(file.tensors) == {*gguf.values(), *(family.gguf_name(name) for name in shapes)}
    for name, written in gguf.items():
        assert file.tensors[written].type_name == "f32"
        np.testing.assert_array_equal(file.dequantize(written), content.floats(name))
    for name in shapes:
        written = family.gguf_name(name)
        kind = setup.plan.types.get(name, "f32")
        assert file.tensors[written].type_name == kind
        if name in setup.plan.linears:
            data = tensor_types.dequantize(tensor_types.BY_NAME[kind], content.packed(name))
        else:
            data = content.floats(name).float().numpy()
        found, data = file.dequantize(written), np.asarray(family.export_rows(name, data))
        if kind == "f32" or name in setup.plan.linears:
            np.testing.assert_array_equal(found, data, err_msg=name)
        else:
            # Embeddings and head, in a stock type.
            assert np.square(found - data).mean() < 0.01 * np.square(data).mean()
