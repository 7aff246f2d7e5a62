"""Which types a plan chooses, and its bits per weight worked out by hand."""

from typing import Any

import pytest

from d2q_edge.errors import D2QError
from d2q_edge.model.families import family_for
from d2q_edge.pipeline.type_plan import TypePlan, check_request, plan_types, rounding_types
from tests.checkpoints import BASE_CONFIG, FAMILY_CONFIG
from tests.real_configs import REAL

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def plan(bits: float = 2, embedding_type: str | None = None, head_type: str | None = None, **config: Any) -> TypePlan:
    """Of a Llama with 2 blocks, 4 heads, 2 of them for keys, and 4100 tokens."""
    family = family_for({**BASE_CONFIG, **FAMILY_CONFIG["llama"], **config})
    return plan_types(family, bits, embedding_type, head_type)


@pytest.mark.parametrize(
    ("bits", "hidden", "intermediate", "expected", "down"),
    [
        (2, 256, 768, "d2q2", "d2q2"),
        (3, 256, 768, "d2q3", "d2q3"),
        (2, 256, 320, "d2q2", "d2q2_64"),
        (3, 64, 512, "d2q3_64", "d2q3"),
        (2, 576, 96, "d2q2_64", "q4_0"),
        (3, 256, 72, "d2q3", "f16"),
    ],
)
def test_types_follow_the_width(bits: int, hidden: int, intermediate: int, expected: str, down: str) -> None:
    chosen = plan(bits, hidden_size=hidden, intermediate_size=intermediate)
    for name, kind in chosen.linears.items():
        assert kind == (down if name.endswith("down_proj.weight") else expected), name
    assert len(chosen.linears) == 14
    assert list(chosen.linears)[6:8] == [
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
    ]


def test_fallbacks_are_what_our_types_cannot_hold() -> None:
    assert plan(hidden_size=64, intermediate_size=128).fallbacks == []
    assert plan(hidden_size=64, intermediate_size=96).fallbacks == [
        f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)
    ]


def test_tables_of_untied_embeddings() -> None:
    assert plan(hidden_size=256).tables == {EMBEDDING: "q4_k", HEAD: "q5_k"}
    assert plan(3, hidden_size=256).tables == {EMBEDDING: "q4_k", HEAD: "q6_k"}
    assert plan(3).tables == {EMBEDDING: "q5_0", HEAD: "q8_0"}
    assert plan(embedding_type="q6_k", head_type="Q4_K").tables == {EMBEDDING: "q8_0", HEAD: "q5_0"}
    assert plan(embedding_type="q4_0", head_type="f16").tables == {EMBEDDING: "q4_0", HEAD: "f16"}
    assert plan(embedding_type="Q5_1", head_type="BF16").tables == {EMBEDDING: "q5_1", HEAD: "bf16"}


def test_table_of_per_layer_embeddings() -> None:
    """Of Gemma 4 E2B, and of one whose blocks together are as wide as 64 divides, but 256 doesn't."""
    wide, narrow = (family_for({**REAL["gemma-4-E2B"][1], "hidden_size_per_layer_input": each}) for each in (256, 64))
    table, projection = (f"{name}.weight" for name in (wide.per_layer_table, wide.per_layer_projection))
    for bits, kind in ((2, "d2q2"), (3, "d2q3")):
        assert plan_types(wide, bits).tables[table] == kind
        assert plan_types(wide, bits).tables[projection] == "q8_0"
    for given, kind in (("d2q3", "d2q3"), ("Q4_K", "q4_k"), ("q4_0", "q4_0")):
        assert plan_types(wide, 2, per_layer_type=given).tables[table] == kind
    assert plan_types(narrow, 2).tables[table] == "d2q2_64"
    with pytest.raises(D2QError, match="--per-layer-type 'iq2_xs' isn't a type that can be written; these are: f32, "):
        check_request(wide, 2, per_layer_type="IQ2_XS")
    llama = family_for({**BASE_CONFIG, **FAMILY_CONFIG["llama"]})
    with pytest.raises(D2QError, match="--per-layer-type is for embeddings that every block has for itself"):
        check_request(llama, 2, per_layer_type="d2q3")


def test_tables_of_tied_embeddings() -> None:
    assert plan(tie_word_embeddings=True).tables == {EMBEDDING: "q5_1"}
    assert plan(tie_word_embeddings=True, hidden_size=256).tables == {EMBEDDING: "q5_k"}
    assert plan(3, tie_word_embeddings=True, hidden_size=256).tables == {EMBEDDING: "q6_k"}
    assert plan(tie_word_embeddings=True, embedding_type="f16").tables == {EMBEDDING: "f16"}
    with pytest.raises(D2QError, match=r"\(tied\); use --embedding-type alone"):
        plan(tie_word_embeddings=True, head_type="f16")


def test_tables_of_odd_widths_are_f16() -> None:
    assert plan(hidden_size=72, num_attention_heads=6).tables == {EMBEDDING: "f16", HEAD: "f16"}


@pytest.mark.parametrize("options", [{"embedding_type": "q2_k"}, {"head_type": "d2q2"}, {"head_type": ""}])
def test_types_that_cannot_be_written(options: dict[str, Any]) -> None:
    option, kind = next(iter(options.items()))
    message = f"--{option.replace('_', '-')} '{kind}' isn't a stock type that can be written; these are: f32, f16, bf16"
    with pytest.raises(D2QError, match=message):
        plan(**options)


def test_bits_per_weight() -> None:
    # Per block: q 64x64, k and v 32x64, o 64x64, gate and up 96x64 in 2.5 bits; down 64x96 in 4.5.
    ours, down, table = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 2 * 96 * 64, 64 * 96, 4100 * 64
    chosen = plan()
    linear_bits = 2 * (ours * 2.5 + down * 4.5)
    assert chosen.linear_bits_per_weight == pytest.approx(linear_bits / (2 * (ours + down)))
    total = 2 * (ours + down) + 2 * table
    # Embeddings in q5_0, head in q5_1.
    assert chosen.bits_per_weight == pytest.approx((linear_bits + table * (5.5 + 6)) / total)
    tied = plan(tie_word_embeddings=True, embedding_type="f16")
    assert tied.bits_per_weight == pytest.approx((linear_bits + table * 16) / (total - table))


@pytest.mark.parametrize(("bits", "expected"), [(2, 2.3125), (3, 3.3125)])
def test_bits_per_weight_of_wide_layers(bits: int, expected: float) -> None:
    assert plan(bits, hidden_size=256, intermediate_size=768).linear_bits_per_weight == expected


def mixed(bits: float, favourite: str = "none", **config: Any) -> TypePlan:
    """A mixture where layers with `favourite` in their names are a hundred times as sensitive, per weight."""
    family = family_for(
        {**BASE_CONFIG, **FAMILY_CONFIG["llama"], "hidden_size": 256, "intermediate_size": 768, **config}
    )
    shapes = family.tensor_shapes()
    sensitivity = {
        name: shapes[name][0] * shapes[name][1] * (100.0 if favourite in name else 1.0)
        for name in rounding_types(family)
    }
    return plan_types(family, bits, sensitivity=sensitivity)


@pytest.mark.parametrize("bits", [2.31, 2.3125, 2.4, 2.625, 3.06, 3.3125, 3.7, 4.3])
def test_mixtures_keep_to_the_budget(bits: float) -> None:
    found = mixed(bits).linear_bits_per_weight
    assert max(bits, 2.3125) - 0.1 < found <= max(bits, 2.3125), "steps are coarse in so small a model"
    assert mixed(bits) == mixed(bits)


def test_mixtures_of_extreme_bits() -> None:
    assert set(mixed(2.31).linears.values()) == {"d2q2"}
    assert mixed(2.31).linear_bits_per_weight == 2.3125
    kinds = list(mixed(4.3).linears.values())
    assert kinds.count("q4_0") > 6 and "d2q2" not in kinds


@pytest.mark.parametrize("favourite", ["down_proj", "layers.1.", "v_proj"])
def test_sensitive_layers_get_more_bits(favourite: str) -> None:
    order = ["d2q2", "d2q3", "q4_0"]
    chosen = mixed(2.9, favourite).linears
    inside = [order.index(kind) for name, kind in chosen.items() if favourite in name]
    outside = [order.index(kind) for name, kind in chosen.items() if favourite not in name]
    assert min(inside) >= max(outside) and sum(inside) > 0
    assert min(outside) == 0


def test_mixtures_of_narrow_layers() -> None:
    """Widths 64 and 96: types with blocks of 64, and layers without a choice, which count for the budget."""
    chosen = mixed(3.4, hidden_size=64, intermediate_size=96)
    assert set(chosen.linears.values()) <= {"d2q2_64", "d2q3_64", "q4_0"}
    assert {kind for name, kind in chosen.linears.items() if "down" in name} == {"q4_0"}
    assert chosen.linears["model.layers.0.self_attn.q_proj.weight"] != "q4_0"
    assert 3.2 < chosen.linear_bits_per_weight <= 3.4
    family = family_for({**BASE_CONFIG, **FAMILY_CONFIG["llama"], "hidden_size": 64, "intermediate_size": 96})
    assert set(rounding_types(family).values()) == {"d2q2_64"}
    assert len(rounding_types(family)) == 12
    # 12 layers of 2.5 bits, and down, a quarter of the weights, of 4.5.
    with pytest.raises(D2QError, match=r"--bits 2.7 is too little .* at least 2.9 bits per weight; use that"):
        check_request(family, 2.7)
    check_request(family, 2.9)
    check_request(family, 2)


@pytest.mark.parametrize("bits", [0, 1, 2.3, 4.31, 4.5, 16, -2, float("nan"), float("inf")])
def test_bits_that_cannot_be_had(bits: float) -> None:
    with pytest.raises(D2QError, match=r"is out of range; use 2, 3, or a number from 2.31 to 4.3"):
        plan(bits)


def test_a_mixture_needs_sensitivity() -> None:
    with pytest.raises(ValueError, match="sensitivity"):
        plan(2.6, hidden_size=256, intermediate_size=768)


@pytest.mark.parametrize(
    ("bits", "embedding", "head"),
    [(2.31, "q4_k", "q5_k"), (2.7, "q4_k", "q5_k"), (2.8, "q4_k", "q6_k"), (3.6, "q6_k", "q6_k")],
)
def test_tables_of_mixtures(bits: float, embedding: str, head: str) -> None:
    assert mixed(bits).tables == {EMBEDDING: embedding, HEAD: head}


def test_counts_and_the_nearest_type() -> None:
    assert mixed(2.31).nearest_bits == plan(hidden_size=256).nearest_bits == 2
    assert mixed(3.4).nearest_bits == plan(3, hidden_size=256).nearest_bits == plan(3).nearest_bits == 3
    chosen = mixed(2.9, "v_proj")
    assert list(chosen.layer_types()) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert all(kinds.total() == 2 for kinds in chosen.layer_types().values())
    assert "d2q2" not in chosen.layer_types()["v_proj"]
