"""Rows of the vocabulary: those of a source, and those that a layout of it is written with."""

from __future__ import annotations

from dataclasses import dataclass, replace

from weights_conversion.errors import ConversionError

DIVISIBLE_BY = 128  # Megatron's own default


@dataclass(frozen=True)
class Vocabulary:
    """Rows of an embedding, tokens first. Where nothing says how many they are, `known` is False and all rows count.

    `stored` are the source's rows, padding included; `written` those of an output (0: not decided yet).
    """

    tokens: int
    stored: int
    known: bool = True
    written: int = 0


def padded_vocabulary(rows: int, divisible_by: int, tp: int) -> int:
    """Rows rounded up to a multiple of `divisible_by` x TP, as Megatron pads them."""
    multiple = divisible_by * tp
    return -(-rows // multiple) * multiple


def to_write(source: Vocabulary, tokens: int | None, divisible_by: int | None, tp: int, pads: bool) -> Vocabulary:
    """`source` with the rows to write: padded where TP, `divisible_by` or stated `tokens` ask for it.

    `pads`: the output has padding wherever the source has it. Raises ConversionError where tokens would be cut off.
    """
    if tokens is not None and tokens < source.tokens:
        raise ConversionError(
            f"--true-vocab-size {tokens} is less than the {source.tokens} rows of the source, which would be cut off"
        )
    asked = divisible_by is not None or tokens is not None or (pads and source.stored != source.tokens)
    true = source.tokens if tokens is None else tokens
    rows = padded_vocabulary(true, divisible_by or DIVISIBLE_BY, tp) if tp > 1 or asked else true
    return replace(source, tokens=true, known=source.known or tokens is not None, written=rows)
