"""torch_dist checkpoints: the key of a parameter, and how it is cut into items. Geometry only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import torch

from weights_conversion.config import ModelConfig
from weights_conversion.layouts.placement import Block, Placed, TensorRef, two_dimensional
from weights_conversion.mapping.dialects import MEGATRON_CORE
from weights_conversion.mapping.hybrid import final_norm, sub_block
from weights_conversion.mapping.parameters import Index, Instance, ParamMapping, Shard

ITEM_BYTES = 256 << 20  # of a torch_dist checkpoint: its readers take an item into memory whole


def dist_key(instance: Instance, spelled: str, *, stacked: bool) -> tuple[str, Index]:
    """(the key of a parameter in a torch_dist checkpoint, its indices that are leading axes of that tensor).

    Experts always are a leading axis, under a name of their own; layers are where `stacked` says so.
    """
    name = spelled
    if instance.row.per_expert:
        name = name.replace(".mlp.experts.", ".mlp.experts.experts.").replace("{expert}", "")
    if instance.layer is None:
        return name, ()
    if stacked and not instance.predicts:  # prediction layers never are
        return name.replace("layers.{layer}.", "layers."), instance.index
    return name.replace("{layer}", str(instance.layer)), instance.index[1:]


_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def hybrid_key(key: str) -> str:
    """A GPTModel's own key as HybridModel has it: attention is layer 2i, the rest 2i+1; the last norm is final_norm."""
    match = _LAYER.fullmatch(key)
    return final_norm(key) if match is None else f"decoder.layers.{2 * int(match[1]) + sub_block(key)}.{match[2]}"


def item_sizes(row: ParamMapping, shape: Sequence[int], dtype: torch.dtype) -> list[int]:
    """Bytes of each item that `place_dist` makes of a parameter of `shape`, in order."""
    _, columns = two_dimensional(shape)
    sizes = [(last - first) * columns * dtype.itemsize for first, last in _cut(row.shard, tuple(shape), dtype)]
    return sizes * len(MEGATRON_CORE.dist_spellings(row.megatron))


def place_dist(
    instance: Instance, shape: Sequence[int], dtype: torch.dtype, files: Iterator[str], *, stacked: bool = True,
    hybrid: bool = False,
) -> Placed:  # fmt: skip
    """A parameter of a torch_dist checkpoint: items of at most ITEM_BYTES, gate and up apart, as Megatron-Core has it.

    Each takes its file from `files`. The refs are named KEY@OFFSETS, where OFFSETS begin with the indices that are
    leading axes of the tensor KEY.
    """
    rows, columns = two_dimensional(shape)
    copies = []
    for spelled in MEGATRON_CORE.dist_spellings(instance.row.megatron):
        key, lead = dist_key(instance, spelled, stacked=stacked)
        key = hybrid_key(key) if hybrid else key
        before = f"{key}@{''.join(f'{index},' for index in lead)}"
        ones, blocks = (1,) * len(lead), []
        for first, last in _cut(instance.row.shard, tuple(shape), dtype):
            ref = TensorRef(next(files), f"{before}{first}", dtype, (*ones, last - first, *shape[1:]))
            blocks.append(Block(ref, 0, (first, last), (0, columns)))
        copies.append(tuple(blocks))
    return Placed(instance.megatron(), dtype, rows, columns, tuple(copies))


@lru_cache(maxsize=1024)  # for each row: its instances are cut alike
def _cut(shard: Shard | None, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[tuple[int, int], ...]:
    """The rows that each item of a parameter holds."""
    rows, columns = two_dimensional(shape)
    parts = shard.blocks if shard else 1
    step = max(min(ITEM_BYTES // (columns * dtype.itemsize), rows // parts), 1)
    ends = [(part * rows // parts, (part + 1) * rows // parts) for part in range(parts)]
    return tuple((first, min(first + step, end)) for begin, end in ends for first in range(begin, end, step))


# Modules without a state of Transformer Engine: Megatron-Core's own.
_STATELESS = (
    *("embedding.word_embeddings", "output_layer", "mlp.router", "mlp.shared_experts", "self_attention", "mixer"),
    *("conv1d", "mixer.norm"),
)
_ATTENTION = "self_attention.core_attention"


def extra_states(instances: Iterable[Instance], config: ModelConfig, *, stacked: bool) -> Iterator[str]:
    """Keys of the states of Transformer Engine's modules, which a load under the default strictness asks for.

    Dense: MODULE._extra_state/shard_LAYER_LAYERS where layers are stacked, shard_0_1 where each has a key of its own;
    of experts /shard_LAYER.EXPERT_LAYERS.EXPERTS and /shard_EXPERT_EXPERTS.
    """
    seen = set()
    experts = config.moe.num_experts if config.moe is not None else 0
    for instance in instances:
        module = instance.row.module
        modules = [module]
        if module.endswith("self_attention.linear_proj"):
            modules.append(module.replace("self_attention.linear_proj", _ATTENTION))
        for name in modules:
            if name.endswith(_STATELESS) or (name, instance.index) in seen:
                continue
            seen.add((name, instance.index))
            shards, of = instance.index, (config.num_layers, experts)[: len(instance.index)]
            if instance.row.per_expert:
                name = name.replace(".mlp.experts.", ".mlp.experts.experts.")
            if not stacked or instance.predicts:
                name, shards, of = name.replace("{layer}", str(instance.layer)), shards[1:], of[1:]
            where = ".".join(map(str, shards)) or "0", ".".join(map(str, of)) or "1"
            yield f"{name.replace('layers.{layer}.', 'layers.')}._extra_state/shard_{where[0]}_{where[1]}"
