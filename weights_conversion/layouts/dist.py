"""torch_dist checkpoints: the key of a parameter, and how it is cut into items. Geometry only."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weights_conversion.layouts.placement import Block, Placed, TensorRef, two_dimensional
from weights_conversion.mapping.dialects import MEGATRON_CORE
from weights_conversion.mapping.parameters import Index, Instance

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
    if stacked:
        return name.replace("layers.{layer}.", "layers."), instance.index
    return name.replace("{layer}", str(instance.layer)), instance.index[1:]


def place_dist(instance: Instance, shape: Sequence[int], dtype: torch.dtype, *, stacked: bool = True) -> Placed:
    """A parameter of a torch_dist checkpoint: items of at most ITEM_BYTES, gate and up apart, as Megatron-Core has it.

    The refs are named KEY@OFFSETS, where OFFSETS begin with the indices that are leading axes of the tensor KEY.
    """
    rows, columns = two_dimensional(shape)
    spellings = MEGATRON_CORE.dist_spellings(instance.row.megatron)
    copies = [_dist_blocks(instance, spelled, shape, dtype, stacked) for spelled in spellings]
    return Placed(instance.megatron(), dtype, rows, columns, tuple(copies))


def _dist_blocks(
    instance: Instance, spelled: str, shape: Sequence[int], dtype: torch.dtype, stacked: bool
) -> tuple[Block, ...]:
    rows, columns = two_dimensional(shape)
    key, lead = dist_key(instance, spelled, stacked=stacked)
    shard = instance.row.shard
    parts = shard.blocks if shard else 1
    step = max(min(ITEM_BYTES // (columns * dtype.itemsize), rows // parts), 1)
    blocks = []
    for part in range(parts):
        begin, end = part * rows // parts, (part + 1) * rows // parts
        for first in range(begin, end, step):
            last = min(first + step, end)
            local = (*(1 for _ in lead), last - first, *shape[1:])
            ref = TensorRef("", f"{key}@{','.join(map(str, (*lead, first)))}", dtype, local)
            blocks.append(Block(ref, 0, (first, last), (0, columns)))
    return tuple(blocks)
