"""Stored names of layers of gated delta, by family and side."""

from __future__ import annotations

from dataclasses import replace

from weights_conversion.verification.names import DeltaNames

_HF_DELTA = DeltaNames(
    before="input_layernorm.weight",
    projections=tuple(f"linear_attn.in_proj_{parts}.weight" for parts in ("qkv", "z", "b", "a")),
    conv="linear_attn.conv1d.weight",
    norm="linear_attn.norm.weight",
    out_proj="linear_attn.out_proj.weight",
    a_log="linear_attn.A_log",
    dt_bias="linear_attn.dt_bias",
)
_HF_DELTA_BY_HEAD = replace(
    _HF_DELTA, projections=("linear_attn.in_proj_qkvz.weight", "linear_attn.in_proj_ba.weight"), by_head=True
)
_CORE_DELTA = DeltaNames(
    before="self_attention.in_proj.layer_norm_weight",
    projections=tuple(
        f"self_attention.in_proj.weight.{part}" for part in ("query", "key", "value", "z", "beta", "alpha")
    ),
    conv="self_attention.conv1d.weight",
    norm="self_attention.out_norm.weight",
    out_proj="self_attention.out_proj.weight",
    a_log="self_attention.A_log",
    dt_bias="self_attention.dt_bias",
    shifted=True,
)
HF = {"qwen3-next": _HF_DELTA_BY_HEAD, "qwen3.5": _HF_DELTA, "qwen3.5-moe": _HF_DELTA}
CORE = dict.fromkeys(HF, _CORE_DELTA)
