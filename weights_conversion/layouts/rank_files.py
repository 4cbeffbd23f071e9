"""Rank files: which rank holds which part of a tensor, and under which name. Geometry only."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import lcm
from typing import NamedTuple

from weights_conversion.config import ModelConfig, Parallelism
from weights_conversion.layouts import parts
from weights_conversion.layouts.placement import Block, Placed, TensorRef, two_dimensional
from weights_conversion.mapping.dialects import Dialect
from weights_conversion.mapping.hybrid import final_norm, sub_block
from weights_conversion.mapping.parameters import Instance, Role, Shard


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


@lru_cache(maxsize=8)
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


_Part = tuple[int, tuple[int, int], tuple[int, int]]  # first element in what the rank stores, rows, columns


@lru_cache(maxsize=4096)  # for each row and rank: there are a million blocks of them
def _parts_of(shape: tuple[int, ...], shard: Shard | None, rank: int, tp: int) -> tuple[_Part, ...]:
    """The parts of a full tensor of `shape` that a rank holds."""
    rows, columns = two_dimensional(shape)
    if shard is None:
        return ((0, (0, rows), (0, columns)),)
    if shard.dim == 1:
        width = columns // tp
        return ((0, (0, rows), (rank * width, (rank + 1) * width)),)
    block, part = rows // shard.blocks, rows // shard.blocks // tp
    firsts = [index * block + rank * part for index in range(shard.blocks)]
    return tuple((at * part * columns, (first, first + part), (0, columns)) for at, first in enumerate(firsts))


# (rank, name in its file, shape of the rank's part) -> where it is stored
Find = Callable[[Rank, str, tuple[int, ...]], TensorRef]


def place_megatron(
    instance: Instance, shape: Sequence[int], config: ModelConfig, parallel: Parallelism, dialect: Dialect, find: Find
) -> Placed:
    """A full Megatron tensor of `shape` (vocabulary padding included) on the ranks of a checkpoint."""
    row = instance.row
    cut = parallel.experts_tensor if row.per_expert else parallel.tensor
    stored = full_shape = tuple(shape)
    begin = 0
    if row.live is not None:  # each rank holds its share of every part, one behind the other
        stored, begin = parts.joined_shape(row.live, shape, config), parts.before(row.live, config) // cut
    part = rank_shape(stored, row.shard, cut)
    copies: list[tuple[Block, ...]] = []
    home = None if instance.expert is None else instance.expert // (_experts(config) // parallel.expert)
    holders = _holders(home, parallel)
    for stage, name in _places(instance, config, parallel, dialect):
        held: list[list[tuple[Block, ...]]] = []
        for number, ranks in enumerate(holders):
            where = _from_row(begin, _parts_of(full_shape, row.shard, number, cut))
            refs = [find(Rank(tp, stage, ep), name, part) for tp, ep in ranks]
            held.append([tuple([Block(ref, *each) for each in where]) for ref in refs])
        if row.shard is None:
            copies += [blocks for ranks in held for blocks in ranks]
        else:  # every part has as many holders
            copies += [tuple(block for blocks in parts for block in blocks) for parts in zip(*held, strict=True)]
    rows, columns = two_dimensional(shape)
    full = instance.megatron(dialect.spell(row.megatron))
    return Placed(full, copies[0][0].ref.dtype, rows, columns, tuple(copies))


def _from_row(first: int, where: tuple[_Part, ...]) -> tuple[_Part, ...]:
    """Parts of a tensor that begins at row `first` of the stored one."""
    if not first:
        return where
    return tuple((at + first * (columns[1] - columns[0]), rows, columns) for at, rows, columns in where)


def _places(
    instance: Instance, config: ModelConfig, parallel: Parallelism, dialect: Dialect
) -> Iterator[tuple[int, str]]:
    """(pipeline stage, name in its files) of every copy of a parameter."""
    row, last = instance.row, chunk_key(parallel.virtual - 1, parallel)
    stored = row.megatron if row.live is None else row.live.name
    if instance.predicts:
        index = instance.index if instance.expert is None else (instance.index[0], _local(instance, config, parallel))
        name = dialect.rank_name(instance.megatron(dialect.live(stored), index))
        yield parallel.pipeline - 1, f"{last}.{name}"
        return
    if instance.layer is not None:
        location = layer_location(*_counted(instance, config, parallel), parallel)
        index = (location.layer, *instance.index[1:])
        if instance.expert is not None:
            index = (location.layer, _local(instance, config, parallel))
        for spelling in dialect.spellings(stored):
            name = dialect.rank_name(instance.megatron(spelling, index))
            yield location.stage, f"{chunk_key(location.chunk, parallel)}.{name}"
        return
    name = dialect.rank_name(dialect.spell(final_norm(row.megatron) if parallel.hybrid else row.megatron))
    if row.role is not Role.EMBEDDING:
        yield parallel.pipeline - 1, f"{last}.{name}"
        return
    yield 0, f"{chunk_key(0, parallel)}.{name}"
    if config.tie_word_embeddings and parallel.pipeline > 1:
        yield parallel.pipeline - 1, f"{last}.{dialect.tied_head}"
    if config.mtp_num_layers and parallel.pipeline > 1:  # the stage that predicts embeds too
        yield parallel.pipeline - 1, f"{last}.{name}"


def _counted(instance: Instance, config: ModelConfig, parallel: Parallelism) -> tuple[int, int]:
    """(the number of an instance's layer, how many layers there are), as Megatron counts them."""
    layer = instance.layer or 0
    if not parallel.hybrid:
        return layer, config.num_layers
    return 2 * layer + sub_block(instance.row.megatron), 2 * config.num_layers


def _local(instance: Instance, config: ModelConfig, parallel: Parallelism) -> int:
    """The number of an expert on the rank that it is dealt to."""
    return (instance.expert or 0) % (_experts(config) // parallel.expert)


def _experts(config: ModelConfig) -> int:
    return config.moe.num_experts if config.moe is not None else 1


@lru_cache(maxsize=1024)  # for each expert rank: there are far fewer than parameters
def _holders(home: int | None, parallel: Parallelism) -> list[list[tuple[int, int]]]:
    """For each part that a parameter is cut into: the (tensor, expert) coordinates of the ranks that hold it.

    `home` is the expert rank of an expert's; None: it is none.
    """
    ranks = stage_ranks(parallel)
    if home is None:
        return [[rank for rank in ranks if rank[0] == tp] for tp in range(parallel.tensor)]
    etp = parallel.experts_tensor
    return [[(tp, ep) for tp, ep in ranks if ep == home and tp % etp == number] for number in range(etp)]
