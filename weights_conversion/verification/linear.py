"""What every part of the forward pass is made of: norms and products with stored matrices, asked for block by block."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from weights_conversion.config import ModelConfig
from weights_conversion.errors import ConversionError
from weights_conversion.verification.conventions import Convention, block_of

Weights = Callable[[str, slice | None], Tensor]
"""(full stored name, rows) -> those rows of the full, unsharded tensor in its stored dtype; None asks for all rows.

Matrices are asked for in ascending, consecutive row ranges with both ends given; norms and biases are asked for whole.
"""

BLOCK_ELEMENTS = 1 << 22
"""Weights that are held in float32 at one time: 16 MiB, small enough that malloc reuses the pages."""


def mlp(config: ModelConfig, convention: Convention, weights: Weights, prefix: str, x: Tensor) -> Tensor:
    names = convention.names_for(config)
    inner = within(config, convention, weights, [prefix + name for name in names.mlp_in], x, config.ffn_hidden_size)
    return linear(weights, prefix + names.mlp_out, inner, 0, config.hidden_size)


def within(
    config: ModelConfig, convention: Convention, weights: Weights, names: list[str], x: Tensor, ffn: int
) -> Tensor:
    """What stands between the matrices of an MLP, or of an expert, of `ffn` rows."""
    block = block_of(config)
    if block.gated:
        return gated(convention, weights, names, x, ffn)
    projected = linear(weights, names[0], x, 0, ffn)
    return F.gelu(projected) if block.activation == "gelu" else F.relu(projected).square()


def gated(convention: Convention, weights: Weights, inner: list[str], x: Tensor, ffn: int) -> Tensor:
    """silu(gate) * up of `ffn` rows each, of two matrices or of one that holds both."""
    gate, up = halves(convention, weights, inner, x, ffn)
    return F.silu(gate) * up


def halves(convention: Convention, weights: Weights, inner: list[str], x: Tensor, ffn: int) -> tuple[Tensor, Tensor]:
    """x times gate, and times up."""
    # Fused: the second half begins at row ffn of the same matrix.
    start = ffn if len(inner) == 1 else 0
    first, second = linear(weights, inner[0], x, 0, ffn), linear(weights, inner[-1], x, start, start + ffn)
    return (first, second) if convention.gate_first else (second, first)


def norm(config: ModelConfig, weights: Weights, name: str, x: Tensor) -> Tensor:
    if not block_of(config).layer_norm:
        return rms(config, weights, name, x)
    size = config.hidden_size
    weight, bias = vector(weights, name, size), vector(weights, name.removesuffix("weight") + "bias", size)
    return F.layer_norm(x, (size,), weight, bias, config.layernorm_epsilon)


def rms(config: ModelConfig, weights: Weights, name: str, x: Tensor) -> Tensor:
    weight = vector(weights, name, x.shape[-1])
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.layernorm_epsilon))


def vector(weights: Weights, name: str, size: int) -> Tensor:
    return _checked(weights(name, None), name, (size,))


def linear(weights: Weights, name: str, x: Tensor, start: int, stop: int) -> Tensor:
    """x (.., columns) times rows [start, stop) of a matrix, in blocks: a large matrix is never whole in float32."""
    columns = x.shape[-1]
    out = x.new_empty(*x.shape[:-1], stop - start)
    step = max(1, BLOCK_ELEMENTS // columns)
    for begin in range(start, stop, step):
        end = min(begin + step, stop)
        out[..., begin - start : end - start] = F.linear(x, rows_of(weights, name, begin, end, columns))
    return out


def rows_of(weights: Weights, name: str, start: int, stop: int, columns: int) -> Tensor:
    return _checked(weights(name, slice(start, stop)), f"{name}, rows {start} to {stop},", (stop - start, columns))


def _checked(tensor: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise ConversionError(
            f"{name} has shape {tuple(tensor.shape)} where the model's config asks for {shape}; "
            "the config and the weights are of two models."
        )
    return tensor.detach().float()
