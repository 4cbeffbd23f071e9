"""Every value of two checkpoints compared, both mapped to Hugging Face's tensors; streamed, in bounded memory."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from weights_conversion.architectures import FAMILIES
from weights_conversion.config import ModelConfig
from weights_conversion.engine import progress
from weights_conversion.engine.copies import inconsistencies
from weights_conversion.engine.direct import Direct
from weights_conversion.engine.execute import as_hf, as_megatron, read_rows
from weights_conversion.engine.recentring import recentred
from weights_conversion.engine.streams import Scratch, Source
from weights_conversion.layouts.plan import Plan, Step
from weights_conversion.mapping.dialects import HF, MEGATRON_LLM, META
from weights_conversion.mapping.ops import Context, Op
from weights_conversion.mapping.parameters import Instance, ParamMapping
from weights_conversion.verification.differences import (
    BLOCK_VALUES,
    Difference,
    Exact,
    block_difference,
    count_nonfinite,
    is_finite,
    same_bits,
)
from weights_conversion.verification.pace import Pace, Stopped
from weights_conversion.verification.sides import Model

CHUNK_BYTES = 8 << 20
THREADS_PER_WORKER = 2  # one reads while the other compares
Item = tuple[Instance, tuple[int, int]]  # a parameter, and a range of its units


@dataclass(frozen=True)
class Pair:
    """Two models of one shape. `config` has the vocabulary rows that are compared, and a head if a side has one."""

    source: Model
    checkpoint: Model
    config: ModelConfig

    @property
    def parameters(self) -> list[Instance]:
        return list(FAMILIES[self.config.family].instances(self.config))

    def units(self, row: ParamMapping) -> int:
        return row.op.units(row.megatron_shape(self.config)[0], self.config)

    def chunks(self, instance: Instance) -> Iterator[tuple[int, int]]:
        """Ranges of units that take at most CHUNK_BYTES (or are one unit) on either side."""
        row = instance.row
        units = self.units(row)
        values = 1
        for size in row.megatron_shape(self.config):
            values *= size
        width = max(
            placed.dtype.itemsize for model in (self.source, self.checkpoint) for placed in model.tensors(instance)
        )
        step = max(CHUNK_BYTES * units // (values * width), 1)
        yield from ((start, min(start + step, units)) for start in range(0, units, step))


def pair(source: Model, checkpoint: Model) -> Pair:
    rows = min(source.config.vocab_size, checkpoint.config.vocab_size)
    tied = source.config.tie_word_embeddings and checkpoint.config.tie_word_embeddings
    return Pair(source, checkpoint, replace(source.config, vocab_size=rows, tie_word_embeddings=tied))


def as_stored(
    pair: Pair, instance: Instance, tensors: list[Tensor], there: torch.dtype, scratch: Scratch
) -> list[Tensor]:
    """The source's tensors of a row that Megatron stores less one, as the checkpoint's side has it: of type `there`
    where the source's own is the same, else in float32."""
    less = pair.checkpoint.dialect.megatron
    if not instance.row.centred or pair.source.dialect.megatron == less:
        return tensors
    moved = recentred(tensors, -1.0 if less else 1.0, scratch)
    return [m.to(there) if t.dtype == there else m for m, t in zip(moved, tensors, strict=True)]


def read_hf(
    model: Model, instance: Instance, units: tuple[int, int], config: ModelConfig, files: Source, scratch: Scratch
) -> list[Tensor]:
    """HF's tensors of some units of a parameter, whatever the side's dialect."""
    placed, ranges = model.tensors(instance), stored_ranges(model, instance, units, config)
    placed = placed * len(ranges) if model.dialect.megatron else placed
    tensors = [read_rows(one, rows, files, scratch) for one, rows in zip(placed, ranges, strict=True)]
    return as_huggingface(model, instance.row.op, units[1] - units[0], tensors, config, scratch)


def stored_ranges(
    model: Model, instance: Instance, units: tuple[int, int], config: ModelConfig
) -> tuple[tuple[int, int], ...]:
    row = instance.row
    if not model.dialect.megatron:
        return row.op.hf_rows(*units, config)
    rows = row.megatron_shape(config)[0] if row.pads_vocabulary else model.tensors(instance)[0].rows
    return row.op.megatron_rows(*units, rows, Context.of(config, model.dialect))


def as_huggingface(
    model: Model, op: Op, units: int, tensors: list[Tensor], config: ModelConfig, scratch: Scratch
) -> list[Tensor]:
    if model.dialect.megatron:
        return as_hf(op, units, tensors, Context.of(config, model.dialect), scratch)
    if model.dialect is META:  # by way of Megatron, whose ops know both
        fused = as_megatron(op, tensors, Context(config, META, MEGATRON_LLM), scratch)
        return as_hf(op, units, fused, Context(config, HF, MEGATRON_LLM), scratch)
    return tensors


def stored_rows(model: Model, instance: Instance, units: tuple[int, int], config: ModelConfig) -> list[Tensor]:
    """For each HF tensor of these units: the row of the stored tensor that each of its rows comes from."""
    ranges = stored_ranges(model, instance, units, config)
    numbers = [torch.arange(*rows).unsqueeze(1) for rows in ranges]
    op, count = instance.row.op, units[1] - units[0]
    return [rows[:, 0] for rows in as_huggingface(model, op, count, numbers, config, Scratch())]


class _Comparison:
    """What several threads have compared so far: `result`, and the differences by tensor (`found`)."""

    def __init__(self, pair: Pair, files: Source) -> None:
        self.pair, self.files, self.result = pair, files, Exact()
        self.found: dict[str, Difference] = {}
        self.advance: Callable[[int], object] = lambda count: None
        self._lock, self._local = threading.Lock(), threading.local()

    def check(self, item: Item) -> None:
        scratches = getattr(self._local, "scratches", None)
        if scratches is None:
            scratches = self._local.scratches = (Scratch(), Scratch())
        for difference, nonfinite in _compare_chunk(self.pair, *item, self.files, scratches):
            count = difference.shape[0] * difference.shape[1]
            self.advance(count * difference.dtypes[0].itemsize)
            with self._lock:
                self._note(difference, nonfinite, count)

    def _note(self, difference: Difference, nonfinite: tuple[int, int], count: int) -> None:
        self.result.values += count
        if any(nonfinite):
            before = self.result.nonfinite.get(difference.tensor, (0, 0))
            self.result.nonfinite[difference.tensor] = (before[0] + nonfinite[0], before[1] + nonfinite[1])
        if difference.values or difference.rounded or difference.dtypes[0] != difference.dtypes[1]:
            if difference.tensor in self.found:
                self.found[difference.tensor].add(difference)
            else:
                self.found[difference.tensor] = difference


class _Paced:
    """A check that waits for the forward pass, and tells it what has been compared. `errors`: why it has stopped."""

    def __init__(self, check: Callable[[Item], None], pace: Pace, parameters: list[Instance], work: list[Item]) -> None:
        self._check, self._pace, self.errors = check, pace, list[Exception]()
        self._left, self._lock = Counter(instance.key for instance, _ in work), threading.Lock()
        for instance in parameters:
            if not self._left[instance.key]:  # without values
                pace.has_compared(instance)

    def check(self, item: Item) -> None:
        try:
            self._pace.compares(item[0])
            self._check(item)
            with self._lock:
                self._left[item[0].key] -= 1
                last = not self._left[item[0].key]
            if last:
                self._pace.has_compared(item[0])
        except Stopped:
            raise
        except Exception as error:
            self.errors.append(error)
            self._pace.stop()  # nobody waits for what does not come
            raise


def compare(pair: Pair, workers: int, pace: Pace | None = None) -> Exact:
    """Compares every tensor on `workers` pairs of threads. Memory: a few chunks for each of them.

    What is not in the page cache is read past it, unless a `pace` is given, by which somebody else reads it next.
    """
    files = Source(direct=Direct() if pace is None else None)
    parameters = pair.parameters if pace is None else sorted(pair.parameters, key=pace.station)
    work = [(instance, units) for instance in parameters for units in pair.chunks(instance)]
    comparison = _Comparison(pair, files)
    paced = None if pace is None else _Paced(comparison.check, pace, parameters, work)
    result, threads = comparison.result, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        total = sum(
            math.prod(one.row.megatron_shape(pair.config)) * pair.source.tensors(one)[0].dtype.itemsize
            for one in pair.parameters
        )
        with (
            _bar(total, pace) as comparison.advance,
            ThreadPoolExecutor(workers * THREADS_PER_WORKER, thread_name_prefix="verify") as pool,
        ):
            try:
                for _ in pool.map(comparison.check if paced is None else paced.check, work):
                    pass
            except BaseException as error:
                pool.shutdown(wait=False, cancel_futures=True)
                if isinstance(error, Stopped) and paced is not None and paced.errors:
                    raise paced.errors[0] from None
                raise
        for model, where in ((pair.source, result.source_copies), (pair.checkpoint, result.copies)):
            where += _copies(pair, model, files)
    finally:
        torch.set_num_threads(threads)
        files.close()
    _settle(result, pair, comparison.found)
    return result


@contextmanager
def _bar(total: int, pace: Pace | None) -> Iterator[Callable[[int], None]]:
    """Beside a forward pass, which goes as fast and ends later, there is that one's bar: a terminal has one line."""
    if pace is not None:
        yield lambda _: None
        return
    with progress.bar(total, doing="comparing weights") as advance:
        yield advance


def _settle(result: Exact, pair: Pair, found: Mapping[str, Difference]) -> None:
    """Puts what was found, by tensor, into `result` in model order."""
    order = [name for instance in pair.parameters for name in instance.hf_names]
    result.tensors = len(order)
    for name in order:
        if name in found:
            found[name].shape = _whole_shape(pair, found[name])
            found[name].settle()
            (result.differences if found[name].values else result.recast).append(found[name])


def _whole_shape(pair: Pair, difference: Difference) -> tuple[int, int]:
    shape = difference.instance.row.hf_shapes(pair.config)[difference.index]
    return shape[0], shape[1] if len(shape) > 1 else 1


def _copies(pair: Pair, model: Model, files: Source) -> list[str]:
    """Parameters whose copies on several ranks differ, and tied heads that differ from the embedding."""
    steps = [
        Step(instance, model.placed[instance.key], (), 0)
        for instance in pair.parameters
        if instance.key in model.placed
    ]
    plan = Plan(model.config, model.dialect, model.dialect, tuple(steps), {})
    return [sentence.split("; --allow-inconsistent")[0] for sentence in inconsistencies(plan, files)]


def _compare_chunk(
    pair: Pair, instance: Instance, units: tuple[int, int], files: Source, scratches: tuple[Scratch, Scratch]
) -> Iterator[tuple[Difference, tuple[int, int]]]:  # fmt: skip
    row = instance.row
    for scratch in scratches:
        scratch.reset()
    of_source = read_hf(pair.source, instance, units, pair.config, files, scratches[0])
    of_checkpoint = read_hf(pair.checkpoint, instance, units, pair.config, files, scratches[1])
    of_source = as_stored(pair, instance, of_source, of_checkpoint[0].dtype, scratches[0])
    starts = [start for start, _ in row.op.hf_rows(*units, pair.config)]
    where: list[Tensor] | None = None
    for index, (a, b, start) in enumerate(zip(of_source, of_checkpoint, starts, strict=True)):
        shape = (a.shape[0], a.shape[1])
        found = Difference(instance.hf_names[index], instance, index, (a.dtype, b.dtype), shape)
        if same_bits(a, b):
            bad = not is_finite(a)
            nonfinite = (count_nonfinite(a), count_nonfinite(b)) if bad else (0, 0)
        else:
            nonfinite = (0, 0) if is_finite(a) and is_finite(b) else (count_nonfinite(a), count_nonfinite(b))
            if where is None:
                where = stored_rows(pair.checkpoint, instance, units, pair.config)
            placed = pair.checkpoint.tensors(instance)
            one = placed[0] if pair.checkpoint.dialect.megatron else placed[index]
            step = max(BLOCK_VALUES // a.shape[1], 1)
            for first in range(0, a.shape[0], step):
                part = block_difference(found, a[first : first + step], b[first : first + step], start + first)
                if part is None:
                    continue
                part, mask = part
                for block in one.copies[0] if part.values else ():
                    rows = where[index][first : first + step]
                    inside = mask[(rows >= block.rows[0]) & (rows < block.rows[1]), block.columns[0] : block.columns[1]]
                    count = int(inside.count_nonzero())
                    if count:
                        part.files[pair.checkpoint.file_name(block.ref.file)] += count
                found.add(part)
        yield found, nonfinite
