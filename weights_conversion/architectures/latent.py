"""Rows of multi-head latent attention: q and k/v through low-rank latents, whose norms Transformer Engine fuses.

The down projections are copied to every tensor rank, the up projections are cut by heads. Nothing is permuted:
Megatron-Core takes the interleaved rotary pairs apart when it runs (rope_utils.py).
"""

from __future__ import annotations

from weights_conversion.mapping.parameters import COLUMN, ROW, same

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
