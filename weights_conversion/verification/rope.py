"""Rotary frequencies by the rules of transformers' `ROPE_INIT_FUNCTIONS`, written down a second time.

The converter carries these numbers from config to config; what a model makes of them is stated here alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weights_conversion.errors import ConversionError

KINDS = ("default", "linear", "llama3", "yarn")


def frequencies(
    kind: str, *, dim: int, theta: float, factor: float = 1.0, low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0, original_max_position_embeddings: int = 0,
    attention_factor: float | None = None, beta_fast: float | None = None, beta_slow: float | None = None,
    mscale: float | None = None, mscale_all_dim: float | None = None, truncate: bool = True,
) -> tuple[Tensor, float]:  # fmt: skip
    """(radians per position of each rotary pair, float32 [dim/2]; what cos and sin are multiplied by).

    `dim` is the part of a head that turns. What a kind has no use for is not looked at. Raises ConversionError for a
    kind that is none of KINDS, and for one that lacks the number of positions that the model was first trained on.
    """
    plain = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if kind == "default":
        return plain, 1.0
    if kind == "linear":
        return plain / factor, 1.0
    if kind not in KINDS:
        raise ConversionError(f"the forward pass knows the rope kinds {', '.join(KINDS)}, not {kind!r}")
    if not original_max_position_embeddings:
        raise ConversionError(f"rope of kind {kind} needs original_max_position_embeddings, which is not stated")
    original = original_max_position_embeddings
    if kind == "llama3":
        return _llama3(plain, factor, low_freq_factor, high_freq_factor, original), 1.0
    low, high = (_turns(turns, dim, theta, original) for turns in (beta_fast or 32, beta_slow or 1))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    scaled = _yarn(plain, dim, theta, factor, max(low, 0), min(high, dim - 1))
    return scaled, _yarn_attention(factor, mscale, mscale_all_dim) if attention_factor is None else attention_factor


def softmax_scale(rope: Mapping[str, Any]) -> float:
    """What DeepSeek's yarn multiplies the softmax's scale by, beside the size of a head."""
    every = rope.get("mscale_all_dim")
    if rope.get("kind") != "yarn" or not every or rope.get("factor", 1.0) <= 1:
        return 1.0
    return (0.1 * every * math.log(rope["factor"]) + 1.0) ** 2


def _llama3(plain: Tensor, factor: float, low: float, high: float, original: int) -> Tensor:
    """Short waves stay, long ones are stretched by `factor`, those between `original` / high and / low are blended."""
    wavelength = 2 * math.pi / plain
    blend = (original / wavelength - low) / (high - low)
    blended = (1 - blend) * plain / factor + blend * plain
    return torch.where(
        wavelength > original / low, plain / factor, torch.where(wavelength < original / high, plain, blended)
    )


def _turns(turns: float, dim: int, theta: float, original: int) -> float:
    """The pair (as a real number) that makes so many turns within `original` positions."""
    return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))


def _yarn(plain: Tensor, dim: int, theta: float, factor: float, low: float, high: float) -> Tensor:
    """Pairs below `low` stay, those from `high` on are divided by `factor`, a ramp lies between."""
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    periods = theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    keep = 1 - ramp
    return (1.0 / (factor * periods)) * (1 - keep) + plain * keep


def _yarn_attention(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    def one(scale: float = 1.0) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    return one(mscale) / one(mscale_all_dim) if mscale and mscale_all_dim else one()
