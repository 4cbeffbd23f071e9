"""Rows of layers with experts, which families with them share: router, experts one by one, shared experts.

The names of an expert are TEGroupedMLP's; what else rank files have for them: formats/experts.py.
"""

from __future__ import annotations

from weights_conversion.mapping.parameters import ROW, Packed, ParamMapping, glu, same

NORM = same(
    "decoder.layers.{layer}.pre_mlp_layernorm.weight",
    "model.layers.{layer}.post_attention_layernorm.weight",
    ("hidden",),
    None,
    "moe",
)
# transformers 5 may pack all experts of a layer into two tensors.
GATE_UP = "model.layers.{layer}.mlp.experts.gate_up_proj"
DOWN = "model.layers.{layer}.mlp.experts.down_proj"


def router(hf: str) -> ParamMapping:
    return same("decoder.layers.{layer}.mlp.router.weight", hf, ("experts", "hidden"), None, "moe")


def experts(*, gate: str, up: str, down: str) -> tuple[ParamMapping, ...]:
    """The matrices of one expert."""
    return (
        glu(
            "decoder.layers.{layer}.mlp.experts.linear_fc1.weight{expert}",
            "moe",
            gate=gate,
            up=up,
            rows="expert_glu",
            packed=(Packed(GATE_UP, 0, 2), Packed(GATE_UP, 1, 2)),
        ),
        same(
            "decoder.layers.{layer}.mlp.experts.linear_fc2.weight{expert}",
            down,
            ("hidden", "expert_ffn"),
            ROW,
            "moe",
            packed=(Packed(DOWN, 0, 1),),
        ),
    )


def shared(*, gate: str, up: str, down: str) -> tuple[ParamMapping, ...]:
    """All shared experts together: one MLP, as wide as they are."""
    return (
        glu(
            "decoder.layers.{layer}.mlp.shared_experts.linear_fc1.weight",
            "shared_experts",
            gate=gate,
            up=up,
            rows="shared_glu",
        ),
        same(
            "decoder.layers.{layer}.mlp.shared_experts.linear_fc2.weight",
            down,
            ("hidden", "shared_ffn"),
            ROW,
            "shared_experts",
        ),
    )


ROUTER = router("model.layers.{layer}.mlp.gate.weight")
# Training updates it in float32, whatever the model's type; half precision would move tokens to other experts.
EXPERT_BIAS = same(
    "decoder.layers.{layer}.mlp.router.expert_bias",
    "model.layers.{layer}.mlp.gate.e_score_correction_bias",
    ("experts",),
    None,
    "expert_bias",
    dtype="float32",
)
EXPERTS = experts(
    gate="model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
    up="model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
    down="model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
)
SHARED = shared(
    gate="model.layers.{layer}.mlp.shared_experts.gate_proj.weight",
    up="model.layers.{layer}.mlp.shared_experts.up_proj.weight",
    down="model.layers.{layer}.mlp.shared_experts.down_proj.weight",
)
