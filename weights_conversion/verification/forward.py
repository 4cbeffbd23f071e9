"""A float32 forward pass straight from stored weights, in the conventions of the side that stored them.

It proves a conversion, so it shares no code with one: only `ModelConfig` and torch. Two sides hold the same model when
their traces agree. Weights are asked for one block of rows at a time; only the prompts' hidden states stay in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weights_conversion.config import ModelConfig
from weights_conversion.errors import ConversionError
from weights_conversion.verification.conventions import Convention, block_of
from weights_conversion.verification.rope import frequencies

Weights = Callable[[str, slice | None], Tensor]
"""(full stored name, rows) -> those rows of the full, unsharded tensor in its stored dtype; None asks for all rows.

Matrices are asked for in ascending, consecutive row ranges with both ends given; norms and biases are asked for whole.
"""

Stage = tuple[str, int | None, Tensor]
"""(sub-module, layer or None, output). The sub-modules are `embedding`, then per layer `attention_norm`, `attention`
(behind the output projection), `mlp_norm` (absent where falcon shares one norm), `mlp` and `layer` (with the residual),
then `final_norm` and `logits`. Outputs are float32 (prompts, length, hidden), logits (prompts, length, vocab)."""

BLOCK_ELEMENTS = 1 << 22
"""Weights that are held in float32 at one time: 16 MiB, small enough that malloc reuses the pages."""


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
    hidden = _norm(config, weights, names.final_norm, hidden)
    yield "final_norm", None, hidden
    head = head or (names.embedding if config.tie_word_embeddings else names.head)
    # Rows from vocab_size on are a layout's padding.
    yield "logits", None, _linear(weights, head, hidden, 0, config.vocab_size)


def embed(config: ModelConfig, convention: Convention, weights: Weights, tokens: Tensor) -> Tensor:
    """Rows of the embedding for `tokens`; no other row is asked for."""
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise ValueError(f"token ids must be in [0, {config.vocab_size}), got {tokens.min()} to {tokens.max()}")
    name = convention.names_for(config).embedding
    ids, positions = torch.unique(tokens, return_inverse=True)
    rows = [_rows(weights, name, i, i + 1, config.hidden_size) for i in ids.tolist()]
    return torch.cat(rows)[positions]


def layer(
    config: ModelConfig, convention: Convention, weights: Weights, index: int, hidden: Tensor,
    positions: Tensor | None = None,
) -> Iterator[tuple[str, int, Tensor]]:  # fmt: skip
    """Stages of one layer for its input `hidden`; the last one, `layer`, is the input of the next."""
    positions = torch.arange(hidden.shape[1]) if positions is None else positions
    names = convention.names_for(config)
    prefix = names.layer.format(index)

    normed = _norm(config, weights, prefix + names.attention_norm, hidden)
    yield "attention_norm", index, normed
    attended = _attention(config, convention, weights, prefix, normed, positions)
    yield "attention", index, attended

    residual = hidden + attended
    mlp_input = hidden if block_of(config).parallel else residual
    if names.mlp_norm != names.attention_norm:
        normed = _norm(config, weights, prefix + names.mlp_norm, mlp_input)
        yield "mlp_norm", index, normed
    mlp = _mlp(config, convention, weights, prefix, normed)
    yield "mlp", index, mlp
    yield "layer", index, residual + mlp


def _attention(
    config: ModelConfig, convention: Convention, weights: Weights, prefix: str, x: Tensor, positions: Tensor
) -> Tensor:
    names = convention.names_for(config)
    groups, dim = config.num_query_groups, config.head_dim
    shape = (*x.shape[:2], groups, -1, dim)  # k and v: one head of a group
    q, k, v = (part.reshape(shape) for part in _qkv(config, convention, weights, prefix, x))
    if config.qk_layernorm:
        q = _rms(config, weights, prefix + names.q_norm, q)
        k = _rms(config, weights, prefix + names.k_norm, k)
    cos, sin = _angles(config, positions)
    q, k = (_rotate(convention, part, cos, sin) for part in (q, k))

    scores = torch.einsum("bigrd,bjgsd->bgrij", q, k) / dim**0.5
    place = torch.arange(x.shape[1])
    distance = place[:, None] - place[None, :]
    masked = distance < 0
    if config.sliding_window is not None:
        masked |= distance >= config.sliding_window  # a token sees `sliding_window` tokens, itself included
    scores = scores.masked_fill(masked, float("-inf")).softmax(dim=-1)
    out = torch.einsum("bgrij,bjgsd->bigrd", scores, v).flatten(2)
    return _linear(weights, prefix + names.dense, out, 0, config.hidden_size)


def _qkv(config: ModelConfig, convention: Convention, weights: Weights, prefix: str, x: Tensor) -> Sequence[Tensor]:
    """q, k and v; the last axes hold their heads in order, by groups or flat."""
    names, dim = convention.names_for(config), config.head_dim
    sizes = [config.num_attention_heads * dim, config.num_query_groups * dim, config.num_query_groups * dim]
    separate = len(names.qkv) == 3
    biases: list[Tensor] = []
    if config.add_qkv_bias:
        lengths = sizes if separate else [sum(sizes)]
        biases = [_vector(weights, prefix + name, size) for name, size in zip(names.qkv_bias, lengths, strict=True)]
    if separate:
        parts = [_linear(weights, prefix + name, x, 0, size) for name, size in zip(names.qkv, sizes, strict=True)]
    else:
        parts = _apart(config, _linear(weights, prefix + names.qkv[0], x, 0, sum(sizes)), convention.grouped_qkv)
        biases = [part for bias in biases for part in _apart(config, bias, convention.grouped_bias)]
    return [part.flatten(2) + bias.flatten() for part, bias in zip(parts, biases, strict=True)] if biases else parts


def _apart(config: ModelConfig, fused: Tensor, grouped: bool) -> Sequence[Tensor]:
    """q, k and v of the last axis of `fused`."""
    heads, groups, dim = config.num_attention_heads, config.num_query_groups, config.head_dim
    if grouped:
        # (.., groups, heads of a group + 2, dim)
        return fused.unflatten(-1, (groups, -1, dim)).split([heads // groups, 1, 1], dim=-2)
    return fused.split([heads * dim, groups * dim, groups * dim], dim=-1)


def _angles(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every position and rotary pair: (length, 1, 1, pairs)."""
    inverse, scaling = frequencies(dim=config.head_dim, **rope_of(config))
    angles = positions.float()[:, None] * inverse
    return angles.cos()[:, None, None] * scaling, angles.sin()[:, None, None] * scaling


def _rotate(convention: Convention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (prompts, length, groups, heads, head_dim)."""
    axis = -1 if convention.interleaved_rotary else -2
    a, b = x.unflatten(-1, (-1, 2) if convention.interleaved_rotary else (2, -1)).unbind(axis)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=axis).flatten(-2)


def _mlp(config: ModelConfig, convention: Convention, weights: Weights, prefix: str, x: Tensor) -> Tensor:
    names, ffn = convention.names_for(config), config.ffn_hidden_size
    if not block_of(config).gated:
        inner = F.gelu(_linear(weights, prefix + names.mlp_in[0], x, 0, ffn))
    else:
        # Fused: the second half begins at row ffn of the same matrix.
        start = ffn if len(names.mlp_in) == 1 else 0
        halves = (
            _linear(weights, prefix + names.mlp_in[0], x, 0, ffn),
            _linear(weights, prefix + names.mlp_in[-1], x, start, start + ffn),
        )
        gate, up = halves if convention.gate_first else halves[::-1]
        inner = F.silu(gate) * up
    return _linear(weights, prefix + names.mlp_out, inner, 0, config.hidden_size)


def _norm(config: ModelConfig, weights: Weights, name: str, x: Tensor) -> Tensor:
    if not block_of(config).layer_norm:
        return _rms(config, weights, name, x)
    size = config.hidden_size
    weight, bias = _vector(weights, name, size), _vector(weights, name.removesuffix("weight") + "bias", size)
    return F.layer_norm(x, (size,), weight, bias, config.layernorm_epsilon)


def _rms(config: ModelConfig, weights: Weights, name: str, x: Tensor) -> Tensor:
    weight = _vector(weights, name, x.shape[-1])
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.layernorm_epsilon))


def _vector(weights: Weights, name: str, size: int) -> Tensor:
    return _checked(weights(name, None), name, (size,))


def _linear(weights: Weights, name: str, x: Tensor, start: int, stop: int) -> Tensor:
    """x (.., columns) times rows [start, stop) of a matrix, in blocks: a large matrix is never whole in float32."""
    columns = x.shape[-1]
    out = x.new_empty(*x.shape[:-1], stop - start)
    step = max(1, BLOCK_ELEMENTS // columns)
    for begin in range(start, stop, step):
        end = min(begin + step, stop)
        out[..., begin - start : end - start] = F.linear(x, _rows(weights, name, begin, end, columns))
    return out


def _rows(weights: Weights, name: str, start: int, stop: int, columns: int) -> Tensor:
    return _checked(weights(name, slice(start, stop)), f"{name}, rows {start} to {stop},", (stop - start, columns))


def _checked(tensor: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise ConversionError(
            f"{name} has shape {tuple(tensor.shape)} where the model's config asks for {shape}; "
            "the config and the weights are of two models."
        )
    return tensor.detach().float()
