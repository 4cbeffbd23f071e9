"""Tensors that files do not hold as such: their values are computed from several stored ones while they are read.

A `TensorRef` with a decoder has the shape and type of the values; where its pieces are is the decoder's to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weights_conversion.errors import ConversionError
from weights_conversion.layouts.placement import TensorRef
from weights_conversion.mapping.ops import Range

STRIP_VALUES = 1 << 18  # that are in float32 at a time: 1 MB


@dataclass(frozen=True)
class BlockScaled:
    """Values times scales: one scale for each block of `block` (rows, columns), cut off at the matrix's edges.

    `values` (matrices x height, columns) are matrices of `height` rows one below the other; `scales` (matrices x
    ceil(height / block rows), ceil(columns / block columns)) likewise. The product is taken in float32 and rounded
    once. A row is a block of (1, columns), and a whole matrix one of (height, columns).
    """

    values: TensorRef
    scales: TensorRef
    block: tuple[int, int]
    height: int

    @property
    def pieces(self) -> tuple[TensorRef, ...]:
        return self.values, self.scales

    def reads(self, rows: Range) -> tuple[Range, ...]:
        first, last = rows
        return rows, (self._scale_row(first), self._scale_row(last - 1) + 1)

    def _scale_row(self, row: int) -> int:
        matrix, local = divmod(row, self.height)
        return matrix * -(-self.height // self.block[0]) + local // self.block[0]

    def check_scales(self, scales: Tensor) -> None:
        """Raises ConversionError for a scale (of any of the rows) that no quantising program makes.

        Some make a scale of 0 for a block of zeros: whether it is one is seen with the values.
        """
        numbers = scales.to(torch.float32)
        wrong = numbers[~((numbers >= 0) & numbers.isfinite())]
        if len(wrong):
            raise ConversionError(_broken(self.scales.name, f"{wrong[0].item():g}", len(wrong), "a positive number"))

    def zeroed(self, scales: Tensor) -> list[Range]:
        """The rows of values of which some have a scale of 0, in ranges as long as can be; `scales` are all of them."""
        per_matrix = -(-self.height // self.block[0])
        found: list[Range] = []
        for row in (scales.to(torch.float32) == 0).any(1).nonzero().flatten().tolist():
            matrix, block = divmod(row, per_matrix)
            first = matrix * self.height + block * self.block[0]
            last = min(first + self.block[0], (matrix + 1) * self.height)
            if found and found[-1][1] == first:  # a scale per row, and many rows of 0: a read for each took seconds
                first = found.pop()[0]
            found.append((first, last))
        return found

    def decode(self, rows: Range, stored: Sequence[Tensor], into: Tensor) -> None:
        self.check_scales(stored[1])
        values, scales = stored[0], stored[1].to(torch.float32)
        some_zero = bool((scales == 0).any())
        numbers = torch.arange(*rows)
        of_rows = numbers // self.height * -(-self.height // self.block[0]) + numbers % self.height // self.block[0]
        of_rows -= self._scale_row(rows[0])
        width = values.shape[1]
        whole, rest = divmod(width, self.block[1])
        strip = max(STRIP_VALUES // max(width, 1), 1)
        for start in range(0, len(values), strip):
            part = values[start : start + strip].to(torch.float32)
            factors = scales[of_rows[start : start + strip]]
            if some_zero and part[factors.repeat_interleave(min(self.block[1], width), 1)[:, :width] == 0].any():
                wanted = "a positive number (or values of 0)"
                raise ConversionError(_broken(self.scales.name, "0", int((scales == 0).count_nonzero()), wanted))
            if whole:
                part[:, : width - rest].unflatten(1, (whole, -1)).mul_(factors[:, :whole, None])
            if rest:
                part[:, width - rest :].mul_(factors[:, whole:])
            into[start : start + strip].copy_(part)
            if into.dtype == torch.float16 and not torch.equal(into[start : start + strip].isinf(), part.isinf()):
                raise ConversionError(
                    f"{self.values.name} has values up to {part[part.isfinite()].abs().max():g}, too large for the "
                    "float16 that config.json states; set its torch_dtype to bfloat16"
                )


def _broken(name: str, value: str, count: int, wanted: str) -> str:
    """The sentence for scales, of which every value that they belong to would be made wrong."""
    others = f" (and {count - 1} more such scales)" if count > 1 else ""
    return f"{name} has a scale of {value}{others}, where {wanted} was expected: it is damaged; download it again"


MXFP4_VALUES = 32  # of a block, which has one exponent
_NO_EXPONENT = 255  # no number, in the standard of such exponents (OCP Microscaling, E8M0)
# What a nibble means: a sign, two bits of exponent and one of mantissa.
_NIBBLES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True)
class Mxfp4:
    """Nibbles times powers of two. `values` (rows, columns / 2) are bytes, the value of the lower nibble first;
    `scales` (rows, columns / 32) are exponents + 127. A value is rounded to bfloat16, as transformers does."""

    values: TensorRef
    scales: TensorRef

    @property
    def pieces(self) -> tuple[TensorRef, ...]:
        return self.values, self.scales

    def reads(self, rows: Range) -> tuple[Range, ...]:
        return rows, rows

    def check_scales(self, scales: Tensor) -> None:
        """Raises ConversionError for an exponent that means no number."""
        if count := int((scales.view(torch.uint8) == _NO_EXPONENT).count_nonzero()):
            raise ConversionError(
                _broken(self.scales.name, f"exponent {_NO_EXPONENT}", count, f"one below {_NO_EXPONENT}")
            )

    def decode(self, rows: Range, stored: Sequence[Tensor], into: Tensor) -> None:
        self.check_scales(stored[1])
        values, scales = stored
        known = torch.tensor(_NIBBLES, dtype=torch.float32)
        pairs = torch.stack([known.repeat(16), known.repeat_interleave(16)], dim=1)  # of each byte
        strip = max(STRIP_VALUES // max(into.shape[1], 1), 1)
        for start in range(0, len(values), strip):
            part = values[start : start + strip]
            powers = torch.pow(2.0, scales[start : start + strip].to(torch.int32) - 127)  # float32
            blocks = pairs.index_select(0, part.reshape(-1).int()).view(len(part), -1, MXFP4_VALUES)
            into[start : start + strip].copy_(blocks.mul_(powers[:, :, None]).flatten(1).to(torch.bfloat16))
