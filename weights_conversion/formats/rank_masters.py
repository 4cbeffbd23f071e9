"""The optimizer's float32 weights of a rank file (`torch` format), which are lists without names.

They stand group by group (with weight decay, without), each in the order of the model's parameters. Which group a
parameter is in differs by release, so the groups are merged: a value belongs to a parameter where its shape is the same
and, as after every step of training, it rounds to the stored weight.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio
from weights_conversion.formats.stand_ins import StoredTensor
from weights_conversion.formats.torch_files import TorchFile
from weights_conversion.layouts.placement import TensorRef

_KEYS = ("fp32_from_fp16_params", "fp32_from_fp16")
_SAMPLE = 1024  # elements at either end of a tensor


def masters(file: TorchFile, tensors: Mapping[str, TensorRef], order: Sequence[str]) -> dict[str, TensorRef]:
    """`tensors` (name -> weight) with the optimizer's values in their places; `order` is that of the live parameters.

    Raises ConversionError where the file stores none, or none that follow the order of the parameters.
    """
    groups = _groups(file)
    wanted = [name for name in order if tensors[name].dtype not in (torch.float32, torch.float64)]
    found = dict(tensors)
    if not wanted:  # trained in float32: the weights are what the optimizer steps
        return found
    if groups is None:
        raise ConversionError(_none(file.path, file.content))
    heads = [list(reversed(group)) for group in groups]
    descriptor = fileio.open_descriptor(file.path)
    try:
        for name in wanted:
            ref = tensors[name]
            group = next((group for group in heads if group and _fits(descriptor, file, group[-1], ref)), None)
            if group is None:
                raise ConversionError(
                    f"{file.path}: none of the optimizer's next float32 weights is {name} of shape {list(ref.shape)} "
                    "(rounded, it would be the stored weight), so which is which is not known; leave --weights master "
                    "out"
                )
            found[name] = file.ref(group.pop(), name)
    finally:
        os.close(descriptor)
    if left := sum(map(len, heads)):
        raise ConversionError(f"{file.path} holds {left} float32 weights more than its model has parameters")
    return found


def live_order(tree: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of the tensors in nested dicts, depth first: as a module names its parameters."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from live_order(value, f"{prefix}{key}.")
        elif isinstance(value, StoredTensor):
            yield f"{prefix}{key}"


def _groups(file: TorchFile) -> list[list[StoredTensor]] | None:
    optimizer = file.content.get("optimizer")
    parts = optimizer if isinstance(optimizer, list) else [optimizer]
    groups: list[list[StoredTensor]] = []
    for part in parts:
        stated = next((part[key] for key in _KEYS if key in part), None) if isinstance(part, dict) else None
        if not isinstance(stated, list):
            return None
        for group in stated:
            if not isinstance(group, list) or not all(isinstance(each, StoredTensor) for each in group):
                return None
            groups.append(group)
    return groups


def _none(path: Path, content: Mapping[str, Any]) -> str:
    beside = next((n for n in ("distrib_optim.pt", "optim.pt") if fileio.is_file(path.parent / n)), None)
    if beside is not None or content.get("optimizer") is not None:
        where = path.parent / beside if beside else path
        return (
            f"{where} keeps the optimizer's float32 weights in the order of a distributed optimizer's buckets, which "
            "no file states, so --weights master cannot read them; save once more without --use-distributed-optimizer, "
            "or with --ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable, or leave --weights master out"
        )
    return (
        f"{path} stores no optimizer, so there are no float32 weights for --weights master; give an iteration with "
        "one, or leave it out"
    )


def _fits(descriptor: int, file: TorchFile, master: StoredTensor, weight: TensorRef) -> bool:
    if master.shape != weight.shape or master.dtype != torch.float32:
        return False
    ours, theirs = weight, file.ref(master, weight.name)
    count = prod(weight.shape)
    for start in sorted({0, max(count - _SAMPLE, 0)}):
        length = min(_SAMPLE, count - start)
        one, two = _read(descriptor, ours, start, length), _read(descriptor, theirs, start, length)
        if not torch.equal(two.to(one.dtype).view(torch.int16), one.view(torch.int16)):
            return False
    return True


def _read(descriptor: int, ref: TensorRef, start: int, length: int) -> torch.Tensor:
    size = ref.dtype.itemsize
    data = bytearray(os.pread(descriptor, length * size, ref.offset + start * size))
    if len(data) != length * size:
        raise ConversionError(f"{ref.file} ends within {ref.name}; it is cut off")
    return torch.frombuffer(data, dtype=ref.dtype)
