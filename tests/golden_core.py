"""Reads Megatron-Core's checkpoints with torch's own functions, apart from the package."""

from __future__ import annotations

import io
import pickle
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

Tensors = dict[str, Tensor]
COMMON = "common_state/shard_0_1"
TRAINING = ("optimizer.", "rng_state", "rerun_state", "chained_")


class Unpickler(pickle.Unpickler):
    """Megatron's own classes become empty ones. For files that the tests own, not for a user's."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "MCoreMetadata":
            return Metadata
        if module.startswith("megatron"):
            return type(name, (), {"__init__": lambda self, *a, **k: None, "__setstate__": lambda self, state: None})
        return super().find_class(module, name)


def unpickle(file: Path | io.BytesIO) -> Any:
    module: Any = types.ModuleType("golden_pickle")
    module.Unpickler, module.Pickler = Unpickler, pickle.Pickler
    module.load = lambda opened, **_: Unpickler(opened).load()
    return torch.load(file, map_location="cpu", weights_only=False, pickle_module=module)


class Reader(dcp.FileSystemReader):
    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = Unpickler(file).load()
        metadata.storage_meta = getattr(metadata, "storage_meta", None) or dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Bytes(dcp.DefaultLoadPlanner):
    def __init__(self) -> None:
        super().__init__()
        self.found = io.BytesIO()

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self.found = io.BytesIO(value.getvalue())


def root_of(folder: Path) -> Path:
    iteration = (folder / "latest_checkpointed_iteration.txt").read_text().strip()
    return folder / (iteration if iteration == "release" else f"iter_{int(iteration):07d}")


def read_torch_dist(folder: Path) -> tuple[Tensors, dict[str, Any]]:
    """(the model's tensors by key, args)."""
    root = root_of(folder)
    entries = Reader(root).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata) and not key.startswith(TRAINING)
    }
    dcp.load(tensors, storage_reader=Reader(root), no_dist=True)
    if (root / "common.pt").is_file():
        common = unpickle(root / "common.pt")
    else:
        planner = _Bytes()
        dcp.load({COMMON: io.BytesIO()}, storage_reader=Reader(root), planner=planner, no_dist=True)
        common = unpickle(planner.found)
        common = common[0] if isinstance(common, list) else common
    return tensors, vars(common["args"]) if "args" in common else {}  # Megatron-Bridge states none


def read_ranks(folder: Path) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """(rank folder -> the model's tensors, args of the first rank)."""
    found: dict[str, Tensors] = {}
    args: dict[str, Any] = {}
    for path in sorted(root_of(folder).glob("mp_rank_*/model_optim_rng.pt")):
        content = unpickle(path)
        args = args or vars(content["args"])
        found[path.parent.name] = {
            name: value
            for name, value in content["model"].items()
            if isinstance(value, Tensor) and "_extra_state" not in name
        }
    return found, args
