"""Places of Transformer Engine's states in a torch_dist index, which no conversion reads."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from weights_conversion.errors import ConversionError
from weights_conversion.formats import dist_index
from weights_conversion.formats.torch_dist import DistCheckpoint

NAME, STATE = "embedding.word_embeddings.weight", "decoder.layers.0._extra_state/shard_0_1"


def read(folder: Path, index: Any, info: Any) -> dict[str, int]:
    """Where an index with one more item says that the states end."""
    at = torch.Size([0, 0])
    whole = dcp.TensorStorageMetadata(
        dcp.TensorProperties(torch.bfloat16), torch.Size([4, 2]), [dcp.ChunkStorageMetadata(at, torch.Size([4, 2]))]
    )
    items = {dcp.MetadataIndex(NAME, at, 0): _StorageInfo("__0_0.distcp", 0, 10), index: info}
    content = dcp.Metadata({NAME: whole, STATE: dcp.BytesStorageMetadata()}, storage_data=items)
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    tensors, _, states = dist_index.read_metadata(folder / ".metadata")
    assert tensors.keys() == {NAME}
    return states


PLACES: dict[str, Any] = {
    "no place": 5,
    "none": None,
    "before the file": _StorageInfo("a", -1, 1),
    "no length": _StorageInfo("a", 0, "x"),  # pyright: ignore[reportArgumentType]
    "no whole number": _StorageInfo("a", 0.0, 1),  # pyright: ignore[reportArgumentType]
    "no file is as long": _StorageInfo("a", 1 << 20000, 1),
}


@pytest.mark.parametrize("kind", PLACES)
def test_no_place(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="is not the index of a checkpoint"):
        read(tmp_path, dcp.MetadataIndex(STATE), PLACES[kind])


@pytest.mark.parametrize("fqn", [5, None, ("._extra_state",)], ids=str)
def test_items_without_a_name_are_nobodys(fqn: Any, tmp_path: Path) -> None:
    assert read(tmp_path, dcp.MetadataIndex(fqn), _StorageInfo("a", 0, 1)) == {}


def test_compressed_states_are_left_out_of_conversions_as_others_are(tmp_path: Path) -> None:
    """What holds no weights may be compressed."""
    compressed = _StorageInfo("a", 3, 4, ["zstd"])  # pyright: ignore[reportCallIssue]
    assert read(tmp_path, dcp.MetadataIndex(STATE), compressed) == {"a": 7}


@pytest.mark.parametrize("name", ["gone", "a folder", "a\0b", "\ud800"], ids=ascii)
def test_names_that_no_file_has(name: str, tmp_path: Path) -> None:
    (tmp_path / "a folder").mkdir()
    with pytest.raises(ConversionError, match=r"is not there, but \.metadata places states"):
        DistCheckpoint(tmp_path, 1, {}, {}, {}, states={name: 1}).check_unread()
