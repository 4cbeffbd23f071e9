"""The optimizer's float32 weights of a torch_dist checkpoint, where its format stores them by the model's names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

import torch

from weights_conversion.errors import ConversionError
from weights_conversion.formats.dist_index import METADATA, Stored, StoredChunk, read_optimizer

# fully_reshardable says param; fully_sharded_model_space (to Megatron-Core 0.15) and plain optimizers say fp32_param.
_MASTER = re.compile(r"(chained_\d+\.)?optimizer\.state\.(param|fp32_param)\.(?P<key>.+)")
_Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes
_BUCKETS = re.compile(r"(chained_\d+\.)?optimizer\.distributed\.dp_group_idx_")
AGAIN = "save the checkpoint once more in training with --dist-ckpt-optim-fully-reshardable, and give that"


def masters(folder: Path, stored: Mapping[str, Stored], prefix: str) -> dict[str, Stored]:
    """`stored` (the model's tensors, without the `prefix` of their keys) with the optimizer's values in their places.

    A weight that is float32 itself has no second copy. Raises ConversionError where a value is not stored, or not in a
    form that a reader without the training run can take apart.
    """
    optimizer, shapes = read_optimizer(folder / METADATA)
    found: dict[str, Stored] = {}
    for name, tensor in optimizer.items():
        if match := _MASTER.fullmatch(name):
            whole = unflattened(tensor, shapes[name], name) if name in shapes else tensor
            found[match["key"].removeprefix(prefix)] = whole
    lacking = sorted(
        key for key, tensor in stored.items()
        if tensor.dtype.is_floating_point and tensor.dtype != torch.float32 and key not in found
    )  # fmt: skip
    if lacking and not found:
        raise ConversionError(_none(folder, any(_BUCKETS.match(name) for name in optimizer), bool(optimizer)))
    problems = [
        f"{folder} stores no float32 weights of {key}, though those of {len(found)} others are there; {AGAIN}, or "
        "leave --weights master out"
        for key in lacking[:3]
    ]
    problems += [
        f"{folder}: the optimizer's {key} has shape {list(found[key].size)}, the weight has {list(tensor.size)}"
        for key, tensor in stored.items()
        if key in found and found[key].size != tensor.size
    ]
    if problems:
        raise ConversionError(*problems)
    return {key: found.get(key, tensor) for key, tensor in stored.items()}


def _none(folder: Path, buckets: bool, any_state: bool) -> str:
    if buckets:
        return (
            f"{folder} stores the optimizer's float32 weights in the order of its buckets (dp_reshardable), which no "
            f"file states, so --weights master cannot read them; {AGAIN}, or leave --weights master out"
        )
    if any_state:
        return f"{folder} stores an optimizer, but no float32 weights in it; leave --weights master out"
    return (
        f"{folder} stores no optimizer (--no-save-optim), so there are no float32 weights for --weights master; "
        "give an iteration with one, or leave it out"
    )


def unflattened(tensor: Stored, shape: tuple[int, ...], name: str) -> Stored:
    """A tensor of `shape` [X, Y] that is stored as [X/x, Y/y, x*y]: each local block flattened, and cut anywhere."""
    *counts, numel = tensor.size
    if len(counts) != len(shape) or any(count < 1 or size % count for size, count in zip(shape, counts, strict=True)):
        raise ConversionError(f"{name} is stored with shape {list(tensor.size)}, which is none of {list(shape)}")
    local = tuple(size // count for size, count in zip(shape, counts, strict=True))
    if prod(local) != numel:
        raise ConversionError(f"{name} is stored with shape {list(tensor.size)}, which is none of {list(shape)}")
    chunks: list[StoredChunk] = []
    for chunk in tensor.chunks:
        *block, begin = chunk.offsets
        *heights, length = chunk.sizes
        if any(height != 1 for height in heights):
            raise ConversionError(f"{name} has a part of shape {list(chunk.sizes)}, where one block was expected")
        at = 0
        for inner, sizes in _boxes(local, begin, begin + length):
            offsets = tuple(i * size + o for i, size, o in zip(block, local, inner, strict=True))
            chunks.append(replace(chunk, offsets=offsets, sizes=sizes, item=chunk.sizes, first=at))
            at += prod(sizes)
    return Stored(tensor.dtype, shape, tuple(chunks))


def _boxes(shape: tuple[int, ...], begin: int, end: int) -> Iterator[_Box]:
    """Boxes that make up elements begin..end of a tensor of `shape`, each of them contiguous."""
    if len(shape) == 1:
        yield (begin,), (end - begin,)
        return
    inner = prod(shape[1:])
    first, last = begin // inner, (end - 1) // inner
    if first == last:
        yield from _slice(shape, first, begin % inner, (end - 1) % inner + 1)
        return
    if begin % inner:
        yield from _slice(shape, first, begin % inner, inner)
        first += 1
    whole = end // inner
    if whole > first:
        yield (first, *[0] * (len(shape) - 1)), (whole - first, *shape[1:])
    if end % inner:
        yield from _slice(shape, whole, 0, end % inner)


def _slice(shape: tuple[int, ...], index: int, begin: int, end: int) -> Iterator[_Box]:
    for offsets, sizes in _boxes(shape[1:], begin, end):
        yield (index, *offsets), (1, *sizes)
