"""Items of a torch_dist checkpoint that are alike around their data, of which only the first is taken apart."""

from __future__ import annotations

import dataclasses
import io
import pickle
import shutil
from pathlib import Path
from typing import Any

import moe_models
import pytest
import tiny_models as tm
import torch

NORM = "decoder.layers.mlp.linear_fc1.layer_norm_weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, to_megatron) -> Path:
    root = tmp_path_factory.mktemp("items")
    tm.write_huggingface(root / "hf", moe_models.MODELS["qwen3-moe"], tokenizer=False)
    to_megatron("qwen3-moe", "--model-path", root / "hf", "--out", root / "megatron").succeeded()
    (root / "megatron" / "conversion_manifest.json").unlink()
    return root / "megatron"


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    shutil.copytree(checkpoint, tmp_path / "in")
    return tmp_path / "in" / "release"


def index_of(folder: Path) -> Any:
    return pickle.loads((folder / ".metadata").read_bytes())


def refused(to_hf, folder: Path, sentence: str, *options: str) -> None:
    arguments = ("--input_dir", folder.parent, "--output_dir", folder.parent.parent / "out", "--no_tokenizer")
    to_hf(*arguments, "--model", "qwen3-moe", *options).refused(sentence)


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_norms_that_disagree(options: tuple[str, ...], folder: Path, to_hf) -> None:
    """One norm in two spellings: what stands around the data is the same, but its CRC-32 is each one's own."""
    places = index_of(folder).storage_data.items()
    place = next(place for index, place in places if (index.fqn, index.offset[0]) == (NORM, 1))
    with (folder / place.relative_path).open("r+b") as file:
        file.seek(place.offset)
        item = file.read(place.length)
        data = torch.load(io.BytesIO(item), weights_only=True).view(torch.uint8).numpy().tobytes()
        file.seek(place.offset + item.index(data))
        file.write(bytes([data[0] ^ 1]))
    refused(to_hf, folder, "decoder.layers.1.pre_mlp_layernorm.weight differs between", *options)


def test_one_item_for_two_tensors_of_different_types(folder: Path, to_hf) -> None:
    """Each is looked at: what the index says of the second is wrong."""
    index = index_of(folder)
    first, second = "decoder.layers.pre_mlp_layernorm.weight", NORM  # in the order in which they are looked for
    entry = index.state_dict_metadata[second]
    entry.properties = dataclasses.replace(entry.properties, dtype=torch.float16)
    for key in [key for key in index.storage_data if key.fqn == second]:
        index.storage_data[key] = index.storage_data[dataclasses.replace(key, fqn=first)]
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    refused(to_hf, folder, "has shape [1, 64] and type torch.float32, .metadata says [1, 64] and torch.float16")
