"""Nemotron-H, Nemotron Nano 2, Nemotron 3: each layer is one sub-block: state space, attention, MLP or experts.

MLPs and experts have no gate, their activation is a squared ReLU; positions reach the model through its state spaces.
"""

from __future__ import annotations

from weights_conversion.architectures.experts import router
from weights_conversion.architectures.family import Family, Signs
from weights_conversion.mapping.parameters import COLUMN, ROW, Packed, ParamMapping, Role, joined, qkv, same

_HF = "backbone.layers.{layer}.mixer."
_CORE = "decoder.layers.{layer}."


def _norm(megatron: str, needs: str) -> ParamMapping:
    """The norm in front of a sub-block, which Transformer Engine fuses into its first module."""
    return same(_CORE + megatron, "backbone.layers.{layer}.norm.weight", ("hidden",), None, needs)


_STATES = {"x": "mamba_inner", "B": "mamba_states", "C": "mamba_states"}
MAMBA = (
    _norm("mixer.in_proj.layer_norm_weight", "mamba"),
    *joined(
        _CORE + "mixer.in_proj.weight", "mamba",
        parts={"z": "mamba_inner", **_STATES, "dt": "mamba_heads"},
        hf={_HF + "in_proj.weight": ("z", *_STATES, "dt")}, rest=("hidden",),
    ),
    *joined(
        _CORE + "mixer.conv1d_weight", "mamba", torch_dist=_CORE + "mixer.conv1d.weight",
        parts=_STATES, hf={_HF + "conv1d.weight": tuple(_STATES)}, rest=("one", "mamba_kernel"),
    ),
    *joined(
        _CORE + "mixer.conv1d_bias", "mamba", torch_dist=_CORE + "mixer.conv1d.bias",
        parts=_STATES, hf={_HF + "conv1d.bias": tuple(_STATES)}, rest=(),
    ),
    *(
        same(f"{_CORE}mixer.{name}", _HF + name, (rows,), COLUMN, "mamba")
        for name, rows in (
            ("A_log", "mamba_heads"), ("D", "mamba_heads"), ("dt_bias", "mamba_heads"), ("norm.weight", "mamba_inner"),
        )
    ),
    same(_CORE + "mixer.out_proj.weight", _HF + "out_proj.weight", ("hidden", "mamba_inner"), ROW, "mamba"),
)  # fmt: skip
ATTENTION = (
    _norm("self_attention.linear_qkv.layer_norm_weight", "attention"),
    qkv(
        _CORE + "self_attention.linear_qkv.weight", "attention",
        q=_HF + "q_proj.weight", k=_HF + "k_proj.weight", v=_HF + "v_proj.weight",
    ),
    same(_CORE + "self_attention.linear_proj.weight", _HF + "o_proj.weight", ("hidden", "q"), ROW, "attention"),
)  # fmt: skip
MLP = (
    _norm("mlp.linear_fc1.layer_norm_weight", "dense"),
    same(_CORE + "mlp.linear_fc1.weight", _HF + "up_proj.weight", ("ffn", "hidden"), COLUMN, "dense"),
    same(_CORE + "mlp.linear_fc2.weight", _HF + "down_proj.weight", ("hidden", "ffn"), ROW, "dense"),
)
EXPERTS = (
    _norm("pre_mlp_layernorm.weight", "moe"),
    router(_HF + "gate.weight"),
    same(
        _CORE + "mlp.router.expert_bias", _HF + "gate.e_score_correction_bias", ("experts",), None, "expert_bias",
        dtype="float32",
    ),
    same(
        _CORE + "mlp.experts.linear_fc1.weight{expert}", _HF + "experts.{expert}.up_proj.weight",
        ("expert_ffn", "expert_in"), COLUMN, "moe", packed=(Packed(_HF + "experts.up_proj", 0, 1),),
    ),
    same(
        _CORE + "mlp.experts.linear_fc2.weight{expert}", _HF + "experts.{expert}.down_proj.weight",
        ("expert_in", "expert_ffn"), ROW, "moe", packed=(Packed(_HF + "experts.down_proj", 0, 1),),
    ),
    *(
        same(f"{_CORE}mlp.{name}.weight", f"{_HF}{name}.weight", shape, None, "latent_experts")
        for name, shape in (
            ("fc1_latent_proj", ("expert_in", "hidden")), ("fc2_latent_proj", ("hidden", "expert_in")),
        )
    ),
    same(
        _CORE + "mlp.shared_experts.linear_fc1.weight", _HF + "shared_experts.up_proj.weight",
        ("shared_ffn", "hidden"), COLUMN, "shared_experts",
    ),
    same(
        _CORE + "mlp.shared_experts.linear_fc2.weight", _HF + "shared_experts.down_proj.weight",
        ("hidden", "shared_ffn"), ROW, "shared_experts",
    ),
)  # fmt: skip

NEMOTRON_H = Family(
    "nemotron-h",
    (
        same(
            "embedding.word_embeddings.weight", "backbone.embeddings.weight", ("vocab", "hidden"), COLUMN,
            role=Role.EMBEDDING,
        ),
        *MAMBA, *ATTENTION, *MLP, *EXPERTS,
        same("decoder.final_norm.weight", "backbone.norm_f.weight", ("hidden",)),
        same("output_layer.weight", "lm_head.weight", ("vocab", "hidden"), COLUMN, "untied", role=Role.HEAD),
    ),
    tied_head="lm_head.weight",
    writes_tied_head=True,
    model_types=("nemotron_h",),
    hf_class="NemotronHForCausalLM",
    repositories={
        "9": "nvidia/NVIDIA-Nemotron-Nano-9B-v2",
        "12": "nvidia/NVIDIA-Nemotron-Nano-12B-v2",
        "30": "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        "4": "nvidia/Nemotron-H-4B-Base-8K",
        "8": "nvidia/Nemotron-H-8B-Base-8K",
        "47": "nvidia/Nemotron-H-47B-Base-8K",
        "56": "nvidia/Nemotron-H-56B-Base-8K",
    },
    defaults={"layernorm_epsilon": 1e-5},
    ropes=("default",),
    rotary=False,
    own_args={
        "swiglu": False, "squared_relu": True, "position_embedding_type": "none",
        "use_rotary_position_embeddings": False,
    },
    signs=tuple(
        Signs(sub_blocks=True, experts=experts, shared_experts=experts, sigmoid=experts) for experts in (False, True)
    ),
)  # fmt: skip
