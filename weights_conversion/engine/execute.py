"""Executes a plan: positioned reads into reused buffers, one strided copy at most, positioned writes.

Reads, copies, checksums and writes all release the GIL, so a few threads keep the filesystem busy. Memory is the
threads' buffers, whatever the size of the model.
"""

from __future__ import annotations

import itertools
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import torch
from torch import Tensor

from weights_conversion.engine.crew import Crew
from weights_conversion.engine.recentring import recentred
from weights_conversion.engine.streams import Scratch, Sink, Source, bytes_of
from weights_conversion.engine.sums import RunningSums, Taped
from weights_conversion.errors import ConversionError
from weights_conversion.layouts.placement import Block, Decoder, Placed, Written, overlaps
from weights_conversion.layouts.plan import Chunk, Plan, Step
from weights_conversion.mapping.dialects import HF
from weights_conversion.mapping.ops import Context, Op, Range, to_hf, to_megatron


def read_rows(placed: Placed, rows: Range, source: Source, scratch: Scratch, copy: int = 0) -> Tensor:
    """Rows of a placed tensor, (rows, columns), gathered from its blocks."""
    first, last = rows
    full = scratch.take((last - first, placed.columns), placed.dtype)
    for block, start, stop in overlaps(placed.copies[copy], rows):
        part = full[start - first : stop - first, block.columns[0] : block.columns[1]]
        if block.ref.decoder is not None:
            _decoded(block, block.ref.decoder, (start, stop), part, source, scratch)
        elif block.transposed or block.ref.transposed:
            part.copy_(_turned(block, (start, stop), source, scratch))
        elif part.is_contiguous() and block.ref.dtype == placed.dtype:
            source.read(block.ref, block.byte(start), part)
        else:
            stored = scratch.take(part.shape, block.ref.dtype)
            source.read(block.ref, block.byte(start), stored)
            part.copy_(stored)
    return _adapted(placed, rows, full, source, scratch) if placed.deltas else full


def _adapted(placed: Placed, rows: Range, stored: Tensor, source: Source, scratch: Scratch) -> Tensor:
    """`stored` rows of a tensor and what adapters add to them, in float32; whoever writes it rounds it, once."""
    first, _ = rows
    full = scratch.take(stored.shape, torch.float32).copy_(stored)
    for delta in placed.deltas:
        below = read_rows(delta.below, (0, delta.below.rows), source, scratch).to(torch.float32)
        for _, start, stop in overlaps(delta.above.copies[0], rows):
            above = read_rows(delta.above, (start, stop), source, scratch).to(torch.float32)
            added = scratch.take((stop - start, placed.columns), torch.float32)
            torch.mm(above, below, out=added)
            full[start - first : stop - first].add_(added.mul_(delta.scale))
    return full


def _decoded(block: Block, decoder: Decoder, rows: Range, into: Tensor, source: Source, scratch: Scratch) -> None:
    """Rows of a block whose values are computed from stored ones."""
    wanted = _rows_of_ref(block, rows)
    stored = []
    for piece, (first, last) in zip(decoder.pieces, decoder.reads(wanted), strict=True):
        width = piece.shape[1]
        part = scratch.take((last - first, width), piece.dtype)
        source.read(piece, first * width * piece.dtype.itemsize, part)
        stored.append(part)
    decoder.decode(wanted, stored, into)


def _rows_of_ref(block: Block, rows: Range) -> Range:
    """Which rows of its whole tensor (as a matrix) some rows of a block are."""
    above = block.start // block.ref.shape[-1] - block.rows[0]
    return rows[0] + above, rows[1] + above


def _turned(block: Block, rows: Range, source: Source, scratch: Scratch) -> Tensor:
    """Rows of a block whose tensor is stored columns first; it is read whole, as experts are small."""
    if block.transposed:
        height, width = block.rows[1] - block.rows[0], block.columns[1] - block.columns[0]
        begin, above = block.byte(block.rows[0]), -block.rows[0]
    else:
        height, width = block.ref.shape
        begin, above = 0, block.start // width - block.rows[0]
    stored = scratch.take((width, height), block.ref.dtype)
    source.read(block.ref, begin, stored)
    return stored.t()[rows[0] + above : rows[1] + above]


def read_source(plan: Plan, step: Step, start: int, stop: int, source: Source, scratch: Scratch) -> list[Tensor]:
    """The source tensors of units start..stop: one per HF tensor, or one per row range of the Megatron tensor."""
    pieces = plan.source_pieces(step, start, stop)
    tensors = [read_rows(placed, rows, source, scratch) for placed, rows in pieces]
    if any(placed.deltas for placed, _ in pieces):  # those beside an adapted one are fused with it
        return [scratch.take(tensor.shape, torch.float32).copy_(tensor) for tensor in tensors]
    return tensors


def prefetch_chunk(plan: Plan, chunk: Chunk, source: Source) -> None:
    """Begin reading a chunk's source while others are being written: on a cold cache reads and writes then overlap."""
    if chunk.adds:
        return
    for placed, rows in plan.source_pieces(plan.steps[chunk.step], chunk.start, chunk.stop):
        for block, start, stop in overlaps(placed.copies[0], rows):
            if (decoder := block.ref.decoder) is not None:
                reads = decoder.reads(_rows_of_ref(block, (start, stop)))
                for piece, (first, last) in zip(decoder.pieces, reads, strict=True):
                    width = piece.shape[1] * piece.dtype.itemsize
                    source.prefetch(piece, first * width, (last - first) * width)
                continue
            source.prefetch(block.ref, block.byte(start), block.byte(stop) - block.byte(start))


def as_hf(op: Op, units: int, tensors: list[Tensor], ctx: Context, scratch: Scratch) -> list[Tensor]:
    """Megatron's tensors of `units` units as HF's, in the same dtype."""
    if op.moves_rows_only(ctx):
        return tensors
    ranges = op.hf_rows(0, units, ctx.config)
    result = [scratch.take((stop - start, tensors[0].shape[1]), tensors[0].dtype) for start, stop in ranges]
    to_hf(op, tensors, result, ctx)
    return result


def as_megatron(op: Op, tensors: list[Tensor], ctx: Context, scratch: Scratch) -> list[Tensor]:
    """HF's tensors of some units as Megatron's, in the same dtype."""
    if op.moves_rows_only(ctx):
        return tensors
    fused = scratch.take((sum(tensor.shape[0] for tensor in tensors), tensors[0].shape[1]), tensors[0].dtype)
    to_megatron(op, [fused], tensors, ctx)
    return [fused]


def transform(plan: Plan, op: Op, units: int, tensors: list[Tensor], scratch: Scratch) -> list[Tensor]:
    """Source tensors of `units` units, as the target wants them (its dtype is applied when they are written)."""
    hf = HF if plan.source.megatron else plan.source
    if plan.source.megatron and plan.target.megatron and plan.source.interleaved == plan.target.interleaved:
        return tensors
    if plan.source.megatron:
        tensors = as_hf(op, units, tensors, Context.of(plan.config, plan.source, hf), scratch)
    if plan.target.megatron:
        tensors = as_megatron(op, tensors, Context.of(plan.config, plan.target, hf), scratch)
    return tensors


def write_rows(
    placed: Placed, rows: Range, tensor: Tensor, target: Sink, scratch: Scratch, crc: bool
) -> Iterable[Written]:
    """Writes rows (rows, columns) to every block of every copy that holds some of them; takes their CRC-32 if asked."""
    first, _ = rows
    if tensor.dtype != placed.dtype:
        cast = scratch.take(tensor.shape, placed.dtype).copy_(tensor)
        if torch.isinf(cast).any() and not torch.equal(torch.isinf(cast), torch.isinf(tensor)):
            largest = tensor[torch.isfinite(tensor)].abs().max()
            raise ConversionError(
                f"{placed.name} has values up to {largest:g}, too large for {placed.dtype}; choose another --dtype"
            )
        tensor = cast
    for copy in placed.copies:
        for block, start, stop in overlaps(copy, rows):
            part = tensor[start - first : stop - first, block.columns[0] : block.columns[1]]
            if block.transposed:
                part = part.t()
            if not part.is_contiguous():
                part = scratch.take(part.shape, part.dtype).copy_(part)
            target.write(block.ref, block.byte(start), part)
            data = bytes_of(part)
            yield Written(block.ref, block.byte(start), len(data), zlib.crc32(data) if crc else 0)


def added_rows(plan: Plan, step: Step, count: int, source: Source, scratch: Scratch) -> Tensor:
    """`count` new vocabulary rows: copies of the last row, or the mean row."""
    (placed,) = step.source
    if plan.new_rows == "mean":
        total = torch.zeros(placed.columns, dtype=torch.float64)
        for start in range(0, step.units, 1024):
            block = read_rows(placed, (start, min(start + 1024, step.units)), source, scratch)
            total += block.to(torch.float64).sum(0)
            scratch.reset()
        row = (total / step.units).to(placed.dtype).unsqueeze(0)
    else:
        row = read_rows(placed, (step.units - 1, step.units), source, scratch)
    return scratch.take((count, placed.columns), row.dtype).copy_(row)


def convert_chunk(plan: Plan, chunk: Chunk, source: Source, target: Sink, scratch: Scratch) -> list[Written]:
    """Reads, converts and writes one chunk."""
    scratch.reset()
    step = plan.steps[chunk.step]
    written: list[Written] = []
    crc = plan.keeps_crcs
    if chunk.adds:
        rows = added_rows(plan, step, chunk.stop - chunk.start, source, scratch)
        written += write_rows(step.target[0], (chunk.start, chunk.stop), rows, target, scratch, crc)
        return written
    tensors = read_source(plan, step, chunk.start, chunk.stop, source, scratch)
    tensors = transform(plan, step.op, chunk.stop - chunk.start, tensors, scratch)
    if step.instance.row.centred and plan.source.megatron != plan.target.megatron:
        tensors = recentred(tensors, -1.0 if plan.target.megatron else 1.0, scratch)
    pieces = plan.target_pieces(step, chunk.start, chunk.stop)
    for tensor, (placed, rows) in zip(tensors, pieces, strict=True):
        written += write_rows(placed, rows, tensor, target, scratch, crc)
    return written


def execute(
    plan: Plan,
    chunks: Sequence[tuple[int, Chunk]],
    source: Source,
    target: Sink,
    workers: int,
    done: Callable[[int, Chunk, list[Written]], None],
    stop: threading.Event | None = None,
    sums: RunningSums | None = None,
) -> str:
    """Converts `chunks` (number, chunk). `done` is called as each is finished, from its thread; `stop` ends it early.

    `sums` gets what is written, in the order of `chunks`.

    Returns what is to be said of the number of threads (crew.Crew), if anything.
    """
    stop, failed = stop or threading.Event(), threading.Event()
    taken = itertools.count()
    crew = Crew(workers, sum(chunk.nbytes for _, chunk in chunks))

    def give_up() -> None:
        failed.set()
        if sums is not None:
            sums.end()

    def work(thread: int) -> None:
        scratch, tape = Scratch(), Taped(target)
        try:
            while crew.admits(thread) and not (stop.is_set() or failed.is_set()):
                index = next(taken)
                if index >= len(chunks):
                    return
                number, chunk = chunks[index]
                if index + crew.limit < len(chunks):
                    prefetch_chunk(plan, chunks[index + crew.limit][1], source)
                done(number, chunk, convert_chunk(plan, chunk, source, tape, scratch))
                pieces = tape.taken()
                if sums is not None:
                    sums.take(index, pieces)
                crew.count(chunk.nbytes)
        except BaseException:
            give_up()
            raise
        finally:
            if thread < crew.few:  # the others may be sent away before the end
                crew.end()

    _on_threads(crew, work, give_up)
    return crew.says()


def _on_threads(crew: Crew, work: Callable[[int], None], give_up: Callable[[], None]) -> None:
    """Calls `work` with the number of each thread, in it; what ends one of them, or this call, ends all."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the workers are the parallelism; torch's own threads would fight them
    try:
        with ThreadPoolExecutor(crew.most, thread_name_prefix="convert") as pool:
            try:
                futures = [pool.submit(work, thread) for thread in range(crew.most)]
                wait(futures, return_when=FIRST_EXCEPTION)
            except BaseException:
                give_up()
                crew.end()
                raise
    finally:
        torch.set_num_threads(before)
    for future in futures:
        future.result()
