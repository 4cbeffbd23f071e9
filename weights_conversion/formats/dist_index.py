"""The index of a torch_dist checkpoint, `.metadata`: which tensors there are, and which bytes hold their chunks.

`.metadata` is a pickle of torch.distributed.checkpoint's classes. It is read with inert stand-ins for them, so that it
can neither import nor call anything, and so that releases of torch and Megatron-Core that name their classes
differently read alike.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weights_conversion.errors import ConversionError
from weights_conversion.errors.text import short
from weights_conversion.files import fileio
from weights_conversion.files.collector import without_collector
from weights_conversion.formats import pickles

METADATA = ".metadata"

# What a checkpoint holds beside its parameters: optimizer, random, fault-tolerance and Transformer-Engine's state.
OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")
_STATE = "._extra_state"
_IGNORED = re.compile(
    r"^(chained_\d+\.)?optimizer\.|^(rng_state|rerun_state_machine_state|common_state)\b|\._extra_state"
)


class _Record:
    """Stands for an object of torch.distributed.checkpoint: keeps what it was built from."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


_CHECKPOINT = "torch.distributed.checkpoint"
_CORE = "megatron.core.dist_checkpointing.strategies.torch"
_GLOBALS = {
    **{
        (f"{_CHECKPOINT}.metadata", name): name
        for name in (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    },
    **{
        (f"{_CHECKPOINT}.planner", name): name
        for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesWriteData", "BytesIOWriteData")
    },
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"): "_StorageInfo",
    ("torch.serialization", "_get_layout"): "layout",
    ("pathlib", "PosixPath"): "PosixPath",
    # up to Megatron-Core 0.15, where the optimizer's state is saved too
    (_CORE, "MCoreMetadata"): "Metadata",
    (_CORE, "MCoreSavePlan"): "SavePlan",
}


# What torch_dcp and fsdp_dtensor checkpoints keep apart, where torch_dist has one common state.
DCP_ENTRIES = ("args", "checkpoint_version", "iteration")


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A part of a stored tensor: where it begins in it, its sizes, and the item that holds it.

    An item of another shape (`item`) holds it from its element `first` on: an optimizer's flattened weights.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int
    item: tuple[int, ...] | None = None
    first: int = 0

    @property
    def item_sizes(self) -> tuple[int, ...]:
        """The shape of the tensor in the item."""
        return self.sizes if self.item is None else self.item


@dataclass(frozen=True, slots=True)
class Stored:
    """A stored tensor, by `.metadata`. Its chunks lie within it; whether they cover it is for the reader to see."""

    dtype: torch.dtype
    size: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]


def read_metadata(path: Path) -> tuple[dict[str, Stored], dict[str, StoredChunk], dict[str, int]]:
    """The model's tensors, and the items that are no tensors, by key; and Transformer Engine's states, which nobody
    here reads, as bytes that each file must have for them. What belongs to training is left out."""
    content = _load(path)
    tensors, others = _index(content, path, _is_model)
    ends: dict[str, int] = {}
    try:
        for index, info in content.storage_data.items():
            if type(index.fqn) is str and _STATE in index.fqn and not OPTIMIZER.match(index.fqn):
                name, start, length = _place(info, path)
                ends[name] = max(ends.get(name, 0), start + length)
    except (AttributeError, TypeError, ValueError) as error:
        raise _no_index(path, error) from error
    return tensors, others, ends


def read_optimizer(path: Path) -> tuple[dict[str, Stored], dict[str, tuple[int, ...]]]:
    """The optimizer's tensors by key; and, of those that were flattened (to Megatron-Core 0.15), the true shapes."""
    content = _load(path)
    stored, _ = _index(content, path, lambda key, entry: hasattr(entry, "chunks") and bool(OPTIMIZER.match(key)))
    shapes: dict[str, tuple[int, ...]] = {}
    noted = getattr(content, "mcore_data", None)
    for key, said in noted.items() if isinstance(noted, dict) else ():
        shape = said.get("nd_reformulated_orig_global_shape") if isinstance(said, dict) else None
        if key in stored and isinstance(shape, (tuple, list)) and all(type(size) is int for size in shape):
            shapes[key] = tuple(shape)
    return stored, shapes


def _load(path: Path) -> Any:
    """The pickled index, its classes replaced by stand-ins."""
    stubs = {name: type(name, (_Record,), {}) for name in set(_GLOBALS.values())}
    further = {key: stubs[name] for key, name in _GLOBALS.items()}
    try:
        data = fileio.read_whole(path, pickles.MAX_PICKLE_BYTES)
    except OSError as error:
        raise ConversionError(f"{path} cannot be read ({error.strerror})") from error
    with without_collector():
        return pickles.load(data, str(path), further, training=True)


def _index(
    content: Any, path: Path, pick: Callable[[str, Any], bool]
) -> tuple[dict[str, Stored], dict[str, StoredChunk]]:
    """The tensors, and the other items, of the keys that are picked."""
    try:
        wanted = {key: entry for key, entry in content.state_dict_metadata.items() if pick(_named(key), entry)}
        items: dict[tuple[str, tuple[int, ...] | None], Any] = {}
        for index, info in content.storage_data.items():
            if type(index.fqn) is str and index.fqn in wanted:
                offset = getattr(index, "offset", None)  # left out where there is none
                items[index.fqn, None if offset is None else _numbers(offset)] = info
        tensors, others = {}, {}
        for key, entry in wanted.items():
            if hasattr(entry, "chunks"):
                tensors[key] = _stored(key, entry, items, path)
            elif (key, None) in items:
                others[key] = _chunk(key, (), (), items[key, None], path)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise _no_index(path, error) from error
    return tensors, others


def _no_index(path: Path, error: Exception) -> ConversionError:
    return ConversionError(f"{path} is not the index of a checkpoint ({type(error).__name__}: {error})")


def _named(key: Any) -> str:
    if type(key) is not str:
        raise TypeError(f"{short(key)} as a name")
    return key


def _is_model(key: str, entry: Any) -> bool:
    """A parameter, or the common state."""
    if hasattr(entry, "chunks"):
        return not _IGNORED.search(key)
    return key.startswith("common_state") or key in DCP_ENTRIES


def _stored(key: str, entry: Any, items: Mapping[tuple[str, tuple[int, ...] | None], Any], path: Path) -> Stored:
    size = _numbers(entry.size)
    chunks = []
    for chunk in entry.chunks:
        offsets, sizes = _numbers(chunk.offsets), _numbers(chunk.sizes)
        if (key, offsets) not in items:
            raise ConversionError(f"{path} has no item for the part of {key} at {list(offsets)}; it is not complete")
        if not len(offsets) == len(sizes) == len(size) or any(
            length < 1 or offset + length > whole for offset, length, whole in zip(offsets, sizes, size, strict=True)
        ):
            raise ConversionError(
                f"{path} has a part of {key} at {list(offsets)} of shape {list(sizes)}, outside its shape {list(size)}"
            )
        chunks.append(_chunk(key, offsets, sizes, items[key, offsets], path))
    return Stored(_dtype(entry.properties), size, tuple(chunks))


def _numbers(values: Any) -> tuple[int, ...]:
    numbers = tuple(values)
    for value in numbers:
        if type(value) is not int or value < 0:
            raise ValueError(f"sizes {short(numbers)}")
    return numbers


def _dtype(properties: Any) -> torch.dtype:
    dtype = properties.dtype if hasattr(properties, "dtype") else properties.state[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype {short(dtype)}")
    return dtype


def _chunk(key: str, offsets: tuple[int, ...], sizes: tuple[int, ...], info: Any, path: Path) -> StoredChunk:
    if getattr(info, "transform_descriptors", None):
        raise ConversionError(
            f"{path}: {key} is compressed ({short(info.transform_descriptors)}), which is not supported; save it "
            "without a compressing storage writer"
        )
    return StoredChunk(offsets, sizes, *_place(info, path))


def _place(info: Any, path: Path) -> tuple[str, int, int]:
    """An item's file, its first byte there and its bytes."""
    name = info.relative_path
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name:
        raise ConversionError(f"{path} names {short(name)}, which is not a file of its own folder")
    start, length = _numbers((info.offset, info.length))
    if start + length > sys.maxsize:
        raise ValueError(f"byte {start} of a file")
    return name, start, length
