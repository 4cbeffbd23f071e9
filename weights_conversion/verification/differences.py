"""Differences between two tensors, value by value."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from weights_conversion.mapping.parameters import Instance, ParamMapping

BLOCK_VALUES = 1 << 20  # values that are compared one by one at a time: they need a few float32 copies
# Of values in a wider type, the part that no narrower type holds: 7/8 for float16 and bfloat16, nearly all for float32.
# A few of them are no rounding, but damage to a checkpoint that was widened.
MOSTLY = 0.25
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Difference:
    """What differs in one tensor of the HF model. Counts are of values; `row` and `column` are the largest error's."""

    tensor: str
    instance: Instance = field(repr=False)
    index: int  # which of its HF tensors
    dtypes: tuple[torch.dtype, torch.dtype]
    shape: tuple[int, int]
    values: int = 0  # that differ, rounding not counted
    reverse: int = 0  # of the source that are not the checkpoint's values rounded
    rounded: int = 0  # that are equal after rounding to the narrower dtype, but not before
    broken: int = 0  # that are finite on one side only
    absolute: float = 0.0
    relative: float = 0.0
    row: int = 0
    column: int = 0
    pair: tuple[float, float] = (0.0, 0.0)
    bits: int = 0  # that differ, where a single value does
    first: tuple[int, int] | None = None
    files: Counter[str] = field(default_factory=Counter)  # checkpoint files that hold values that differ
    cause: str | None = None

    @property
    def layer(self) -> int | None:
        return self.instance.layer

    @property
    def mapping(self) -> ParamMapping:
        return self.instance.row

    def add(self, other: Difference) -> None:
        """Joins what another chunk of the same tensor found."""
        if (other.values > 0, other.absolute) > (self.values > 0, self.absolute) or not (self.values or self.rounded):
            self.row, self.column, self.pair, self.absolute = other.row, other.column, other.pair, other.absolute
        self.relative = max(self.relative, other.relative)
        self.first = min((place for place in (self.first, other.first) if place is not None), default=None)
        self.bits = other.bits if not self.values else 0 if other.values else self.bits
        self.values += other.values
        self.reverse += other.reverse
        self.rounded += other.rounded
        self.broken += other.broken
        self.files += other.files

    def settle(self) -> None:
        """Where the source is the narrower side, it may be the one that was rounded: then nearly all values are."""
        if not self.reverse and self.values > MOSTLY * self.shape[0] * self.shape[1]:
            self.rounded, self.values, self.first = self.rounded + self.values, 0, None
            self.files.clear()


@dataclass
class Exact:
    """`differences` holds the tensors with values that differ, `recast` those of another dtype that rounds to it."""

    tensors: int = 0
    values: int = 0
    differences: list[Difference] = field(default_factory=list)
    recast: list[Difference] = field(default_factory=list)
    nonfinite: dict[str, tuple[int, int]] = field(default_factory=dict)  # NaN and infinities on each side
    copies: list[str] = field(default_factory=list)  # the checkpoint's ranks that disagree
    source_copies: list[str] = field(default_factory=list)
    padding: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        return not (self.differences or self.copies or self.source_copies or self.padding)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    whole_words = tensor.is_contiguous() and (tensor.shape[-1] * tensor.element_size()) % 8 == 0
    return tensor.view(torch.int64 if whole_words else INTEGERS[tensor.element_size()])


def is_finite(tensor: Tensor) -> bool:
    """A sum passes NaN and infinities on, and is the fastest; where it overflows, the extremes decide."""
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum())):
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def count_nonfinite(tensor: Tensor) -> int:
    """NaN and infinities."""
    step = max(BLOCK_VALUES // tensor.shape[1], 1)
    return sum(int((~part.isfinite()).count_nonzero()) for part in tensor.split(step))


def block_difference(whole: Difference, a: Tensor, b: Tensor, start: int) -> tuple[Difference, Tensor] | None:
    """What differs between two blocks of rows, the first being row `start`; and a mask of the values that differ."""
    if same_bits(a, b):
        return None
    integer = INTEGERS[a.element_size()]
    if a.dtype == b.dtype:
        reverse = differs = a.view(integer) != b.view(integer)
    else:
        same = a.isnan() & b.isnan()
        broken = a.isfinite() != b.isfinite()
        back = b.to(a.dtype) == a
        lost = back & (
            a.abs() < torch.finfo(a.dtype).smallest_normal
        )  # bits that the source's small values cannot have
        differs, reverse = ~((a.to(b.dtype) == b) | lost | same) | broken, ~(back | same) | broken
    wide = torch.float64 if torch.float64 in whole.dtypes else torch.float32
    x, y = a.to(wide), b.to(wide)
    error = (x - y).abs().nan_to_num_(0.0, posinf=0.0)
    scale = torch.maximum(x.abs(), y.abs()).nan_to_num_(0.0, posinf=0.0)
    relative = torch.where(scale > 0, error / scale, error)
    number = int((error * differs if differs.any() and error[differs].max() > 0 else error).argmax())
    if differs.any() and not error[differs].any():  # not a number, or bits without a value (the zero's sign)
        number = int(differs.to(torch.uint8).argmax())
    row, column = divmod(number, a.shape[1])
    found = replace(whole, files=Counter())
    found.values, found.reverse = int(differs.count_nonzero()), int(reverse.count_nonzero())
    found.rounded = int((error > 0).count_nonzero()) if not found.values else 0
    found.broken = int((a.isfinite() != b.isfinite()).count_nonzero())
    found.absolute, found.relative = float(error[row, column]), float(relative.max())
    found.row, found.column = start + row, column
    found.pair = (float(x[row, column]), float(y[row, column]))
    if found.values:
        place = divmod(int(differs.to(torch.uint8).argmax()), a.shape[1])
        found.first = (start + place[0], place[1])
        if found.values == 1 and a.dtype == b.dtype:
            one, other = a.view(integer)[row, column].item(), b.view(integer)[row, column].item()
            found.bits = ((int(one) ^ int(other)) & ((1 << (8 * a.element_size())) - 1)).bit_count()
    return found, differs
