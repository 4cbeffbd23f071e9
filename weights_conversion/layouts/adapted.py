"""Rows of stored tensors that an adapter's factors are: which stand together, and in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from weights_conversion.config import ModelConfig
from weights_conversion.layouts.placement import Block, Placed, overlaps
from weights_conversion.mapping.dialects import Dialect
from weights_conversion.mapping.ops import Context, to_hf
from weights_conversion.mapping.parameters import ParamMapping

Run = tuple[int, int, int]  # first row there, first row here, how many


def hf_rows(row: ParamMapping, config: ModelConfig, dialect: Dialect) -> list[list[int]]:
    """For each Hugging Face tensor of `row`: which row of the full Megatron tensor each of its rows is."""
    rows, *_ = row.megatron_shape(config)
    ctx = Context.of(config, dialect)
    units = row.op.units(rows, config)
    fused = torch.arange(rows).unsqueeze(1)
    pieces = [fused[first:last] for first, last in row.op.megatron_rows(0, units, rows, ctx)]
    ranges = row.op.hf_rows(0, units, config)
    if row.op.moves_rows_only(ctx):
        return [piece[:, 0].tolist() for piece in pieces]
    found = [torch.empty(stop - start, 1, dtype=torch.int64) for start, stop in ranges]
    to_hf(row.op, pieces, found, ctx)
    return [each[:, 0].tolist() for each in found]


def runs(there: Sequence[int], here: Sequence[int]) -> Iterator[Run]:
    """Rows there[i] -> here[i], those that follow each other on both sides taken together."""
    start = 0
    for end in range(1, len(there) + 1):
        steady = end < len(there) and there[end] - there[start] == end - start == here[end] - here[start]
        if not steady:
            yield there[start], here[start], end - start
            start = end


def moved(placed: Placed, rows: Sequence[Run], height: int, name: str) -> Placed:
    """A tensor of `height` rows (some of them perhaps nowhere) that holds rows of `placed` in other places."""
    blocks: list[Block] = []
    for there, here, count in rows:
        for block, first, last in overlaps(placed.copies[0], (there, there + count)):
            width = block.columns[1] - block.columns[0]
            start = block.start + (first - block.rows[0]) * width
            blocks.append(Block(block.ref, start, (here + first - there, here + last - there), block.columns))
    return replace(placed, name=name, rows=height, copies=(tuple(blocks),))
