"""Where a tensor lives: which files hold which rows and columns of it. Geometry only; nothing here opens a file."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import lcm, prod
from typing import NamedTuple

import torch

from weights_conversion.config import ModelConfig, Parallelism
from weights_conversion.mapping.dialects import MEGATRON_CORE, Dialect
from weights_conversion.mapping.parameters import Index, Instance, Packed, Role, Shard

PAGE = 4096  # bytes; direct writes begin and end on one
ITEM_BYTES = 256 << 20  # of a torch_dist checkpoint: its readers take an item into memory whole


@dataclass(frozen=True)
class TensorRef:
    """A tensor stored contiguously in one file. `offset` is its first byte, -1 while a target has no file yet.

    `transposed`: a matrix of `shape` whose columns are stored as rows.
    """

    file: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = -1
    transposed: bool = False

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


Key = tuple[str, Index]  # Instance.key
# Where a parameter's source tensors are: several where HF keeps apart what Megatron fuses.
Located = dict[Key, tuple[Placed, ...]]


def with_factors(placed: Placed) -> Iterator[Placed]:
    """A tensor, and the factors of what is added to it."""
    yield placed
    for delta in placed.deltas:
        yield from (delta.below, delta.above)


@dataclass(frozen=True)
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
    """(rows, columns); buffers, which nobody reads, may have any other rank."""
    return (shape[0], shape[1]) if len(shape) == 2 else (prod(shape), 1)


def whole(ref: TensorRef) -> Placed:
    """A tensor that one file holds whole."""
    rows, columns = two_dimensional(ref.shape)
    return Placed(ref.name, ref.dtype, rows, columns, ((Block(ref, 0, (0, rows), (0, columns)),),))


def slab(ref: TensorRef, expert: int, packed: Packed, shape: tuple[int, ...]) -> Placed:
    """One expert's matrix of `shape` in a tensor of all experts of a layer, where it lies in one piece."""
    rows, columns = shape
    start = (expert * packed.parts + packed.part) * rows * columns
    block = Block(ref, start, (0, rows), (0, columns))
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


class Rank(NamedTuple):
    """Where a rank file's process stands: its tensor, pipeline and expert coordinate."""

    tensor: int
    pipeline: int
    expert: int = 0


def stage_ranks(parallel: Parallelism) -> tuple[tuple[int, int], ...]:
    """(tensor, expert) coordinates of one stage's rank files, in the order of the processes that write them.

    Process r of a stage is tensor rank r % TP; of the experts it is rank r % ETP of expert rank (r / ETP) % EP.
    Processes beyond the first such round hold copies (parallel_state.py of Megatron-Core).
    """
    etp = parallel.experts_tensor
    processes = range(lcm(parallel.tensor, etp * parallel.expert))
    return tuple(dict.fromkeys((r % parallel.tensor, r // etp % parallel.expert) for r in processes))


def rank_folder(rank: Rank, parallel: Parallelism) -> str:
    stage = f"_{rank.pipeline:03d}" if parallel.pipeline > 1 else ""
    expert = f"_{rank.expert:03d}" if parallel.expert > 1 else ""
    return f"mp_rank_{rank.tensor:02d}{stage}{expert}"


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


# (rank, name in its file, shape of the rank's part) -> where it is stored
Find = Callable[[Rank, str, tuple[int, ...]], TensorRef]


def place_megatron(
    instance: Instance, shape: Sequence[int], config: ModelConfig, parallel: Parallelism, dialect: Dialect, find: Find
) -> Placed:
    """A full Megatron tensor of `shape` (vocabulary padding included) on the ranks of a checkpoint."""
    row = instance.row
    cut = parallel.experts_tensor if row.per_expert else parallel.tensor
    part = rank_shape(shape, row.shard, cut)
    copies: list[tuple[Block, ...]] = []
    for stage, name in _places(instance, config, parallel, dialect):
        held: list[list[tuple[Block, ...]]] = []
        for number, ranks in enumerate(_holders(instance, config, parallel)):
            refs = [find(Rank(tp, stage, ep), name, part) for tp, ep in ranks]
            held.append([tuple(rank_blocks(ref, shape, row.shard, number, cut)) for ref in refs])
        if row.shard is None:
            copies += [blocks for ranks in held for blocks in ranks]
        else:  # every part has as many holders
            copies += [tuple(block for blocks in parts for block in blocks) for parts in zip(*held, strict=True)]
    rows, columns = two_dimensional(shape)
    full = instance.megatron(dialect.spell(row.megatron))
    return Placed(full, copies[0][0].ref.dtype, rows, columns, tuple(copies))


def _places(
    instance: Instance, config: ModelConfig, parallel: Parallelism, dialect: Dialect
) -> Iterator[tuple[int, str]]:
    """(pipeline stage, name in its files) of every copy of a parameter."""
    row, last = instance.row, chunk_key(parallel.virtual - 1, parallel)
    if instance.layer is not None:
        location = layer_location(instance.layer, config.num_layers, parallel)
        index = (location.layer, *instance.index[1:])
        if instance.expert is not None and config.moe is not None:
            index = (location.layer, instance.expert % (config.moe.num_experts // parallel.expert))
        for spelling in dialect.spellings(row.megatron):
            name = dialect.rank_name(instance.megatron(spelling, index))
            yield location.stage, f"{chunk_key(location.chunk, parallel)}.{name}"
        return
    name = dialect.rank_name(dialect.spell(row.megatron))
    if row.role is not Role.EMBEDDING:
        yield parallel.pipeline - 1, f"{last}.{name}"
        return
    yield 0, f"{chunk_key(0, parallel)}.{name}"
    if config.tie_word_embeddings and parallel.pipeline > 1:
        yield parallel.pipeline - 1, f"{last}.{dialect.tied_head}"


def _holders(instance: Instance, config: ModelConfig, parallel: Parallelism) -> list[list[tuple[int, int]]]:
    """For each part that a parameter is cut into: the (tensor, expert) coordinates of the ranks that hold it."""
    ranks = stage_ranks(parallel)
    if instance.expert is None or config.moe is None:
        return [[rank for rank in ranks if rank[0] == tp] for tp in range(parallel.tensor)]
    home = instance.expert // (config.moe.num_experts // parallel.expert)
    etp = parallel.experts_tensor
    return [[(tp, ep) for tp, ep in ranks if ep == home and tp % etp == number] for number in range(etp)]


def dist_key(instance: Instance, spelled: str, *, stacked: bool) -> tuple[str, Index]:
    """(the key of a parameter in a torch_dist checkpoint, its indices that are leading axes of that tensor).

    Experts always are a leading axis, under a name of their own; layers are where `stacked` says so.
    """
    name = spelled
    if instance.row.per_expert:
        name = name.replace(".mlp.experts.", ".mlp.experts.experts.").replace("{expert}", "")
    if instance.layer is None:
        return name, ()
    if stacked:
        return name.replace("layers.{layer}.", "layers."), instance.index
    return name.replace("{layer}", str(instance.layer)), instance.index[1:]


def place_dist(instance: Instance, shape: Sequence[int], dtype: torch.dtype, *, stacked: bool = True) -> Placed:
    """A parameter of a torch_dist checkpoint: items of at most ITEM_BYTES, gate and up apart, as Megatron-Core has it.

    The refs are named KEY@OFFSETS, where OFFSETS begin with the indices that are leading axes of the tensor KEY.
    """
    rows, columns = two_dimensional(shape)
    spellings = MEGATRON_CORE.dist_spellings(instance.row.megatron)
    copies = [_dist_blocks(instance, spelled, shape, dtype, stacked) for spelled in spellings]
    return Placed(instance.megatron(), dtype, rows, columns, tuple(copies))


def _dist_blocks(
    instance: Instance, spelled: str, shape: Sequence[int], dtype: torch.dtype, stacked: bool
) -> tuple[Block, ...]:
    rows, columns = two_dimensional(shape)
    key, lead = dist_key(instance, spelled, stacked=stacked)
    shard = instance.row.shard
    parts = shard.blocks if shard else 1
    step = max(min(ITEM_BYTES // (columns * dtype.itemsize), rows // parts), 1)
    blocks = []
    for part in range(parts):
        begin, end = part * rows // parts, (part + 1) * rows // parts
        for first in range(begin, end, step):
            last = min(first + step, end)
            local = (*(1 for _ in lead), last - first, *shape[1:])
            ref = TensorRef("", f"{key}@{','.join(map(str, (*lead, first)))}", dtype, local)
            blocks.append(Block(ref, 0, (first, last), (0, columns)))
    return tuple(blocks)
