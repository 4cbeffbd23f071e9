"""Queries, keys and values of full attention in the forward pass, whichever way a side stores them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from weights_conversion.config import ModelConfig
from weights_conversion.verification.conventions import Convention
from weights_conversion.verification.linear import Weights, linear, vector


def of_layer(config: ModelConfig, layer: int) -> ModelConfig:
    """The config with what a layer's attention has: its window, and the rope of layers with one or without."""
    here = replace(config, sliding_window=config.window_of(layer), window_layers=None)
    if here.sliding_window is None or config.local_rope_theta is None:
        return here
    return replace(here, rope_theta=config.local_rope_theta, rope_scaling_factor=1.0, rope_scaling=None)


def qkv(config: ModelConfig, convention: Convention, weights: Weights, prefix: str, x: Tensor) -> Sequence[Tensor]:
    """q, k and v; the last axes hold their heads in order, by groups or flat."""
    names, dim = convention.names_for(config), config.head_dim
    heads = config.num_attention_heads * (2 if config.attention_output_gate else 1)
    sizes = [heads * dim, config.num_query_groups * dim, config.num_query_groups * dim]
    separate = len(names.qkv) == 3
    biases: list[Tensor] = []
    if config.add_qkv_bias:
        lengths = sizes if separate else [sum(sizes)]
        biases = [vector(weights, prefix + name, size) for name, size in zip(names.qkv_bias, lengths, strict=True)]
    if separate:
        parts = [linear(weights, prefix + name, x, 0, size) for name, size in zip(names.qkv, sizes, strict=True)]
    else:
        parts = apart(config, linear(weights, prefix + names.qkv[0], x, 0, sum(sizes)), convention.grouped_qkv)
        biases = [part for bias in biases for part in apart(config, bias, convention.grouped_bias)]
    return [part.flatten(2) + bias.flatten() for part, bias in zip(parts, biases, strict=True)] if biases else parts


def apart(config: ModelConfig, fused: Tensor, grouped: bool) -> Sequence[Tensor]:
    """q, k and v of the last axis of `fused`."""
    groups, dim = config.num_query_groups, config.head_dim
    if grouped:
        # (.., groups, heads of a group + 2, dim)
        return fused.unflatten(-1, (groups, -1, dim)).split([fused.shape[-1] // groups // dim - 2, 1, 1], dim=-2)
    return fused.split([fused.shape[-1] - 2 * groups * dim, groups * dim, groups * dim], dim=-1)


def gated(config: ModelConfig, convention: Convention, q: Tensor) -> tuple[Tensor, Tensor]:
    """(queries, gates), both by groups: (prompts, length, groups, heads of a group, dim).

    Hugging Face has the gate of each head behind it; Megatron-Core those of a group behind its queries.
    """
    groups, dim = config.num_query_groups, config.head_dim
    q = q.reshape(*q.shape[:2], groups, -1, dim)
    each = q.shape[3] // 2
    if len(convention.names_for(config).qkv) == 3:
        return q[:, :, :, 0::2], q[:, :, :, 1::2]
    return q[:, :, :, :each], q[:, :, :, each:]
