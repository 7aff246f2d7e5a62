"""Which norms get a bias, and quantized blocks whose activations overflow."""

import pytest
import torch

from d2q_edge.calibration.hidden_states import StreamPair
from d2q_edge.distributed.process_group import SINGLE_PROCESS
from d2q_edge.errors import D2QError
from d2q_edge.options import Options
from d2q_edge.pipeline.context import Context
from d2q_edge.pipeline.norm_correction import advance_quantized, corrected_norms
from d2q_edge.pipeline.report import Report
from tests.pipeline.common import CPU, DEFAULT, SMALL, WINDOWS, Make, Setup


def test_norms_that_get_a_bias(make_checkpoint: Make) -> None:
    family = Setup(make_checkpoint("qwen3", **SMALL)).family
    assert corrected_norms(family, Options(dac=False)) == []
    names = [f"model.layers.{index}.post_attention_layernorm" for index in range(3)]
    assert corrected_norms(family, DEFAULT) == [*names, "model.norm"]


@pytest.mark.parametrize(("number", "layer"), [(0, "self_attn.o_proj"), (1, "mlp.down_proj")])
@torch.inference_mode()
def test_quantized_activations_that_overflow(make_checkpoint: Make, number: int, layer: str) -> None:
    runner = Setup(make_checkpoint(**SMALL)).runner()
    streams = StreamPair(runner, WINDOWS, 160, CPU, SINGLE_PROCESS)
    context = Context(runner, streams, SINGLE_PROCESS, Report(CPU))
    original = runner.load(0)
    quantized = runner.share(original)
    sublayer = runner.family.block_sublayers(0)[number]
    advance_quantized(context, 0, sublayer, original, quantized, None)
    linear = quantized.get_submodule(layer)
    broken = linear.get_parameter("weight").clone()
    broken[0, 0] = torch.inf
    linear.weight = torch.nn.Parameter(broken, requires_grad=False)
    message = rf"the activations of the quantized model are NaN or infinite after model\.layers\.0\.{sublayer.module}"
    with pytest.raises(D2QError, match=message):
        advance_quantized(context, 0, sublayer, original, quantized, None)
