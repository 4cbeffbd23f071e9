"""Parameters of a source that are stored several times: whether all copies are the same."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from weights_conversion.engine.execute import read_rows
from weights_conversion.engine.streams import Scratch, Source
from weights_conversion.layouts.placement import Placed
from weights_conversion.layouts.plan import CHUNK_BYTES, Plan

_COMPARED_BYTES = 1 << 20  # at a time: both pieces stay in a core's cache


def inconsistencies(plan: Plan, source: Source, workers: int = 1, by_sums: bool = False) -> list[str]:
    """Compares the copies of every source tensor that has several (norms on tensor ranks, tied heads), bit by bit.

    `by_sums`: those whose files keep a CRC-32 of them by that; of 512 ranks they may be a hundred gigabytes.
    """
    several = [placed for step in plan.steps for placed in step.source if len(placed.copies) > 1]
    if by_sums:
        several = [placed for placed in several if not _same_sums(placed)]
    scratches = threading.local()

    def differences(placed: Placed, start: int) -> list[str]:
        if not hasattr(scratches, "own"):
            scratches.own = Scratch()
        numbers = range(1, len(placed.copies))
        return [said for number in numbers for said in _difference(placed, number, start, source, scratches.own)]

    pieces = [(placed, start) for placed in several for start in range(0, placed.rows, _compared_rows(placed))]
    with ThreadPoolExecutor(workers, thread_name_prefix="compare") as pool:
        found = pool.map(differences, *zip(*pieces, strict=True)) if pieces else ()
        return list(dict.fromkeys(said for problems in found for said in problems))


def _same_sums(placed: Placed) -> bool:
    """Whether all copies are cut alike, and each part has the CRC-32 of the first copy's."""
    said = {tuple((b.ref.crc, b.ref.shape, b.start, b.rows, b.columns) for b in copy) for copy in placed.copies}
    return len(said) == 1 and all(block.ref.crc is not None for block in placed.copies[0])


def _compared_rows(placed: Placed) -> int:
    return max(CHUNK_BYTES // placed.row_bytes, 1)


def _difference(placed: Placed, number: int, begin: int, source: Source, scratch: Scratch) -> list[str]:
    """What is to be said of rows from `begin` on of copy `number`, where they are not those of the first."""
    end = min(begin + _compared_rows(placed), placed.rows)
    whole = any(b.ref.transposed or b.transposed for b in (*placed.copies[0], *placed.copies[number]))  # read as such
    rows = end - begin if whole else max(_COMPARED_BYTES // placed.row_bytes, 1)
    for start in range(begin, end, rows):
        scratch.reset()
        span = (start, min(start + rows, end))
        first = read_rows(placed, span, source, scratch)
        other = read_rows(placed, span, source, scratch, copy=number)
        if not _same_bits(first, other):
            one, two = placed.copies[0][0], placed.copies[number][0]
            return [
                f"{placed.name} differs between {one.ref.file} ({one.ref.name}) and {two.ref.file} ({two.ref.name}), "
                "which must hold the same values; --allow-inconsistent takes the first"
            ]
    return []


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one type are equal bit by bit, eight bytes at a time where they are so many."""
    words = torch.int64 if one.shape[-1] * one.element_size() % 8 == 0 else torch.uint8
    return torch.equal(one.view(words), other.view(words))
