"""SmolLM3: Llama's block; every fourth layer has no rotary embedding.

llama.cpp: src/models/smollm3.cpp; conversion/llama.py, SmolLM3Model. The interval of four is built into llama.cpp,
which reads neither biases nor rope_freqs.weight. Rows of q and k are reordered as Llama's in all layers, because
attention without rotation doesn't depend on their order.
"""

from d2q_edge.errors import D2QError
from d2q_edge.model.families.llama import Llama

NO_ROPE_INTERVAL = 4  # llama.cpp's n_no_rope_layer_step for this architecture


class SmolLM3(Llama):
    """SmolLM3ForCausalLM."""

    architectures = ("SmolLM3ForCausalLM",)
    model_type = "smollm3"
    gguf_arch = "smollm3"
    rope_types = ("default", "linear", "yarn")
    records_default_head_dim = False
    refused_flags = ("attention_bias", "mlp_bias")
    default_rope_theta = 2000000.0
    default_kv_heads = 4
    tied_by_default = True

    def _refuse_unsupported(self) -> None:
        super()._refuse_unsupported()
        interval = self._int("no_rope_layer_interval", default=NO_ROPE_INTERVAL)
        with_rope = self.config.get("no_rope_layers")
        if with_rope is None:
            with_rope = [int((index + 1) % interval != 0) for index in range(self.num_layers)]
        expected = [int((index + 1) % NO_ROPE_INTERVAL != 0) for index in range(self.num_layers)]
        if not isinstance(with_rope, list) or with_rope[: self.num_layers] != expected:
            raise D2QError(
                f"config.json: no_rope_layers must leave out the rotary embedding of every {NO_ROPE_INTERVAL}th layer "
                "and of no other; llama.cpp's smollm3 can't do anything else"
            )
