"""Rows of multi-head latent attention: q and k/v through low-rank latents, whose norms Transformer Engine fuses.

The down projections are copied to every tensor rank, the up projections are cut by heads. Nothing is permuted:
Megatron-Core takes the interleaved rotary pairs apart when it runs (rope_utils.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from weights_conversion.config import ModelConfig
from weights_conversion.mapping.parameters import COLUMN, ROW, Architecture, ParamMapping, Part, same

ATTENTION = (
    same("decoder.layers.{layer}.input_layernorm.weight", "model.layers.{layer}.input_layernorm.weight", ("hidden",)),
    same(
        "decoder.layers.{layer}.self_attention.linear_q_proj.weight",
        "model.layers.{layer}.self_attn.q_proj.weight",
        ("mla_q", "hidden"),
        COLUMN,
        "q_whole",
    ),
    same(
        "decoder.layers.{layer}.self_attention.linear_q_down_proj.weight",
        "model.layers.{layer}.self_attn.q_a_proj.weight",
        ("q_rank", "hidden"),
        None,
        "q_lora",
    ),
    same(
        "decoder.layers.{layer}.self_attention.linear_q_up_proj.layer_norm_weight",
        "model.layers.{layer}.self_attn.q_a_layernorm.weight",
        ("q_rank",),
        None,
        "q_lora",
    ),
    same(
        "decoder.layers.{layer}.self_attention.linear_q_up_proj.weight",
        "model.layers.{layer}.self_attn.q_b_proj.weight",
        ("mla_q", "q_rank"),
        COLUMN,
        "q_lora",
    ),
    same(
        "decoder.layers.{layer}.self_attention.linear_kv_down_proj.weight",
        "model.layers.{layer}.self_attn.kv_a_proj_with_mqa.weight",
        ("kv_down", "hidden"),
    ),
    same(
        "decoder.layers.{layer}.self_attention.linear_kv_up_proj.layer_norm_weight",
        "model.layers.{layer}.self_attn.kv_a_layernorm.weight",
        ("kv_rank",),
    ),
    same(
        "decoder.layers.{layer}.self_attention.linear_kv_up_proj.weight",
        "model.layers.{layer}.self_attn.kv_b_proj.weight",
        ("mla_kv", "kv_rank"),
        COLUMN,
    ),
    same(
        "decoder.layers.{layer}.self_attention.linear_proj.weight",
        "model.layers.{layer}.self_attn.o_proj.weight",
        ("hidden", "mla_out"),
        ROW,
    ),
)

# --mla-down-proj-fusion (0.18): one module holds the norm in front and both down projections. torch_dist keeps them
# apart, a rank file has rank r's rows of q's, then its rows of kv's.
FUSED = "linear_qkv_down_proj"
_PARTS = ("q_rank", "kv_down")
_LIVE = {
    "input_layernorm.weight": Part(f"self_attention.{FUSED}.layer_norm_weight", 0, ("hidden",), saved_apart=True),
    "self_attention.linear_q_down_proj.weight": Part(f"self_attention.{FUSED}.weight", 0, _PARTS, saved_apart=True),
    "self_attention.linear_kv_down_proj.weight": Part(f"self_attention.{FUSED}.weight", 1, _PARTS, saved_apart=True),
}


def fused(architecture: Architecture) -> Architecture:
    """The same parameters as a run with --mla-down-proj-fusion has them in rank files."""
    return replace(architecture, rows=tuple(map(_fused, architecture.rows)))


def _fused(row: ParamMapping) -> ParamMapping:
    for name, part in _LIVE.items():
        if row.megatron.endswith(f".{name}"):
            live = replace(part, name=row.megatron.removesuffix(name) + part.name)
            return replace(row, live=live, shard=row.shard if len(part.parts) == 1 else COLUMN)
    return row


def is_fused(names: Iterable[str]) -> bool:
    """Whether rank files whose tensors have `names` are of a run with --mla-down-proj-fusion."""
    return any(f".{FUSED}." in name for name in names)


def fusion_problems(config: ModelConfig, tensor: int) -> list[str]:
    """What keeps the down projections of `config` from being fused on `tensor` ranks, as sentences."""
    if config.mla is None or config.mla.q_lora_rank is None:
        what = "no q_lora_rank" if config.mla is not None else "no latent attention"
        return [f"--mla-down-proj-fusion joins the down projections of q and kv, but this model has {what}"]
    return [
        f"{config.axes[axis]} rows of {module} ({name}) cannot be divided among {tensor} tensor ranks, as "
        "--mla-down-proj-fusion cuts them"
        for axis, module, name in (
            ("q_rank", "linear_q_down_proj", "q_lora_rank"),
            ("kv_down", "linear_kv_down_proj", "kv_lora_rank + qk_rope_head_dim"),
        )
        if config.axes[axis] % tensor
    ]
