"""The plan: every tensor of a conversion with its source and target places, complete and checked before a byte moves.

A plan is a list of steps, one for each parameter of the architecture, and each step is cut into chunks of bounded size
that any thread or process can convert by itself. Chunks depend on nothing but the plan, so that a resumed run and runs
with other numbers of workers do the same writes.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import gcd

import torch

from weights_conversion.config import ConversionError, ModelConfig, Parallelism
from weights_conversion.dialects import HF, MEGATRON_CORE, Dialect
from weights_conversion.mapping import Architecture, ParamMapping
from weights_conversion.ops import Context, Range
from weights_conversion.placement import PAGE, Find, Placed, TensorRef, place_dist, place_megatron, whole

CHUNK_BYTES = 32 << 20
FILE_BYTES = 4 << 30  # of a torch_dist checkpoint


@dataclass(frozen=True)
class Step:
    """One parameter: `units` of its op go from source to target, then target rows `added` are new ones."""

    mapping: ParamMapping
    layer: int | None
    source: tuple[Placed, ...]
    target: tuple[Placed, ...]
    units: int
    added: Range = (0, 0)


@dataclass(frozen=True)
class Chunk:
    """Units start..stop of a step; or, with `adds`, target rows start..stop, which hold added vocabulary."""

    step: int
    start: int
    stop: int
    nbytes: int
    adds: bool = False


@dataclass(frozen=True)
class Side:
    """One side of a conversion: its dialect, and whether its tensors are Megatron's (fused) or HF's (apart)."""

    dialect: Dialect
    megatron: bool

    def context(self, config: ModelConfig, hf: Dialect = HF) -> Context:
        return Context(config, hf, self.dialect) if self.megatron else Context(config, self.dialect, self.dialect)


@dataclass(frozen=True)
class Plan:
    """`targets` lists the tensors of every file to be written, in file order. `new_rows` is "last" or "mean"."""

    config: ModelConfig
    source: Side
    target: Side
    steps: tuple[Step, ...]
    targets: Mapping[str, tuple[TensorRef, ...]] = field(hash=False)
    new_rows: str = "last"

    def rows(self, side: Side, step: Step, start: int, stop: int) -> tuple[Range, ...]:
        """Rows of units start..stop on one side: a range per tensor for HF, one or more of the one tensor otherwise."""
        op = step.mapping.op
        if not side.megatron:
            return op.hf_rows(start, stop, self.config)
        placed = (step.source if side is self.source else step.target)[0]
        return op.megatron_rows(start, stop, placed.rows, side.context(self.config))

    def chunks(self, limit: int = CHUNK_BYTES) -> list[Chunk]:
        """The work, cut so that a chunk reads at most `limit` bytes (or one unit) and starts on a page where it can."""
        chunks = []
        for index, step in enumerate(self.steps):
            unit = sum((stop - start) * placed.row_bytes for placed, (start, stop) in self._unit(step))
            align = max(_aligned_units(placed, stop - start) for placed, (start, stop) in self._unit(step, target=True))
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

    def _unit(self, step: Step, target: bool = False) -> Iterator[tuple[Placed, Range]]:
        side, placed = (self.target, step.target) if target else (self.source, step.source)
        ranges = self.rows(side, step, 0, 1)
        yield from zip(placed * len(ranges) if side.megatron else placed, ranges, strict=False)


def _aligned_units(placed: Placed, rows_per_unit: int) -> int:
    """How many units fill whole pages in every block of `placed`."""
    widths = {columns[1] - columns[0] for copy in placed.copies for columns in (block.columns for block in copy)}
    return max(PAGE // gcd(PAGE, width * placed.dtype.itemsize * rows_per_unit) for width in widths)


def instances(parameters: Sequence[ParamMapping], num_layers: int) -> Iterator[tuple[ParamMapping, int | None]]:
    """Every parameter with its layer, in model order: embedding, layer by layer, final norm, head."""
    per_layer = [row for row in parameters if row.per_layer]
    first = parameters.index(per_layer[0])
    yield from ((row, None) for row in parameters[:first] if not row.per_layer)
    yield from ((row, layer) for layer in range(num_layers) for row in per_layer)
    yield from ((row, None) for row in parameters[first:] if not row.per_layer)


def padded_vocabulary(rows: int, divisible_by: int, tp: int) -> int:
    """Rows rounded up to a multiple of `divisible_by` x TP, as Megatron pads them."""
    multiple = divisible_by * tp
    return -(-rows // multiple) * multiple


def check_parallelism(config: ModelConfig, parallel: Parallelism, vocabulary: int, dialect: Dialect) -> list[str]:
    """What keeps `config` from being cut as `parallel` says, as sentences; `vocabulary` counts the padded rows."""
    tp, pp, vpp, layers = parallel.tensor, parallel.pipeline, parallel.virtual, config.num_layers
    groups, core = config.num_query_groups, dialect is MEGATRON_CORE
    divisors = [n for n in range(1, tp + 1) if groups % n == 0 and config.num_attention_heads % n == 0]
    shared = core and tp % groups == 0 and config.axes["qkv"] % tp == 0  # Megatron-Core gathers a group cut in rows
    checks = [
        (tp if shared else groups, "query groups (num_key_value_heads)",
         f"; {dialect.name} cannot share a group so, use one of {divisors}"),
        (config.num_attention_heads, "attention heads", ""),
        (config.ffn_hidden_size, "MLP rows (ffn_hidden_size)", ""),
        (vocabulary, "vocabulary rows", "; --make-vocab-size-divisible-by pads them"),
    ]  # fmt: skip
    problems = [
        f"{count} {what} cannot be divided among --tensor-model-parallel-size {tp}{hint}"
        for count, what, hint in checks
        if count % tp
    ]
    if vpp > 1 and pp == 1:
        problems.append("virtual pipeline stages need --pipeline-model-parallel-size 2 or more, not 1")
    if layers % pp:
        problems.append(f"{layers} layers cannot be divided among --pipeline-model-parallel-size {pp}")
    elif layers % (pp * vpp):
        problems.append(f"{layers} layers cannot be divided among {pp} pipeline stages of {vpp} virtual stages each")
    return problems


def source_hf(
    architecture: Architecture, config: ModelConfig, tensors: Mapping[str, Placed], dialect: Dialect
) -> dict[tuple[str, int | None], tuple[Placed, ...]]:
    """Finds each parameter among the tensors of an HF or Meta source. Missing, misshapen and unexpected ones: error."""
    if config.num_layers > len(tensors):  # before a loop over as many layers as a config may claim
        raise ConversionError(f"the config says {config.num_layers} layers, the source has {len(tensors)} tensors")
    problems, used, found = [], set(), {}
    for row, layer in instances(architecture.parameters(config), config.num_layers):
        placed = []
        for template, shape in zip(row.hf, row.hf_shapes(config), strict=True):
            name = dialect.spell(template).format(layer)
            used.add(name)
            tensor = tensors.get(name)
            if tensor is None:
                problems.append(f"the source has no tensor {name}, which its config asks for with shape {list(shape)}")
                continue
            expected = (shape[0], shape[1] if len(shape) > 1 else 1)
            if (tensor.rows, tensor.columns) != expected:
                shown = [tensor.rows, tensor.columns] if len(shape) > 1 else [tensor.rows]
                problems.append(f"{name} has shape {shown}, but its config says {list(shape)}")
            placed.append(tensor)
        found[row.megatron, layer] = tuple(placed)

    if config.tie_word_embeddings and architecture.tied_head:
        head = dialect.spell(architecture.tied_head)
        embedding = architecture.parameters(config)[0]
        if head in tensors and found[embedding.megatron, None]:
            (placed,) = found[embedding.megatron, None]
            used.add(head)
            if (tensors[head].rows, tensors[head].dtype) != (placed.rows, placed.dtype):
                problems.append(f"{head} and {placed.name} are tied, but differ in shape or dtype")
            both = Placed(placed.name, placed.dtype, placed.rows, placed.columns, placed.copies + tensors[head].copies)
            found[embedding.megatron, None] = (both,)
    for name in sorted(set(tensors) - used - set(ignored_tensors(architecture, tensors))):
        problems.append(f"the source has a tensor {name} that a {architecture.family} model does not have")
    if problems:
        raise ConversionError(*problems)
    return found


def ignored_tensors(architecture: Architecture, names: Iterable[str]) -> list[str]:
    """Those of `names` that hold no parameter, and are left out without an error."""
    patterns = [pattern.replace("{}", "*") for pattern in architecture.ignored]
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def source_megatron(
    architecture: Architecture,
    config: ModelConfig,
    parallel: Parallelism,
    vocabulary: int,
    dialect: Dialect,
    find: Find,
) -> dict[tuple[str, int | None], tuple[Placed, ...]]:
    """Places each parameter on the ranks of a Megatron checkpoint whose vocabulary tensors have `vocabulary` rows."""
    return {
        (row.megatron, layer): (
            place_megatron(row, layer, megatron_shape(row, config, vocabulary), config, parallel, dialect, find),
        )
        for row, layer in instances(architecture.parameters(config), config.num_layers)
    }


def megatron_shape(row: ParamMapping, config: ModelConfig, vocabulary: int) -> tuple[int, ...]:
    """Shape of the full Megatron tensor, with `vocabulary` rows where the vocabulary is padded."""
    shape = row.megatron_shape(config)
    return (vocabulary, *shape[1:]) if row.pads_vocabulary else shape


def plan_to_megatron(
    architecture: Architecture, config: ModelConfig, sources: Mapping[tuple[str, int | None], tuple[Placed, ...]],
    source: Side, target: Side, parallel: Parallelism, vocabulary: int, dtype: torch.dtype | None,
    rank_file: Callable[[int, int], str], new_rows: str = "last",
) -> Plan:  # fmt: skip
    """Into one file per rank, `rank_file(tp, pp)`. `vocabulary`: rows to write; `dtype` None: each tensor's own."""
    targets: dict[str, dict[str, TensorRef]] = {
        rank_file(tp, pp): {} for pp in range(parallel.pipeline) for tp in range(parallel.tensor)
    }

    def place(row: ParamMapping, layer: int | None, kept: torch.dtype) -> Placed:
        def find(tp: int, pp: int, name: str, shape: tuple[int, ...]) -> TensorRef:
            file = rank_file(tp, pp)
            return targets[file].setdefault(name, TensorRef(file, name, dtype or kept, shape))

        shape = megatron_shape(row, config, vocabulary)
        return place_megatron(row, layer, shape, config, parallel, target.dialect, find)

    steps = []
    for row, layer in instances(architecture.parameters(config), config.num_layers):
        placed = sources[row.megatron, layer]
        steps.append(_step(row, layer, placed, (place(row, layer, placed[0].dtype),), config))
    files = {file: tuple(refs.values()) for file, refs in targets.items()}
    return Plan(config, source, target, tuple(steps), files, new_rows)


def plan_to_dist(
    architecture: Architecture, config: ModelConfig, sources: Mapping[tuple[str, int | None], tuple[Placed, ...]],
    source: Side, target: Side, vocabulary: int, dtype: torch.dtype | None, folder: str, new_rows: str = "last",
) -> Plan:  # fmt: skip
    """Into torch_dist files of about FILE_BYTES below `folder`."""
    placed = [
        place_dist(row, layer, megatron_shape(row, config, vocabulary), dtype or sources[row.megatron, layer][0].dtype)
        for row, layer in instances(architecture.parameters(config), config.num_layers)
    ]
    blocks = [block for each in placed for block in each.copies[0]]
    sizes = [block.ref.nbytes for block in blocks]
    count = min(-(-sum(sizes) // FILE_BYTES), len(sizes))
    moved: dict[TensorRef, TensorRef] = {}
    targets: dict[str, tuple[TensorRef, ...]] = {}
    for number, (first, last) in enumerate(balanced(sizes, count), start=1):
        file = f"{folder}/__0_{number}.distcp"
        moved |= {block.ref: replace(block.ref, file=file) for block in blocks[first:last]}
        targets[file] = tuple(moved[block.ref] for block in blocks[first:last])
    steps = []
    for each, (row, layer) in zip(placed, instances(architecture.parameters(config), config.num_layers), strict=True):
        (copy,) = each.copies
        there = replace(each, copies=(tuple(replace(block, ref=moved[block.ref]) for block in copy),))
        steps.append(_step(row, layer, sources[row.megatron, layer], (there,), config))
    return Plan(config, source, target, tuple(steps), targets, new_rows)


def plan_to_hf(
    architecture: Architecture, config: ModelConfig, sources: Mapping[tuple[str, int | None], tuple[Placed, ...]],
    source: Side, target: Side, shards: int, dtype: torch.dtype | None,
) -> Plan:  # fmt: skip
    """Into `shards` safetensors files, balanced by bytes, tensors in model order."""
    wanted: list[TensorRef] = []
    for row, layer in instances(architecture.parameters(config), config.num_layers):
        kept = dtype or sources[row.megatron, layer][0].dtype
        for name, shape in zip(row.hf, row.hf_shapes(config), strict=True):
            wanted.append(TensorRef("", name.format(layer), kept, shape))
    if shards > len(wanted):
        raise ConversionError(f"--num_output_shards {shards} is more than the {len(wanted)} tensors of this model")
    targets: dict[str, list[TensorRef]] = {}
    for number, group in enumerate(balanced([ref.nbytes for ref in wanted], shards), start=1):
        file = "model.safetensors" if shards == 1 else f"model-{number:05d}-of-{shards:05d}.safetensors"
        targets[file] = [TensorRef(file, ref.name, ref.dtype, ref.shape) for ref in wanted[group[0] : group[1]]]
    refs = {ref.name: ref for group in targets.values() for ref in group}
    steps = [
        _step(
            row, layer, sources[row.megatron, layer], tuple(whole(refs[name.format(layer)]) for name in row.hf), config
        )
        for row, layer in instances(architecture.parameters(config), config.num_layers)
    ]
    # Tensors of whole pages first: then the ones behind them start on a page too, as direct writes need.
    files = {file: tuple(sorted(group, key=lambda ref: ref.nbytes % PAGE != 0)) for file, group in targets.items()}
    return Plan(config, source, target, tuple(steps), files)


def _step(row: ParamMapping, layer: int | None, source: tuple[Placed, ...], target: tuple[Placed, ...],
          config: ModelConfig) -> Step:  # fmt: skip
    rows, *_ = row.megatron_shape(config)
    added = (rows, target[0].rows) if row.pads_vocabulary else (0, 0)
    return Step(row, layer, source, target, row.op.units(rows, config), added)


def balanced(sizes: Sequence[int], parts: int) -> list[Range]:
    """Cuts `sizes` into `parts` runs, none empty, so that the largest sum is as small as can be."""

    def runs(limit: int) -> list[Range]:
        cut, start, total = [], 0, 0
        for index, size in enumerate(sizes):
            left = parts - len(cut) - 1  # runs still to come after this one
            if index > start and (total + size > limit or len(sizes) - index == left):
                cut.append((start, index))
                start, total = index, 0
            total += size
        return [*cut, (start, len(sizes))]

    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        if len(runs(middle)) > parts:
            low = middle + 1
        else:
            high = middle
    return runs(low)
