"""The plan: every tensor of a conversion with its source and target places, complete and checked before a byte moves.

A plan is a list of steps, one for each parameter of the architecture, and each step is cut into chunks of bounded size
that any thread or process can convert by itself. Chunks depend on nothing but the plan, so that a resumed run and runs
with other numbers of workers do the same writes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import gcd
from operator import attrgetter

from weights_conversion.config import ModelConfig
from weights_conversion.layouts.placement import PAGE, Placed, TensorRef, with_factors
from weights_conversion.mapping.dialects import Dialect
from weights_conversion.mapping.ops import Context, Op, Range
from weights_conversion.mapping.parameters import Instance

CHUNK_BYTES = 16 << 20  # as fast as 32 MB on a local disk, in less memory
_COLUMNS = attrgetter("columns")


@dataclass(frozen=True, slots=True)
class Step:
    """One parameter: `units` of its op go from source to target, then target rows `added` are new ones."""

    instance: Instance
    source: tuple[Placed, ...]
    target: tuple[Placed, ...]
    units: int
    added: Range = (0, 0)

    @property
    def op(self) -> Op:
        return self.instance.row.op


@dataclass(frozen=True, slots=True)
class Chunk:
    """Units start..stop of a step; or, with `adds`, target rows start..stop, which hold added vocabulary."""

    step: int
    start: int
    stop: int
    nbytes: int
    adds: bool = False


@dataclass(frozen=True)
class Plan:
    """`targets` lists the tensors of every file to be written, in file order. `new_rows` is "last" or "mean".

    `keeps_crcs`: the format of the files holds a CRC-32 of each tensor.
    """

    config: ModelConfig
    source: Dialect
    target: Dialect
    steps: tuple[Step, ...]
    targets: Mapping[str, tuple[TensorRef, ...]] = field(hash=False)
    new_rows: str = "last"
    keeps_crcs: bool = False

    def source_pieces(self, step: Step, start: int, stop: int) -> list[tuple[Placed, Range]]:
        """Where units start..stop of a step come from, piece by piece: a tensor, and which of its rows."""
        return self._pieces(self.source, step.source, step, start, stop)

    def target_pieces(self, step: Step, start: int, stop: int) -> list[tuple[Placed, Range]]:
        """Where units start..stop of a step go to, piece by piece: a tensor, and which of its rows."""
        return self._pieces(self.target, step.target, step, start, stop)

    def source_files(self) -> list[str]:
        """Every file that tensors are read from."""
        placed = [each for step in self.steps for one in step.source for each in with_factors(one)]
        return sorted({ref.file for each in placed for copy in each.copies for b in copy for ref in b.ref.stored})

    def _pieces(
        self, dialect: Dialect, tensors: tuple[Placed, ...], step: Step, start: int, stop: int
    ) -> list[tuple[Placed, Range]]:
        op = step.op
        if not dialect.megatron:
            return list(zip(tensors, op.hf_rows(start, stop, self.config), strict=True))
        (fused,) = tensors
        return [(fused, rows) for rows in op.megatron_rows(start, stop, fused.rows, Context.of(self.config, dialect))]

    def chunks(self, limit: int = CHUNK_BYTES) -> list[Chunk]:
        """The work, cut so that a chunk reads at most `limit` bytes (or one unit) and starts on a page where it can."""
        chunks = []
        for index, step in enumerate(self.steps):
            unit = sum((stop - start) * placed.read_bytes for placed, (start, stop) in self.source_pieces(step, 0, 1))
            if any(placed.deltas for placed in step.source):  # they are added in float32, beside what is read
                unit *= 4
            targets = self.target_pieces(step, 0, 1)
            align = max(_aligned_units(placed, stop - start) for placed, (start, stop) in targets)
            size = max(limit // unit, 1)
            size = size // align * align or min(size, step.units)
            for start in range(0, step.units, size):
                stop = min(start + size, step.units)
                chunks.append(Chunk(index, start, stop, (stop - start) * unit))
            if step.added[0] < step.added[1]:
                width = step.target[0].row_bytes
                rows = max(limit // width, 1)
                for start in range(*step.added, rows):
                    stop = min(start + rows, step.added[1])
                    chunks.append(Chunk(index, start, stop, (stop - start) * width, adds=True))
        return chunks


def _aligned_units(placed: Placed, rows_per_unit: int) -> int:
    """How many units fill whole pages in every block of `placed`."""
    columns = {each for copy in placed.copies for each in map(_COLUMNS, copy)}
    return max(PAGE // gcd(PAGE, (end - start) * placed.dtype.itemsize * rows_per_unit) for start, end in columns)


def balanced(sizes: Sequence[int], parts: int) -> list[Range]:
    """Cuts `sizes` into `parts` runs, none empty, so that the largest sum is as small as can be."""

    ends = list(accumulate(sizes, initial=0))

    def runs(limit: int) -> list[Range]:
        """As many as `parts` or more, each as long as `limit` and those still to come allow."""
        cut, start = [], 0
        while start < len(sizes):
            fits = bisect_right(ends, ends[start] + limit) - 1
            left = parts - len(cut) - 1  # runs still to come after this one
            stop = max(min(fits, len(sizes) - left if left > 0 else fits), start + 1)
            cut.append((start, stop))
            start = stop
        return cut

    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        if len(runs(middle)) > parts:
            low = middle + 1
        else:
            high = middle
    return runs(low)
