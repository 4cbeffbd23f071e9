"""Linear attention by the gated delta rule in the forward pass, by transformers' rules, token by token.

Where a head forgets at once, its output is of rounding size before the norm behind it, which makes it as large as any
other: a different order of sums in float32 then shows. So this layer is computed in float64, from its input on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from weights_conversion.config import GatedDelta, ModelConfig
from weights_conversion.verification.conventions import Convention
from weights_conversion.verification.linear import BLOCK_ELEMENTS, Weights, rows_of, vector
from weights_conversion.verification.names import DeltaNames
from weights_conversion.verification.parts import sizes_of

_SMALL = 1e-6  # beside the squares of q and of k, which have length one


def gated_delta(config: ModelConfig, convention: Convention, weights: Weights, prefix: str, x: Tensor) -> Tensor:
    """x (prompts, length, hidden), behind its norm, through a layer's linear attention and output projection."""
    names, sizes = convention.names_for(config).delta, config.gated_delta
    assert sizes is not None  # the caller has looked
    assert names is not None
    x = x.double()
    q, k, v, z, b, a = _projected(config, sizes, names, weights, prefix, x)
    mixed = _convolved(
        torch.cat([part.flatten(2) for part in (q, k, v)], dim=-1), _kernel(sizes, names, weights, prefix)
    )
    keys = sizes.num_key_heads * sizes.key_head_dim
    q, k, v = (
        part.unflatten(-1, (heads, -1))
        for part, heads in zip(
            mixed.split([keys, keys, mixed.shape[-1] - 2 * keys], dim=-1),
            (sizes.num_key_heads, sizes.num_key_heads, sizes.num_value_heads),
            strict=True,
        )
    )
    each = sizes.num_value_heads // sizes.num_key_heads  # value heads that share a key head
    q, k = (_unit(part).repeat_interleave(each, dim=2) for part in (q, k))
    a_log, dt_bias = (
        vector(weights, prefix + name, sizes.num_value_heads).double() for name in (names.a_log, names.dt_bias)
    )
    decay = (-a_log.exp() * F.softplus(a.flatten(2) + dt_bias)).exp()
    out = _scanned(q * sizes.key_head_dim**-0.5, k, v, decay, b.flatten(2).sigmoid())
    scale = vector(weights, prefix + names.norm, sizes.value_head_dim).double() + float(names.shifted)
    out = scale * out * torch.rsqrt(out.square().mean(-1, keepdim=True) + config.layernorm_epsilon) * F.silu(z)
    return _linear(weights, prefix + names.out_proj, out.flatten(2), config.hidden_size).float()


def _scanned(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """What the state gives at each token; all (prompts, length, heads, size), decay and beta without a size."""
    held = q.new_zeros(q.shape[0], q.shape[2], q.shape[-1], v.shape[-1])
    out = []
    for token in range(q.shape[1]):
        held = held * decay[:, token, :, None, None]
        known = (held * k[:, token, :, :, None]).sum(-2)
        change = (v[:, token] - known) * beta[:, token, :, None]
        held = held + k[:, token, :, :, None] * change[:, :, None]
        out.append((held * q[:, token, :, :, None]).sum(-2))
    return torch.stack(out, dim=1)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _SMALL)


def _convolved(x: Tensor, kernel: Tensor) -> Tensor:
    """Each column of x (prompts, length, columns) over its last tokens by a kernel of its own, then silu."""
    moved = F.conv1d(x.transpose(1, 2), kernel, padding=kernel.shape[-1] - 1, groups=x.shape[-1])
    return F.silu(moved[..., : x.shape[1]].transpose(1, 2))


def _kernel(sizes: GatedDelta, names: DeltaNames, weights: Weights, prefix: str) -> Tensor:
    stored = [prefix + names.conv]
    if len(names.projections) > 4:  # each part by itself
        stored = [f"{prefix}{names.conv}.{part}" for part in ("query", "key", "value")]
    return torch.cat([weights(name, None).double() for name in stored]).view(-1, 1, sizes.conv_kernel_dim)


def _projected(
    config: ModelConfig, sizes: GatedDelta, names: DeltaNames, weights: Weights, prefix: str, x: Tensor
) -> list[Tensor]:
    """q, k, v, z, b and a, each (prompts, length, heads, size)."""
    keys, values, each = sizes.num_key_heads, sizes.num_value_heads, sizes.num_value_heads // sizes.num_key_heads
    heads = (keys, keys, values, values, values, values)
    dims = (sizes.key_head_dim, sizes.key_head_dim, sizes.value_head_dim, sizes.value_head_dim, 1, 1)
    rows = [number * dim for number, dim in zip(heads, dims, strict=True)]
    assert list(sizes_of(".self_attention.in_proj.weight", config).values()) == rows
    count = len(names.projections)
    joins = {2: (4, 2), 4: (3, 1, 1, 1), 6: (1,) * 6}[count]  # how many parts each has
    found: list[Tensor] = []
    for name, number in zip(names.projections, joins, strict=True):
        at = len(found)
        out = _linear(weights, prefix + name, x, sum(rows[at : at + number]))
        if names.by_head:
            widths = [rows[i] // keys for i in range(at, at + number)]
            parts = [part.flatten(2) for part in out.unflatten(-1, (keys, -1)).split(widths, dim=-1)]
        else:
            parts = out.split(rows[at : at + number], dim=-1)
        found += parts
    assert each * keys == values
    return [part.unflatten(-1, (number, -1)) for part, number in zip(found, heads, strict=True)]


def _linear(weights: Weights, name: str, x: Tensor, rows: int) -> Tensor:
    """x times a stored matrix, in float64, some rows of it at a time."""
    step = max(1, BLOCK_ELEMENTS // x.shape[-1] // 4)
    blocks = (
        x @ rows_of(weights, name, first, min(first + step, rows), x.shape[-1]).double().t()
        for first in range(0, rows, step)
    )
    return torch.cat(list(blocks), dim=-1)
