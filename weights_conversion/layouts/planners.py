"""Plans of the three kinds of output: rank files, torch_dist, and safetensors; and what a layout asks of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from weights_conversion.config import ModelConfig, Parallelism
from weights_conversion.errors import ConversionError
from weights_conversion.layouts.placement import PAGE, Located, Placed, TensorRef, place_dist, place_megatron, whole
from weights_conversion.layouts.plan import Plan, Step, balanced
from weights_conversion.mapping.dialects import Dialect
from weights_conversion.mapping.parameters import Architecture, ParamMapping

FILE_BYTES = 4 << 30  # of a torch_dist checkpoint


def padded_vocabulary(rows: int, divisible_by: int, tp: int) -> int:
    """Rows rounded up to a multiple of `divisible_by` x TP, as Megatron pads them."""
    multiple = divisible_by * tp
    return -(-rows // multiple) * multiple


def check_parallelism(config: ModelConfig, parallel: Parallelism, vocabulary: int, dialect: Dialect) -> list[str]:
    """What keeps `config` from being cut as `parallel` says, as sentences; `vocabulary` counts the padded rows."""
    tp, pp, vpp, layers = parallel.tensor, parallel.pipeline, parallel.virtual, config.num_layers
    groups = config.num_query_groups
    divisors = [n for n in range(1, tp + 1) if groups % n == 0 and config.num_attention_heads % n == 0]
    # Megatron-Core gathers a group that was cut in rows
    shared = dialect.splits_groups and tp % groups == 0 and config.axes["qkv"] % tp == 0
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


def plan_to_megatron(
    architecture: Architecture, config: ModelConfig, sources: Located,
    source: Dialect, target: Dialect, parallel: Parallelism, vocabulary: int, dtype: torch.dtype | None,
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

        shape = row.megatron_shape(config, vocabulary)
        return place_megatron(row, layer, shape, config, parallel, target, find)

    steps = []
    for row, layer in architecture.instances(config):
        placed = sources[row.megatron, layer]
        steps.append(_step(row, layer, placed, (place(row, layer, placed[0].dtype),), config))
    files = {file: tuple(refs.values()) for file, refs in targets.items()}
    return Plan(config, source, target, tuple(steps), files, new_rows)


def plan_to_dist(
    architecture: Architecture, config: ModelConfig, sources: Located,
    source: Dialect, target: Dialect, vocabulary: int, dtype: torch.dtype | None, folder: str, new_rows: str = "last",
) -> Plan:  # fmt: skip
    """Into torch_dist files of about FILE_BYTES below `folder`."""
    placed = [
        place_dist(row, layer, row.megatron_shape(config, vocabulary), dtype or sources[row.megatron, layer][0].dtype)
        for row, layer in architecture.instances(config)
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
    for each, (row, layer) in zip(placed, architecture.instances(config), strict=True):
        (copy,) = each.copies
        there = replace(each, copies=(tuple(replace(block, ref=moved[block.ref]) for block in copy),))
        steps.append(_step(row, layer, sources[row.megatron, layer], (there,), config))
    return Plan(config, source, target, tuple(steps), targets, new_rows)


def plan_to_hf(
    architecture: Architecture, config: ModelConfig, sources: Located,
    source: Dialect, target: Dialect, shards: int, dtype: torch.dtype | None,
) -> Plan:  # fmt: skip
    """Into `shards` safetensors files, balanced by bytes, tensors in model order."""
    wanted: list[TensorRef] = []
    for row, layer in architecture.instances(config):
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
        for row, layer in architecture.instances(config)
    ]
    # Tensors of whole pages first: then the ones behind them start on a page too, as direct writes need.
    files = {file: tuple(sorted(group, key=lambda ref: ref.nbytes % PAGE != 0)) for file, group in targets.items()}
    return Plan(config, source, target, tuple(steps), files)


def _step(row: ParamMapping, layer: int | None, source: tuple[Placed, ...], target: tuple[Placed, ...],
          config: ModelConfig) -> Step:  # fmt: skip
    rows, *_ = row.megatron_shape(config)
    added = (rows, target[0].rows) if row.pads_vocabulary else (0, 0)
    return Step(row, layer, source, target, row.op.units(rows, config), added)
