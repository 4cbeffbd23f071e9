"""Where a tensor lives: which files hold which rows and columns of it. Geometry only; nothing here opens a file."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import torch

from weights_conversion.config import ModelConfig, Parallelism
from weights_conversion.mapping.dialects import MEGATRON_CORE, Dialect
from weights_conversion.mapping.parameters import ParamMapping, Shard

PAGE = 4096  # bytes; direct writes begin and end on one
ITEM_BYTES = 256 << 20  # of a torch_dist checkpoint: its readers take an item into memory whole


@dataclass(frozen=True)
class TensorRef:
    """A tensor stored contiguously in one file. `offset` is its first byte, -1 while a target has no file yet."""

    file: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = -1

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Written:
    """Bytes start..start+length of a target tensor have been written, and have this CRC-32 (0 where none is kept)."""

    ref: TensorRef
    start: int
    length: int
    crc: int


@dataclass(frozen=True)
class Block:
    """The part of a tensor that stands in `ref` from element `start` on: `rows` x `columns` of it, contiguous."""

    ref: TensorRef
    start: int
    rows: tuple[int, int]
    columns: tuple[int, int]

    def byte(self, row: int) -> int:
        """Byte within `ref` at which this block's part of tensor row `row` begins."""
        width = self.columns[1] - self.columns[0]
        return (self.start + (row - self.rows[0]) * width) * self.ref.dtype.itemsize


@dataclass(frozen=True)
class Placed:
    """A full tensor and its blocks. Every copy holds the whole tensor (replicated parameters have several).

    `rows` x `columns` is its shape; a vector has one column.
    """

    name: str
    dtype: torch.dtype
    rows: int
    columns: int
    copies: tuple[tuple[Block, ...], ...]

    @property
    def row_bytes(self) -> int:
        return self.columns * self.dtype.itemsize


# (ParamMapping.megatron, layer) -> where its source tensors are: several where HF keeps apart what Megatron fuses.
Located = dict[tuple[str, int | None], tuple[Placed, ...]]


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
    """(rows, columns); buffers, which nobody reads, may have any other rank."""
    return (shape[0], shape[1]) if len(shape) == 2 else (prod(shape), 1)


def whole(ref: TensorRef) -> Placed:
    """A tensor that one file holds whole."""
    rows, columns = two_dimensional(ref.shape)
    return Placed(ref.name, ref.dtype, rows, columns, ((Block(ref, 0, (0, rows), (0, columns)),),))


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


@dataclass(frozen=True)
class Location:
    """Which pipeline stage holds a layer, in which of its chunks, and under which local number."""

    stage: int
    chunk: int
    layer: int


def layer_location(layer: int, num_layers: int, parallel: Parallelism) -> Location:
    """Chunk v of stage p holds the layers from v*(L/VPP) + p*(L/(PP*VPP)) on, if the stages are of one length."""
    if parallel.layers:
        ends = list(accumulate(parallel.layers))
        turn = bisect_right(ends, layer)
        return Location(turn % parallel.pipeline, turn // parallel.pipeline, layer - ends[turn] + parallel.layers[turn])
    per_chunk = num_layers // (parallel.pipeline * parallel.virtual)
    turn = layer // per_chunk
    return Location(turn % parallel.pipeline, turn // parallel.pipeline, layer % per_chunk)


def rank_folder(tp: int, pp: int, parallel: Parallelism) -> str:
    return f"mp_rank_{tp:02d}" if parallel.pipeline == 1 else f"mp_rank_{tp:02d}_{pp:03d}"


def chunk_key(chunk: int, parallel: Parallelism) -> str:
    return f"model{chunk}" if parallel.virtual > 1 else "model"


def rank_shape(shape: Sequence[int], shard: Shard | None, tp: int) -> tuple[int, ...]:
    """Shape of one rank's part of a full tensor."""
    if shard is None:
        return tuple(shape)
    return tuple(size // tp if dim == shard.dim else size for dim, size in enumerate(shape))


def rank_blocks(ref: TensorRef, shape: Sequence[int], shard: Shard | None, rank: int, tp: int) -> Iterator[Block]:
    """The blocks of a full tensor of `shape` that `ref` holds as rank `rank` of `tp`."""
    rows, columns = two_dimensional(shape)
    if shard is None:
        yield Block(ref, 0, (0, rows), (0, columns))
    elif shard.dim == 1:
        width = columns // tp
        yield Block(ref, 0, (0, rows), (rank * width, (rank + 1) * width))
    else:
        block, part = rows // shard.blocks, rows // shard.blocks // tp
        for index in range(shard.blocks):
            first = index * block + rank * part
            yield Block(ref, index * part * columns, (first, first + part), (0, columns))


# (tensor rank, pipeline stage, name in the file, shape of the rank's part) -> where it is stored
Find = Callable[[int, int, str, tuple[int, ...]], TensorRef]


def place_megatron(
    row: ParamMapping, layer: int | None, shape: Sequence[int], config: ModelConfig, parallel: Parallelism,
    dialect: Dialect, find: Find,
) -> Placed:  # fmt: skip
    """A full Megatron tensor of `shape` (vocabulary padding included) on the ranks of a checkpoint."""
    last_chunk = chunk_key(parallel.virtual - 1, parallel)
    places = []  # (stage, name in the file)
    if layer is not None:
        location = layer_location(layer, config.num_layers, parallel)
        for spelling in dialect.spellings(row.megatron):
            name = dialect.rank_name(spelling.format(location.layer))
            places.append((location.stage, f"{chunk_key(location.chunk, parallel)}.{name}"))
    elif row.megatron.startswith("embedding."):
        places.append((0, f"{chunk_key(0, parallel)}.{dialect.rank_name(dialect.spell(row.megatron))}"))
        if config.tie_word_embeddings and parallel.pipeline > 1:
            places.append((parallel.pipeline - 1, f"{last_chunk}.{dialect.tied_head}"))
    else:
        places.append((parallel.pipeline - 1, f"{last_chunk}.{dialect.rank_name(dialect.spell(row.megatron))}"))

    part = rank_shape(shape, row.shard, parallel.tensor)
    copies: list[tuple[Block, ...]] = []
    for stage, name in places:
        refs = [find(tp, stage, name, part) for tp in range(parallel.tensor)]
        cut = [tuple(rank_blocks(ref, shape, row.shard, tp, parallel.tensor)) for tp, ref in enumerate(refs)]
        copies += cut if row.shard is None else [tuple(block for blocks in cut for block in blocks)]
    full = row.megatron if layer is None else row.megatron.format(layer)
    rows, columns = two_dimensional(shape)
    return Placed(full, copies[0][0].ref.dtype, rows, columns, tuple(copies))


def place_dist(row: ParamMapping, layer: int | None, shape: Sequence[int], dtype: torch.dtype) -> Placed:
    """A parameter of a torch_dist checkpoint: items of at most ITEM_BYTES, gate and up apart, as Megatron-Core has it.

    The refs are named KEY@OFFSETS, where KEY is the stacked tensor and OFFSETS begin with the layer.
    """
    rows, columns = two_dimensional(shape)
    name = MEGATRON_CORE.spell(row.megatron)
    key = name if layer is None else name.replace("layers.{}.", "layers.")
    parts = row.shard.blocks if row.shard else 1
    step = max(min(ITEM_BYTES // (columns * dtype.itemsize), rows // parts), 1)
    blocks = []
    for part in range(parts):
        begin, end = part * rows // parts, (part + 1) * rows // parts
        for first in range(begin, end, step):
            last = min(first + step, end)
            stored = (last - first, *shape[1:])
            local, where = (stored, (first,)) if layer is None else ((1, *stored), (layer, first))
            ref = TensorRef("", f"{key}@{','.join(map(str, where))}", dtype, local)
            blocks.append(Block(ref, 0, (first, last), (0, columns)))
    full = row.megatron if layer is None else row.megatron.format(layer)
    return Placed(full, dtype, rows, columns, (tuple(blocks),))
