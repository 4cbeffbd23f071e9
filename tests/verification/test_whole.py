"""Verification reads HF folders and torch_dist itself: any rows, as others wrote them; faults of the converter show."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from weights_conversion.errors import ConversionError
from weights_conversion.formats import huggingface
from weights_conversion.sources import locate_dist
from weights_conversion.verification.dist_storage import read_index
from weights_conversion.verification.whole import huggingface_weights
from weights_conversion.verification.whole_dist import dist_weights

NORM, WEIGHT = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"


def two_tensors() -> dict[str, Tensor]:
    return {NORM: torch.randn(6), WEIGHT: torch.randn(10, 6).to(torch.bfloat16)}


def write_sharded(folder: Path, tensors: dict[str, Tensor], suffix: str) -> None:
    stem, names = {"safetensors": "model", "bin": "pytorch_model"}[suffix], {}
    for number, (name, tensor) in enumerate(tensors.items(), start=1):
        names[name] = f"{stem}-{number:05d}-of-00002.{suffix}"
        save_file({name: tensor}, folder / names[name]) if suffix == "safetensors" else torch.save(
            {name: tensor}, folder / names[name]
        )
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": names}))


HF_FOLDERS: dict[str, Callable[[Path, dict[str, Tensor]], Any]] = {
    "safetensors": lambda folder, tensors: save_file(tensors, folder / "model.safetensors"),
    "safetensors in parts": lambda folder, tensors: write_sharded(folder, tensors, "safetensors"),
    "bin": lambda folder, tensors: torch.save(tensors, folder / "pytorch_model.bin"),
    "bin before zip": lambda folder, tensors: torch.save(
        tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False
    ),
    "bin in parts": lambda folder, tensors: write_sharded(folder, tensors, "bin"),
}


@pytest.mark.parametrize("kind", HF_FOLDERS)
def test_huggingface_by_rows(kind: str, tmp_path: Path) -> None:
    tensors = two_tensors()
    HF_FOLDERS[kind](tmp_path, tensors)
    (tmp_path / "consolidated.safetensors").write_bytes(b"another copy, which transformers does not open")
    read = huggingface_weights(tmp_path)
    assert torch.equal(read(NORM, None), tensors[NORM])
    assert torch.equal(read(WEIGHT, slice(3, 7)), tensors[WEIGHT][3:7])
    assert read(WEIGHT, slice(0, 10)).dtype == torch.bfloat16
    with pytest.raises(ConversionError, match=r"has no tensor lm_head\.weight"):
        read("lm_head.weight", None)


def test_torch_dist_of_torch_itself(tmp_path: Path) -> None:
    stacked = torch.randn(3, 8, 5)
    state = {"decoder.layers.mlp.linear_fc2.weight": stacked, "decoder.final_layernorm.weight": torch.randn(5)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    read = dist_weights(tmp_path, 3)
    assert torch.equal(read("decoder.final_layernorm.weight", None), state["decoder.final_layernorm.weight"])
    for layer in range(3):
        name = f"decoder.layers.{layer}.mlp.linear_fc2.weight"
        assert torch.equal(read(name, slice(2, 5)), stacked[layer, 2:5])
        assert torch.equal(read(name, None), stacked[layer])
    with pytest.raises(ConversionError, match="nor one of all 3 layers"):
        read("decoder.layers.0.mlp.linear_fc1.weight", None)
    with pytest.raises(ConversionError, match="nor one of all 2 layers"):
        dist_weights(tmp_path, 2)("decoder.layers.0.mlp.linear_fc2.weight", None)


def write_parts(folder: Path, key: str, whole: Tensor, boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    """A torch_dist folder of one tensor in several boxes (offsets, sizes), as several ranks would have left it."""
    chunks, stored = [], {}
    for number, (offsets, sizes) in enumerate(boxes):
        part = whole[tuple(slice(at, at + length) for at, length in zip(offsets, sizes, strict=True))].contiguous()
        buffer = io.BytesIO()
        torch.save(part, buffer)
        before = number * 7  # items stand anywhere in their files
        (folder / f"__{number}_0.distcp").write_bytes(bytes(before) + buffer.getvalue() + b"behind")
        chunks.append(metadata.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        place = _StorageInfo(f"__{number}_0.distcp", before, len(buffer.getvalue()))
        stored[metadata.MetadataIndex(key, torch.Size(offsets))] = place
    entry = metadata.TensorStorageMetadata(metadata.TensorProperties(dtype=whole.dtype), whole.size(), chunks)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata.Metadata({key: entry}, None, stored)))


def test_torch_dist_parts_of_any_shape(tmp_path: Path) -> None:
    whole = torch.arange(4 * 6 * 5, dtype=torch.float32).view(4, 6, 5)
    boxes = [((0, 0, 0), (4, 6, 2)), ((0, 0, 2), (2, 4, 3)), ((0, 4, 2), (2, 2, 3)), ((2, 0, 2), (2, 6, 3))]
    write_parts(tmp_path, "decoder.layers.mlp.linear_fc2.weight", whole, boxes)
    read = dist_weights(tmp_path, 4)
    for layer in range(4):
        for first, last in ((0, 6), (3, 5), (4, 6), (0, 1)):
            found = read(f"decoder.layers.{layer}.mlp.linear_fc2.weight", slice(first, last))
            assert torch.equal(found, whole[layer, first:last])


def test_torch_dist_with_a_hole_is_refused(tmp_path: Path) -> None:
    write_parts(tmp_path, "decoder.layers.a.weight", torch.ones(2, 6, 4), [((0, 0, 0), (2, 6, 3))])
    with pytest.raises(ConversionError, match=r"parts of a tensor of shape \[2, 6, 4\] hold 18 of 24"):
        dist_weights(tmp_path, 2)("decoder.layers.1.a.weight", None)


def test_halves_of_a_glu(tmp_path: Path) -> None:
    halves = {f"decoder.layers.0.mlp.linear_fc1.weight_{half}": torch.randn(4, 3) for half in "wv"}
    dcp.save(halves, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    both = torch.cat(list(halves.values()))
    read = dist_weights(tmp_path, 1)
    for first, last in ((0, 8), (0, 4), (4, 8), (2, 6)):
        assert torch.equal(read("decoder.layers.0.mlp.linear_fc1.weight", slice(first, last)), both[first:last])


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_in_an_index_is_called(tmp_path: Path) -> None:
    write_parts(tmp_path, "a", torch.ones(2, 3), [((0, 0), (2, 3))])
    content = pickle.loads((tmp_path / ".metadata").read_bytes())
    content.planner_data = Evil(tmp_path / "was-called")
    (tmp_path / ".metadata").write_bytes(pickle.dumps(content))
    assert read_index(tmp_path).keys() == {"a"}
    assert not (tmp_path / "was-called").exists()


def _layers_exchanged(name: str) -> str:
    return name.replace("layers.0.", "layers.x.").replace("layers.1.", "layers.0.").replace("layers.x.", "layers.1.")


def test_a_fault_in_the_converters_reading_of_safetensors_is_seen(
    tmp_path: Path, sources: Callable[[str], Path], to_megatron, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault is on both sides of the exact comparison, so only the forward pass can see it."""
    right = huggingface.read_safetensors
    monkeypatch.setattr(
        huggingface,
        "read_safetensors",
        lambda path: {_layers_exchanged(n) if "o_proj" in n else n: ref for n, ref in right(path).items()},
    )
    source = sources("llama2")
    to_megatron("llama2", "--model-path", source, "--out", tmp_path / "out").succeeded()
    result = run("weights_conversion.verify", source, tmp_path / "out", "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert result.code == 1
    assert found["exact"]["differences"] == []
    assert (found["numeric"]["stage"], found["numeric"]["layer"]) == ("attention", 0)


def test_a_fault_in_the_converters_reading_of_torch_dist_is_seen(
    tmp_path: Path, imported, to_hf, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, blocks = imported("llama2", "--target", "megatron-core"), locate_dist.Parts.blocks

    def exchanged(self: Any, key: str, lead: Any, first: int) -> Any:
        return blocks(self, key, {(0,): (1,), (1,): (0,)}.get(lead, lead) if "linear_proj" in key else lead, first)

    monkeypatch.setattr(locate_dist.Parts, "blocks", exchanged)
    model = ("--input_dir", checkpoint, "--output_dir", tmp_path / "out", "--model", "llama2")
    to_hf(*model, "--no_tokenizer").succeeded()
    result = run("weights_conversion.verify", checkpoint, tmp_path / "out", "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert result.code == 1
    assert found["exact"]["differences"] == []
    assert (found["numeric"]["stage"], found["numeric"]["layer"]) == ("attention", 0)
