"""Rows of layers that alternate between linear attention by the gated delta rule and full attention with a gate.

A tensor rank holds its rows of queries, keys, values, gates z, and of b and a (Megatron-Core: beta, alpha) one behind
the other; torch_dist has each of them as a tensor of its own (gated_delta_net.py). All norms are stored around zero on
both sides, but the one behind the linear attention is so in Megatron-Core alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from weights_conversion.mapping.ops import FuseGatedQKV
from weights_conversion.mapping.parameters import COLUMN, MTP, ROW, ParamMapping, joined, same

_PROJECTED = {
    "query": "delta_key",
    "key": "delta_key",
    "value": "delta_value",
    "z": "delta_value",
    "beta": "delta_value_heads",
    "alpha": "delta_value_heads",
}
_CONVOLVED = {part: _PROJECTED[part] for part in ("query", "key", "value")}
FLAT = {
    "in_proj_qkv": ("query", "key", "value"),
    "in_proj_z": ("z",),
    "in_proj_b": ("beta",),
    "in_proj_a": ("alpha",),
}
BY_HEAD = {"in_proj_qkvz": ("query", "key", "value", "z"), "in_proj_ba": ("beta", "alpha")}


def linear(
    root: str, projections: Mapping[str, tuple[str, ...]], groups: str = "one", float32: bool = False
) -> tuple[ParamMapping, ...]:
    """Linear attention of HF's layers below `root`: its `projections` have their parts once, or in each of `groups`.

    `float32`: of decay and norm, whatever type the other weights have.
    """
    here, hf = "decoder.layers.{layer}.self_attention", f"{root}.layers.{{layer}}.linear_attn"
    kept = "float32" if float32 else None
    return (
        same(
            f"{here}.in_proj.layer_norm_weight",
            f"{root}.layers.{{layer}}.input_layernorm.weight",
            ("hidden",),
            None,
            "gated_delta",
        ),
        *joined(
            f"{here}.in_proj.weight",
            "gated_delta",
            parts=_PROJECTED,
            hf={f"{hf}.{name}.weight": parts for name, parts in projections.items()},
            rest=("hidden",),
            groups=groups,
        ),
        *joined(
            f"{here}.conv1d.weight",
            "gated_delta",
            parts=_CONVOLVED,
            hf={f"{hf}.conv1d.weight": tuple(_CONVOLVED)},
            rest=("one", "delta_kernel"),
        ),
        same(f"{here}.A_log", f"{hf}.A_log", ("delta_value_heads",), COLUMN, "gated_delta", hf_dtype=kept),
        same(f"{here}.dt_bias", f"{hf}.dt_bias", ("delta_value_heads",), COLUMN, "gated_delta"),
        same(
            f"{here}.out_norm.weight",
            f"{hf}.norm.weight",
            ("delta_value_dim",),
            None,
            "gated_delta",
            centred=True,
            hf_dtype=kept,
        ),
        same(f"{here}.out_proj.weight", f"{hf}.out_proj.weight", ("hidden", "delta_value"), ROW, "gated_delta"),
    )


# Full attention with an output gate, and norms of q and k.
FULL = (
    same(
        "decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight",
        "model.layers.{layer}.input_layernorm.weight",
        ("hidden",),
        None,
        "full_attention",
    ),
    ParamMapping(
        "decoder.layers.{layer}.self_attention.linear_qkv.weight",
        (
            "model.layers.{layer}.self_attn.q_proj.weight",
            "model.layers.{layer}.self_attn.k_proj.weight",
            "model.layers.{layer}.self_attn.v_proj.weight",
        ),
        ("gated_qkv", "hidden"),
        COLUMN,
        FuseGatedQKV(),
        ("full_attention",),
    ),
    same(
        "decoder.layers.{layer}.self_attention.q_layernorm.weight",
        "model.layers.{layer}.self_attn.q_norm.weight",
        ("head_dim",),
        None,
        "full_attention",
    ),
    same(
        "decoder.layers.{layer}.self_attention.k_layernorm.weight",
        "model.layers.{layer}.self_attn.k_norm.weight",
        ("head_dim",),
        None,
        "full_attention",
    ),
    same(
        "decoder.layers.{layer}.self_attention.linear_proj.weight",
        "model.layers.{layer}.self_attn.o_proj.weight",
        ("hidden", "q"),
        ROW,
        "full_attention",
    ),
)


def below(root: str, rows: Iterable[ParamMapping]) -> tuple[ParamMapping, ...]:
    """`rows` whose layers HF has below model., below `root` instead."""

    def moved(name: str) -> str:
        return f"{root}.{name.removeprefix('model.')}" if name.startswith("model.") else name

    return tuple(
        replace(
            row,
            hf=tuple(map(moved, row.hf)),
            packed=tuple(replace(each, name=moved(each.name)) for each in row.packed),
            within=tuple(replace(each, name=moved(each.name)) for each in row.within),
        )
        for row in rows
    )


def predicting(layer: Iterable[ParamMapping]) -> tuple[ParamMapping, ...]:
    """A layer that predicts a further token: mtp., beside HF's model. `layer`: rows of the inner layer, below model."""
    return (
        same(f"{MTP}enorm.weight", "mtp.pre_fc_norm_embedding.weight", ("hidden",)),
        same(f"{MTP}hnorm.weight", "mtp.pre_fc_norm_hidden.weight", ("hidden",)),
        same(f"{MTP}eh_proj.weight", "mtp.fc.weight", ("hidden", "two_hidden"), COLUMN),
        *(
            replace(row, megatron=row.megatron.replace("decoder.layers.{layer}.", f"{MTP}transformer_layer."))
            for row in below("mtp", layer)
        ),
        same(f"{MTP}final_layernorm.weight", "mtp.norm.weight", ("hidden",)),
    )
