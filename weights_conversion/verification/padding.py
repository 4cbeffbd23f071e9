"""Rows of a Megatron vocabulary beyond the compared ones: added tokens and padding, which a conversion invents."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from weights_conversion.engine.execute import read_rows
from weights_conversion.engine.streams import Scratch, Source
from weights_conversion.layouts.placement import Placed
from weights_conversion.verification.exact import Pair
from weights_conversion.verification.sides import Model

BLOCK_ROWS = 512


def check_padding(pair: Pair, model: Model) -> tuple[list[str], list[str]]:
    """(what is wrong with the rows that `model` has beyond the common ones, what they are)."""
    problems, notes = [], []
    files, scratch = Source(), Scratch()
    try:
        for instance in pair.parameters:
            if not (model.dialect.megatron and instance.row.pads_vocabulary and instance.key in model.placed):
                continue
            (placed,) = model.placed[instance.key]
            common = pair.config.vocab_size
            if placed.rows == common:
                continue
            bad, kind = _check(placed, common, files, scratch)
            span = f"{placed.name} rows {common} to {placed.rows - 1}"
            if not bad:
                notes.append(f"{span} (added or padding) repeat {kind}")
                continue
            file = next((b.ref.file for b in placed.copies[0] if b.rows[0] <= bad[0] < b.rows[1]), "")
            problems.append(
                f"{span} (added or padding) should repeat the last or the mean row, but {len(bad)} do not, the first "
                f"being row {bad[0]} in {model.file_name(file)}"
            )
    finally:
        files.close()
    return problems, notes


def _check(placed: Placed, common: int, files: Source, scratch: Scratch) -> tuple[list[int], str]:
    """Rows behind `common` that are wrong, and what the others repeat."""
    last = read_rows(placed, (common - 1, common), files, scratch).clone()
    wrong = _not(placed, common, files, scratch, lambda rows: (rows == last).all(1))
    if not wrong:
        return [], "the last row"
    total = torch.zeros(placed.columns, dtype=torch.float64)
    square = 0.0
    for start in range(0, common, BLOCK_ROWS):
        scratch.reset()
        rows = read_rows(placed, (start, min(start + BLOCK_ROWS, common)), files, scratch).to(torch.float64)
        total += rows.sum(0)
        square += float(rows.square().sum())
    mean, spread = total / common, (square / common / placed.columns) ** 0.5
    # The mean may have been taken before a rounding to this dtype, or over fewer rows (tokens added before).
    bound = torch.finfo(placed.dtype).eps * (mean.abs() + spread / common**0.5)
    wrong_mean = _not(placed, common, files, scratch, lambda rows: ((rows.double() - mean).abs() <= bound).all(1))
    return (wrong_mean, "the mean row") if len(wrong_mean) < len(wrong) else (wrong, "the last row")


def _not(placed: Placed, common: int, files: Source, scratch: Scratch, good: Callable[[Tensor], Tensor]) -> list[int]:
    wrong: list[int] = []
    for start in range(common, placed.rows, BLOCK_ROWS):
        scratch.reset()
        rows: Tensor = read_rows(placed, (start, min(start + BLOCK_ROWS, placed.rows)), files, scratch)
        wrong += [start + int(number) for number in (~good(rows)).nonzero()[:, 0]]
    return wrong
