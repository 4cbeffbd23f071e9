"""How work is shared among ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weights_conversion.layouts.plan import balanced


def share(work: Sequence[Any], sizes: Sequence[int], size: int) -> list[Sequence[Any]]:
    """Cuts `work` into `size` runs, balanced by `sizes` (bytes): what stands together in a file falls to one rank."""
    if not work:
        return [()] * size
    runs = [work[start:stop] for start, stop in balanced(sizes, min(size, len(work)))]
    return [*runs, *([()] * (size - len(runs)))]


def to_ranges(numbers: Sequence[int]) -> list[list[int]]:
    """Sorted numbers as [first, behind the last] pairs."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number:
            ranges[-1][1] += 1
        else:
            ranges.append([number, number + 1])
    return ranges
