"""Blocks, what of them holds some rows, and work that is cut into parts of nearly one size."""

from __future__ import annotations

import pytest
import torch

from weights_conversion.layouts.placement import Block, TensorRef, joined, overlaps, whole
from weights_conversion.layouts.plan import balanced

UPPER, LOWER = (TensorRef(name, "w", torch.bfloat16, (2, 3)) for name in ("rank0", "rank1"))


def test_whole_is_one_block() -> None:
    placed = whole(UPPER)
    assert (placed.rows, placed.columns, placed.row_bytes) == (2, 3, 6)
    assert placed.copies == ((Block(UPPER, 0, (0, 2), (0, 3)),),)


def test_a_vector_has_one_column() -> None:
    placed = whole(TensorRef("f", "norm", torch.float32, (5,)))
    assert (placed.rows, placed.columns, placed.row_bytes) == (5, 1, 4)


def test_parts_below_each_other_and_beside_each_other() -> None:
    (below,) = joined("w", [UPPER, LOWER], 0).copies
    assert [(block.rows, block.columns) for block in below] == [((0, 2), (0, 3)), ((2, 4), (0, 3))]
    (beside,) = joined("w", [UPPER, LOWER], 1).copies
    assert [(block.rows, block.columns) for block in beside] == [((0, 2), (0, 3)), ((0, 2), (3, 6))]
    assert len(joined("w", [UPPER, LOWER], None).copies) == 2  # each is all of it


def test_rows_one_to_three_lie_in_both_parts() -> None:
    (copy,) = joined("w", [UPPER, LOWER], 0).copies
    assert [(block.ref, start, stop) for block, start, stop in overlaps(copy, (1, 3))] == [(UPPER, 1, 2), (LOWER, 2, 3)]
    assert [block.ref for block, _, _ in overlaps(copy, (2, 4))] == [LOWER]


def test_a_row_begins_at_its_byte() -> None:
    """Row 5 of a block that holds rows 4 to 8 and begins at element 10: 10 and one row of 3, two bytes each."""
    assert Block(UPPER, 10, (4, 8), (0, 3)).byte(5) == 26


@pytest.mark.parametrize(
    ("sizes", "parts", "cut"),
    [
        ([1, 1, 1, 1], 2, [(0, 2), (2, 4)]),
        ([9, 1, 1, 1], 2, [(0, 1), (1, 4)]),
        ([1, 1, 1, 9], 2, [(0, 3), (3, 4)]),
        ([5, 5, 5], 3, [(0, 1), (1, 2), (2, 3)]),
        ([1, 9, 9], 1, [(0, 3)]),
        ([9, 0, 0], 3, [(0, 1), (1, 2), (2, 3)]),  # none is empty
    ],
)
def test_balanced(sizes: list[int], parts: int, cut: list[tuple[int, int]]) -> None:
    assert balanced(sizes, parts) == cut
