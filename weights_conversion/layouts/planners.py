"""Plans of the three kinds of output: rank files, torch_dist, and safetensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain

import torch

from weights_conversion.config import ModelConfig, Parallelism
from weights_conversion.errors import ConversionError
from weights_conversion.layouts.dist import item_sizes, place_dist
from weights_conversion.layouts.parts import joined_shape, part_of
from weights_conversion.layouts.placement import PAGE, Located, Placed, TensorRef, joined, slab, whole
from weights_conversion.layouts.plan import Plan, Step, balanced
from weights_conversion.layouts.rank_files import Rank, place_megatron, stage_ranks
from weights_conversion.mapping.dialects import Dialect
from weights_conversion.mapping.parameters import Architecture, Instance

FILE_BYTES = 4 << 30  # of a torch_dist checkpoint


def plan_to_megatron(
    architecture: Architecture, config: ModelConfig, sources: Located,
    source: Dialect, target: Dialect, parallel: Parallelism, vocabulary: int, dtype: torch.dtype | None,
    rank_file: Callable[[Rank], str], new_rows: str = "last",
) -> Plan:  # fmt: skip
    """Into one file per rank. `vocabulary`: rows to write; `dtype` None: each tensor's own."""
    ranks = (Rank(tp, pp, ep) for pp in range(parallel.pipeline) for tp, ep in stage_ranks(parallel))
    named = {rank: rank_file(rank) for rank in ranks}
    targets: dict[Rank, dict[str, TensorRef]] = {rank: {} for rank in named}

    def place(instance: Instance, kept: torch.dtype) -> Placed:
        def find(rank: Rank, name: str, shape: tuple[int, ...]) -> TensorRef:
            there = targets[rank]
            if name not in there:
                there[name] = TensorRef(named[rank], name, kept, shape)
            return there[name]

        return place_megatron(instance, instance.row.megatron_shape(config, vocabulary), config, parallel, target, find)

    steps = []
    for instance in architecture.instances(config):
        placed = sources[instance.key]
        steps.append(_step(instance, placed, (place(instance, written_dtype(instance, placed, dtype)),), config))
    files = {named[rank]: tuple(refs.values()) for rank, refs in targets.items()}
    return Plan(config, source, target, tuple(steps), files, new_rows)


def written_dtype(instance: Instance, source: tuple[Placed, ...], dtype: torch.dtype | None) -> torch.dtype:
    """The type to write a parameter in: its own where it has one, else `dtype` (None: the source's)."""
    own = instance.row.dtype
    return getattr(torch, own) if own is not None else dtype or source[0].dtype


def plan_to_dist(
    architecture: Architecture, config: ModelConfig, sources: Located,
    source: Dialect, target: Dialect, vocabulary: int, dtype: torch.dtype | None, folder: str, new_rows: str = "last",
    *, stacked: bool = True, hybrid: bool = False,
) -> Plan:  # fmt: skip
    """Into torch_dist files of about FILE_BYTES below `folder`; `stacked`: the layers along a leading axis.

    `hybrid`: under the names of a HybridModel, whose layers are never stacked.
    """
    wanted = [
        (each, each.row.megatron_shape(config, vocabulary), written_dtype(each, sources[each.key], dtype))
        for each in architecture.instances(config)
    ]
    sizes = [size for each, shape, kept in wanted for size in item_sizes(each.row, shape, kept)]
    count = min(-(-sum(sizes) // FILE_BYTES), len(sizes))
    runs = enumerate(balanced(sizes, count), start=1)
    files = (file for n, run in runs for file in [f"{folder}/__0_{n}.distcp"] * (run[1] - run[0]))
    targets: dict[str, list[TensorRef]] = {}
    steps = []
    for instance, shape, kept in wanted:
        there = place_dist(instance, shape, kept, files, stacked=stacked and not hybrid, hybrid=hybrid)
        for block in chain.from_iterable(there.copies):
            targets.setdefault(block.ref.file, []).append(block.ref)
        steps.append(_step(instance, sources[instance.key], (there,), config))
    return Plan(config, source, target, tuple(steps), {file: tuple(refs) for file, refs in targets.items()}, new_rows)


def plan_to_hf(
    architecture: Architecture, config: ModelConfig, sources: Located,
    source: Dialect, target: Dialect, shards: int, dtype: torch.dtype | None, *, packed: bool = False,
) -> Plan:  # fmt: skip
    """Into `shards` safetensors files, balanced by bytes, tensors in model order; `packed`: all experts in one."""
    wanted = list(_hf_tensors(architecture, config, sources, dtype, packed))
    if shards > len(wanted):
        raise ConversionError(f"--num_output_shards {shards} is more than the {len(wanted)} tensors of this model")
    targets: dict[str, list[TensorRef]] = {}
    for number, group in enumerate(balanced([ref.nbytes for ref in wanted], shards), start=1):
        file = "model.safetensors" if shards == 1 else f"model-{number:05d}-of-{shards:05d}.safetensors"
        targets[file] = [TensorRef(file, ref.name, ref.dtype, ref.shape) for ref in wanted[group[0] : group[1]]]
    refs = {ref.name: ref for group in targets.values() for ref in group}
    steps = [
        _step(instance, sources[instance.key], _hf_places(architecture, instance, config, refs, packed), config)
        for instance in architecture.instances(config)
    ]
    # Tensors of whole pages first: then the ones behind them start on a page too, as direct writes need.
    files = {file: tuple(sorted(group, key=lambda ref: ref.nbytes % PAGE != 0)) for file, group in targets.items()}
    return Plan(config, source, target, tuple(steps), files)


def _hf_tensors(
    architecture: Architecture, config: ModelConfig, sources: Located, dtype: torch.dtype | None, packed: bool
) -> Iterator[TensorRef]:
    """Every tensor of a Hugging Face model, in model order."""
    seen = set()
    for instance in architecture.instances(config):
        kept = written_dtype(instance, sources[instance.key], dtype)
        for at, shape in enumerate(instance.row.hf_shapes(config)):
            if instance.row.within:
                part = instance.row.within[at]
                name = instance.hf(part.name)
                if name not in seen:
                    seen.add(name)
                    yield TensorRef("", name, kept, joined_shape(part, shape, config))
                continue
            if not is_packed(instance, packed):
                names = instance.hf_names[at], *architecture.copies(instance, config)
                yield from (TensorRef("", name, kept, shape) for name in names)
                continue
            place = instance.row.packed[at]
            name = instance.hf(place.name)
            if name not in seen and config.moe is not None:
                seen.add(name)
                yield TensorRef("", name, kept, place.shape(config.moe.num_experts, shape))


def is_packed(instance: Instance, packed: bool) -> bool:
    """Whether an expert's tensors are parts of one of all experts: where they always are, or are to be."""
    return any(packed or place.always for place in instance.row.packed)


def _hf_places(
    architecture: Architecture, instance: Instance, config: ModelConfig, refs: Mapping[str, TensorRef], packed: bool
) -> tuple[Placed, ...]:
    if instance.row.within:
        stored = ((whole(refs[instance.hf(part.name)]), part) for part in instance.row.within)
        return tuple(part_of(tensor, part, config) for tensor, part in stored)
    if not is_packed(instance, packed):
        copies = [refs[name] for name in architecture.copies(instance, config)]  # of a row that is one tensor
        return tuple(joined(name, [refs[name], *copies], None) for name in instance.hf_names)
    return tuple(
        slab(refs[instance.hf(place.name)], instance.expert or 0, place, shape)
        for place, shape in zip(instance.row.packed, instance.row.hf_shapes(config), strict=True)
    )


def _step(instance: Instance, source: tuple[Placed, ...], target: tuple[Placed, ...], config: ModelConfig) -> Step:
    row = instance.row
    rows, *_ = row.megatron_shape(config)
    added = (rows, target[0].rows) if row.pads_vocabulary else (0, 0)
    return Step(instance, source, target, row.op.units(rows, config), added)
