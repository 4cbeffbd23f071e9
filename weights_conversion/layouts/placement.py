"""Where a tensor lives: which files hold which rows and columns of it. Geometry only; nothing here opens a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from weights_conversion.mapping.ops import Range
from weights_conversion.mapping.parameters import Index, Packed

PAGE = 4096  # bytes; direct writes begin and end on one


class Decoder(Protocol):
    """Computes a tensor's values from stored ones (quantised values and their scales). Hashable, as a TensorRef is.

    Rows are those of the tensor as a matrix: all axes but the last, as one.
    """

    @property
    def pieces(self) -> tuple[TensorRef, ...]:
        """The stored tensors, as matrices."""
        ...

    def reads(self, rows: Range) -> tuple[Range, ...]:
        """Which rows of each piece rows first..last are computed from."""
        ...

    def decode(self, rows: Range, stored: Sequence[Tensor], into: Tensor) -> None:
        """Fills `into` (rows, columns), in whatever type it has, rounding once. `stored` are what `reads` named."""
        ...


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor stored contiguously in one file. `offset` is its first byte, -1 while a target has no file yet.

    `transposed`: a matrix of `shape` whose columns are stored as rows. `decoder`: the values (of `dtype` and `shape`)
    are stored nowhere, and computed when they are read; `file` is that of the first piece. `crc` is the CRC-32 that
    the file keeps of it.
    """

    file: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = -1
    transposed: bool = False
    decoder: Decoder | None = None
    crc: int | None = field(default=None, compare=False)

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        """The tensors that files hold: this one, or what it is computed from."""
        return (self,) if self.decoder is None else self.decoder.pieces

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def __hash__(self) -> int:
        """Of what tells tensors apart, whose hashes are kept by the strings: a layout looks up a million of them."""
        return hash((self.file, self.name))

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Written:
    """Bytes start..start+length of a target tensor have been written, and have this CRC-32 (0 where none is kept)."""

    ref: TensorRef
    start: int
    length: int
    crc: int


@dataclass(frozen=True, slots=True)
class Block:
    """The part of a tensor that stands in `ref` from element `start` on: `rows` x `columns` of it, contiguous.

    `transposed`: its columns stand there one behind the other. Such a block is read, and written, whole.
    """

    ref: TensorRef
    start: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    transposed: bool = False

    def byte(self, row: int) -> int:
        """Byte within `ref` at which this block's part of tensor row `row` begins."""
        width = self.columns[1] - self.columns[0]
        return (self.start + (row - self.rows[0]) * width) * self.ref.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Placed:
    """A full tensor and its blocks. Every copy holds the whole tensor (replicated parameters have several).

    `rows` x `columns` is its shape; a vector has one column. `deltas` are added to what is stored (adapters).
    """

    name: str
    dtype: torch.dtype
    rows: int
    columns: int
    copies: tuple[tuple[Block, ...], ...]
    deltas: tuple[Delta, ...] = ()

    @property
    def row_bytes(self) -> int:
        return self.columns * self.dtype.itemsize

    @property
    def read_bytes(self) -> int:
        """Memory that a row takes while it is read: its own, and that of what it is computed from."""
        ref = self.copies[0][0].ref if self.copies[0] else None
        if ref is None or ref.decoder is None:
            return self.row_bytes
        pieces = sum(piece.nbytes for piece in ref.decoder.pieces)
        return self.row_bytes + -(-self.row_bytes * pieces // max(ref.nbytes, 1))


Key = tuple[str, Index]  # Instance.key
# Where a parameter's source tensors are: several where HF keeps apart what Megatron fuses.
Located = dict[Key, tuple[Placed, ...]]


def with_factors(placed: Placed) -> Iterator[Placed]:
    """A tensor, and the factors of what is added to it."""
    yield placed
    for delta in placed.deltas:
        yield from (delta.below, delta.above)


@dataclass(frozen=True, slots=True)
class Delta:
    """`scale` x `above` @ `below`, in float32: what an adapter of low rank r adds to a tensor.

    `below` is (r, columns); `above` is (rows, r), and its blocks may hold some of the rows only, the others stay.
    """

    below: Placed
    above: Placed
    scale: float


def overlaps(copy: Sequence[Block], rows: tuple[int, int]) -> Iterator[tuple[Block, int, int]]:
    """The blocks that hold some of the tensor's `rows`, each with the first of those that it holds and their end."""
    for block in copy:
        start, stop = max(rows[0], block.rows[0]), min(rows[1], block.rows[1])
        if start < stop:
            yield block, start, stop


def main_dtype(tensors: Sequence[Placed]) -> torch.dtype:
    """The type that most of the bytes have."""
    sizes: dict[torch.dtype, int] = {}
    for placed in tensors:
        sizes[placed.dtype] = sizes.get(placed.dtype, 0) + placed.rows * placed.row_bytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def two_dimensional(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns): all axes behind the first together, as those of a convolution; of a scalar 1 and 1."""
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


def whole(ref: TensorRef) -> Placed:
    """A tensor that one file holds whole."""
    rows, columns = two_dimensional(ref.shape)
    return Placed(ref.name, ref.dtype, rows, columns, ((Block(ref, 0, (0, rows), (0, columns)),),))


def slab(ref: TensorRef, expert: int, packed: Packed, shape: tuple[int, ...]) -> Placed:
    """One expert's matrix of `shape` in a tensor of all experts of a layer, where it lies in one piece."""
    rows, columns = two_dimensional(shape)
    start = (expert * packed.parts + packed.part) * rows * columns
    block = Block(ref, start, (0, rows), (0, columns), packed.transposed)
    return Placed(f"{ref.name}[{expert}]", ref.dtype, rows, columns, ((block,),))


def joined(name: str, parts: Sequence[TensorRef], dim: int | None) -> Placed:
    """A tensor whose `parts` were cut along `dim` (Meta's consolidated files); None: each part is a whole copy."""
    if dim is None:
        copies = tuple(whole(part).copies[0] for part in parts)
        rows, columns = two_dimensional(parts[0].shape)
        return Placed(name, parts[0].dtype, rows, columns, copies)
    blocks, row, column = [], 0, 0
    rows = columns = 0
    for part in parts:
        height, width = two_dimensional(part.shape)
        blocks.append(Block(part, 0, (row, row + height), (column, column + width)))
        rows, columns = row + height, column + width
        if dim == 0:
            row = rows
        else:
            column = columns
    return Placed(name, parts[0].dtype, rows, columns, (tuple(blocks),))
