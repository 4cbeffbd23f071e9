"""Writes Megatron-Core's `torch_dist` checkpoints: `.distcp` files whose data follow later, and what stands around."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from weights_conversion.formats import torch_files
from weights_conversion.formats.archives import patch_crcs
from weights_conversion.formats.torch_dist import COMMON
from weights_conversion.layouts.placement import PAGE, TensorRef

EXTRA_STATES = "__0_0.distcp"  # holds no parameters
COMMON_STATE = "common_state/shard_0_1"


@dataclass(frozen=True, slots=True)
class Item:
    """One archive of a .distcp file: its place, the bytes before and behind its data, and where those begin."""

    ref: TensorRef
    start: int
    head: bytes = field(repr=False)
    tail: bytes = field(repr=False)

    @property
    def data(self) -> int:
        return self.start + len(self.head)

    @property
    def length(self) -> int:
        return len(self.head) + self.ref.nbytes + len(self.tail)


@dataclass(frozen=True)
class DistFileTarget:
    """A .distcp file to be written."""

    file: str
    refs: tuple[TensorRef, ...]

    def items(self) -> list[Item]:
        """Every item on a page of its own, so that its data begin on one."""
        items, position = [], 0
        for ref in self.refs:
            head, tail = archive_around(ref.shape, ref.dtype)
            items.append(Item(ref, position, head, tail))
            position += -(-items[-1].length // PAGE) * PAGE
        return items

    def create(self, file: BinaryIO) -> dict[TensorRef, int]:
        """Writes everything but the data, at its final size; returns the first byte of each tensor's data."""
        for item in self.items():
            file.seek(item.start)
            file.write(item.head)
            file.seek(item.data + item.ref.nbytes)
            file.write(item.tail)
        return self.find(file)

    def find(self, file: BinaryIO) -> dict[TensorRef, int]:
        """What `create` returned, of a file that is there."""
        return {item.ref: item.data for item in self.items()}

    def finish(self, file: BinaryIO, crcs: Mapping[TensorRef, int], offsets: Mapping[TensorRef, int]) -> None:
        """Puts the CRC-32 of each item's data where its archive keeps it."""
        for item in self.items():
            patch_crcs(file, item.start, item.length, {item.data: (item.ref.nbytes, crcs[item.ref])})


_ARCHIVES: dict[tuple[tuple[int, ...], torch.dtype], tuple[bytes, bytes]] = {}


def archive_around(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What torch.save writes before and behind the data of one tensor; equal for all of one shape and type."""
    if (shape, dtype) not in _ARCHIVES:
        ref = TensorRef("archive.pt", "tensor", dtype, shape)
        with tempfile.TemporaryDirectory() as folder:
            offset = torch_files.write_without_data(Path(folder) / ref.file, ref)[ref]
            with (Path(folder) / ref.file).open("rb") as file:
                head = file.read(offset)
                file.seek(offset + ref.nbytes)
                _ARCHIVES[shape, dtype] = head, file.read()
    return _ARCHIVES[shape, dtype]


def metadata(targets: Sequence[DistFileTarget], extra: Mapping[str, tuple[str, int, int]]) -> bytes:
    """The pickled index. `extra` are the byte entries: key -> (file, offset, length)."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    chunks: dict[str, list[ChunkStorageMetadata]] = {}
    dtypes: dict[str, torch.dtype] = {}
    storage = {}
    sizes: dict[tuple[int, ...], torch.Size] = {}  # one object for all that are equal: pickle writes it once
    for target in targets:
        file = Path(target.file).name
        for item in target.items():
            key, where = item.ref.name.split("@")
            starts = [int(number) for number in where.split(",")]
            offsets = torch.Size([*starts, *[0] * (len(item.ref.shape) - len(starts))])
            shape = sizes.setdefault(item.ref.shape, torch.Size(item.ref.shape))
            chunks.setdefault(key, []).append(ChunkStorageMetadata(offsets, shape))
            dtypes[key] = item.ref.dtype
            storage[MetadataIndex(key, offsets)] = _StorageInfo(file, item.start, item.length)
    entries: dict[str, Any] = {}
    for key, parts in chunks.items():
        size = [max(c.offsets[axis] + c.sizes[axis] for c in parts) for axis in range(len(parts[0].sizes))]
        properties = TensorProperties(dtype=dtypes[key])
        ordered = sorted(parts, key=lambda chunk: tuple(chunk.offsets))
        entries[key] = TensorStorageMetadata(properties, torch.Size(size), ordered)
    for key, (file, offset, length) in extra.items():
        entries[key] = BytesStorageMetadata()
        storage[MetadataIndex(key)] = _StorageInfo(file, offset, length)
    return pickle.dumps(Metadata(entries, None, storage), protocol=4)


def extra_states(names: Sequence[str]) -> tuple[bytes, dict[str, tuple[str, int, int]]]:
    """Empty Transformer-Engine states by their keys: a file, and its entries."""
    buffer = io.BytesIO()
    torch.save([torch.empty(0, dtype=torch.uint8)], buffer)
    state = buffer.getvalue()
    entries = {name: (EXTRA_STATES, index * len(state), len(state)) for index, name in enumerate(names)}
    return state * len(names), entries


def small_files(args: Mapping[str, Any] | None, iteration: int, apart: bool = True) -> dict[str, bytes]:
    """metadata.json, and common.pt; not `apart`: the common state is an entry among the items (common_state)."""
    kinds: dict[str, Any] = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    if not apart:
        return {"metadata.json": json.dumps(kinds).encode()}
    buffer = io.BytesIO()
    torch.save(_common(args, iteration), buffer)
    kinds |= {"common_backend": "torch", "common_backend_version": 1}
    return {COMMON: buffer.getvalue(), "metadata.json": json.dumps(kinds).encode()}


def common_state(args: Mapping[str, Any] | None, iteration: int) -> bytes:
    """The common state as Megatron-Core 0.19 and newer keep it among the items, under COMMON_STATE."""
    buffer = io.BytesIO()
    torch.save([_common(args, iteration)], buffer)
    return buffer.getvalue()


def _common(args: Mapping[str, Any] | None, iteration: int) -> dict[str, Any]:
    """`args` None: a wrapper's file states the model."""
    stated = {} if args is None else {"args": argparse.Namespace(**args)}
    kept = {"singleton_local_shards": False}
    return {**stated, "checkpoint_version": 3.0, "iteration": iteration, "content_metadata": kept}
