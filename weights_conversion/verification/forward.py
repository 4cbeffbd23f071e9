"""A float32 forward pass straight from stored weights, in the conventions of the side that stored them.

It proves a conversion, so it shares no code with one: only `ModelConfig` and torch. Two sides hold the same model when
their traces agree. Weights are asked for one block of rows at a time; only the prompts' hidden states stay in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from weights_conversion.config import ModelConfig
from weights_conversion.verification import predicting
from weights_conversion.verification.conventions import Convention, block_of
from weights_conversion.verification.gated_delta import gated_delta
from weights_conversion.verification.linear import Weights, linear, mlp, norm, rms, rows_of, vector
from weights_conversion.verification.projected import gated, of_layer, qkv
from weights_conversion.verification.rope import frequencies, softmax_scale
from weights_conversion.verification.routed import experts
from weights_conversion.verification.state_space import mamba

Stage = tuple[str, int | None, Tensor]
"""(sub-module, layer or None, output). The sub-modules are `embedding`, then per layer `attention_norm`, `attention`
(behind the output projection; or a state space), `mlp_norm` (absent where falcon shares one norm), `mlp` and `layer`
(with the residual; a layer that is one sub-block has the stages of that one), where there are norms behind them
`attention_post_norm` and `mlp_post_norm`, then `final_norm`, and per layer that predicts further tokens `joined`, the
stages of a layer, and `prediction`; then `logits`. Outputs are float32 (prompts, length, hidden or vocab)."""


def default_prompts(config: ModelConfig, count: int = 3, length: int = 24) -> Tensor:
    """Token ids (count, length), the same on every machine, spread evenly over the vocabulary and thus over its shards.

    A window below 64 lengthens the prompts beyond it. A longer window is out of reach of a cheap prompt: it has to be
    compared in the configs.
    """
    if config.sliding_window is not None and config.sliding_window < 64:
        length = max(length, config.sliding_window + 8)
    # Multiples of the golden ratio leave no large gap in [0, 1). It is a fraction of integers here, to be exact.
    steps = torch.arange(1, count * length + 1, dtype=torch.int64) * 2654435769 % 2**32
    return (steps * config.vocab_size // 2**32).view(count, length)


def shorter_window(a: ModelConfig, b: ModelConfig) -> ModelConfig:
    """`a` with the shorter window of both, so that prompts of its length feel it."""
    windows = [config.sliding_window for config in (a, b) if config.sliding_window is not None]
    return replace(a, sliding_window=min(windows, default=None))


def default_positions(config: ModelConfig, length: int) -> Tensor:
    """Rotary positions (length) of such prompts: far apart where the rope is scaled.

    A scaling is hardly felt at the first positions (Llama 3's leaves every wave below 2048 positions alone), so the
    tokens stand as far apart as 61, within the model's range.
    """
    if rope_of(config)["kind"] == "default":
        return torch.arange(length)
    return torch.arange(length) * max(1, min(61, config.max_position_embeddings // length))


def rope_of(config: ModelConfig) -> dict[str, Any]:
    """What decides the rotary angles, as `frequencies` takes it."""
    return {name: value for name, value in vars(config.rope).items() if value is not None}


def trace(
    config: ModelConfig, convention: Convention, weights: Weights, tokens: Tensor, *, head: str | None = None,
    positions: Tensor | None = None,
) -> Iterator[Stage]:  # fmt: skip
    """Yields each sub-module's output for `tokens` (prompts, length), as soon as it is computed.

    The logits come from `head` where a name is given (pipeline ranks hold a tied table twice), else from the embedding
    if `tie_word_embeddings`, else from the side's own head. Raises ConversionError for a tensor of another shape than
    `config` asks for. `positions` (length) are the rotary ones, 0.. unless given.
    """
    names = convention.names_for(config)
    hidden = embed(config, convention, weights, tokens)
    yield "embedding", None, hidden
    for index in range(config.num_layers):
        for stage in layer(config, convention, weights, index, hidden, positions):
            yield stage
            hidden = stage[2]
    hidden = norm(config, weights, names.final_norm, hidden)
    yield "final_norm", None, hidden
    yield from _predictions(config, convention, weights, tokens, hidden, positions)
    head = head or (names.embedding if config.tie_word_embeddings else names.head)
    # Rows from vocab_size on are a layout's padding.
    yield "logits", None, linear(weights, head, hidden, 0, config.vocab_size)


def _predictions(
    config: ModelConfig, convention: Convention, weights: Weights, tokens: Tensor, hidden: Tensor,
    positions: Tensor | None,
) -> Iterator[Stage]:  # fmt: skip
    """Layers that predict further tokens, each from the one before; numbered on behind the last layer."""
    names = predicting.names_of(convention.title, config)
    for index in predicting.numbers(convention.title, config):
        assert names is not None
        tokens = tokens.roll(-1, dims=1)
        tokens[:, -1] = 0  # behind the end, as Megatron-Core has it
        state = joined(config, convention, weights, index, tokens, hidden)
        yield "joined", index, state
        for stage in layer(config, convention, weights, index, state, positions):
            yield stage
            state = stage[2]
        hidden = norm(config, weights, names.prefix(config, index) + names.norm, state)
        yield "prediction", index, hidden


def joined(
    config: ModelConfig, convention: Convention, weights: Weights, index: int, tokens: Tensor, hidden: Tensor
) -> Tensor:
    """What a prediction layer begins with: the next `tokens` and the `hidden` state of the layers before."""
    names = predicting.names_of(convention.title, config)
    assert names is not None  # the caller has looked
    prefix = names.prefix(config, index)
    embedded = norm(config, weights, prefix + names.embedding_norm, embed(config, convention, weights, tokens))
    parts = [embedded, norm(config, weights, prefix + names.hidden_norm, hidden)]
    both = torch.cat(parts if convention.embedding_first else parts[::-1], dim=-1)
    return linear(weights, prefix + names.joined, both, 0, config.hidden_size)


def embed(config: ModelConfig, convention: Convention, weights: Weights, tokens: Tensor) -> Tensor:
    """Rows of the embedding for `tokens`; no other row is asked for."""
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise ValueError(f"token ids must be in [0, {config.vocab_size}), got {tokens.min()} to {tokens.max()}")
    name = convention.names_for(config).embedding
    ids, positions = torch.unique(tokens, return_inverse=True)
    rows = [rows_of(weights, name, i, i + 1, config.hidden_size) for i in ids.tolist()]
    scale = config.hidden_size**0.5 if block_of(config).scaled_embedding else 1.0
    return torch.cat(rows)[positions] * scale


def layer(
    config: ModelConfig, convention: Convention, weights: Weights, index: int, hidden: Tensor,
    positions: Tensor | None = None,
) -> Iterator[tuple[str, int, Tensor]]:  # fmt: skip
    """Stages of one layer for its input `hidden`; the last one, `layer`, is the input of the next."""
    positions = torch.arange(hidden.shape[1]) if positions is None else positions
    names = convention.names_for(config)
    own = min(index, config.num_layers - 1)  # a prediction layer is as the last layer is
    further = predicting.names_of(convention.title, config) if own < index else None
    prefix = names.layer.format(index) if further is None else further.prefix(config, index) + further.inner
    if config.hybrid_layer_pattern is not None:
        yield from _sub_block(config, convention, weights, index, hidden, positions)
        return

    in_front = names.attention_norm if config.mla is None or names.latent is None else names.latent.norm
    attend = _attention if config.mla is None else _latent_attention
    if names.delta is not None and config.gated_delta is not None and config.gated_delta.layers[own]:
        in_front, attend = names.delta.before, _linear_attention
    normed = norm(config, weights, prefix + in_front, hidden)
    yield "attention_norm", index, normed
    attended = attend(of_layer(config, own), convention, weights, prefix, normed, positions)
    yield "attention", index, attended
    if names.after_attention:
        attended = norm(config, weights, prefix + names.after_attention, attended)
        yield "attention_post_norm", index, attended

    residual = hidden + attended
    mlp_input = hidden if block_of(config).parallel else residual
    routed = names.experts is not None and config.moe is not None and config.moe.layers[own]
    mlp_norm = names.experts.norm if routed and names.experts is not None else names.mlp_norm
    if mlp_norm != names.attention_norm:
        normed = norm(config, weights, prefix + mlp_norm, mlp_input)
        yield "mlp_norm", index, normed
    out = (experts if routed else mlp)(config, convention, weights, prefix, normed)
    yield "mlp", index, out
    if names.after_mlp:
        out = norm(config, weights, prefix + names.after_mlp, out)
        yield "mlp_post_norm", index, out
    yield "layer", index, residual + out


def _sub_block(
    config: ModelConfig, convention: Convention, weights: Weights, index: int, hidden: Tensor, positions: Tensor
) -> Iterator[tuple[str, int, Tensor]]:
    """Stages of a layer that is one sub-block, by its symbol."""
    names, symbol = convention.names_for(config), (config.hybrid_layer_pattern or "")[index]
    prefix = names.layer.format(index)
    in_front = {"M": names.mamba and names.mamba.before, "*": names.attention_norm, "-": names.mlp_norm,
                "E": names.experts and names.experts.norm}[symbol] or ""  # fmt: skip
    stage = "attention" if symbol in "M*" else "mlp"
    normed = norm(config, weights, prefix + in_front, hidden)
    yield f"{stage}_norm", index, normed
    if symbol == "*":
        out = _attention(config, convention, weights, prefix, normed, positions)
    else:
        out = {"M": mamba, "-": mlp, "E": experts}[symbol](config, convention, weights, prefix, normed)
    yield stage, index, out
    yield "layer", index, hidden + out


def _attention(
    config: ModelConfig, convention: Convention, weights: Weights, prefix: str, x: Tensor, positions: Tensor
) -> Tensor:
    names = convention.names_for(config)
    groups, dim = config.num_query_groups, config.head_dim
    shape = (*x.shape[:2], groups, -1, dim)  # k and v: one head of a group
    q, k, v = (part.reshape(shape) for part in qkv(config, convention, weights, prefix, x))
    gate = None
    if config.attention_output_gate:
        q, gate = gated(config, convention, q)
    if config.qk_layernorm:
        q = rms(config, weights, prefix + names.q_norm, q)
        k = rms(config, weights, prefix + names.k_norm, k)
    if block_of(config).rotary:
        cos, sin = _angles(config, positions)
        q, k = (_rotate(convention, part, cos, sin) for part in (q, k))

    sinks = None
    if block_of(config).sinks:
        sinks = vector(weights, prefix + names.sinks, config.num_attention_heads).view(groups, -1)
    out = _attend(config, q, k, v, (config.query_pre_attn_scalar or dim) ** -0.5, sinks)
    out = out if gate is None else out * gate.flatten(2).sigmoid()
    out = linear(weights, prefix + names.dense, out, 0, config.hidden_size)
    biased = config.moe is not None and config.moe.biased
    return out + vector(weights, prefix + names.dense_bias, config.hidden_size) if biased else out


def _linear_attention(
    config: ModelConfig, convention: Convention, weights: Weights, prefix: str, x: Tensor, positions: Tensor
) -> Tensor:
    return gated_delta(config, convention, weights, prefix, x)  # which has no positions


def _attend(
    config: ModelConfig, q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor | None = None
) -> Tensor:  # fmt: skip
    """q (prompts, length, groups, heads of a group, dim), k and v with one head: (prompts, length, heads x dim).

    `sinks` (groups, heads of a group) are logits that stand beside each token's scores in the softmax, and weigh
    nothing.
    """
    scores = torch.einsum("bigrd,bjgsd->bgrij", q, k) * scale
    place = torch.arange(q.shape[1])
    distance = place[:, None] - place[None, :]
    masked = distance < 0
    if config.sliding_window is not None:
        masked |= distance >= config.sliding_window  # a token sees `sliding_window` tokens, itself included
    scores = scores.masked_fill(masked, float("-inf"))
    if sinks is not None:
        beside = sinks[None, :, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, beside], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        scores = scores.softmax(dim=-1)
    return torch.einsum("bgrij,bjgsd->bigrd", scores, v).flatten(2)


def _latent_attention(
    config: ModelConfig, convention: Convention, weights: Weights, prefix: str, x: Tensor, positions: Tensor
) -> Tensor:
    """Multi-head latent attention by DeepSeek-V3's rules: only a part of a head has rope, and k's part is shared.

    The rotary pairs are neighbours on every side, since Megatron-Core takes them apart when it runs.
    """
    names, sizes = convention.names_for(config), config.mla
    assert sizes is not None  # the caller has looked
    assert names.latent is not None
    latent, heads = names.latent, config.num_attention_heads
    plain, turning, out = sizes.qk_head_dim, sizes.qk_pos_emb_head_dim, sizes.v_head_dim
    q, q_name = x, latent.q
    if sizes.q_lora_rank is not None:
        q = linear(weights, prefix + latent.q_down, x, 0, sizes.q_lora_rank)
        q, q_name = rms(config, weights, prefix + latent.q_norm, q), latent.q_up
    q = linear(weights, prefix + q_name, q, 0, heads * (plain + turning)).unflatten(-1, (heads, 1, -1))
    kv = linear(weights, prefix + latent.kv_down, x, 0, sizes.kv_lora_rank + turning)
    kv, k_turning = kv.split([sizes.kv_lora_rank, turning], dim=-1)
    kv = rms(config, weights, prefix + latent.kv_norm, kv)
    kv = linear(weights, prefix + latent.kv_up, kv, 0, heads * (plain + out)).unflatten(-1, (heads, 1, -1))
    k, v = kv.split([plain, out], dim=-1)

    pairs = replace(convention, interleaved_rotary=True)
    inverse, scaling = frequencies(dim=turning, **rope_of(config))
    angles = positions.float()[:, None] * inverse
    cos, sin = angles.cos()[:, None, None] * scaling, angles.sin()[:, None, None] * scaling
    q_plain, q_turning = q.split([plain, turning], dim=-1)
    q = torch.cat([q_plain, _rotate(pairs, q_turning, cos, sin)], dim=-1)
    k_turning = _rotate(pairs, k_turning[:, :, None, None], cos, sin)
    k = torch.cat([k, k_turning.expand(*k.shape[:-1], turning)], dim=-1)
    scale = softmax_scale(rope_of(config)) * (plain + turning) ** -0.5
    return linear(weights, prefix + names.dense, _attend(config, q, k, v, scale), 0, config.hidden_size)


def _angles(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every position and rotary pair: (length, 1, 1, pairs)."""
    inverse, scaling = frequencies(dim=int(config.head_dim * config.rotary_percent), **rope_of(config))
    angles = positions.float()[:, None] * inverse
    return angles.cos()[:, None, None] * scaling, angles.sin()[:, None, None] * scaling


def _rotate(convention: Convention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (prompts, length, groups, heads, head_dim)."""
    axis = -1 if convention.interleaved_rotary else -2
    x, still = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)  # a part of the head may not turn
    a, b = x.unflatten(-1, (-1, 2) if convention.interleaved_rotary else (2, -1)).unbind(axis)
    return torch.cat([torch.stack([a * cos - b * sin, b * cos + a * sin], dim=axis).flatten(-2), still], dim=-1)
