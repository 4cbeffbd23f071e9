"""State-space layers (Mamba 2) in the forward pass, by transformers' rules, token by token: no chunks, no kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from weights_conversion.config import MAMBA_KERNEL, ModelConfig
from weights_conversion.verification.conventions import Convention
from weights_conversion.verification.linear import Weights, linear, vector
from weights_conversion.verification.parts import sizes_of

# transformers clamps the step of time from below, at a value that every config of the family has; Megatron-Core does
# not, and is equal wherever softplus(dt + dt_bias) is greater.
_LEAST_STEP = 0.001


def mamba(config: ModelConfig, convention: Convention, weights: Weights, prefix: str, x: Tensor) -> Tensor:
    """x (prompts, length, hidden), behind its norm, through a layer's state space and output projection."""
    names, sizes = convention.names_for(config).mamba, config.mamba
    assert sizes is not None  # the caller has looked
    assert names is not None
    z, *mixed, dt = _projected(config, convention.joins_parts, weights, prefix + names.in_proj, x)
    kernels = _vectors(config, convention.joins_parts, weights, prefix + names.conv_weight, (1, MAMBA_KERNEL))
    biases = _vectors(config, convention.joins_parts, weights, prefix + names.conv_bias, ())
    states, b, c = (_convolved(*each) for each in zip(mixed, kernels, biases, strict=True))

    states = states.unflatten(-1, (sizes.num_heads, sizes.head_dim))
    each = sizes.num_heads // sizes.num_groups  # heads that share B and C
    b, c = (part.unflatten(-1, (sizes.num_groups, -1)).repeat_interleave(each, dim=2) for part in (b, c))
    a_log, d, dt_bias = (vector(weights, prefix + name, sizes.num_heads) for name in (names.a_log, names.d, names.dt))
    step = F.softplus(dt + dt_bias).clamp(min=_LEAST_STEP)
    out = _scanned(states, b, c, step, -a_log.exp()) + d[:, None] * states

    gated = (out.flatten(2) * F.silu(z)).unflatten(-1, (sizes.num_groups, -1))
    normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + config.layernorm_epsilon)
    normed = normed.flatten(2) * vector(weights, prefix + names.norm, sizes.num_heads * sizes.head_dim)
    return linear(weights, prefix + names.out_proj, normed, 0, config.hidden_size)


def _scanned(states: Tensor, b: Tensor, c: Tensor, step: Tensor, a: Tensor) -> Tensor:
    """What the state gives at each token: states (prompts, length, heads, head_dim), b and c (.., heads, state)."""
    held = states.new_zeros(states.shape[0], *states.shape[2:], b.shape[-1])
    out = []
    for token in range(states.shape[1]):
        forgotten = (step[:, token] * a).exp()[..., None, None]
        taken = (step[:, token, :, None] * states[:, token])[..., None] * b[:, token, :, None]
        held = held * forgotten + taken
        out.append((held * c[:, token, :, None]).sum(-1))
    return torch.stack(out, dim=1)


def _convolved(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """Each column of x (prompts, length, columns) over its last tokens by a kernel of its own, then silu."""
    length = x.shape[1]
    moved = F.conv1d(x.transpose(1, 2), kernel, bias, padding=MAMBA_KERNEL - 1, groups=x.shape[-1])
    return F.silu(moved[..., :length].transpose(1, 2))


def _projected(config: ModelConfig, joined: bool, weights: Weights, name: str, x: Tensor) -> list[Tensor]:
    parts = sizes_of(name, config)
    if not joined:
        return [linear(weights, f"{name}.{part}", x, 0, size) for part, size in parts.items()]
    return list(linear(weights, name, x, 0, sum(parts.values())).split(list(parts.values()), dim=-1))


def _vectors(config: ModelConfig, joined: bool, weights: Weights, name: str, rest: tuple[int, ...]) -> list[Tensor]:
    """The parts of a tensor of few columns."""
    parts = sizes_of(name, config)
    names = [name] if joined else [f"{name}.{part}" for part in parts]
    whole = torch.cat([weights(each, None).detach().float() for each in names]).view(-1, *rest)
    return list(whole.split(list(parts.values())))
