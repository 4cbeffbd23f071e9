"""A stand-in for fla (flash-linear-attention) on a CPU, without which megatron-core builds no gated delta layer.

The rule is megatron-core's own torch code, what --deterministic-mode runs; convolution and norm are plain torch.
"""

from __future__ import annotations

from typing import Any

import modules_stand_in
import torch
import torch.nn.functional as F
from torch import Tensor


def l2norm(x: Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(output_dtype or x.dtype)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Any = None, activation: str | None = None, **_: Any) -> Any:
    """x (batch, length, channels), weight (channels, kernel)."""
    moved = F.conv1d(
        x.transpose(1, 2), weight.unsqueeze(1), bias, padding=weight.shape[-1] - 1, groups=weight.shape[0]
    )[..., : x.shape[1]]
    return (F.silu(moved) if activation in ("silu", "swish") else moved).transpose(1, 2), None


def chunk_gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    from megatron.core.ssm.gated_delta_net.common import torch_chunk_gated_delta_rule

    return torch_chunk_gated_delta_rule(q, k, v, **options)


def install() -> None:
    contents: dict[str, dict[str, Any]] = {
        "fla": {}, "fla.modules": {}, "fla.modules.convolution": {"causal_conv1d": causal_conv1d},
        "fla.modules.l2norm": {"l2norm": l2norm}, "fla.ops": {},
        "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": chunk_gated_delta_rule},
    }  # fmt: skip
    modules_stand_in.install(contents)
