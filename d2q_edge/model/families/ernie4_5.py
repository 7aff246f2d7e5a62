"""ERNIE 4.5, dense (0.3B): Llama's block without biases, rotating neighboring pairs of rows as llama.cpp does.

llama.cpp: src/models/ernie4-5.cpp; conversion/ernie.py, Ernie4_5Model. Its converter wants a SentencePiece tokenizer.
"""

from d2q_edge.model.families.base import Family


class Ernie4p5(Family):
    """Ernie4_5ForCausalLM; the first checkpoints have another underscore in the name."""

    architectures = ("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM")
    model_type = "ernie4_5"
    gguf_arch = "ernie4_5"
    records_space_prefix = True
    rope_types = ("default",)
    refused_flags = ("use_bias",)
    default_norm_eps = 1e-5
    default_rope_theta = 500000.0
    default_kv_heads = 2
    default_head_dim = 128
    tied_by_default = True
