"""Writes torch_dist folders item by item, as any number of ranks would have left them: no Megatron, no converter."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

Parts = tuple[tuple[int, ...], Sequence[tuple[tuple[int, ...], Tensor]]]  # (whole shape, [(offsets, part)])


def whole(tensor: Tensor) -> Parts:
    return tuple(tensor.shape), [((0,) * tensor.dim(), tensor)]


def write(
    folder: Path, tensors: Mapping[str, Parts], objects: Mapping[str, Any] | None = None,
    mcore_data: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """`objects` are byte entries; `mcore_data` is what Megatron-Core up to 0.15 notes of flattened tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    stored: dict[Any, Any] = {}
    entries: dict[str, Any] = {}
    position = 0
    with (folder / "__0_0.distcp").open("wb") as file:

        def put(index: metadata.MetadataIndex, content: Any) -> None:
            nonlocal position
            buffer = io.BytesIO()
            torch.save(content, buffer)
            length = file.write(buffer.getvalue())
            stored[index] = _StorageInfo("__0_0.distcp", position, length)
            position += length

        for key, (shape, parts) in tensors.items():
            chunks = []
            for offsets, part in parts:
                chunks.append(metadata.ChunkStorageMetadata(torch.Size(offsets), part.shape))
                put(metadata.MetadataIndex(key, torch.Size(offsets)), part.contiguous().clone())
            properties = metadata.TensorProperties(dtype=parts[0][1].dtype)
            entries[key] = metadata.TensorStorageMetadata(properties, torch.Size(shape), chunks)
        for key, content in (objects or {}).items():
            put(metadata.MetadataIndex(key), content)
            entries[key] = metadata.BytesStorageMetadata()
    index = metadata.Metadata(entries, None, stored)
    if mcore_data is not None:
        index.mcore_data = dict(mcore_data)  # type: ignore[attr-defined]
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    return folder
