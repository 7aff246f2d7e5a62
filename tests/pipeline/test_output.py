"""What a file gets from the work directory and what from the checkpoint, and its size before it is written."""

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
from d2q_edge.formats.quantized_block import QuantizedBlock, QuantizedWeight
from d2q_edge.formats.tensor_types import F32
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.options import Options
from d2q_edge.pipeline.norm_correction import corrected_norms
from d2q_edge.pipeline.output import Output, QuantizedContent, RoundedContent
from d2q_edge.pipeline.refinement import refined_norms
from d2q_edge.pipeline.type_plan import plan_types
from d2q_edge.pipeline.work_dir import WorkDir
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
    """A checkpoint, and a work directory with random blocks with entries of every kind; refined ones are others."""

    def __init__(self, model: Path) -> None:
        self.checkpoint = Checkpoint.open(model)
        self.family = family_for(self.checkpoint.config)
        # q4_0 is also a type of our own layers.
        self.types = plan_types(self.family, 2, None if self.family.tied_embeddings else "q4_0")
        self.work = WorkDir(model.parent / "out.gguf", {})
        self.blocks = {refined: self._blocks(np.random.default_rng(refined), refined) for refined in (False, True)}
        for refined, blocks in self.blocks.items():
            for index, block in enumerate(blocks):
                self.work.write_block(index, block, refined=refined)

    def _blocks(self, generator: np.random.Generator, refined: bool) -> list[QuantizedBlock]:
        shapes = self.family.tensor_shapes()

        def floats(size: int) -> F32:
            return generator.normal(1, 0.1, size).astype(np.float32)

        blocks = []
        for index in range(2):
            block, prefix = QuantizedBlock(), self.family.block_prefix(index)
            for layer in self.family.block_linears(index):
                name = f"{prefix}{layer}.weight"
                own = tensor_types.BY_NAME[self.types.linears[name]]
                data = generator.integers(0, 16, (shapes[name][0], own.row_bytes(shapes[name][1]))).astype(np.uint8)
                data[:, :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
                block.weights[layer] = QuantizedWeight(own, data)
            norms = ["input_layernorm", "post_attention_layernorm"]
            block.floats |= {f"{norm}.weight": floats(HIDDEN) for norm in norms}
            # Without refinement the second block's is a norm that was left alone.
            block.norm_biases |= {norm: floats(HIDDEN) for norm in norms[not refined : 2 if refined else 2 - index]}
            name = "self_attn.v_proj.bias"
            if prefix + name in shapes:
                block.floats[name] = floats(shapes[prefix + name][0])
            block.column_scales["self_attn.q_proj"] = floats(HIDDEN)
            blocks.append(block)
        last = QuantizedBlock(floats={"model.norm.weight": floats(HIDDEN)}, norm_biases={"model.norm": floats(HIDDEN)})
        if not self.family.tied_embeddings:
            last.column_scales["lm_head"] = floats(HIDDEN)
        return [*blocks, last]

    def changed(self, *, refined: bool) -> dict[str, Any]:
        """The blocks' entries by the full names of tensors; those of biases and scales end in .bias and .scales."""
        found: dict[str, Any] = {}
        for prefix, block in zip(("model.layers.0.", "model.layers.1.", ""), self.blocks[refined], strict=True):
            found |= {f"{prefix}{layer}.weight": weight.data for layer, weight in block.weights.items()}
            found |= {prefix + name: values for name, values in block.floats.items()}
            found |= {f"{prefix}{norm}.bias": values for norm, values in block.norm_biases.items()}
            found |= {f"{prefix}{layer}.scales": values for layer, values in block.column_scales.items()}
        return found

    def content(self, *, refined: bool, work: WorkDir | None = None) -> QuantizedContent:
        return QuantizedContent(self.checkpoint, self.family, work or self.work, CPU, refined=refined)

    def output(self, norms: list[str]) -> Output:
        tokenizer = model_tokenizer(self.checkpoint, self.family)
        return Output(self.checkpoint, self.family, tokenizer, self.types, norms, {"d2q.version": 1}, 80)


@pytest.fixture(params=MODELS, ids=lambda model: model[0])
def setup(request: pytest.FixtureRequest, make_checkpoint: Make) -> Setup:
    return Setup(make_checkpoint(request.param[0], **request.param[1]))


@pytest.mark.parametrize("refined", [False, True])
class TestQuantizedContent:
    def test_everything(self, setup: Setup, refined: bool) -> None:
        content = setup.content(refined=refined)
        changed = setup.changed(refined=refined)
        names = [*setup.family.tensor_shapes()]
        # Also in an order that goes back and forth between blocks.
        for name in [*names, *names[::7], *names[::-5]]:
            if name in setup.types.linears:
                found: Any = content.packed(name)
                expected = changed[name]
            else:
                found = content.floats(name).float().numpy()
                expected = changed.get(name, setup.checkpoint.tensor(name).float().numpy())
                if name == "lm_head.weight":
                    expected = setup.checkpoint.tensor(name).float().numpy() / changed["lm_head.scales"]
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected, err_msg=name)

    def test_biases_of_norms(self, setup: Setup, refined: bool) -> None:
        content = setup.content(refined=refined)
        zeros = []
        for norm in refined_norms(setup.family):
            name = f"{norm}.bias"
            found = content.floats(name)
            assert found.dtype == torch.float32
            expected = setup.changed(refined=refined).get(name)
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
        rounded = RoundedContent(setup.checkpoint, setup.family, setup.types, CPU)
        rounded.device = meta  # a search couldn't be there
        for found in (content, rounded):
            table = found.floats("model.embed_tokens.weight")
            assert (table.device, table.dtype) == (meta, setup.checkpoint.dtype("model.embed_tokens.weight"))
            assert found.floats("model.norm.weight").device == CPU
        if not setup.family.tied_embeddings:
            head = content.floats("lm_head.weight")
            assert (head.device, head.dtype) == (meta, torch.float32)


class Reading(WorkDir):
    """Notes what is read, and makes sure that the weights of the block before are gone."""

    def __init__(self, output: Path) -> None:
        super().__init__(output, {})
        self.reads: list[tuple[int, bool]] = []
        self._kept: list[weakref.ref[Any]] = []

    def read_block(self, index: int, *, refined: bool = False) -> QuantizedBlock:
        assert all(array() is None for array in self._kept), "only one block is in memory"
        block = super().read_block(index, refined=refined)
        self.reads.append((index, refined))
        arrays = [*(weight.data for weight in block.weights.values()), *block.floats.values()]
        # What follows the last block is small.
        self._kept = [weakref.ref(array) for array in arrays] if block.weights else []
        return block


class TestWriting:
    """How the blocks get into the file."""

    @pytest.mark.parametrize("refined", [False, True])
    def test_every_block_is_read_once(self, setup: Setup, tmp_path: Path, refined: bool) -> None:
        work = Reading(setup.work.output)
        setup.output(refined_norms(setup.family)).write(
            tmp_path / "out.gguf", setup.content(refined=refined, work=work), False
        )
        assert sorted(work.reads) == [(index, refined) for index in range(3)]

    def test_a_damaged_block(self, setup: Setup, tmp_path: Path) -> None:
        file = setup.work.path / "block-0001.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        with pytest.raises(D2QError, match=r"block-0001.safetensors is damaged \(its checksum is wrong\)"):
            setup.output([]).write(tmp_path / "file.gguf", setup.content(refined=False), False)
        assert not list(tmp_path.glob("*file.gguf*"))

    def test_one_block_is_kept(self, setup: Setup) -> None:
        work = Reading(setup.work.output)
        content = setup.content(refined=True, work=work)
        for name in setup.types.linears:
            content.packed(name)
        assert [index for index, _ in work.reads] == [2, 0, 1]


def test_a_layer_that_is_missing(setup: Setup) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    setup.work.write_block(1, QuantizedBlock())
    with pytest.raises(RuntimeError, match=f"{name} was not quantized"):
        setup.content(refined=False).packed(name)


def test_planned_tensors_have_no_data(setup: Setup) -> None:
    tensors = setup.output(refined_norms(setup.family))._tensors(None)
    for tensor in tensors:
        with pytest.raises(RuntimeError, match="is only planned"):
            tensor.load()


def test_rounded_content(setup: Setup) -> None:
    content = RoundedContent(setup.checkpoint, setup.family, setup.types, CPU)
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.k_proj.weight"):
        kind = tensor_types.BY_NAME[setup.types.linears[name]]
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
        "corrected": corrected_norms(family, Options()),
        "refined": refined_norms(family),
    }[which]
    assert len(norms) == {"none": 0, "corrected": 3, "refined": 5}[which]
    assert corrected_norms(family, Options(dac=False)) == []
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
        kind = setup.types.all.get(name, "f32")
        assert file.tensors[written].type_name == kind
        if name in setup.types.linears:
            data = tensor_types.dequantize(tensor_types.BY_NAME[kind], content.packed(name))
        else:
            data = content.floats(name).float().numpy()
        found, data = file.dequantize(written), np.asarray(family.export_rows(name, data))
        if kind == "f32" or name in setup.types.linears:
            np.testing.assert_array_equal(found, data, err_msg=name)
        else:
            # Embeddings and head, in a stock type.
            assert np.square(found - data).mean() < 0.01 * np.square(data).mean()
