"""A stand-in for mamba_ssm on a CPU: what megatron-core's mixer calls of it, token by token, in plain torch."""

from __future__ import annotations

from typing import Any

import modules_stand_in
import torch
import torch.nn.functional as F
from torch import Tensor


def scan(
    zxbcdt: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor, dt_bias: Tensor, a: Tensor, *, D: Tensor,
    headdim: int, ngroups: int, **_: Any,
) -> Tensor:  # fmt: skip
    """mamba_split_conv1d_scan_combined without its norm: zxbcdt (batch, length, z + x + B + C + heads)."""
    heads, mixed = D.shape[0], conv1d_weight.shape[0]
    inner, length = heads * headdim, zxbcdt.shape[1]
    states = (mixed - inner) // 2
    z, xbc, dt = zxbcdt.split([inner, mixed, heads], dim=-1)
    padding = conv1d_weight.shape[-1] - 1
    moved = F.conv1d(xbc.transpose(1, 2), conv1d_weight.unsqueeze(1), conv1d_bias, padding=padding, groups=mixed)
    x, b, c = F.silu(moved[..., :length]).transpose(1, 2).split([inner, states, states], dim=-1)
    x = x.unflatten(-1, (heads, headdim))
    b, c = (part.unflatten(-1, (ngroups, -1)).repeat_interleave(heads // ngroups, dim=2) for part in (b, c))
    step = F.softplus(dt + dt_bias)
    held = x.new_zeros(x.shape[0], heads, headdim, b.shape[-1])
    out = []
    for token in range(length):
        taken = (step[:, token, :, None] * x[:, token])[..., None] * b[:, token, :, None]
        held = held * (step[:, token] * a).exp()[..., None, None] + taken
        out.append((held * c[:, token, :, None]).sum(-1) + D[:, None] * x[:, token])
    return torch.stack(out, dim=1).flatten(2) * F.silu(z)


class GroupedNorm(torch.nn.Module):
    def __init__(self, hidden_size: int, eps: float = 1e-5, group_size: int | None = None, **options: Any) -> None:
        super().__init__()
        self.eps, self.group = eps, group_size or hidden_size
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=options.get("dtype")))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        assert z is None
        groups = x.unflatten(-1, (-1, self.group))
        normed = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
        return normed.flatten(-2) * self.weight


def install() -> None:
    contents: dict[str, dict[str, Any]] = {
        "mamba_ssm": {"__version__": "2.2.5"}, "mamba_ssm.ops": {}, "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.layernorm_gated": {"RMSNorm": GroupedNorm},
        "mamba_ssm.ops.triton.ssd_combined": {
            "mamba_chunk_scan_combined": None, "mamba_split_conv1d_scan_combined": scan,
        },
    }  # fmt: skip
    modules_stand_in.install(contents)
