"""Every value of two checkpoints compared, both mapped to Hugging Face's tensors; streamed, in bounded memory."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from weights_conversion.architectures import ARCHITECTURES
from weights_conversion.config import ModelConfig
from weights_conversion.dialects import HF, MEGATRON_LLM, META
from weights_conversion.execute import Scratch, Source, as_hf, as_megatron, inconsistencies, read_rows
from weights_conversion.mapping import ParamMapping
from weights_conversion.ops import Context, Op
from weights_conversion.plan import Plan, Step, instances
from weights_conversion.verification.sides import Model

CHUNK_BYTES = 16 << 20
BLOCK_VALUES = 1 << 20  # values that are compared one by one at a time: they need a few float32 copies
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Difference:
    """What differs in one tensor of the HF model. Counts are of values; `row` and `column` are the largest error's."""

    tensor: str
    layer: int | None
    mapping: ParamMapping = field(repr=False)
    index: int  # which of the mapping's HF tensors
    dtypes: tuple[torch.dtype, torch.dtype]
    shape: tuple[int, int]
    values: int = 0  # that differ, rounding not counted
    rounded: int = 0  # that are equal after rounding to the narrower dtype, but not before
    broken: int = 0  # that are finite on one side only
    absolute: float = 0.0
    relative: float = 0.0
    row: int = 0
    column: int = 0
    pair: tuple[float, float] = (0.0, 0.0)
    bits: int = 0  # that differ, where a single value does
    first: tuple[int, int] | None = None
    files: Counter[str] = field(default_factory=Counter)  # checkpoint files that hold values that differ
    cause: str | None = None

    def add(self, other: Difference) -> None:
        """Joins what another chunk of the same tensor found."""
        if (other.values > 0, other.absolute) > (self.values > 0, self.absolute) or not (self.values or self.rounded):
            self.row, self.column, self.pair, self.absolute = other.row, other.column, other.pair, other.absolute
        self.relative = max(self.relative, other.relative)
        self.first = min((place for place in (self.first, other.first) if place is not None), default=None)
        self.bits = other.bits if not self.values else 0 if other.values else self.bits
        self.values += other.values
        self.rounded += other.rounded
        self.broken += other.broken
        self.files += other.files


@dataclass
class Exact:
    """`differences` holds the tensors with values that differ, `recast` those of another dtype that are equal after rounding."""

    tensors: int = 0
    values: int = 0
    differences: list[Difference] = field(default_factory=list)
    recast: list[Difference] = field(default_factory=list)
    nonfinite: dict[str, tuple[int, int]] = field(default_factory=dict)  # NaN and infinities on each side
    copies: list[str] = field(default_factory=list)  # the checkpoint's ranks that disagree
    source_copies: list[str] = field(default_factory=list)
    padding: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        return not (self.differences or self.copies or self.source_copies or self.padding)


@dataclass(frozen=True)
class Pair:
    """Two models of one shape. `config` has the vocabulary rows that are compared, and a head if either side has one."""

    source: Model
    checkpoint: Model
    config: ModelConfig

    @property
    def parameters(self) -> list[tuple[ParamMapping, int | None]]:
        return list(instances(ARCHITECTURES[self.config.family].parameters(self.config), self.config.num_layers))

    def units(self, row: ParamMapping) -> int:
        return row.op.units(row.megatron_shape(self.config)[0], self.config)

    def chunks(self, row: ParamMapping, layer: int | None) -> Iterator[tuple[int, int]]:
        """Ranges of units that take at most CHUNK_BYTES (or are one unit) on either side."""
        units = self.units(row)
        values = 1
        for size in row.megatron_shape(self.config):
            values *= size
        width = max(
            placed.dtype.itemsize for model in (self.source, self.checkpoint) for placed in model.tensors(row, layer)
        )
        step = max(CHUNK_BYTES * units // (values * width), 1)
        yield from ((start, min(start + step, units)) for start in range(0, units, step))


def pair(source: Model, checkpoint: Model) -> Pair:
    rows = min(source.config.vocab_size, checkpoint.config.vocab_size)
    tied = source.config.tie_word_embeddings and checkpoint.config.tie_word_embeddings
    return Pair(source, checkpoint, replace(source.config, vocab_size=rows, tie_word_embeddings=tied))


def read_hf(
    model: Model, row: ParamMapping, layer: int | None, units: tuple[int, int], config: ModelConfig, files: Source,
    scratch: Scratch,
) -> list[Tensor]:  # fmt: skip
    """HF's tensors of some units of a parameter, whatever the side's dialect."""
    placed, ranges = model.tensors(row, layer), stored_ranges(model, row, layer, units, config)
    placed = placed * len(ranges) if model.side.megatron else placed
    tensors = [read_rows(one, rows, files, scratch) for one, rows in zip(placed, ranges, strict=True)]
    return as_huggingface(model, row.op, units[1] - units[0], tensors, config, scratch)


def stored_ranges(
    model: Model, row: ParamMapping, layer: int | None, units: tuple[int, int], config: ModelConfig
) -> tuple[tuple[int, int], ...]:
    if not model.side.megatron:
        return row.op.hf_rows(*units, config)
    rows = row.megatron_shape(config)[0] if row.pads_vocabulary else model.tensors(row, layer)[0].rows
    return row.op.megatron_rows(*units, rows, model.side.context(config))


def as_huggingface(
    model: Model, op: Op, units: int, tensors: list[Tensor], config: ModelConfig, scratch: Scratch
) -> list[Tensor]:
    if model.side.megatron:
        return as_hf(op, units, tensors, model.side.context(config), scratch)
    if model.side.dialect is META:  # by way of Megatron, whose ops know both
        fused = as_megatron(op, tensors, Context(config, META, MEGATRON_LLM), scratch)
        return as_hf(op, units, fused, Context(config, HF, MEGATRON_LLM), scratch)
    return tensors


def stored_rows(
    model: Model, row: ParamMapping, layer: int | None, units: tuple[int, int], config: ModelConfig
) -> list[Tensor]:
    """For each HF tensor of these units: the row of the stored tensor that each of its rows comes from."""
    ranges = stored_ranges(model, row, layer, units, config)
    numbers = [torch.arange(*rows).unsqueeze(1) for rows in ranges]
    return [rows[:, 0] for rows in as_huggingface(model, row.op, units[1] - units[0], numbers, config, Scratch())]


def compare(pair: Pair, workers: int) -> Exact:
    """Compares every tensor on `workers` threads. Memory: a few chunks for each of them."""
    result, files = Exact(), Source()
    work = [(row, layer, units) for row, layer in pair.parameters for units in pair.chunks(row, layer)]
    found: dict[str, Difference] = {}
    lock, local = threading.Lock(), threading.local()

    def one(item: tuple[ParamMapping, int | None, tuple[int, int]]) -> None:
        scratches = getattr(local, "scratches", None)
        if scratches is None:
            scratches = local.scratches = (Scratch(), Scratch())
        for difference, nonfinite in _compare_chunk(pair, *item, files, scratches):
            with lock:
                result.values += difference.shape[0] * difference.shape[1]
                if any(nonfinite):
                    before = result.nonfinite.get(difference.tensor, (0, 0))
                    result.nonfinite[difference.tensor] = (before[0] + nonfinite[0], before[1] + nonfinite[1])
                if difference.values or difference.rounded or difference.dtypes[0] != difference.dtypes[1]:
                    if difference.tensor in found:
                        found[difference.tensor].add(difference)
                    else:
                        found[difference.tensor] = difference

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
            for _ in pool.map(one, work):
                pass
        for model, where in ((pair.source, result.source_copies), (pair.checkpoint, result.copies)):
            where += _copies(pair, model, files)
    finally:
        torch.set_num_threads(threads)
        files.close()
    order = [name.format(layer) for row, layer in pair.parameters for name in row.hf]
    result.tensors = len(order)
    for name in order:
        if name in found:
            found[name].shape = _whole_shape(pair, found[name])
            (result.differences if found[name].values else result.recast).append(found[name])
    return result


def _whole_shape(pair: Pair, difference: Difference) -> tuple[int, int]:
    shape = difference.mapping.hf_shapes(pair.config)[difference.index]
    return shape[0], shape[1] if len(shape) > 1 else 1


def _copies(pair: Pair, model: Model, files: Source) -> list[str]:
    """Parameters whose copies on several ranks differ, and tied heads that differ from the embedding."""
    steps = [Step(row, layer, model.placed[row.megatron, layer], (), 0)
             for row, layer in pair.parameters if (row.megatron, layer) in model.placed]  # fmt: skip
    plan = Plan(model.config, model.side, model.side, tuple(steps), {})
    return [sentence.split("; --allow-inconsistent")[0] for sentence in inconsistencies(plan, files)]


def _compare_chunk(
    pair: Pair, row: ParamMapping, layer: int | None, units: tuple[int, int], files: Source,
    scratches: tuple[Scratch, Scratch],
) -> Iterator[tuple[Difference, tuple[int, int]]]:  # fmt: skip
    for scratch in scratches:
        scratch.reset()
    ours = read_hf(pair.source, row, layer, units, pair.config, files, scratches[0])
    theirs = read_hf(pair.checkpoint, row, layer, units, pair.config, files, scratches[1])
    starts = [start for start, _ in row.op.hf_rows(*units, pair.config)]
    where: list[Tensor] | None = None
    for index, (a, b, start) in enumerate(zip(ours, theirs, starts, strict=True)):
        shape = (a.shape[0], a.shape[1])
        found = Difference(row.hf[index].format(layer), layer, row, index, (a.dtype, b.dtype), shape)
        if same_bits(a, b):
            bad = not _finite(a)
            nonfinite = (_count(a), _count(b)) if bad else (0, 0)
        else:
            nonfinite = (0, 0) if _finite(a) and _finite(b) else (_count(a), _count(b))
            if where is None:
                where = stored_rows(pair.checkpoint, row, layer, units, pair.config)
            placed = pair.checkpoint.tensors(row, layer)
            one = placed[0] if pair.checkpoint.side.megatron else placed[index]
            step = max(BLOCK_VALUES // a.shape[1], 1)
            for first in range(0, a.shape[0], step):
                part = _difference(found, a[first : first + step], b[first : first + step], start + first)
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


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    whole_words = tensor.is_contiguous() and (tensor.shape[-1] * tensor.element_size()) % 8 == 0
    return tensor.view(torch.int64 if whole_words else _INTEGERS[tensor.element_size()])


def _finite(tensor: Tensor) -> bool:
    """aminmax passes NaN on, and reads the tensor once without a copy."""
    if not tensor.is_floating_point():
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _count(tensor: Tensor) -> int:
    """NaN and infinities."""
    step = max(BLOCK_VALUES // tensor.shape[1], 1)
    return sum(int((~part.isfinite()).count_nonzero()) for part in tensor.split(step))


def _difference(whole: Difference, a: Tensor, b: Tensor, start: int) -> tuple[Difference, Tensor] | None:
    """What differs between two blocks of rows, the first being row `start`; and a mask of the values that differ."""
    if same_bits(a, b):
        return None
    integer = _INTEGERS[a.element_size()]
    if a.dtype == b.dtype:
        differs = a.view(integer) != b.view(integer)
    else:
        # Rounding one way or the other: a recast of either side into the other's dtype. NaN stays NaN.
        nan = a.isnan() & b.isnan()
        rounded = (a.to(b.dtype) == b) | (b.to(a.dtype) == a)
        differs = ~(rounded | nan) | (a.isfinite() != b.isfinite())
    wide = torch.float64 if torch.float64 in whole.dtypes else torch.float32
    x, y = a.to(wide), b.to(wide)
    error = (x - y).abs().nan_to_num_(0.0, posinf=0.0)
    scale = torch.maximum(x.abs(), y.abs()).nan_to_num_(0.0, posinf=0.0)
    relative = torch.where(scale > 0, error / scale, error)
    number = int((error * differs if differs.any() and error[differs].max() > 0 else error).argmax())
    if differs.any() and not error[differs].any():  # not a number, or bits without a value (the zero's sign)
        number = int(differs.to(torch.uint8).argmax())
    row, column = divmod(number, a.shape[1])
    found = replace(whole, files=Counter())
    found.values = int(differs.count_nonzero())
    found.rounded = int((error > 0).count_nonzero()) if not found.values else 0
    found.broken = int((a.isfinite() != b.isfinite()).count_nonzero())
    found.absolute, found.relative = float(error[row, column]), float(relative.max())
    found.row, found.column = start + row, column
    found.pair = (float(x[row, column]), float(y[row, column]))
    if found.values:
        place = divmod(int(differs.to(torch.uint8).argmax()), a.shape[1])
        found.first = (start + place[0], place[1])
        if found.values == 1 and a.dtype == b.dtype:
            one, other = a.view(integer)[row, column].item(), b.view(integer)[row, column].item()
            found.bits = ((int(one) ^ int(other)) & ((1 << (8 * a.element_size())) - 1)).bit_count()
    return found, differs
