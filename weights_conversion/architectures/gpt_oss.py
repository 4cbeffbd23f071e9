"""GPT-OSS 20B and 120B: sinks beside the softmax, biases of every linear layer, windows on every other layer.

Its experts are packed, their columns first ([E, hidden, 2f] and [E, f, hidden]), gate and up in turn. A square matrix
shows nothing of that: the order is that of the files. Quantised repositories (MXFP4) have them rows first.
"""

from __future__ import annotations

from weights_conversion.architectures.experts import NORM, router
from weights_conversion.architectures.family import Family, Signs
from weights_conversion.architectures.llama import ATTENTION, EMBEDDING, LAST
from weights_conversion.mapping.ops import InterleavedGLU, WholeCopy
from weights_conversion.mapping.parameters import COLUMN, GLU, ROW, Packed, same

_EXPERTS = "model.layers.{layer}.mlp.experts."


def _packed(name: str) -> tuple[Packed, ...]:
    """Columns first, and rows first where the file is quantised."""
    return (Packed(_EXPERTS + name, 0, 1, always=True, transposed=True, turned=f"{_EXPERTS}{name}_blocks"),)


BIASES = (
    same(
        "decoder.layers.{layer}.self_attention.core_attention.softmax_offset",
        "model.layers.{layer}.self_attn.sinks",
        ("heads",),
        COLUMN,
    ),
    same(
        "decoder.layers.{layer}.self_attention.linear_proj.bias",
        "model.layers.{layer}.self_attn.o_proj.bias",
        ("hidden",),
    ),
    same("decoder.layers.{layer}.mlp.router.bias", "model.layers.{layer}.mlp.router.bias", ("experts",)),
)
# No file has the names of one expert's tensors, which reports use.
EXPERTS = (
    same(
        "decoder.layers.{layer}.mlp.experts.linear_fc1.weight{expert}",
        "model.layers.{layer}.mlp.experts.{expert}.gate_up_proj",
        ("expert_glu", "hidden"),
        GLU,
        op=InterleavedGLU("expert_glu"),
        packed=_packed("gate_up_proj"),
    ),
    same(
        "decoder.layers.{layer}.mlp.experts.linear_fc1.bias{expert}",
        "model.layers.{layer}.mlp.experts.{expert}.gate_up_proj_bias",
        ("expert_glu",),
        GLU,
        op=InterleavedGLU("expert_glu"),
        packed=(Packed(f"{_EXPERTS}gate_up_proj_bias", 0, 1, always=True),),
    ),
    same(
        "decoder.layers.{layer}.mlp.experts.linear_fc2.weight{expert}",
        "model.layers.{layer}.mlp.experts.{expert}.down_proj",
        ("hidden", "expert_ffn"),
        ROW,
        op=WholeCopy("hidden"),
        packed=_packed("down_proj"),
    ),
    same(
        "decoder.layers.{layer}.mlp.experts.linear_fc2.bias{expert}",
        "model.layers.{layer}.mlp.experts.{expert}.down_proj_bias",
        ("hidden",),
        packed=(Packed(f"{_EXPERTS}down_proj_bias", 0, 1, always=True),),
    ),
)

GPT_OSS = Family(
    "gpt-oss",
    (EMBEDDING, *ATTENTION, *BIASES, NORM, router("model.layers.{layer}.mlp.router.weight"), *EXPERTS, *LAST),
    tied_head="lm_head.weight",
    model_types=("gpt_oss",),
    hf_class="GptOssForCausalLM",
    repositories={"20": "openai/gpt-oss-20b", "120": "openai/gpt-oss-120b"},
    defaults={"layernorm_epsilon": 1e-5, "rope_theta": 150000.0},
    features=frozenset({"add_qkv_bias"}),
    ropes=("default", "yarn"),
    windowed=True,
    own_args={"swiglu": False, "quick_geglu": True, "glu_linear_offset": 1.0, "softmax_type": "learnable"},
    own_flags=("--quick-geglu", "--glu-linear-offset 1.0", "--softmax-type learnable"),
    signs=tuple(Signs(experts=True, qkv_bias=True, sinks=True, window=window) for window in (True, False)),
)
