"""How work is shared among ranks, and how long a number of them takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def share(work: Sequence[Any], sizes: Sequence[int], size: int) -> list[Sequence[Any]]:
    """Cuts `work` into `size` runs, balanced by `sizes` (bytes): what stands together in a file falls to one rank."""
    from weights_conversion.layouts.plan import balanced

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


def start_up_seconds(alone: float, ranks: int) -> float:
    """From the start of a command to its first byte, given what one process `alone` took.

    torchrun imports torch before it starts its ranks, which then do so at one time and join: with a core for each rank
    2.4 s were measured where one process took 0.8 s. With fewer cores it is more, under srun less.
    """
    return alone if ranks == 1 else 3 * alone


def predicted_seconds(
    nbytes: int, ranks: int, rank_rate: float, bandwidth: float | None = None, start_up: float = 0.0
) -> float:
    """Time of a conversion that writes `nbytes`. Rates in bytes/s of output: one rank's, and the filesystem's."""
    rate = ranks * rank_rate
    return start_up + nbytes / (min(rate, bandwidth) if bandwidth else rate)
