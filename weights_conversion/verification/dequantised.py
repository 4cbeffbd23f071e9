"""Quantised values a second time, without the converter's reader: by a table of what each byte means, in float64.

The product of a byte's value and a scale is exact there; it is rounded to float32 and then to the model's type, as the
product in float32 is.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from weights_conversion.layouts.decoding import BlockScaled, Mxfp4
from weights_conversion.layouts.placement import Placed, TensorRef

_STRIP = 1 << 18  # values that are in float64 at a time
_FORMATS = {  # bits of the exponent and of the mantissa, and the exponent's bias
    torch.float8_e4m3fn: (4, 3, 7),
    torch.float8_e5m2: (5, 2, 15),
}


@functools.cache
def table(dtype: torch.dtype) -> Tensor:
    """What each of the 256 bytes means, (256,) in float64."""
    exponents, fractions, bias = _FORMATS[dtype]
    values = []
    for byte in range(256):
        sign = -1.0 if byte >> 7 else 1.0
        exponent, fraction = byte >> fractions & (1 << exponents) - 1, byte & (1 << fractions) - 1
        top = (1 << exponents) - 1
        if dtype == torch.float8_e5m2 and exponent == top:
            values.append(float("nan") if fraction else sign * float("inf"))
        elif dtype == torch.float8_e4m3fn and byte & 0x7F == 0x7F:  # it has no infinities
            values.append(float("nan"))
        elif exponent == 0:
            values.append(sign * fraction * 2.0 ** (1 - bias - fractions))
        else:
            values.append(sign * (1 + fraction / (1 << fractions)) * 2.0 ** (exponent - bias))
    return torch.tensor(values, dtype=torch.float64)


def block_of(shape: Sequence[int], scales: Sequence[int], raw: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of a matrix of `shape` that share one of `scales`."""
    rows, columns = shape[-2:]
    stated = raw.get("quantization_config") or raw.get("compression_config") or {}
    groups = stated.get("config_groups")
    weights = [each.get("weights") for each in groups.values()] if isinstance(groups, Mapping) else []
    blocks = [each.get("block_structure") for each in weights if isinstance(each, Mapping)]
    found = [stated.get("weight_block_size"), *blocks]
    block = next((each for each in found if each), None)
    if all(size == 1 for size in scales) or len(scales) < 2:
        return (1, columns) if len(shape) == 2 and len(scales) == 1 and scales[0] == rows else (rows, columns)
    if block is None and scales[-1] == 1 and scales[-2] in (1, rows):
        return (rows // scales[-2], columns)
    if isinstance(block, str):
        block = [int(size) for size in block.split("x")]
    return (block[0], block[1]) if block else (128, 128)


def values_of(values: Tensor, scales: Tensor, first: int, block: tuple[int, int], into: Tensor) -> Tensor:
    """Fills `into` with rows first.. of a matrix: `values` (rows, columns) in fp8, `scales` of the whole matrix."""
    known, scales = table(values.dtype), scales.reshape(-1, scales.shape[-1] if scales.dim() > 1 else 1).double()
    columns = torch.arange(values.shape[1]) // block[1]
    step = max(_STRIP // values.shape[1], 1)
    for start in range(0, len(values), step):
        part = values[start : start + step]
        rows = (torch.arange(len(part)) + first + start) // block[0]
        product = known[part.view(torch.uint8).int()] * scales[rows][:, columns]
        into[start : start + step] = product.float()
    return into


@dataclass(frozen=True)
class Again:
    """A decoder (layouts.placement) of matrices of `height` rows one below the other, by this file's arithmetic."""

    values: TensorRef
    scales: TensorRef
    block: tuple[int, int]
    height: int

    @property
    def pieces(self) -> tuple[TensorRef, ...]:
        return self.values, self.scales

    def reads(self, rows: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        return rows, (0, self.scales.shape[0])

    def decode(self, rows: tuple[int, int], stored: Sequence[Tensor], into: Tensor) -> None:
        values, scales = stored
        each = len(scales) // max(self.values.shape[0] // self.height, 1)
        for row in range(rows[0] // self.height * self.height, rows[1], self.height):
            first, last = max(row, rows[0]), min(row + self.height, rows[1])
            matrix = row // self.height if each else 0
            own = scales[matrix * each : (matrix + 1) * each] if each else scales
            part = slice(first - rows[0], last - rows[0])
            values_of(values[part], own, first - row, self.block, into[part])


@functools.cache
def small_table() -> Tensor:
    """What each of 16 nibbles means, (16,) in float64: a bit of sign, two of exponent (bias 1), one of mantissa."""
    values = []
    for nibble in range(16):
        exponent, half = nibble % 8 // 2, nibble % 2 * 0.5
        values.append((-1.0) ** (nibble // 8) * (half if exponent == 0 else (1 + half) * 2.0 ** (exponent - 1)))
    return torch.tensor(values, dtype=torch.float64)


def small_values(values: Tensor, scales: Tensor, into: Tensor) -> Tensor:
    """Fills `into` (rows, columns) from bytes (rows, columns / 2) and exponents (rows, columns / 32).

    The lower nibble of a byte comes first.
    """
    step = max(_STRIP // into.shape[1], 1)
    for start in range(0, len(values), step):
        part, here = values[start : start + step].int(), into[start : start + step]
        exponents = scales[start : start + step].view(torch.uint8).double() - 127
        powers = torch.exp2(exponents).float().double()  # 2^128 is none of float32
        powers = powers.repeat_interleave(16, dim=1)
        here[:, 0::2] = small_table()[part % 16] * powers
        here[:, 1::2] = small_table()[part // 16] * powers
    return into


@dataclass(frozen=True)
class SmallAgain:
    """A decoder of MXFP4 (layouts.placement) by this file's arithmetic."""

    values: TensorRef
    scales: TensorRef

    @property
    def pieces(self) -> tuple[TensorRef, ...]:
        return self.values, self.scales

    def reads(self, rows: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        return rows, rows

    def decode(self, rows: tuple[int, int], stored: Sequence[Tensor], into: Tensor) -> None:
        small_values(stored[0], stored[1], into)


def again(stored: Mapping[str, Placed], found: Mapping[str, Placed], raw: Mapping[str, Any]) -> dict[str, Placed]:
    """`found` tensors, the quantised ones of `stored` computed by this file instead of the converter's reader."""
    result = dict(found)
    for name, placed in found.items():
        ((block, *_), *_) = placed.copies
        if isinstance(block.ref.decoder, Mxfp4):
            own = SmallAgain(*block.ref.decoder.pieces)
            result[name] = replace(placed, copies=((replace(block, ref=replace(block.ref, decoder=own)),),))
            continue
        if not isinstance(block.ref.decoder, BlockScaled):
            continue
        values = stored[name].copies[0][0].ref
        scales = next(stored[name + end] for end in ("_scale_inv", "_scale") if name + end in stored).copies[0][0].ref
        height, width = values.shape[-2:]
        flat = (scales.numel // scales.shape[-1], scales.shape[-1]) if len(scales.shape) > 1 else (scales.numel, 1)
        decoder = Again(
            replace(values, shape=(values.numel // width, width)), replace(scales, shape=flat),
            block_of(values.shape, scales.shape, raw), height,
        )  # fmt: skip
        ref = replace(block.ref, decoder=decoder)
        result[name] = replace(placed, copies=((replace(block, ref=ref),),))
    return result
