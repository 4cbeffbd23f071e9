"""Plans of the three kinds of output: rank files, torch_dist, and safetensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from weights_conversion.config import ModelConfig, Parallelism
from weights_conversion.errors import ConversionError
from weights_conversion.layouts.dist import item_sizes, place_dist
from weights_conversion.layouts.parts import joined_shape, part_of
from weights_conversion.layouts.placement import PAGE, Located, Placed, TensorRef, joined, main_dtype, slab, whole
from weights_conversion.layouts.plan import Plan, Step, balanced
from weights_conversion.layouts.rank_files import Rank, place_megatron, stage_ranks
from weights_conversion.mapping.dialects import Dialect
from weights_conversion.mapping.parameters import Architecture, Instance, Packed, ParamMapping, Part

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

    steps, model = [], _model_dtype(architecture, sources, dtype)
    for instance in architecture.instances(config):
        placed = sources[instance.key]
        steps.append(_step(instance, placed, (place(instance, written_dtype(instance, placed, dtype, model)),), config))
    files = {named[rank]: tuple(refs.values()) for rank, refs in targets.items()}
    return Plan(config, source, target, tuple(steps), files, new_rows)


def written_dtype(
    instance: Instance, source: tuple[Placed, ...], dtype: torch.dtype | None, model: torch.dtype | None = None
) -> torch.dtype:
    """The type to write a parameter in: its own where it has one, else `dtype` (None: the source's).

    `model` is that of rows that hub files alone may have in another type than the model's.
    """
    own = instance.row.dtype
    if own is None and instance.row.hf_dtype is not None and model is not None:
        return model
    return getattr(torch, own) if own is not None else dtype or source[0].dtype


def _model_dtype(architecture: Architecture, sources: Located, dtype: torch.dtype | None) -> torch.dtype | None:
    """The model's type, where a row asks for it."""
    if dtype is not None or all(row.hf_dtype is None for row in architecture.rows):
        return dtype
    return main_dtype([placed for group in sources.values() for placed in group])


def plan_to_dist(
    architecture: Architecture, config: ModelConfig, sources: Located,
    source: Dialect, target: Dialect, vocabulary: int, dtype: torch.dtype | None, folder: str, new_rows: str = "last",
    *, stacked: bool = True, hybrid: bool = False,
) -> Plan:  # fmt: skip
    """Into torch_dist files of about FILE_BYTES below `folder`; `stacked`: the layers along a leading axis.

    `hybrid`: under the names of a HybridModel, whose layers are never stacked.
    """
    model = _model_dtype(architecture, sources, dtype)
    wanted = [
        (each, each.row.megatron_shape(config, vocabulary), written_dtype(each, sources[each.key], dtype, model))
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
    source: Dialect, target: Dialect, shards: int, dtype: torch.dtype | None, *,
    packed: Collection[str] = (), own_types: Collection[str] = (), others: Sequence[Placed] = (),
) -> Plan:  # fmt: skip
    """Into `shards` safetensors files, balanced by bytes, tensors in model order.

    `packed` are the names of all experts in one that are written so; `own_types` the rows that keep their hf_dtype;
    `others` are copied as they are, behind the model.
    """
    form = _Form(architecture, config, target, frozenset(packed), frozenset(own_types))
    wanted = [*form.tensors(sources, dtype), *(_as_is(placed) for placed in others)]
    if shards > len(wanted):
        raise ConversionError(f"--num_output_shards {shards} is more than the {len(wanted)} tensors of this model")
    targets: dict[str, list[TensorRef]] = {}
    for number, group in enumerate(balanced([ref.nbytes for ref in wanted], shards), start=1):
        file = "model.safetensors" if shards == 1 else f"model-{number:05d}-of-{shards:05d}.safetensors"
        targets[file] = [TensorRef(file, ref.name, ref.dtype, ref.shape) for ref in wanted[group[0] : group[1]]]
    refs = {ref.name: ref for group in targets.values() for ref in group}
    steps = [
        _step(instance, sources[instance.key], form.places(instance, refs), config)
        for instance in architecture.instances(config)
    ]
    for placed in others:
        row = ParamMapping(placed.name, (placed.name,), ())
        steps.append(Step(Instance(row), (placed,), (whole(refs[placed.name]),), placed.rows))
    # Tensors of whole pages first: then the ones behind them start on a page too, as direct writes need.
    files = {file: tuple(sorted(group, key=lambda ref: ref.nbytes % PAGE != 0)) for file, group in targets.items()}
    return Plan(config, source, target, tuple(steps), files)


def _as_is(placed: Placed) -> TensorRef:
    (block,) = placed.copies[0]
    return TensorRef("", placed.name, placed.dtype, block.ref.shape)


@dataclass(frozen=True)
class _Form:
    """How a Hugging Face model is spelled: its names, which experts are packed, which rows keep a type of their own."""

    architecture: Architecture
    config: ModelConfig
    target: Dialect
    packed: frozenset[str]
    own_types: frozenset[str]

    def name(self, instance: Instance, template: str) -> str:
        if instance.row.beside_packed is not None and self.packed:
            template = instance.row.beside_packed
        return instance.hf(self.target.spell(template))

    def packs(self, instance: Instance) -> bool:
        """Whether an expert's tensors are parts of one of all experts: where they always are, or are to be."""
        places = instance.row.packed
        return bool(places) and all(place.always or place.name in self.packed for place in places)

    def tensors(self, sources: Located, dtype: torch.dtype | None) -> Iterator[TensorRef]:
        """Every tensor, in model order."""
        seen = set()
        for instance in self.architecture.instances(self.config):
            row, kept = instance.row, written_dtype(instance, sources[instance.key], dtype)
            if row.hf_dtype is not None and row.megatron in self.own_types:
                kept = getattr(torch, row.hf_dtype)
            for at, shape in enumerate(row.hf_shapes(self.config)):
                joining = row.within[at] if row.within else row.packed[at] if self.packs(instance) else None
                if joining is None:
                    names = self.name(instance, row.hf[at]), *self.architecture.copies(instance, self.config)
                    yield from (TensorRef("", name, kept, shape) for name in names)
                    continue
                name = self.name(instance, joining.name)
                if name not in seen:
                    seen.add(name)
                    yield TensorRef("", name, kept, self._joined_shape(joining, shape))

    def _joined_shape(self, joining: Part | Packed, shape: tuple[int, ...]) -> tuple[int, ...]:
        if isinstance(joining, Part):
            return joined_shape(joining, shape, self.config)
        experts = self.config.moe.num_experts if self.config.moe is not None else 0
        return joining.shape(experts, shape)

    def places(self, instance: Instance, refs: Mapping[str, TensorRef]) -> tuple[Placed, ...]:
        row = instance.row
        if row.within:
            stored = ((whole(refs[self.name(instance, part.name)]), part) for part in row.within)
            return tuple(part_of(tensor, part, self.config) for tensor, part in stored)
        if not self.packs(instance):
            copies = [refs[name] for name in self.architecture.copies(instance, self.config)]  # of one tensor
            names = [self.name(instance, template) for template in row.hf]
            return tuple(joined(name, [refs[name], *copies], None) for name in names)
        return tuple(
            slab(refs[self.name(instance, place.name)], instance.expert or 0, place, shape)
            for place, shape in zip(row.packed, row.hf_shapes(self.config), strict=True)
        )


def _step(instance: Instance, source: tuple[Placed, ...], target: tuple[Placed, ...], config: ModelConfig) -> Step:
    row = instance.row
    rows, *_ = row.megatron_shape(config)
    added = (rows, target[0].rows) if row.pads_vocabulary else (0, 0)
    return Step(instance, source, target, row.op.units(rows, config), added)
